"""Does P3O train a real language model as well as PPO and online DPO do? Film reviews, labelled by people.

    python results/language/run.py --plots_only     tables and picture from runs.jsonl
    python results/language/run.py --model HuggingFaceTB/SmolLM2-135M-Instruct     everything again

The labels of online DPO are drawn with the probabilities that the reward model gives them, because only then
it has the optimum of the other two. PPO's critic learns at 10/3 of the policy's rate, as in ppo.py.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import lib
from film_reviews import PROMPT, RESPONSE, FilmReviews, bootstrap, by_prompt, untrained

BETA, STEPS, SEEDS = 1.0, 60, (1, 2, 3)
RATES = {"P3O": 3e-5, "PPO": 3e-5, "online DPO": 3e-5}  # the best of 1e-5, 3e-5 and 1e-4 in 20 steps, seed 0
LONGER, BEST_OF, OFFSETS = 3, (2, 4), (1, 4)  # times the steps at a lower rate; offsets over the spread
SPREAD = 2.3  # of the reward among the SFT model's responses to a prompt
SHARED = {"beta": BETA, "dtype": "bfloat16", "prompt_length": PROMPT, "response_length": RESPONSE}
SHARED |= {"epochs": 2, "prompts_per_step": 16, "minibatch_size": 16}


def one_run(method, seed, part, steps=STEPS, rate=None, **flags):
    rate = rate or RATES[method]
    more = {"PPO": {"critic_learning_rate": float(f"{rate / 0.3:.3g}")}, "online DPO": {"labels": "sampled"}}
    flags = SHARED | {"learning_rate": rate, "steps": steps} | more.get(method, {}) | flags
    return lib.run(method, seed, {"part": part}, **flags)


PLAN = [one_run(m, seed, f"{STEPS} steps") for seed in SEEDS for m in RATES]
for m in ("P3O", "PPO"):
    PLAN.append(one_run(m, 1, f"{LONGER * STEPS} steps", LONGER * STEPS, float(f"{RATES[m] / LONGER:.2g}")))
    PLAN += [one_run(m, 1, f"{x}x", reward_shift=float(f"{x * SPREAD:.2g}")) for x in OFFSETS]


def mean_of(points, sft):
    """The same, the mean over runs that differ in their seed."""
    runs = [by_prompt(point, sft, BETA) for point in points]
    return {x: torch.stack([values[x] for values in runs]).mean(0) for x in runs[0]} if runs else {}


def cells(values):
    return {x: bootstrap(lambda share, y=y: share @ y, len(y)) for x, y in values.items()}


def tables(found):
    methods, differences, offsets = [], [], []
    for part in (f"{STEPS} steps", f"{LONGER * STEPS} steps"):
        means = {m: mean_of(found.pick(method=m, part=part), found.sft) for m in RATES}
        means = {m: values for m, values in means.items() if values}
        methods += [{"method": m, "trained": part} | cells(values) for m, values in means.items()]
        for m in [m for m in means if m != "P3O" and "P3O" in means]:
            apart = {x: means["P3O"][x] - means[m][x] for x in means[m]}
            differences.append({"P3O minus": m, "trained": part} | cells(apart))
    if found.sft:
        best = untrained(found.sft, BETA, BEST_OF)
        methods += [{"method": m, "trained": ""} | cells(x) for m, x in best.items()]
    for m in ("P3O", "PPO"):
        parts = {"none": f"{STEPS} steps"} | {f"{x}x": f"{x}x" for x in OFFSETS}
        runs = {x: mean_of(found.pick(method=m, part=part, seed=1), found.sft) for x, part in parts.items()}
        for x in [x for x in runs if runs[x] and runs["none"]]:
            change = cells({"change": runs[x]["objective"] - runs["none"]["objective"]})
            row = {"method": m, "offsets": x, "objective": cells(runs[x])["objective"]}
            offsets.append(row | (change if x != "none" else {"change": None}))
    source = lib.source(found, "bootstrap over prompts, for these very trainings")
    return {"source": source, "methods": methods, "differences": differences, "offsets": offsets}


def picture(found):
    figure, axes = lib.axes(2, 4.8, 4.3, sharex=True, sharey=True)
    best = untrained(found.sft, BETA, BEST_OF)
    titles = {"gain": "by the reward model they train on", "judge's gain": "by a judge that they never see"}
    for axis, (name, title) in zip(axes, titles.items()):
        for point in [point for point in found.points if "steps" in point["part"]]:
            values, first = by_prompt(point, found.sft, BETA), point["seed"] == 1
            look = {"color": lib.METHODS[point["method"]].color, "ms": 8}
            look |= {"label": f"{point['method']}, {point['part']}"} if first else {}
            look |= {} if point["part"] == f"{STEPS} steps" else {"mfc": "white", "mew": 2}
            axis.plot(values["KL"].mean(), values[name].mean(), "o", **look)
        means = [[best[f"best of {n}, untrained"][x].mean() for n in BEST_OF] for x in ("KL", name)]
        axis.plot(*means, "kX", ms=9, label="best of 2 and of 4, no training")
        axis.set_title(title, fontsize=11)
        axis.set(xlabel="KL to the SFT model, nats per response", xlim=(0, None), ylim=(0, None))
    axes[0].set_ylabel("gain over the SFT model")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle("On film reviews PPO gains more than P3O; best of 4, untrained, gains more than both")
    return figure


def main(argv=None):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ[name] = str(2**33)  # glibc keeps freed memory: fetching large tensors again takes long
    lib.main(__file__, PLAN, tables, picture, FilmReviews(), argv)


if __name__ == "__main__":
    main()
