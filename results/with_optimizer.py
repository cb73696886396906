"""A training script with another learning-rate schedule, or another beta2 of Adam, than the one it has.

    python results/with_optimizer.py p3o.py constant [--flags of p3o.py]     or cosine, or a beta2: 0.999

The scripts have neither flag: it was tried here whether they should, see distance.md.
"""

import importlib
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHAPES = {  # the learning rate over its start, given the share of the run that is left; the scripts': linear
    "constant": lambda left: 1.0,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
}


def make_adam(change):
    """torch.optim.Adam for one parameter group, with the schedule or the beta2 that `change` names.

    The scripts set a falling rate before each step, the first time the whole: it is kept in the group, and so
    in checkpoints, and for a step the rate is put where the other schedule has it.
    """

    class Adam(torch.optim.Adam):
        def __init__(self, params, *others, **options):
            if change not in SHAPES:
                options["betas"] = (options["betas"][0], float(change))
            super().__init__(params, *others, **options)

        def step(self):
            (group,) = self.param_groups
            linear = group["lr"]
            start = group.setdefault("start", linear)
            group["lr"] = start * SHAPES[change](linear / start) if change in SHAPES else linear
            super().step()
            group["lr"] = linear

    return Adam


if __name__ == "__main__":
    script, change = sys.argv.pop(1), sys.argv.pop(1)
    torch.optim.Adam = make_adam(change)
    module = importlib.import_module(script.removesuffix(".py"))
    module.guard(module.main, module.Args)
