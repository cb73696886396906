"""Compares learning rates: three for each method, in a quarter of the steps, on seed 0.

python results/language/tune.py     trains, or goes on, and writes tuning.jsonl
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import lib  # noqa: E402
from film_reviews import FilmReviews  # noqa: E402
from run import BETA, STEPS, keep_freed_memory, one_run  # noqa: E402

# Both were tried at 2e-5 and 4e-5, and then at the next rate on the side of the better one.
GRID = {"P3O": (2e-5, 4e-5, 8e-5), "PPO": (1e-5, 2e-5, 4e-5)}


def main(argv=None):
    parser, world, lines = argparse.ArgumentParser(allow_abbrev=False), FilmReviews(), []
    for name, more in world.options.items():
        parser.add_argument(f"--{name}", **more)
    keep_freed_memory()
    paths = world.prepare(parser.parse_args(argv))
    for method, rate in [(method, rate) for method in GRID for rate in GRID[method]]:
        one = one_run(method, method, rate, 0, STEPS // 4)
        folder = lib.OUT / "language" / lib.name_of(one)
        lib.train_run(one, folder, paths, world.flags)
        end = lib.read_lines(folder / "metrics.jsonl")[-1]  # on the validation prompts
        values = {"gain": end["eval_gain"], "KL": end["eval_kl"], "ended by EOS": end["eval_eos_rate"]}
        values["objective"] = values["gain"] - BETA * values["KL"]
        lines.append({"method": method, "rate": rate} | {x: round(y, 3) for x, y in values.items()})
    lines[0] |= lib.origin()
    lib.write_lines(Path(__file__).with_name("tuning.jsonl"), lines)


if __name__ == "__main__":
    main()
