"""If beta is small, so that the KL may grow, does the true reward turn over while the reward model's rises?

    python results/overoptimisation/run.py [--plots_only]     measures again, or tables and picture only

The toy is a small world whose true ("gold") reward is known. No method sees it in training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lib
from toy_task import Toy

SEEDS, BETAS, METHODS = range(1, 6), (1.0, 0.5, 0.25, 0.1, 0.05), ("P3O", "PPO", "DPO", "online DPO")
PLAN = [lib.run(m, seed, {"beta": b}, beta=b) for m in METHODS for b in BETAS for seed in SEEDS]
GAINS = {"reward model's gain": "gain", "true gain": "gold_gain"}


def tables(found):
    rows = []
    for m, b in [(m, b) for m in METHODS for b in BETAS[2:]]:
        points, last = found.pick(method=m, beta=b), found.pick(method=m, beta=0.05)
        row = {"method": m, "beta": str(b), "KL": lib.interval(points, "kl")}
        row |= {title: lib.interval(points, name) for title, name in GAINS.items()}
        for title, name in GAINS.items():
            row[f"{title}: beta 0.05 minus this"] = lib.paired(last, points, name) if b > 0.05 else None
        rows.append(row)
    return {"gold": rows}


def picture(found):
    figure, axes = lib.axes(2, 4.8, 4.2, sharey=True)
    titles = {"gain": "what they train on: the reward model", "gold_gain": "what is wanted: the true reward"}
    for axis, (name, title) in zip(axes, titles.items()):
        for m in METHODS:
            points = [found.pick(method=m, beta=beta) for beta in BETAS]
            kls, gains = ([lib.interval(x, y) for x in points] for y in ("kl", name))
            lib.curve(axis, m, [kl[0] if kl else None for kl in kls], gains, kls, lw=2)
        axis.set(title=title, xlabel="KL to the SFT model, nats per response")
    axes[0].set_ylabel("gain over the SFT model")
    axes[0].legend(loc="upper left", fontsize=10)
    figure.suptitle("At a large KL the true reward turns down, and by far the most with DPO", fontsize=13)
    return figure


def main(argv=None):
    lib.main(__file__, PLAN, tables, picture, Toy(), argv)


if __name__ == "__main__":
    main()
