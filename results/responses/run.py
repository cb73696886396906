"""Do more responses to a prompt help P3O, and do more samples?

    python results/responses/run.py [--plots_only]     measures again, or tables and picture only

First K responses to each of fewer prompts, so that every run samples 7,680 responses. Then a quarter to ten
times as many samples, each method with the best of 22 settings (RLOO of TRL: of three learning rates), which
were tried on seed 0. Every number of samples is a run of its own, whose learning rate falls to 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lib
from toy_task import ToyWithOptimum

SEEDS, TIMES = range(1, 6), (0.25, 0.5, 1, 2, 10)
EIGHT = {"num_responses": 8, "prompts_per_step": 16, "minibatch_size": 8}
FEW = {2: {}, 4: {"num_responses": 4, "prompts_per_step": 32, "minibatch_size": 16}, 8: EIGHT}
BEST = {  # in the table: method, its flags, the seeds at 7,680 responses
    "P3O, K = 8, rate 5e-4": ("P3O", EIGHT | {"learning_rate": 5e-4}, SEEDS),
    "PPO, 4 passes": ("PPO", {"epochs": 4}, SEEDS),
    "RLOO of TRL, K = 2": ("RLOO of TRL", {}, SEEDS[:3]),
}
PLAN = [
    lib.run("P3O", seed, {"K": f"P3O, K = {K}"}, **flags) for K, flags in FEW.items() for seed in SEEDS[:3]
]
PLAN += [lib.run("PPO", seed, {"K": "PPO, K = 2"}) for seed in SEEDS[:3]]
for setting, (method, flags, seeds) in BEST.items():
    for times in TIMES if method == "P3O" else TIMES[:4]:
        steps = {} if times == 1 else {"steps": round(60 * times)}
        labels = {"setting": setting, "times": times}
        PLAN += [lib.run(method, seed, labels, **flags, **steps) for seed in (seeds if times == 1 else [1])]


def tables(found):
    counts, samples = [], []
    for label in dict.fromkeys(one["K"] for one in PLAN if "K" in one):
        points = found.pick(K=label)
        row = {
            "7,680 responses": label,
            "KL": lib.interval(points, "kl"),
            "gain": lib.interval(points, "gain"),
        }
        more = lib.paired(points, found.pick(K="P3O, K = 2"), "objective") if label != "P3O, K = 2" else None
        counts.append(row | {"objective": lib.interval(points, "objective"), "more than P3O, K = 2": more})
    for times in TIMES:
        cells = {x: lib.interval(found.pick(setting=x, times=times), "share") for x in BEST}
        samples.append({"responses sampled": f"{round(7680 * times):,}"} | cells)
    return {"counts": counts, "samples": samples}


def picture(found):
    figure, axes = lib.axes(2, 4.8, 4.2)
    cells = [lib.interval(found.pick(K=f"P3O, K = {K}"), "objective") for K in FEW]
    lib.curve(axes[0], "P3O", range(3), cells, lw=2)
    ppo = lib.interval(found.pick(K="PPO, K = 2"), "objective")
    if ppo:
        axes[0].axhline(ppo[0], color=lib.METHODS["PPO"].color, lw=2, label="PPO")
        axes[0].axhspan(*ppo[1:], color=lib.METHODS["PPO"].color, alpha=0.15)
    axes[0].set_xticks(range(3), ["2", "4", "8"])
    axes[0].set(xlabel="responses to a prompt", ylabel="reward gained minus beta KL")
    axes[0].set_title("as many samples, more to a prompt")
    axes[0].legend(loc="lower right")
    for setting, (method, _, _) in BEST.items():
        cells = [lib.interval(found.pick(setting=setting, times=x), "share") for x in TIMES]
        lib.curve(axes[1], method, [7680 * x for x in TIMES], cells, lw=2, label=setting)
    axes[1].set_xscale("log")
    axes[1].set_xticks([7680 * x for x in TIMES], ["1,920", "3,840", "7,680", "15,360", "76,800"], fontsize=8)
    axes[1].minorticks_off()
    axes[1].set(
        title="more samples", xlabel="responses sampled", ylabel="reward gained, as a share of the best"
    )
    axes[1].legend(loc="lower right", fontsize=9)
    figure.suptitle("More responses to a prompt help P3O a little; more samples help every method")
    return figure


def main(argv=None):
    lib.main(__file__, PLAN, tables, picture, ToyWithOptimum(), argv)


if __name__ == "__main__":
    main()
