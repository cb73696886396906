"""A training script whose reward gets an offset for each place of the toy's world, which a critic can learn.

    python results/invariance/offsets_by_place.py ppo.py --place_shift 6.8 [flags of ppo.py]

6.8 is the standard deviation of the offsets. A prompt's offset is that of the place it asks about. It is in
the rewards that the run logs, but policies are measured without it.
"""

import importlib
import sys
from pathlib import Path

import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import toy


def place_offsets(size):
    """{place: offset}, mean 0, standard deviation `size`; multiples of 1/256: float64 adds them exactly."""
    draws = torch.randn(len(toy.PLACES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = (draws - draws.mean()) / draws.std(unbiased=False) * size
    return dict(zip(toy.PLACES, ((draws * 256).round() / 256).tolist()))


def add_offsets(module, size):
    """Puts the offsets on the scores of the reward that the module loads."""
    offsets, plain = place_offsets(size), module.load_reward

    def load_reward(*args):
        reward = plain(*args)

        def shifted(batch):
            shifts = [sum(offsets.get(word, 0.0) for word in prompt.split()) for prompt in batch["prompt"]]
            score = torch.as_tensor(reward(batch)).double()
            return score + torch.tensor(shifts, dtype=torch.float64, device=score.device)

        return shifted

    module.load_reward = load_reward


def main(words):
    module, at = importlib.import_module(words[0].removesuffix(".py")), words.index("--place_shift")
    add_offsets(module, float(words[at + 1]))
    parser = HfArgumentParser(module.Args, allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses([*words[1:at], *words[at + 2 :]], look_for_args_file=False)
    module.main(args)


if __name__ == "__main__":
    main(sys.argv[1:])
