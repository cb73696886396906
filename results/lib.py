"""What every question under results/ needs: train a run, measure it, keep its line, show what was found.

A question is a folder with a run.py. Its plan is a list of runs; a run is a method, its flags and a seed.
`python results/NAME/run.py` trains the runs into out/results/NAME, lets evaluate.py measure them, and
compares the tables with the committed ones. `--plots_only` rebuilds the folder's tables and picture from its
runs.jsonl, which has one line for each run. A world (toy_task.py) says what the runs start from.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out/results"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)  # of a README, generated
BETA = 0.5


@dataclass(frozen=True)
class Method:
    """How a method is trained and drawn."""

    script: str
    color: str  # of Okabe and Ito's, which every kind of eye can tell apart
    learning_rate: float  # the best of a grid that was the same for every method, on seed 0
    flags: dict = field(default_factory=dict)
    data: str = "prompts"  # or "preferences"


METHODS = {
    "P3O": Method("p3o.py", "#D55E00", 3e-4),
    "P3O-V1": Method("p3o.py", "#E69F00", 3e-4, {"clipping": "separate"}),
    "P3O without clip": Method("p3o.py", "#882255", 3e-4, {"clip_range": 1e9}),
    "pairwise gradient": Method("p3o.py", "#8C6D00", 3e-4, {"clipping": "none"}),
    "PPO": Method("ppo.py", "#0072B2", 3e-4),
    "PPO-max": Method("ppo.py", "#56B4E9", 1e-3, {"preset": "ppo_max"}),
    "DPO": Method("dpo.py", "#CC79A7", 1e-4, data="preferences"),
    "online DPO": Method("dpo.py", "#009E73", 1e-4, {"online": True, "labels": "ranked"}),
    "RLOO of TRL": Method("results/speed/trl_rloo.py", "#117733", 3e-4),
}


# ------------------------------------------------------------------------------------ runs and their lines
def run(method, seed, labels=None, script=None, /, **flags):
    """A run. Labels say what it is in a table; they are no part of what is trained."""
    kind = METHODS[method]
    flags = {"learning_rate": kind.learning_rate, "beta": BETA} | kind.flags | flags | {"seed": seed}
    return {"method": method, "script": script or kind.script, "flags": flags, "seed": seed} | (labels or {})


def key(line):
    """What makes two runs the same run."""
    return line["method"], json.dumps(line.get("flags", {}), sort_keys=True)


SFT, OPTIMUM = ("SFT", "{}"), ("optimum", "{}")  # the keys of two lines that are no runs


def name_of(one):
    """A folder name that no other run has."""
    parts = [f"{x}{y}" for x, y in one["flags"].items() if (x, y) not in METHODS[one["method"]].flags.items()]
    return re.sub(r"[^\w.+-]", "-", "_".join([one["method"], *parts]))


def read_lines(path):
    """The lines of a runs.jsonl; none where there is no such file."""
    return [json.loads(x) for x in Path(path).read_text().splitlines()] if Path(path).exists() else []


def write_lines(path, lines):
    """Writes a runs.jsonl beside its place and moves it there."""
    new = Path(path).with_suffix(".new")
    new.parent.mkdir(parents=True, exist_ok=True)
    new.write_text("".join(json.dumps(line) + "\n" for line in lines))
    new.replace(path)


class Found:
    """What is known of a plan: points, a dict for every measured run; sft; optimum; the missing names."""

    def __init__(self, plan, lines, world):
        lines = {key(line): line for line in lines}
        self.sft, self.optimum = (lines.get(name, {}) for name in (SFT, OPTIMUM))
        self.missing = [name_of(one) for one in plan if key(one) not in lines]
        self.points = [one | lines[key(one)] for one in plan if key(one) in lines]
        for point in self.points:
            world.complete(point, self)

    def pick(self, **labels):
        """The points that have these labels."""
        return [point for point in self.points if all(point.get(x) == y for x, y in labels.items())]


# ------------------------------------------------------------------------------------------ the statistics
T975 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's t for 1, 2, ... degrees


def t_interval(values):
    """(mean, low, high), 95%, of independent values; low and high are None where there is only one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    t = T975[len(values) - 2] if len(values) - 2 < len(T975) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def interval(points, name):
    """t_interval of a value over the seeds. None where one of them lacks it: no lucky seeds are picked."""
    values = [point[name] for point in points]
    return t_interval(values) if values and None not in values else None


