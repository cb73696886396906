"""Does P3O train a real language model as well as PPO does? Film reviews, labelled by people.

    python results/language/run.py --plots_only     tables and picture from runs.jsonl
    python results/language/run.py                  trains and measures everything again

Beta is small enough for a KL of several nats, as in the paper. tune.py compares learning rates. PPO's critic
learns at 10/3 of the policy's rate, as it does by default in ppo.py.
"""

import os
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import lib
from film_reviews import PROMPT, RESPONSE, FilmReviews, best_of_n, bootstrap, by_prompt

BETA, STEPS, SEEDS, BEST_OF = 0.1, 120, (1,), (2, 4)
RUNS = {"P3O": ("P3O", 4e-5), "PPO": ("PPO", 2e-5), "P3O at PPO's rate": ("P3O", 2e-5)}
SHARED = {"beta": BETA, "dtype": "bfloat16", "prompt_length": PROMPT, "response_length": RESPONSE}
SHARED |= {"epochs": 1, "prompts_per_step": 32, "minibatch_size": 16, "micro_batch_size": 16}
SHARED |= {"eval_every": STEPS // 6, "eval_prompts": 128, "save_every": STEPS // 6}
TUNING = lib.read_lines(Path(__file__).with_name("tuning.jsonl"))


def one_run(name, method, rate, seed, steps=STEPS):
    critic = {"critic_learning_rate": float(f"{rate / 0.3:.3g}")} if method == "PPO" else {}
    return lib.run(method, seed, {"name": name}, **SHARED, learning_rate=rate, steps=steps, **critic)


PLAN = [one_run(name, *what, seed) for seed in SEEDS for name, what in RUNS.items()]


COLUMNS = "gain", "KL", "objective", "judge's gain", "preferred by the judge"


def means_by_prompt(found):
    """{policy: its values by prompt}, the mean over runs that differ in their seed."""
    means = {}
    for name in [name for name in RUNS if found.pick(name=name)]:
        runs = [by_prompt(point, found.sft) for point in found.pick(name=name)]
        means[name] = {x: torch.stack([values[x] for values in runs]).mean(0) for x in runs[0]}
    means |= {f"best of {n}, untrained": x for n, x in best_of_n(found.sft, BEST_OF).items()}
    return {name: x | {"objective": x["gain"] - BETA * x["KL"]} for name, x in means.items()}


def tables(found):
    means, policies = means_by_prompt(found), []
    if {"P3O", "PPO"} <= means.keys():
        means["P3O minus PPO"] = {x: means["P3O"][x] - means["PPO"][x] for x in means["PPO"]}
    for name, values in means.items():
        cells = {x: bootstrap(lambda share, y=values[x]: share @ y, len(values[x])) for x in COLUMNS}
        policies.append({"policy": name} | cells)
    shown = {"SFT": found.sft} | {name: found.pick(name=name)[0] for name in RUNS if name in means}
    answers = []
    for i, (prompt, _) in enumerate(found.sft.get("first_answers", [])):
        texts = (f"  - {name}: *{x['first_answers'][i][1].strip()}*" for name, x in shown.items())
        answers += [f"- {prompt} ...", *texts]
    rates = [{x: str(y) for x, y in line.items() if x in TUNING[-1]} for line in TUNING]
    source = lib.source(found, "bootstrap over prompts, for these very trainings")
    return {"policies": policies, "answers": "\n".join(answers), "rates": rates or "", "source": source}


PANELS = {
    "reward": "reward, by the model that they train on",
    "judge": "score by the judge, which they never see",
    "preferred": "share of answers that the judge prefers to SFT's",
    "kl": "KL to the SFT model, nats per response",
    "response_length": "length of an answer, tokens",
}


def picture(found):
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for point in found.points:
        look = {"color": lib.METHODS[point["method"]].color, "label": point["name"], "lw": 2.5, "ms": 4}
        look |= {"alpha": 1.0 if point["name"] in lib.METHODS else 0.45}
        curve = {name: [x[name] for x in point["curve"]] for name in ("step", *PANELS)}
        answers = [2 * SHARED["prompts_per_step"] * step for step in curve["step"]]
        for axis, name in zip(panels, PANELS):
            axis.plot(answers, curve[name], "o-", **look)
        panels[5].plot(curve["kl"], [x - curve["judge"][0] for x in curve["judge"]], "o-", **look)
    best = best_of_n(found.sft, (1, *BEST_OF)).values()
    means = [[x[name].mean() for x in best] for name in ("KL", "judge's gain")]
    panels[5].plot(*means, "X--", color="black", label="best of 1, 2, 4, untrained")
    for axis, title in zip(panels, PANELS.values()):
        axis.set(title=title, xlabel="answers sampled in training")
    panels[5].set(title="judge's score minus SFT's", xlabel="KL to the SFT model, nats per response")
    panels[5].legend()
    figure.suptitle("Both methods please a judge that they never see; the larger learning rate goes further")
    return figure


def keep_freed_memory():
    """For the scripts that this one starts: glibc keeps what is freed, because fetching it again is slow."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ[name] = str(2**33)


def main(argv=None):
    keep_freed_memory()
    lib.main(__file__, PLAN, tables, picture, FilmReviews(), argv)


if __name__ == "__main__":
    main()
