"""The chain from data to policy: what the scripts read, and folders that plain transformers loads and that sample as in training."""

import json
import math

import pytest
import torch
from conftest import ROOT, run_script, word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import p3o
import sft

EVALUATED = """reward reward_std objective kl kl_std kl_exact entropy perplexity response_length
    eos_rate""".split()
METRICS = """loss clip_fraction log_ratio_max log_ratio_first grad_norm frac_identical_pairs tokens_per_second
    seconds_rollout seconds_score seconds_update peak_memory_gb""".split()
METRICS += EVALUATED


# -------------------------------------------------------------------------------------------- what they read
def save(folder, **splits):
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_texts_are_taken_literally_and_long_ones_left_out_and_counted(tmp_path, capsys):
    """No special token is added but the EOS of a response; what stands in the text is what the model sees."""
    tokenizer = word_tokenizer(20)
    prompts = ["w3 <eos> w4", "w5", "w2 w2 w2 w2", "", "<eos>"]
    completions = ["w6 w7", "<eos>", "w3", "w4", "w8 w8 w8"]
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions)]
    name = save(tmp_path / "data", train=rows, validation=rows[1:2], test=rows[:1])
    args = p3o.Args(prompt_length=3, response_length=3)
    found = p3o.read_prompts(name, ["train"], tokenizer, args)
    assert found == [
        {"prompt": p, "prompt_ids": ids}
        for p, ids in (("w3 <eos> w4", [3, 1, 4]), ("w5", [5]), ("<eos>", [1]))
    ]
    assert capsys.readouterr().out == f"{name} [train]: 3 of 5 prompts are within --prompt_length\n"
    found = sft.read_rows(name, ["train"], ["completion"], tokenizer, args)
    assert [row["prompt_ids"] for row in found] == [[3, 1, 4], [5]]
    assert [row["response_ids"] for row in found] == [[[6, 7, 1]], [[1, 1]]]
    assert (
        capsys.readouterr().out
        == f"warning, less than half: {name} [train]: 2 of 5 rows are within the length limits\n"
    )
    both = sft.read_rows(name, ["train"], ["completion", "prompt"], tokenizer, p3o.Args(), limit=2)
    assert [row["response_ids"] for row in both] == [[[6, 7, 1], [3, 1, 4, 1]], [[1, 1], [5, 1]]]
    assert sft.read_rows(name, ["train"], [], tokenizer, args)[0] == {
        "prompt": "w3 <eos> w4",
        "prompt_ids": [3, 1, 4],
        "response_ids": [],
    }
    (held_out,) = p3o.read_prompts(name, ["validation", "test"], tokenizer, args)
    assert held_out["prompt"] == "w5", "the first of the splits that there is"
    (held_out,) = p3o.read_prompts(name, ["dev", "test"], tokenizer, args)
    assert held_out["prompt"] == "w3 <eos> w4"


def test_too_few_rows_or_no_such_data_end_in_one_line(tmp_path, capsys):
    long = [{"prompt": "w2 " * 9}] * 9
    name = save(tmp_path / "data", train=[{"prompt": "w3"}] + long)
    cases = {
        "train": "1 of 10 prompts are within --prompt_length 3; raise it",
        "test": "cannot read data set",
    }
    for split, message in cases.items():
        with pytest.raises(SystemExit, match="2"):
            p3o.read_prompts(name, [split], word_tokenizer(20), p3o.Args(prompt_length=3))
        assert message in capsys.readouterr().err
    name = save(tmp_path / "more", train=[{"prompt": "w3"}] * 2 + long)
    assert len(p3o.read_prompts(name, ["train"], word_tokenizer(20), p3o.Args(prompt_length=3))) == 2


def test_the_order_of_the_data():
    """Passes over all rows, each in another order, whatever the size of a step; a step needs no other."""
    for size in (1, 3, 7, 10):
        steps = [p3o.data_order(7, size, step, seed=0) for step in range(1, 43)]
        rows = sum(steps, [])
        assert all(len(step) == size for step in steps)
        passes = [rows[i : i + 7] for i in range(0, len(rows) - 6, 7)]
        assert all(sorted(one) == list(range(7)) for one in passes)
        assert len({tuple(one) for one in passes}) > len(passes) // 2
        assert rows == sum([p3o.data_order(7, 1, step, seed=0) for step in range(1, len(rows) + 1)], [])
    assert p3o.data_order(100, 100, 1, seed=0) != p3o.data_order(100, 100, 1, seed=1)


