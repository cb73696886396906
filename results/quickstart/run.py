"""What does the quick start print, how long does it take, and how good is the policy that it ends with?

    python results/quickstart/run.py --plots_only     table and picture from runs.jsonl
    python results/quickstart/run.py [--keep]         runs the commands in out/results/quickstart; ten minutes

A line of runs.jsonl is a command and all that it said; that of frontier.py has the numbers of summary.json.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lib

CHAIN = "toy.py", "sft.py", "reward_model.py", "p3o.py", "evaluate.py", "frontier.py"
CURVES_PICTURE = Path(__file__).with_name("curves.png")  # what curves.py draws after the chain
CURVES, OTHERS = ("optimal_frontier", "best_of_n"), ("curves.py", "ppo.py", "dpo.py")  # run afterwards
KEPT = "reward", "reward_gain", "gold_gain", "kl", "frontier_efficiency"


def run_all(args):
    """Runs the commands in a folder of their own; a line for each."""
    folder = lib.OUT / "quickstart/work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines, start = [], time.perf_counter()
    for script in (*CHAIN, *OTHERS):
        command = [sys.executable, str(lib.ROOT / script)]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {script} failed; it said: {done.stderr[-600:]}")
        lines.append({"command": f"python {script}", "said": done.stdout.splitlines()} | lib.origin())
        lines[-1]["seconds"] = round(time.perf_counter() - begin)
        print(lines[-1]["said"][-1], flush=True)
        if script == CHAIN[-1]:
            lines[0]["chain_seconds"] = round(time.perf_counter() - start)
    if args.keep:
        shutil.copy(folder / "out/curves.png", CURVES_PICTURE)
    lines[len(CHAIN) - 1] |= shorten(json.loads((folder / "out/evaluation/summary.json").read_text()))
    return lines


def shorten(summary):
    """What the table and the picture need of summary.json."""
    policies, ends = {}, ("", "_low", "_high")
    for name, x in summary["policies"].items():
        policies[name] = {y: [x[f"{y}{end}"] for end in ends] for y in KEPT if y in x}
        policies[name]["win_rate_vs"] = x["win_rate_vs"]
    curves = {x: [[y["kl"], y["reward"]] for y in summary[x]] for x in CURVES}
    return {"policies": policies} | curves


def tables(found):
    lines = {line["command"]: line for line in found.points}
    said = [
        {"command": f"`{x}`", "seconds": line["seconds"], "what it says in the end": line["said"][-1]}
        for x, line in lines.items()
    ]
    policies = lines["python frontier.py"]["policies"]
    names = dict(zip(("gain", "true gain", "KL", "share of the best"), KEPT[1:]))
    row = {"policy": "P3O"} | {title: tuple(policies["p3o"][x]) for title, x in names.items()}
    row["wins against SFT, by the reward model"] = tuple(policies["p3o"]["win_rate_vs"]["sft"])
    first = found.points[0]
    about = f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}"
    source = f"Run on {about}. The first six commands took {first['chain_seconds']} seconds. In brackets: 95%"
    source += " intervals, bootstrap over the prompts."
    return {"source": source, "commands": said, "policy": [row]}


def picture(found):
    (line,) = [line for line in found.points if "policies" in line]
    figure, (axis,) = lib.axes(1, 6.4, 4.2)
    zero, p3o = line["policies"]["sft"]["reward"][0], line["policies"]["p3o"]
    right = 1.2 * p3o["kl"][0]
    curves = {name: [(kl, r - zero) for kl, r in line[name] if kl <= right] for name in CURVES}
    axis.plot(*zip(*curves["optimal_frontier"]), "k", lw=2.5, label="the best that any policy can do")
    axis.plot(*zip(*curves["best_of_n"]), "D:", color="#777777", label="best of 1, 2, ... without training")
    lib.curve(axis, "P3O", [p3o["kl"][0]], [p3o["reward_gain"]], [p3o["kl"]], ls="", zorder=5)
    axis.plot(0, 0, "ks", label="SFT model", zorder=5)
    axis.set(xlabel="KL to the SFT model, nats per response", ylabel="reward gained", ylim=(-0.1, None))
    axis.legend(loc="lower right", fontsize=10)
    share = p3o["frontier_efficiency"][0]
    axis.set_title(f"After the quick start P3O gains {share:.0%} of what is possible at its KL", fontsize=12)
    return figure


def main(argv=None):
    found, merge = lambda lines: SimpleNamespace(points=lines), lambda committed, lines: lines
    lib.report(__file__, argv, {}, run_all, found, merge, tables, picture)


if __name__ == "__main__":
    main()
