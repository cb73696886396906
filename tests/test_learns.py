"""Short real runs on the toy raise the reward by far more than its sampling error."""

import json
import statistics

import pytest
from conftest import QUICK, run_script


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    "script, options",
    [
        ("p3o.py", None),  # the run that other tests read too
        ("p3o.py", ["--clipping", "separate", "--max_importance_weight", 10]),
        ("p3o.py", ["--clipping", "none", "--epochs", 1, "--num_responses", 4]),
        ("ppo.py", []),
        ("dpo.py", ["--online", "--labels", "sampled"]),
    ],
    ids=["p3o-v2", "p3o-v1", "pairwise-gradient-4-responses", "ppo", "online-dpo"],
)
def test_the_reward_rises(chain, p3o_run, tmp_path, script, options):
    folder = p3o_run[0]
    if options is not None:
        folder = tmp_path / "run"
        done = run_script(script, *QUICK, *options, "--output_dir", folder, cwd=chain)
        assert done.returncode == 0, done.stderr
    rewards = {0: [], 6: []}
    for sample in read(folder, "samples.jsonl"):
        rewards[sample["step"]].append(sample["reward"])
    before, after = rewards[0], rewards[6]
    error = (statistics.variance(before) / len(before) + statistics.variance(after) / len(after)) ** 0.5
    assert len(before) == 64 and statistics.mean(after) - statistics.mean(before) > 4 * error
    metrics = read(folder, "metrics.jsonl")
    assert metrics[0]["eval_kl"] == 0  # the policy starts as the reference
    assert 0 < metrics[-1]["eval_kl"] < 15
    if script != "dpo.py":  # labels hide by how much a response is better: so few steps overshoot in KL
        assert metrics[-1]["eval_objective"] > metrics[0]["eval_objective"]
    assert [row["step"] for row in metrics] == list(range(7))


def test_sft_and_reward_model_learn(chain):
    sft, reward = read(chain / "out/sft", "metrics.jsonl"), read(chain / "out/reward_model", "metrics.jsonl")
    assert sft[-1]["eval_perplexity"] < sft[0]["eval_perplexity"] / 4
    assert reward[-1]["eval_loss"] < reward[0]["eval_loss"]
    assert reward[0]["step"] == 0 and 0 <= reward[-1]["eval_calibration_error"] < 0.5
