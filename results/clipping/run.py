"""When does clipping matter? Each rollout is passed over 1, 2, 4 or 8 times, and grows more and more stale.

python results/clipping/run.py [--plots_only]     measures again, or tables and picture only
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lib
from toy_task import Toy

SEEDS, PASSES = range(1, 4), (1, 2, 4, 8)
METHODS = {
    "P3O": "clips log pi(y1) - log pi(y2)",
    "P3O-V1": "clips each response",
    "P3O without clip": "importance weights, no clip",
    "pairwise gradient": "neither",
}
PLAN = [lib.run(m, seed, {"passes": x}, epochs=x) for m in METHODS for x in PASSES for seed in SEEDS]


def tables(found):
    rows = []
    for m, what in METHODS.items():
        row = {"method": m, "what it does": what}
        for x in PASSES:
            title = f"objective, {x} pass{'es' * (x > 1)}"
            row[title] = lib.interval(found.pick(method=m, passes=x), "objective")
        row["KL, 8 passes"] = lib.interval(found.pick(method=m, passes=8), "kl")
        lead = lib.paired(found.pick(method="P3O", passes=8), found.pick(method=m, passes=8), "objective")
        rows.append(row | {"P3O leads, 8 passes": lead if m != "P3O" else None})
    return {"clipping": rows}


def picture(found):
    figure, axes = lib.axes(2, 4.8, 4.2)
    titles = {"objective": "reward gained minus beta KL", "kl": "KL, nats per response"}
    for axis, (name, title) in zip(axes, titles.items()):
        for m in METHODS:
            cells = [lib.interval(found.pick(method=m, passes=x), name) for x in PASSES]
            lib.curve(axis, m, range(4), cells, lw=2)
        axis.set_xticks(range(4), map(str, PASSES))
        axis.set(xlabel="passes over each rollout", ylabel=title)
    axes[0].legend(loc="lower left", fontsize=10)
    figure.suptitle("Clipping matters only after many passes over a rollout", fontsize=13)
    return figure


def main(argv=None):
    lib.main(__file__, PLAN, tables, picture, Toy(), argv)


if __name__ == "__main__":
    main()