def paired(ours, theirs, name):
    """t_interval of the differences, seed by seed, over the seeds that both have."""
    other = {point["seed"]: point[name] for point in theirs}
    values = [point[name] - other[point["seed"]] for point in ours if point["seed"] in other]
    return t_interval(values) if values else None


# --------------------------------------------------------------------------------------- train and measure
def call(script, *words, **flags):
    """Runs a script with one thread and shows its last line. What fails ends everything, and says why."""
    words = [*script.split(), *words, *(str(word) for x, y in flags.items() for word in (f"--{x}", y))]
    os.environ["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr * (done.returncode != 0)).strip().splitlines() or [script]
    if done.returncode:
        sys.exit(f"error: {' '.join(words)} failed; it said: {' | '.join(lines[-3:])}")
    print(lines[-1], flush=True)


def train(script, folder, base="", **flags):
    """Trains a run into its folder, goes on if it was interrupted, and leaves a finished one alone.

    What a folder is for stands in a file beside it. One that is for something else, or unknown, is refused.
    """
    folder, record = Path(folder), Path(f"{folder}.setting.json")
    setting = json.loads(json.dumps({"script": script, "flags": flags, "base": base}, default=str))
    before = json.loads(record.read_text()) if record.exists() else {}
    if folder.exists() and before.get("setting") != setting:
        sys.exit(f"error: {folder} holds a model of another setting; delete it, or move it away")
    if folder.exists() and before["finished"]:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"setting": setting, "finished": False}))
    resume = ["--resume"] if (folder / "args.json").exists() and script != "toy.py" else []
    call(script, *resume, output_dir=folder, **flags)
    record.write_text(json.dumps({"setting": setting, "finished": True}))
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # it and the critic are most of the disk space
    shutil.rmtree(folder / "critic", ignore_errors=True)


def train_run(one, folder, paths, more):
    """Trains a run of an RL method; more: flags that are no part of the run."""
    base = {x: paths[x] for x in ("model", "reward_model")}
    flags = base | {"dataset": paths[METHODS[one["method"]].data], "eval_every": 10**6} | more
    train(one["script"], folder, fingerprint(*base.values()), **flags, **one["flags"])


def answers(place, folders, **flags):
    """Lets evaluate.py ask the policies and the SFT model the same test prompts; {policy: its responses}."""
    call("evaluate.py", *map(str, folders), output_dir=place, seed=12345, overwrite=True, **flags)
    policies = {}
    for row in map(json.loads, open(Path(place, "answers.jsonl"), encoding="utf-8")):
        if "policy" in row:  # the first line holds the settings
            policies.setdefault(row["policy"], []).append(row)
    shutil.rmtree(place)
    return policies


def fingerprint(*folders):
    """Digits that differ when the weights in the folders do."""
    weights = [hashlib.sha256(Path(x, "model.safetensors").read_bytes()).hexdigest() for x in folders]
    return "-".join(x[:16] for x in weights)


def origin():
    """The commit, the version of torch and the machine, as they are now."""
    git = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (re.findall(r"model name\s*: (.*)", info) or [platform.machine()])[0]
    hardware = f"{cpu}, {os.cpu_count()} cores, 1 thread a process"
    return {"commit": git.stdout.strip(), "torch": version("torch"), "hardware": hardware}


