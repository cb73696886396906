"""The embedded task as a world for runs: what all of them start from, and how they are measured.

Gain: the mean reward minus that of the SFT model on the same prompts. KL: to the SFT model, exact, in nats
per response. Objective: gain minus beta times KL, which is what every method maximises. Share: the gain as
a part of the gain of the best policy there can be at the same KL.
"""

import json
import statistics
from bisect import bisect_right

import lib

PROMPTS, RESPONSES = 128, 16  # test prompts, and responses to each
POOLED = 32  # responses of each policy to each prompt that draw the optimum


class Toy:
    """Data, SFT model and reward model in out/results/toy, which every question shares."""

    options = {"device": {"default": "cpu", "help": "where to train; the committed runs come from a CPU"}}

    def prepare(self, args):
        base, self.flags = lib.OUT / "toy", {"device": args.device}
        lib.train("toy.py", base / "data")
        lib.train("sft.py", base / "sft", model=base / "data/model", dataset=base / "data/sft", **self.flags)
        flags = {"model": base / "sft", "dataset": base / "data/preferences"} | self.flags
        lib.train("reward_model.py", base / "reward_model", **flags)
        data = {name: base / "data" / name for name in ("prompts", "preferences")}
        return {"model": base / "sft", "reward_model": base / "reward_model"} | data

    def measure(self, folder, paths):
        """Means over the responses, and every gold reward: of the SFT model, and of a run."""
        flags = {"dataset": paths["prompts"], "num_prompts": PROMPTS, "samples_per_prompt": RESPONSES}
        flags |= {"reward_model": paths["reward_model"], "missing_eos_penalty": 1.0} | self.flags
        policies, lines = lib.answers(f"{folder}.answers", [folder], **flags), []
        names = {"reward": "reward", "gold_reward": "gold_reward", "kl": "kl_exact", "length": "length"}
        for rows in (policies["sft"], policies[folder.name]):
            line = {x: round(statistics.fmean(row[y] for row in rows), 6) for x, y in names.items()}
            lines.append(line | {"gold": [round(row["gold_reward"], 2) for row in rows]})
        return lines

    def complete(self, point, found):
        """Adds gain, gold_gain, objective and share, which is None where the optimum is not known."""
        point["gain"] = point["reward"] - found.sft["reward"]
        point["gold_gain"] = point["gold_reward"] - found.sft["gold_reward"]
        point["objective"] = point["gain"] - point["flags"]["beta"] * point["kl"]
        best = best_gain(found, point["kl"])
        return point | {"share": point["gain"] / best if best else None}


def best_gain(found, kl):
    """The largest gain there can be at a KL, linear in its root between points; None where it is unknown."""
    if not found.optimum or kl <= 1e-6:
        return None
    points = zip(found.optimum["kl"], found.optimum["reward"])
    curve = [(0.0, 0.0)] + [(k**0.5, reward - found.sft["reward"]) for k, reward in points if k > 1e-6]
    right = bisect_right([x for x, _ in curve], kl**0.5)
    if right == len(curve):
        return None
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (kl**0.5 - x0) / (x1 - x0)


class ToyWithOptimum(Toy):
    """The same, with the curve of the best policies there can be."""

    def optimum(self, folder, paths):
        """The curve from the answers of P3O and PPO at four betas, on a seed that is in no interval."""
        runs = [lib.run(name, 0, beta=beta) for name in ("P3O", "PPO") for beta in (0.1, 0.25, 0.5, 1.0)]
        folders, place = [folder / lib.name_of(one) for one in runs], folder / "optimum"
        for one, where in zip(runs, folders):
            lib.train_run(one, where, paths, self.flags)
        flags = {"dataset": paths["prompts"], "num_prompts": PROMPTS, "samples_per_prompt": POOLED}
        flags |= {"seed": 12345, "overwrite": True} | self.flags
        lib.call("evaluate.py", *map(str, folders), output_dir=place, **flags)
        lib.call("frontier.py", input_dir=place)
        curve = json.loads((place / "summary.json").read_text())["optimal_frontier"]
        return {x: [float(f"{point[x]:.7g}") for point in curve] for x in ("kl", "reward")}
