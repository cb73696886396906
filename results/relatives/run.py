"""How does P3O compare with RLOO, GRPO, Dr. GRPO, PPO and online DPO?

    python results/relatives/run.py --plots_only     tables and picture from runs.jsonl
    python results/relatives/run.py                  trains and measures everything again; needs trl

Every method has the same SFT model, reward model and prompts, and the best learning rate of one grid on seed
0. At equal samples each run samples 7,680 responses. At equal seconds it has as many steps as fit into the
time of 60 steps of PPO, by step_seconds.json. The last table changes the reward in ways that change no
preference: by offsets per prompt, and by a reward and a beta that are four times as large.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import lib
from times_four import FOUR, ToyTimesFour

SEEDS, RATES = range(1, 6), (1e-4, 3e-4, 1e-3)
EDGE = {"P3O, K = 8": 3e-3, "PPO, K = 2": 3e-3, "online DPO, K = 2": 3e-5}  # the best was an outer rate
EDGE |= {"GRPO, K = 2": 3e-5, "GRPO, K = 8": 3e-5}
OFFSETS = 6.8  # four times the reward's spread among the SFT model's responses to a prompt
K = {2: {}, 4: {"num_responses": 4, "prompts_per_step": 32, "minibatch_size": 16}}
K[8] = {"num_responses": 8, "prompts_per_step": 16, "minibatch_size": 8}
METHODS = {  # in the tables: the method, the number of responses to a prompt, the best learning rate
    "P3O, K = 2": ("P3O", 2, 3e-4),
    "P3O, K = 4": ("P3O", 4, 3e-4),
    "P3O, K = 8": ("P3O", 8, 1e-3),
    "RLOO, K = 2": ("RLOO of TRL", 2, 3e-4),
    "RLOO, K = 8": ("RLOO of TRL", 8, 3e-4),
    "GRPO, K = 2": ("GRPO of TRL", 2, 1e-4),
    "GRPO, K = 8": ("GRPO of TRL", 8, 1e-4),
    "Dr. GRPO, K = 2": ("Dr. GRPO of TRL", 2, 3e-4),
    "Dr. GRPO, K = 8": ("Dr. GRPO of TRL", 8, 3e-4),
    "PPO, K = 2": ("PPO", 2, 1e-3),
    "online DPO, K = 2": ("online DPO", 2, 1e-4),
}
CHANGED = "P3O, K = 2", "RLOO, K = 2", "GRPO, K = 2", "PPO, K = 2"
COLUMNS = {"objective": "objective", "gain": "gain", "KL": "kl", "true gain": "gold_gain"}


def job(name, seed, part, rate=None, **flags):
    method, responses, best = METHODS[name]
    flags = K[responses] | {"learning_rate": rate or best} | flags
    return lib.run(method, seed, {"name": name, "part": part}, **flags)


def equal_seconds(path=Path(__file__).with_name("step_seconds.json")):
    """{name: the number of steps in the time of 60 steps of PPO}."""
    seconds = json.loads(path.read_text())["seconds"] if path.exists() else dict.fromkeys(METHODS, 1)
    return {name: round(60 * seconds["PPO, K = 2"] / seconds[name]) for name in METHODS}


STEPS = equal_seconds()
PLAN = [job(name, 0, "tuning", rate) for name in METHODS for rate in RATES]
PLAN += [job(name, 0, "tuning", rate) for name, rate in EDGE.items()]
for seed in SEEDS:
    PLAN += [job(name, seed, "samples") for name in METHODS]
    PLAN += [job(name, seed, "seconds", **({"steps": x} if x != 60 else {})) for name, x in STEPS.items()]
    PLAN += [job(name, seed, "offsets", reward_shift=OFFSETS) for name in CHANGED]
    PLAN += [job(name, seed, "times four", **FOUR) for name in CHANGED]


def comparison(found, part):
    """A row for each method; its last cell is its objective minus that of P3O, K = 2, seed by seed."""
    rows, p3o = [], found.pick(name="P3O, K = 2", part=part)
    for name in METHODS:
        points, row = found.pick(name=name, part=part), {"method": name}
        row |= {"steps": str(STEPS[name])} if part == "seconds" else {}
        row |= {column: lib.interval(points, x) for column, x in COLUMNS.items()}
        more = lib.paired(points, p3o, "objective") if name != "P3O, K = 2" else None
        rows.append(row | {"objective minus that of P3O, K = 2": more})
    return rows


def tables(found):
    tuning, changed = [], []
    for name in METHODS:
        row, points = {"method": name}, found.pick(name=name, part="tuning")
        for rate in sorted({*RATES, *EDGE.values()}):
            chosen = [point for point in points if point["flags"]["learning_rate"] == rate]
            row[f"rate {rate:g}"] = lib.interval(chosen, "objective")
        tuning.append(row)
    for name in CHANGED:
        plain, row = found.pick(name=name, part="samples"), {"method": name}
        for part, x in [(part, x) for part in ("offsets", "times four") for x in ("objective", "KL")]:
            row[f"{part}: {x}"] = lib.paired(found.pick(name=name, part=part), plain, COLUMNS[x])
        changed.append(row)
    return {x: comparison(found, x) for x in ("samples", "seconds")} | {"changed": changed, "tuning": tuning}


def picture(found):
    figure, (axis,) = lib.axes(1, 8.4, 4.8)
    looks = {"samples": ("o", None, "the same number of samples"), "seconds": ("s", "white", "the same time")}
    for place, (part, (marker, inside, label)) in enumerate(looks.items()):
        for x, name in enumerate(METHODS):
            cells = [lib.interval(found.pick(name=name, part=part), "objective")]
            look = {"marker": marker, "mfc": inside, "ms": 7, "ls": "", "label": None if x else label}
            lib.curve(axis, METHODS[name][0], [x + 0.25 * place], cells, **look)
    axis.set_xticks(range(len(METHODS)), METHODS, rotation=30, ha="right")
    axis.set_ylabel("reward gained minus beta KL\n(higher is better)")
    axis.legend(loc="lower left")
    figure.suptitle("P3O, RLOO and PPO end almost level; GRPO and online DPO are behind at the same beta")
    return figure


def main(argv=None):
    lib.main(__file__, PLAN, tables, picture, ToyTimesFour(), argv)


if __name__ == "__main__":
    main()
