"""How fast are p3o.py and ppo.py, and how much memory do they take, beside TRL's trainers on the same work?

    python results/speed/run.py --plots_only     table and picture from runs.jsonl
    python results/speed/run.py                  measures again; run nothing beside it

Every program runs on its own from the command line, with the same model, prompts, reward, lengths, batch and
passes, in turns with the others, five times. --trl_python names a Python that has trl 1.16.0; without it
RLOOTrainer takes no part. PPOTrainer left TRL after 1.10.0; its lines come from commit b5e62c8. The toy's
model has 0.43M parameters and gives 128 responses a step. GPT-2 has 124M with random weights, and gives 16.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import lib
from measure import SIZES, make_gpt2, measure_all
from toy_task import Toy

COLORS = {"p3o.py": lib.METHODS["P3O"].color, "ppo.py": lib.METHODS["PPO"].color}


def tables(found):
    rows = []
    for x in found.points:
        threads = f"{x['threads']} thread{'s' * (x['threads'] > 1)}"
        row = {"model": x["model"], "program": f"{x['program']}, {threads}"}
        row["completions a second"] = tuple(x["completions_per_second"])
        row |= {"times the speed of TRL's": tuple(x["speed_over_trl"]) if x["speed_over_trl"] else None}
        rows.append(row | {"memory, GB": f"{x['memory_gb']:.2f}"})
    about = sorted({f"{x['hardware']}, torch {x['torch']}, commit {x['commit']}" for x in found.points})
    source = f"Measured on {'; '.join(about)}. In brackets: the least and the most of five runs in turns. "
    source += "A rerun takes about an hour on two cores that do nothing else."
    return {"source": source, "speed": rows}


def picture(found):
    figure, axes = lib.axes(2, 5.6, 3.4)
    for axis, model in zip(axes, SIZES):
        points = [x for x in found.points if x["model"] == model and x["threads"] == 2][::-1]
        for place, x in enumerate(points):
            value, low, high = x["completions_per_second"]
            look = {"color": COLORS.get(x["program"], "#999999"), "capsize": 4}
            axis.barh(place, value, xerr=[[value - low], [high - value]], **look)
        axis.set_yticks(range(len(points)), [f"{x['program']}\n{x['memory_gb']:.2f} GB" for x in points])
        axis.set(title=f"{model}, two CPU threads", xlabel="completions trained on in a second")
    figure.suptitle("p3o.py keeps up with TRL's RLOOTrainer, and ppo.py is faster than TRL's PPOTrainer")
    return figure


def main(argv=None):
    options = {"models": {"nargs": "+", "choices": SIZES, "default": [*SIZES], "help": "default: both"}}
    options["repeats"] = {"type": int, "default": 5, "help": "runs of every program"}
    options["trl_python"] = {"help": "a Python with trl 1.16.0; without it RLOOTrainer takes no part"}

    def measure(args):
        with tempfile.TemporaryDirectory() as folder:
            paths = {"toy": Toy().prepare(SimpleNamespace(device="cpu"))}
            paths["GPT-2, 124M"] = make_gpt2(Path(folder)) if "GPT-2, 124M" in args.models else None
            return measure_all(args, paths)

    def merge(committed, lines):
        return [*{(x["model"], x["threads"], x["program"]): x for x in (*committed, *lines)}.values()]

    lib.report(__file__, argv, options, measure, lambda x: SimpleNamespace(points=x), merge, tables, picture)


if __name__ == "__main__":
    main()
