"""What every question under results/ needs: train a run, measure it, keep its line, show what was found.

A question is a folder with a run.py. Its plan is a list of runs; a run is a method, its flags and a seed.
`python results/NAME/run.py` trains them into out/results/NAME, lets evaluate.py measure them, and compares
the tables with those from the committed runs.jsonl. A world (toy_task.py) says what the runs start from.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out/results"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)  # of a README, generated
BETA = 0.5
rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
rcParams |= {"axes.titlesize": 11, "figure.titlesize": 13}


@dataclass(frozen=True)
class Method:
    """How a method is trained and drawn."""

    script: str
    color: str  # of Okabe and Ito's, or of Tol's, which every kind of eye can tell apart
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
    "RLOO of TRL": Method("examples/relatives_with_trl.py --method rloo", "#117733", 3e-4),  # needs trl
    "GRPO of TRL": Method("examples/relatives_with_trl.py --method grpo", "#332288", 3e-4),
    "Dr. GRPO of TRL": Method("examples/relatives_with_trl.py --method dr_grpo", "#AA4499", 3e-4),
}


# ----------------------------------------------------------------- runs, their lines, and their statistics
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
    name = re.sub(r"[^\w.+-]", "-", "_".join([one["method"], *parts]))
    return name if len(name) < 80 else f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def read_lines(path):
    """The lines of a runs.jsonl; none where there is no such file."""
    return [json.loads(x) for x in Path(path).read_text().split("\n") if x] if Path(path).exists() else []


def write_lines(path, lines):
    """Writes a runs.jsonl beside its place and moves it there."""
    (new := Path(path).with_suffix(".new")).parent.mkdir(parents=True, exist_ok=True)
    new.write_text("".join(json.dumps(line) + "\n" for line in lines))
    new.replace(path)


class Found:
    """What is known of a plan: points, a dict for every measured run; sft; optimum; the missing names."""

    def __init__(self, plan, world, lines):
        lines = {key(line): line for line in lines}
        self.sft, self.optimum = (lines.get(name, {}) for name in (SFT, OPTIMUM))
        self.missing = [name_of(one) for one in plan if key(one) not in lines]
        known = [one | lines[key(one)] for one in plan if key(one) in lines]
        self.points = [world.complete(point, self) for point in known]

    def pick(self, **labels):  # the points that have them
        return [point for point in self.points if all(point.get(x) == y for x, y in labels.items())]


T975 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's t for 1, 2, ... degrees


def t_interval(values):
    """(mean, low, high), 95%; low and high are None for one value. None if one is missing: no lucky seeds."""
    if not values or None in values:
        return None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    t = T975[len(values) - 2] if len(values) - 2 < len(T975) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def interval(points, name):
    return t_interval([point[name] for point in points])


def paired(ours, theirs, name):
    """t_interval of the differences, seed by seed, over the seeds that both have."""
    other = {point["seed"]: point[name] for point in theirs}
    return t_interval([point[name] - other[point["seed"]] for point in ours if point["seed"] in other])


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
    """Trains a run into its folder, or goes on with it. A folder that is for something else is refused."""
    record = Path(f"{folder}.setting.json")  # beside the folder: what it is for
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
    train(one["script"], folder, fingerprint(*base.values()), **(flags | one["flags"]))


def answers(place, folders, **flags):
    """Lets evaluate.py ask the policies and the SFT model the same test prompts; {policy: its responses}."""
    call("evaluate.py", *map(str, folders), output_dir=place, seed=12345, overwrite=True, **flags)
    rows = [row for row in read_lines(Path(place, "answers.jsonl")) if "policy" in row]  # first: settings
    shutil.rmtree(place)
    return {name: [row for row in rows if row["policy"] == name] for name in {row["policy"] for row in rows}}


def fingerprint(*folders):
    """Digits that differ when the weights in the folders do."""
    files = [Path(folder, "model.safetensors") for folder in folders]
    return "-".join(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)


def origin():
    """The commit, the version of torch and the machine, as they are now."""
    git = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (re.findall(r"model name\s*: (.*)", info) or ["unknown CPU"])[0]
    hardware = f"{cpu}, {os.cpu_count()} cores, 1 thread a process"
    return {"commit": git.stdout.strip(), "torch": version("torch"), "hardware": hardware}


def measure_all(name, plan, world, args):
    """Trains and measures what no question has measured yet; returns all lines of the plan."""
    paths, new = world.prepare(args), 0
    base = fingerprint(paths["model"], paths["reward_model"])
    lines = [line for path in sorted(OUT.glob("*/runs.jsonl")) for line in read_lines(path)]
    known = {key(line): line for line in lines if line.get("base") == base}
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
    print(f"{name}: {new} runs trained and measured now, {len(plan) - new} by earlier commands")
    return [known[x] for x in keys if x in known]


# -------------------------------------------------------------------------------- tables, pages and pictures
def show(cell):
    """A cell as text: (value, low, high) with two digits of the interval's half, at most three decimals."""
    if not isinstance(cell, tuple):
        return "" if cell is None else str(cell)
    value, low, high = cell
    if low is None:
        return f"{value:.3f}"
    decimals = min(3, max(0, 1 - math.floor(math.log10(max(high - low, 1e-9) / 2))))
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
    names = "seed", "commit", "hardware"
    seeds, commits, machines = (", ".join(sorted({str(x[y]) for x in lines})) for y in names)
    text = f"{len(lines)} runs, seeds {seeds}, on {machines}; commits {commits}. In brackets: 95% intervals, "
    text += f"{kind}. A rerun takes {sum(x['minutes'] for x in lines) / 60:.1f} hours of one core."
    return text + (f" Missing: {', '.join(found.missing)}." if found.missing else "")


