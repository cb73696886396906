"""What changes if the reward gets an offset per prompt, which preferences cannot tell from the reward?

    python results/invariance/run.py [--plots_only]     measures again, or tables and picture only

The offsets are normal numbers, one for each prompt, with a standard deviation of 0, 1, 4 or 16 times the
reward's spread, which is its standard deviation among the SFT model's responses to one prompt. Either nothing
can foresee them (--reward_shift), or they belong to the place that a prompt asks about, so that a critic can
learn them. Every policy is measured without offsets.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lib
from toy_task import Toy

SPREAD, SIZES = 1.7, (0, 1, 4, 16)
KINDS = {"unpredictable": "an offset that nothing can foresee"}
KINDS["learnable"] = "an offset that a critic can learn"
SEEDS = range(1, 6)
SWITCHES = {"PPO without whitening": {"whiten_advantages": False}}
SWITCHES["PPO, values unclipped"] = {"value_clip_range": "inf"}


def one_run(method, seed, offsets, size, variant=None):
    """A run with offsets of a kind and a size; size 0 is the run without."""
    labels = {"offsets": offsets, "size": size, "variant": variant}
    flags, shift, script = SWITCHES.get(variant, {}), float(f"{size * SPREAD:.2g}"), None
    if size and offsets == "unpredictable":
        flags = flags | {"reward_shift": shift}
    elif size:
        flags = flags | {"place_shift": shift}
        script = f"results/invariance/offsets_by_place.py {lib.METHODS[method].script}"
    return lib.run(method, seed, labels, script, **flags)


RIVALS = "P3O", "PPO", "PPO-max"
PLAN = [one_run(m, seed, "unpredictable", size) for seed in SEEDS for m in RIVALS for size in SIZES]
PLAN += [one_run("P3O", seed, "learnable", size) for seed in SEEDS for size in (0, 16)]  # any size is one run
PLAN += [one_run("PPO", seed, "learnable", size) for seed in SEEDS for size in SIZES]
for variant, kind in zip(SWITCHES, KINDS):
    PLAN += [one_run("PPO", seed, kind, size, variant) for seed in SEEDS for size in SIZES]


def unchanged(found, points):
    """How many runs end in the bytes of the run without offsets."""
    plain = {point["seed"]: point["weights"] for point in found.pick(method="P3O", size=0)}
    return f"{sum(point['weights'] == plain.get(point['seed']) for point in points)} of {len(points)}"


def tables(found):
    rows, switches = [], []
    for kind, size in [(kind, size) for kind in KINDS for size in SIZES]:
        place = {"offsets": kind, "size": size, "variant": None}
        p3o, ppo = (found.pick(method=m, **place) for m in ("P3O", "PPO"))
        row = {"offsets": kind, "size / spread": str(size), "P3O": lib.interval(p3o, "objective")}
        row |= {m: lib.interval(found.pick(method=m, **place), "objective") for m in ("PPO", "PPO-max")}
        row["P3O minus PPO"] = lib.paired(found.pick(method="P3O", size=0, offsets=kind), ppo, "objective")
        rows.append(row | {"P3O: same weights": unchanged(found, p3o) if p3o else None})
    for variant, kind in zip(SWITCHES, KINDS):
        cells = [lib.interval(found.pick(variant=variant, size=size), "objective") for size in SIZES]
        switches.append({"PPO": variant, "offsets": kind} | dict(zip(map(str, SIZES), cells)))
    return {"objective": rows, "switches": switches}


def picture(found):
    figure, axes = lib.axes(2, 4.6, 4.2, sharey=True)
    for axis, (kind, title) in zip(axes, KINDS.items()):
        for method in RIVALS:
            points = [found.pick(method=method, offsets=kind, size=x, variant=None) for x in SIZES]
            cells = [lib.interval(x, "objective") for x in points]
            if any(cells):
                lib.curve(axis, method, range(4), cells, lw=2.5)
        axis.set_xticks(range(4), ["none", "1x", "4x", "16x"])
        axis.set(title=title, xlabel="size of the offsets, relative to the reward's spread")
        axis.axhline(0, color="black", lw=0.8)
    axes[0].set_ylabel("reward gained minus beta KL\n(higher is better)")
    axes[0].legend(loc="lower left", fontsize=11)
    figure.suptitle("An offset per prompt leaves P3O unchanged; PPO falls", fontsize=14)
    return figure


def main(argv=None):
    lib.main(__file__, PLAN, tables, picture, Toy(), argv)


if __name__ == "__main__":
    main()
