"""A training script with an offset for each place in its reward: like --reward_shift, but to be learnt.

    python results/shift_by_place.py ppo.py 6.8 [--flags of ppo.py]     6.8: standard deviation of the offsets

The offset of a prompt depends on the place it asks about: a critic can read it off the prompt. It is in the
rewards that the run logs; reproduce.py measures policies without it.
"""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy


def place_offsets(size):
    """{place: offset}, mean 0, standard deviation `size`; multiples of 1/256: float64 adds them exactly."""
    draws = torch.randn(len(toy.PLACES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = (draws - draws.mean()) / draws.std(unbiased=False) * size
    return dict(zip(toy.PLACES, ((draws * 256).round() / 256).tolist()))


def main(script, size):
    module, offsets = importlib.import_module(script.removesuffix(".py")), place_offsets(size)
    plain_reward = module.load_reward

    def load_reward(tokenizer, args):
        reward = plain_reward(tokenizer, args)

        def shifted(batch):
            shifts = [sum(offsets.get(word, 0.0) for word in prompt.split()) for prompt in batch["prompt"]]
            return reward(batch).double() + torch.tensor(shifts, dtype=torch.float64, device=args.device)

        return shifted

    module.load_reward = load_reward
    module.guard(module.main, module.Args)


if __name__ == "__main__":
    script, size = sys.argv.pop(1), float(sys.argv.pop(1))
    main(script, size)
