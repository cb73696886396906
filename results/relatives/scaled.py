"""p3o.py with every score multiplied by a number: a problem with the same solution if beta is multiplied too.

python results/relatives/scaled.py --reward_scale 4 --beta 2    after the quick start; flags of p3o.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o  # noqa: E402


@dataclass
class Args(p3o.Args):
    reward_scale: float = p3o.flag(1.0, "number that multiplies each score and the missing-EOS penalty")


def main(args):
    score_batch = p3o.score_batch

    def scaled(batch, *others):
        score_batch(batch, *others)
        batch["score"] *= args.reward_scale

    p3o.score_batch = scaled
    p3o.main(args)


if __name__ == "__main__":
    main(Args(**vars(transformers.HfArgumentParser(Args, allow_abbrev=False).parse_args())))
