"""Short real runs raise the reward by far more than its sampling error, for every variant of the RL scripts."""

import json
import random
import statistics

import pytest
import torch
from conftest import word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import dpo
import p3o
import ppo


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def gain(folder, steps):
    """The mean reward on the held-out prompts after the run minus that before it, in standard errors."""
    before, after = (read(folder, "metrics.jsonl")[step]["eval_reward"] for step in (0, steps))
    rewards = [[row["reward"] for row in read(folder, f"samples_{step}.jsonl")] for step in (0, steps)]
    assert [statistics.mean(values) for values in rewards] == pytest.approx([before, after], rel=1e-5)
    return (after - before) / sum(statistics.variance(values) / len(values) for values in rewards) ** 0.5


def test_the_chain_learns(chain, p3o_run):
    """The SFT model, the reward model and P3O, each from what the stage before it left."""
    folders = chain / "out/sft", chain / "out/reward_model", p3o_run[0]
    sft, reward, metrics = (read(folder, "metrics.jsonl") for folder in folders)
    assert sft[-1]["eval_perplexity"] < sft[0]["eval_perplexity"] / 4
    assert reward[-1]["eval_loss"] < reward[0]["eval_loss"]
    assert gain(p3o_run[0], steps=6) > 4
    assert metrics[0]["eval_kl"] == 0 < metrics[-1]["eval_kl"] < 15


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random model of one layer and prompts of random words."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    torch.manual_seed(0)
    size = {"vocab_size": 12, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=None, eos_token_id=1)).save_pretrained(folder / "lm")
    word_tokenizer(12).save_pretrained(folder / "lm")
    (folder / "prompts").mkdir()
    for split in ("train", "validation"):
        prompts = [" ".join(f"w{rng.randrange(2, 12)}" for _ in range(rng.randint(1, 6))) for _ in range(64)]
        rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        (folder / "prompts" / f"{split}.jsonl").write_text("".join(rows))
    return folder


VARIANTS = {
    "p3o-v2": (p3o, {}),
    "p3o-v1": (p3o, {"clipping": "separate", "max_importance_weight": 10.0}),
    "pairwise-gradient-4-responses": (p3o, {"clipping": "none", "epochs": 1, "num_responses": 4}),
    "ppo": (ppo, {"critic_init": "sft"}),
    "ppo-penalty": (ppo, {"critic_init": "sft", "policy_loss": "penalty"}),
    "online-dpo": (dpo, {"online": True, "labels": "sampled"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_a_reward_of_ones_own(name, world, tmp_path, monkeypatch):
    """The reward is a function of the texts in the place of load_reward: 1 for every w5, -1 for every w7."""
    script, options = VARIANTS[name]

    def reward(batch):
        return [text.count("w5") - text.count("w7") for text in batch["response"]]

    monkeypatch.setattr(script, "load_reward", lambda *_: reward)
    settings = {"model": f"{world}/lm", "dataset": f"{world}/prompts", "output_dir": f"{tmp_path}/run"}
    settings |= {"prompts_per_step": 16, "minibatch_size": 8, "steps": 12, "learning_rate": 3e-3, "beta": 0.1}
    settings |= {"prompt_length": 6, "response_length": 8, "missing_eos_penalty": 0.0, "eval_every": 100}
    script.main(script.Args(**settings | {"eval_prompts": 64, "save_every": 100} | options))
    metrics = read(tmp_path / "run", "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(13))
    assert gain(tmp_path / "run", steps=12) > 6
    assert metrics[0]["eval_kl"] == 0 < metrics[-1]["eval_kl"] < 40
