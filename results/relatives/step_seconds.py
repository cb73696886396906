"""Measures how many seconds a step of every method takes, with one thread. Run nothing beside it.

python results/relatives/step_seconds.py     writes step_seconds.json; needs trl
"""

import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

RESULTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(RESULTS / "relatives"), str(RESULTS), str(RESULTS / "speed")]

import lib  # noqa: E402
from measure import measure  # noqa: E402
from run import METHODS, job  # noqa: E402
from toy_task import Toy  # noqa: E402

ROUNDS, STEPS = 3, 10  # a round goes through all methods, so that a slow minute hits all of them


def main():
    paths, rounds = Toy().prepare(SimpleNamespace(device="cpu")), {name: [] for name in METHODS}
    paths = {"dataset": paths["prompts"]} | {x: paths[x] for x in ("model", "reward_model")}
    for number, name in [(number, name) for number in range(ROUNDS) for name in METHODS]:
        one = job(name, number, "seconds", steps=STEPS, device="cpu")
        rounds[name].append(measure([sys.executable, *one["script"].split()], 1, **paths, **one["flags"])[0])
        print(f"{name}: {rounds[name][-1]:.3f} seconds a step", flush=True)
    seconds = {name: round(statistics.median(values), 4) for name, values in rounds.items()}
    found = {"seconds": seconds, "rounds": rounds} | lib.origin()
    Path(__file__).with_name("step_seconds.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