def measure_all(name, plan, world, args):
    """Trains and measures what no question has measured yet; all lines of the plan, and how many are new."""
    paths, new = world.prepare(args), 0
    base = fingerprint(paths["model"], paths["reward_model"])
    lines = [line for path in sorted(OUT.glob("*/runs.jsonl")) for line in read_lines(path)]
    known = {key(line): line for line in lines if line["base"] == base}
    keys = [SFT, OPTIMUM, *map(key, plan)]

    def keep(one, measured):
        known[one] = {"method": one[0], "flags": json.loads(one[1])} | measured | origin() | {"base": base}
        write_lines(OUT / name / "runs.jsonl", [known[x] for x in keys if x in known])

    for one in [one for one in plan if key(one) not in known]:
        folder = OUT / name / name_of(one)
        train_run(one, folder, paths, world.flags)
        steps = [row.items() for row in read_lines(folder / "metrics.jsonl")]
        minutes = sum(y for row in steps for x, y in row if x.startswith("seconds")) / 60
        sft, measured = world.measure(folder, paths)
        if SFT not in known:
            keep(SFT, sft)
        keep(key(one), measured | {"minutes": round(minutes, 2), "weights": fingerprint(folder)})
        new += 1
    if hasattr(world, "optimum") and OPTIMUM not in known:
        keep(OPTIMUM, world.optimum(OUT / name, paths))
    lines = [known[x] for x in keys if x in known]
    write_lines(OUT / name / "runs.jsonl", lines)
    return lines, new


# -------------------------------------------------------------------------------- tables, pages and pictures
def show(cell):
    """A cell as text: (value, low, high) with two digits of the interval's half, at most three decimals."""
    if not isinstance(cell, tuple):
        return "" if cell is None else str(cell)
    value, low, high = cell
    if low is None:
        return f"{value:.3f}"
    half = (high - low) / 2
    decimals = 3 if half < 1e-9 else min(3, max(0, 1 - math.floor(math.log10(half))))
    decimals = 3 if any(x and not round(x, decimals) for x in cell) else decimals  # on which side of 0?
    value, low, high = (f"{round(x, decimals) + 0.0:.{decimals}f}" for x in cell)  # + 0.0: never -0
    return f"{value} [{low}, {high}]"


def markdown(rows):
    """A table from dicts that have the same keys."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([show(x) for x in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def source(found, kind="Student's t over seeds"):
    """Where the numbers come from and what a rerun costs, in a paragraph."""
    lines = list({key(point): point for point in found.points}.values())
    seeds, commits, machines = (sorted({x[y] for x in lines}) for y in ("seed", "commit", "hardware"))
    hours = sum(line["minutes"] for line in lines) / 60
    text = f"{len(lines)} runs, seeds {', '.join(map(str, seeds))}, on {'; '.join(machines)}; commits "
    text += f"{', '.join(commits)}. In brackets: 95% intervals, {kind}. A rerun takes {hours:.1f} core hours."
    return text + (f" Missing: {', '.join(found.missing)}." if found.missing else "")


def write_report(folder, page, found, tables, picture):
    """README.md, whose generated blocks are made new, and picture.png of a question; returns the tables."""
    made = tables(found)
    blocks = {name: x if isinstance(x, str) else markdown(x) for name, x in made.items()}
    blocks |= {} if "source" in blocks else {"source": source(found)}
    fresh = "".join(f"\n<!-- table {name} -->\n<!-- end -->\n" for name in blocks)
    page = page if BLOCK.search(page) else page + fresh
    page = BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[3]}", page)
    (folder / "README.md").write_text(page)
    picture(found).savefig(folder / "picture.png", dpi=130)
    return made


def numbers(tables):
    """{(table, row, column): (value, low, high)} of every cell that holds a number."""
    rows = [(name, row) for name, rows in tables.items() if isinstance(rows, list) for row in rows]
    texts = [" ".join(x for x in list(row.values())[:2] if isinstance(x, str)) for _, row in rows]
    cells = [(name, text, x, y) for (name, row), text in zip(rows, texts) for x, y in row.items()]
    return {cell[:3]: cell[3] for cell in cells if isinstance(cell[3], tuple)}


def compare(before, now):
    """Says of every number that both tables have whether the two intervals overlap."""
    before, now, agree = numbers(before), numbers(now), 0
    for place in [place for place in now if place in before]:
        old, new = ([x for x in cells[place] if x is not None] for cells in (before, now))
        verdict = "overlaps" if min(old) <= max(new) and min(new) <= max(old) else "DIFFERS"
        agree += verdict == "overlaps"
        print(f"{', '.join(place)}: committed {show(before[place])}, now {show(now[place])}: {verdict}")
    print(f"{agree} of {len(before.keys() & now.keys())} numbers overlap with the committed ones")


def axes(count=1, width=5.0, height=4.0, **options):
    """A figure with panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, **options)[0]
    for axis in panels:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, panels


