"""How fast are p3o.py and ppo.py, and how much memory do they take, beside TRL's trainers on the same work?

    python results/speed/run.py --plots_only     table and picture from runs.jsonl
    python results/speed/run.py                  measures again; run nothing beside it

Every program runs on its own from the command line, with the same model, prompts, reward, lengths, batch and
passes, in turns with the others, five times. TRL's two trainers need different versions of trl, so that
--rloo_python and --ppo_python name a Python each that has them; without, there is no peer. The toy's model
has 0.43M parameters and gives 128 responses a step. GPT-2 has 124M with random weights, and gives 16.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import lib
from measure import PEERS, SIZES, make_gpt2, measure_all
from toy_task import Toy

COLORS = {"p3o.py": lib.METHODS["P3O"].color, "ppo.py": lib.METHODS["PPO"].color} | dict.fromkeys(
    PEERS.values(), "#999999"
)


def tables(found):
    rows = []
    for x in found.points:
        row = {
            "model": x["model"],
            "program": f"{x['program']}, {x['threads']} thread{'s' * (x['threads'] > 1)}",
        }
        row["completions a second"] = tuple(x["completions_per_second"])
        row |= {"times the speed of TRL's": tuple(x["speed_over_trl"]) if x["speed_over_trl"] else None}
        rows.append(row | {"memory, GB": f"{x['memory_gb']:.2f}"})
    about = sorted({f"{x['hardware']}, torch {x['torch']}, commit {x['commit']}" for x in found.points})
    source = f"Measured on {'; '.join(about)}. In brackets: the least and the most of five runs in turns. "
    return {
        "source": source + "A rerun takes about an hour on two cores that do nothing else.",
        "speed": rows,
    }


def picture(found):
    figure, axes = lib.axes(2, 5.6, 3.4)
    for axis, model in zip(axes, SIZES):
        points = [x for x in found.points if x["model"] == model and x["threads"] == 2][::-1]
        for place, x in enumerate(points):
            value, low, high = x["completions_per_second"]
            axis.barh(
                place, value, xerr=[[value - low], [high - value]], color=COLORS[x["program"]], capsize=4
            )
        axis.set_yticks(range(len(points)), [f"{x['program']}\n{x['memory_gb']:.2f} GB" for x in points])
        axis.set_title(f"{model}, two CPU threads", fontsize=11)
        axis.set_xlabel("completions trained on in a second")
    figure.suptitle(
        "p3o.py keeps up with TRL's RLOOTrainer, and ppo.py is faster than TRL's PPOTrainer", fontsize=13
    )
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--plots_only", action="store_true", help="table and picture from runs.jsonl")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=[*SIZES], help="default: both")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every program")
    parser.add_argument("--rloo_python", help="a Python that has trl 1.16.0; without, there is no such peer")
    parser.add_argument("--ppo_python", help="a Python that has trl 1.10.0; without, there is no such peer")
    parser.add_argument("--keep", action="store_true", help="put the new lines into the committed runs.jsonl")
    args = parser.parse_args(argv)
    home, out = Path(__file__).resolve().parent, lib.OUT / "speed"
    page, points = (home / "README.md").read_text(), lib.read_lines(home / "runs.jsonl")
    if not args.plots_only:
        with tempfile.TemporaryDirectory() as folder:
            paths = {"toy": Toy().prepare(SimpleNamespace(device="cpu"))}
            paths["GPT-2, 124M"] = make_gpt2(Path(folder)) if "GPT-2, 124M" in args.models else None
            lines = measure_all(args, paths)
        out.mkdir(parents=True, exist_ok=True)
        lib.write_lines(out / "runs.jsonl", lines)
        now = lib.write_report(out, page, SimpleNamespace(points=lines), tables, picture)
        lib.compare(tables(SimpleNamespace(points=points)), now)
        if not args.keep:
            return
        lib.write_lines(home / "runs.jsonl", lines)
        points = lines
    lib.write_report(home, page, SimpleNamespace(points=points), tables, picture)
    print(f"speed: {len(points)} measurements read from runs.jsonl")


if __name__ == "__main__":
    main()
