"""The chain from data to policy: every stage's folder is an ordinary one that plain transformers loads."""

import json

import pytest
import torch
from conftest import ROOT, run_script
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import p3o

SMALL = ["--steps", 2, "--prompts_per_step", 4, "--minibatch_size", 2, "--eval_prompts", 8]
METRICS = """reward objective kl entropy perplexity response_length eos_rate clip_fraction log_ratio_max grad_norm
    frac_identical_pairs tokens_per_second seconds_rollout seconds_score seconds_update peak_memory_gb""".split()
EVALUATED = ["reward", "objective", "kl", "entropy", "perplexity", "response_length", "eos_rate"]


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "p3o"
    done = run_script("p3o.py", *SMALL, "--output_dir", folder, cwd=chain)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_policy_loads_in_plain_transformers_and_answers(run):
    folder, printed = run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("please review the cafe and mention the coffee :", return_tensors="pt")
    ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5)
    assert inputs["input_ids"].shape[1] < ids.shape[1] <= inputs["input_ids"].shape[1] + 5
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["models"][""]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert printed.splitlines()[-1].startswith(f"{folder}: reward ")


def test_the_reward_model_of_plain_transformers_gives_the_same_scores(chain):
    folder = chain / "out/reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("please review the cafe and mention the coffee :")["input_ids"]
    response = tokenizer("the coffee was lovely .")["input_ids"] + [tokenizer.eos_token_id]
    batch = *p3o.pad([prompt], "left", 0, "cpu"), *p3o.pad([response], "right", 0, "cpu")
    with torch.no_grad():
        plain = model(torch.tensor([prompt + response])).logits[0, 0]
        torch.testing.assert_close(p3o.read_score(model, *batch)[0], plain)


def test_what_a_run_leaves(run):
    folder, _ = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert set(METRICS) <= set(rows[1]) and {f"eval_{name}" for name in EVALUATED} <= set(rows[2])
    assert rows[1]["log_ratio_first"] < 1e-4 and rows[0]["eval_kl"] == 0
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 8 + [2] * 8
    assert set(samples[0]) == {"step", "prompt", "response", "reward", "kl"}
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["steps"] == 2 and record["args"]["micro_batch_size"] == 2
    assert record["versions"]["torch"].startswith("2.") and "git_commit" in record


@pytest.mark.parametrize("options", [[], ["--clipping", "separate"]])
def test_micro_batches_do_not_change_the_run(chain, tmp_path, options):
    """Sums of gradients in another order: equal up to rounding, not to the bit."""
    losses = []
    for size in (2, 1):
        folder = tmp_path / str(size)
        options = [*options, "--micro_batch_size", size, "--output_dir", folder]
        assert run_script("p3o.py", *SMALL, *options, cwd=chain).returncode == 0
        losses.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1])
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-3, abs=1e-6)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-3)


def test_bfloat16_runs_and_starts_at_the_reference(chain, tmp_path):
    done = run_script("p3o.py", *SMALL, "--dtype", "bfloat16", "--output_dir", tmp_path / "run", cwd=chain)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_kl"] == 0 and rows[1]["log_ratio_first"] < 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32


def test_no_script_writes_beside_its_output(run):
    assert not list(run[0].parent.glob("*.args.json")) and not list(run[0].glob("*new*"))
    assert not (ROOT / "out").is_symlink()
