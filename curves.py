"""Draws the learning curves of training runs into one picture, while they go on or when they are done.

    python curves.py [RUN ...] [--output out/curves.png]    # without a RUN: all runs of stage 3 in out/

A line shows the responses that the policy learns from, and dots show held-out prompts. A metric that a run
does not have is left out. For example, offline DPO samples no responses while it learns.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {  # title: metrics of the x axis and of the y axis
    "reward (dots: held-out prompts)": ("step", "reward"),
    "KL to the SFT model, nats/response": ("step", "kl"),
    "reward against KL": ("kl", "reward"),
    "entropy, nats/token": ("step", "entropy"),
    "share of clipped terms": ("step", "clip_fraction"),
    "response length, tokens": ("step", "response_length"),
}


def check(condition, message):
    """Ends the program with a one-line error message if the condition does not hold."""
    if not condition:
        sys.exit(f"error: {message}")


def read_metrics(run):
    """Returns the lines of metrics.jsonl as dicts, without a line that is still being written."""
    path = Path(run, "metrics.jsonl")
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def draw_run(axis, rows, x, y, **style):
    """Draws one metric of a run against another, from training as a line and from evaluations as dots."""
    for prefix, marks in (("", {"lw": 1, "alpha": 0.5}), ("eval_", {"ls": "", "marker": "o", "ms": 5})):
        keys = [key if key == "step" else prefix + key for key in (x, y)]
        points = [[row[key] for key in keys] for row in rows if all(key in row for key in keys)]
        axis.plot([point[0] for point in points], [point[1] for point in points], **marks, **style)


def main(args):
    output = Path(args.output)
    writable = output.suffix == ".png" and (output.is_file() or not output.exists())
    check(writable, f"{output} is no file for a picture; give --output NAME.png")
    runs = args.runs or [str(path.parent) for path in sorted(Path("out").glob("*/metrics.jsonl"))]
    metrics = {run: read_metrics(run) for run in runs}
    found = [run for run in runs if any({"kl", "eval_kl"} & row.keys() for row in metrics[run])]
    check(found and set(args.runs) <= set(found), f"{args.runs or 'out'} holds no policy; run p3o.py first")
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    for axis, (title, (x, y)) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for i, run in enumerate(found):
            draw_run(axis, metrics[run], x, y, color=f"C{i % 10}")
        axis.set(title=title, xlabel="KL, nats/response" if x == "kl" else x)
    figure.legend(figure.axes[0].lines[1::2], found, loc="outside lower center", ncols=4)  # the dots
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    print(f"{output}: {', '.join(found)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="folders of runs; by default all of stage 3 in out/")
    parser.add_argument("--output", default="out/curves.png", help="picture to write")
    main(parser.parse_args())