def curve(axis, name, xs, cells, x_cells=None, **look):
    """A line through means, with their intervals. Cells that are None are left out."""
    known, bars = [i for i, cell in enumerate(cells) if cell], {}
    for side, values in (("yerr", cells), ("xerr", x_cells)):
        spans = [(x, low or x, high or x) for x, low, high in (values[i] for i in known)] if values else []
        bars[side] = [[x - low for x, low, _ in spans], [high - x for x, _, high in spans]] if spans else None
    look = {"color": METHODS[name].color if name in METHODS else "black", "marker": "o", "label": name} | look
    axis.errorbar([xs[i] for i in known], [cells[i][0] for i in known], **bars, ms=5, capsize=3, **look)


# ---------------------------------------------------------------------------------------------- the command
def main(file, plan, tables, picture, world, argv=None):
    """The command line of a question."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--plots_only", action="store_true", help="rebuild tables and picture from runs.jsonl; train nothing")
    add("--seeds", type=int, nargs="+", help="only the runs with these seeds")
    add("--methods", nargs="+", choices=METHODS, help="only the runs of these methods")
    add("--device", default="cpu", help="where to train; the committed runs come from a CPU")
    add("--keep", action="store_true", help="put the new lines into the committed runs.jsonl")
    for name, (default, text) in getattr(world, "options", {}).items():
        add(f"--{name}", default=default, help=text)
    args = parser.parse_args(argv)
    home = Path(file).resolve().parent
    committed = {key(line): line for line in read_lines(home / "runs.jsonl")}
    page = (home / "README.md").read_text() if (home / "README.md").exists() else f"# {home.name}\n"
    if not args.plots_only:
        wanted = [one for one in plan if one["method"] in (args.methods or METHODS)]
        wanted = [one for one in wanted if not args.seeds or one["seed"] in args.seeds]
        lines, new = measure_all(home.name, wanted, world, args)
        found = Found(wanted, lines, world)
        now = write_report(OUT / home.name, page, found, tables, picture)
        print(
            f"{home.name}: {new} runs trained and measured now, {len(lines)} lines in out/results/{home.name}"
        )
        compare(tables(Found(plan, committed.values(), world)), now)
        if not args.keep:
            return
        gold = {SFT, *(key(one) for one in plan if one.get("keep_gold"))}  # every response's: for few
        committed |= {key(x): {y: x[y] for y in x if y != "gold" or key(x) in gold} for x in lines}
        committed = {x: committed[x] for x in (SFT, OPTIMUM, *map(key, plan)) if x in committed}
        if len({line.get("base") for line in committed.values()}) > 1:
            sys.exit(
                "error: the other runs start from another SFT model; measure all of the plan, and keep that"
            )
        write_lines(home / "runs.jsonl", committed.values())
    found = Found(plan, committed.values(), world)
    write_report(home, page, found, tables, picture)
    print(f"{home.name}: {len(found.points)} runs read from runs.jsonl")