def write_report(folder, page, found, tables, picture):
    """README.md, whose generated blocks are made new, and picture.png of a question; returns the tables."""
    made = tables(found)
    made |= {} if "source" in made else {"source": source(found)}
    blocks = {name: x if isinstance(x, str) else markdown(x) for name, x in made.items()}
    fresh = "".join(f"\n<!-- table {name} -->\n<!-- end -->\n" for name in blocks)
    page = page if BLOCK.search(page) else page + fresh
    page = BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[3]}", page)
    (folder / "README.md").write_text(page)
    picture(found).savefig(folder / "picture.png", dpi=130)
    return made


def numbers(tables):
    """{(table, row, column): (value, low, high)} of every cell that holds a number."""
    found = {}
    for name, row in [(name, row) for name, rows in tables.items() for row in rows if isinstance(row, dict)]:
        texts = " ".join(x for x in list(row.values())[:2] if isinstance(x, str))
        found |= {(name, texts, x): y for x, y in row.items() if isinstance(y, tuple)}
    return found


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
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def curve(axis, name, xs, cells, x_cells=None, **look):
    """A line through means, with their intervals. Cells that are None are left out."""

    def bars(values):
        spans = [(x, low or x, high or x) for x, low, high in (values[i] for i in known)]
        return [[x - low for x, low, _ in spans], [high - x for x, _, high in spans]]

    known = [i for i, cell in enumerate(cells) if cell]
    look = {"color": METHODS[name].color, "marker": "o", "label": name, "ms": 5, "capsize": 3} | look
    means = [xs[i] for i in known], [cells[i][0] for i in known]
    axis.errorbar(*means, bars(cells), bars(x_cells) if x_cells else None, **look)


def report(file, argv, options, measure, find, merge, tables, picture):
    """The command of a question: measure if asked to, compare with what is committed, write the page."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    options["plots_only"] = {"action": "store_true", "help": "rebuild page and picture from runs.jsonl"}
    options["keep"] = {"action": "store_true", "help": "put the new lines into the committed runs.jsonl"}
    for name, more in options.items():
        parser.add_argument(f"--{name}", **more)
    args, home = parser.parse_args(argv), Path(file).resolve().parent
    committed, out = read_lines(home / "runs.jsonl"), OUT / home.name
    page = (home / "README.md").read_text() if (home / "README.md").exists() else f"# {home.name}\n"
    if not args.plots_only:
        lines = measure(args)
        write_lines(out / "runs.jsonl", lines)
        now = write_report(out, page, find(lines), tables, picture)
        compare(tables(find(committed)), now)
        if not args.keep:
            return
        committed = merge(committed, lines)
        write_lines(home / "runs.jsonl", committed)
    write_report(home, page, find(committed), tables, picture)
    print(f"{home.name}: {len(committed)} lines read from runs.jsonl")


def main(file, plan, tables, picture, world, argv=None):
    """The command of a question that trains a plan of runs."""
    options = {"seeds": {"type": int, "nargs": "+", "help": "only the runs with these seeds"}}
    options["methods"] = {"nargs": "+", "choices": METHODS, "help": "only the runs of these methods"}

    def measure(args):
        wanted = [one for one in plan if one["method"] in (args.methods or METHODS)]
        wanted = [one for one in wanted if not args.seeds or one["seed"] in args.seeds]
        return measure_all(Path(file).resolve().parent.name, wanted, world, args)

    def merge(committed, lines):
        gold = {SFT, *(key(one) for one in plan if one.get("keep_gold"))}  # every response's: for few
        lines = [{y: x[y] for y in x if y != "gold" or key(x) in gold} for x in lines]
        known = {key(line): line for line in (*committed, *lines)}
        known = [known[x] for x in dict.fromkeys((SFT, OPTIMUM, *map(key, plan))) if x in known]
        if len({line.get("base") for line in known}) > 1:
            sys.exit("error: the other runs start from another SFT model; measure and keep all of the plan")
        return known

    report(file, argv, options | world.options, measure, partial(Found, plan, world), merge, tables, picture)
