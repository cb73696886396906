"""An equivalent problem: the reward, and the weight of the KL, four times as large."""

import lib
from toy_task import Toy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOUR = {"reward_model": "out/results/toy/reward_model_times_four", "beta": 4 * lib.BETA}
FOUR |= {"missing_eos_penalty": 4.0}  # it belongs to the reward


class ToyTimesFour(Toy):
    """The toy, with one more reward model. Its score is four times that of the other one, to the last bit."""

    def prepare(self, args):
        paths, folder = super().prepare(args), lib.ROOT / FOUR["reward_model"]
        if not (folder / "config.json").exists():
            AutoTokenizer.from_pretrained(paths["reward_model"]).save_pretrained(folder)
            model = AutoModelForSequenceClassification.from_pretrained(paths["reward_model"])
            model.score.weight.data *= 4  # the score head has no bias
            model.save_pretrained(folder)
        return paths

    def complete(self, point, found):
        """What is compared is always the objective with the one reward model and beta."""
        return super().complete(point | {"flags": point["flags"] | {"beta": lib.BETA}}, found)