# ------------------------------------------------------------------------------------------- what they leave
def test_what_a_run_leaves(p3o_run):
    folder, printed = p3o_run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))
    evaluated = {f"eval_{name}" for name in EVALUATED}
    assert set(rows[0]) == {"step"} | evaluated and set(rows[6]) == {"step", *METRICS} | evaluated
    assert all(set(row) == {"step", *METRICS} for row in rows[1:6])
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["eval_kl"] == 0 and all(row["log_ratio_first"] < 1e-4 for row in rows[1:])
    samples = [json.loads(line) for line in (folder / "samples_6.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [6] * 64
    assert all(set(sample) == {"step", "prompt", "response", "reward"} for sample in samples)
    mean = sum(sample["reward"] for sample in samples) / 64
    assert rows[6]["eval_reward"] == pytest.approx(mean, rel=1e-6)
    last = f"{folder}: reward {mean:.3f} at KL {rows[6]['eval_kl']:.2f} nats/response on held-out prompts; 6 steps, "
    assert printed.splitlines()[-1].startswith(last)
    args = json.loads((folder / "args.json").read_text())["args"]
    assert args["steps"] == 6 and args["micro_batch_size"] == 8 and set(args) == set(vars(p3o.Args()))
    files = {path.name for path in folder.iterdir()}
    assert files == {path.name for path in folder.iterdir() if "new" not in path.name}
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "checkpoint.pt"} <= files
    assert [path.name for path in folder.parent.iterdir()] == ["p3o"] and not (ROOT / "out").is_symlink()
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"][""]
    for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("stage", ["sft", "p3o"])
def test_plain_transformers_samples_as_in_training_and_stops_at_eos(chain, p3o_run, stage):
    """50 answers of the saved folder's own generate(), given nothing."""
    folder = p3o_run[0] if stage == "p3o" else chain / "out/sft"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = "please review the cafe and mention the coffee :"
    inputs = tokenizer([prompt] * 50, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    assert model.generation_config.max_new_tokens == 24 >= ids.shape[1], (
        "--response_length is in the folder too"
    )
    ended = 0
    for answer in ids.tolist():
        length = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else 24
        assert set(answer[length + 1 :]) <= {tokenizer.pad_token_id}, "goes on after EOS"
        ended += length < 24
    assert ended > 25 and len({tuple(answer) for answer in ids.tolist()}) > 25
    args = p3o.Args(model=str(folder), device="cpu")
    policy = p3o.load_model(AutoModelForCausalLM, args.model, tokenizer, args)
    torch.manual_seed(0)
    row = {"prompt": prompt, "prompt_ids": tokenizer(prompt)["input_ids"]}
    batch = p3o.sample_batch(policy, [row], 50, tokenizer, args)
    assert torch.equal(batch["response_ids"], ids) and batch["ended"].sum() == ended


def test_the_reward_model_of_plain_transformers_gives_the_same_scores(chain):
    """Its own forward pass, on one text and on a padded batch of texts."""
    folder = chain / "out/reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "please review the cafe and mention the coffee :"
    responses = ["the coffee was lovely .", "i hated it", ""]
    prompt_ids = [tokenizer(prompt)["input_ids"]] * 3
    response_ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in responses]
    batch = *p3o.pad(prompt_ids, "left", tokenizer, "cpu"), *p3o.pad(response_ids, "right", tokenizer, "cpu")
    texts = [f"{prompt} {text} {tokenizer.eos_token}" for text in responses]
    with torch.no_grad():
        scores = p3o.read_score(model, *batch)
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
        together = model(**tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")).logits[
            :, 0
        ]
    assert scores.std() > 0.1
    torch.testing.assert_close(torch.stack(alone), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, scores, atol=1e-5, rtol=1e-5)


def test_bfloat16_runs_and_starts_at_the_reference(chain, tmp_path):
    flags = ["--steps", 1, "--prompts_per_step", 4, "--minibatch_size", 2, "--eval_prompts", 8]
    done = run_script("p3o.py", *flags, "--dtype", "bfloat16", "--output_dir", tmp_path / "run", cwd=chain)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_kl"] == 0 and rows[1]["log_ratio_first"] < 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32
