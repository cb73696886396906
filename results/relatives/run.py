"""How does P3O compare with RLOO, GRPO, Dr. GRPO, PPO and online DPO, at equal samples and at equal seconds?

    python results/relatives/run.py --plots_only     tables and picture from runs.jsonl
    python results/relatives/run.py                  trains and measures everything again; needs trl

Every method starts from the same SFT model and reward model. Its learning rate is the best of three on seed
0. With K responses to a prompt a rollout has 128 responses, so that 60 steps sample 7,680. For equal seconds
each method does as many steps as fit into the time of 60 steps of PPO, by the seconds in SECONDS.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lib
from toy_task import Toy

SEEDS, RATES = range(1, 6), (1e-4, 3e-4, 1e-3)
K = {
    2: {},
    4: {"num_responses": 4, "prompts_per_step": 32, "minibatch_size": 16},
    8: {"num_responses": 8, "prompts_per_step": 16, "minibatch_size": 8},
}
METHODS = {  # in the tables: the method, the number of responses to a prompt, the best learning rate
    "P3O, K = 2": ("P3O", 2, 3e-4),
    "P3O, K = 4": ("P3O", 4, 3e-4),
    "P3O, K = 8": ("P3O", 8, 3e-4),
    "RLOO, K = 2": ("RLOO of TRL", 2, 3e-4),
    "RLOO, K = 8": ("RLOO of TRL", 8, 3e-4),
    "GRPO, K = 2": ("GRPO of TRL", 2, 3e-4),
    "GRPO, K = 8": ("GRPO of TRL", 8, 3e-4),
    "Dr. GRPO, K = 2": ("Dr. GRPO of TRL", 2, 3e-4),
    "Dr. GRPO, K = 8": ("Dr. GRPO of TRL", 8, 3e-4),
    "PPO, K = 2": ("PPO", 2, 3e-4),
    "online DPO": ("online DPO", None, 1e-4),
}


def job(name, seed, part, rate=None, script=None, **flags):
    method, responses, best = METHODS[name]
    flags = K.get(responses, {}) | {"learning_rate": rate or best} | flags
    return lib.run(method, seed, {"name": name, "part": part}, script, **flags)


PLAN = [job(name, 0, "tuning", rate) for name in METHODS for rate in RATES]


def tables(found):
    tuning = []
    for name in METHODS:
        row = {"method": name}
        for rate in RATES:
            points = [x for x in found.pick(name=name, part="tuning") if x["flags"]["learning_rate"] == rate]
            row[f"{rate:g}"] = lib.interval(points, "objective")
        tuning.append(row)
    return {"tuning": tuning}


def picture(found):
    return lib.axes(1, 6, 4)[0]


if __name__ == "__main__":
    lib.main(__file__, PLAN, tables, picture, Toy())
