"""The chain from data to policy: what the scripts read, and what they leave for plain transformers and the next stage."""

import json
import math

import pytest
import torch
import transformers
from conftest import byte_tokenizer, run_script, word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import p3o
import sft

EVALUATED = "reward kl entropy response_length eos_rate".split()
METRICS = [*EVALUATED, *"loss clip_fraction log_ratio_max grad_norm frac_identical_pairs seconds".split()]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_are_taken_literally_and_long_ones_left_out_and_counted(tmp_path, capsys):
    """No special token is added but the EOS of a response. What stands in the text is what the model sees."""
    tokenizer = word_tokenizer(20)
    prompts = ["w3 <eos> w4", "w5", "w2 w2 w2 w2", "", "<eos>"]
    completions = ["w6 w7", "<eos>", "w3", "w4", "w8 w8 w8"]
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions)]
    name, splits = str(tmp_path), {"train": rows, "validation": rows[1:2], "test": rows[:1]}
    for split, some in splits.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    args = p3o.Args(dataset=name, prompt_length=3, response_length=3)
    found = p3o.read_prompts(["train"], tokenizer, args)
    expected = ("w3 <eos> w4", [3, 1, 4]), ("w5", [5]), ("<eos>", [1])
    assert found == [{"prompt": p, "prompt_ids": ids} for p, ids in expected]
    assert "3 of 5" in capsys.readouterr().out
    found = sft.read_rows(name, ["train"], ["completion"], tokenizer, args)
    assert [row["prompt_ids"] for row in found] == [[3, 1, 4], [5]]
    assert [row["response_ids"] for row in found] == [[[6, 7, 1]], [[1, 1]]]
    assert "2 of 5" in capsys.readouterr().out
    for splits, prompt in ((["validation", "test"], "w5"), (["dev", "test"], "w3 <eos> w4")):
        (held_out,) = p3o.read_prompts(splits, tokenizer, args)
        assert held_out["prompt"] == prompt, "the first of the splits that there is"


def test_the_order_of_the_data():
    """Passes over all rows, each in another order, whatever the size of a step. A step needs no other step."""
    single = sum([p3o.data_order(7, 1, step, seed=0) for step in range(1, 421)], [])
    passes = [single[i : i + 7] for i in range(0, 420, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes) and len({*map(tuple, passes)}) > 30
    for size in (3, 7, 10):
        steps = [p3o.data_order(7, size, step, seed=0) for step in range(1, 43)]
        assert sum(steps, []) == single[: 42 * size]
    assert p3o.data_order(100, 100, 1, seed=0) != p3o.data_order(100, 100, 1, seed=1)


def test_what_a_run_leaves(p3o_run):
    folder, printed = p3o_run
    rows = read_lines(folder / "metrics.jsonl")
    evaluated = {f"eval_{name}" for name in [*EVALUATED, "gain"]}
    names = [evaluated, *[METRICS] * 5, evaluated | {*METRICS}]
    assert [set(row) for row in rows] == [{"step", *some} for some in names]
    assert [row["step"] for row in rows] == list(range(7))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["eval_kl"] == rows[0]["eval_gain"] == 0
    samples = read_lines(folder / "samples_6.jsonl")
    assert len(samples) == 64 and all(set(sample) == {"prompt", "response", "reward"} for sample in samples)
    mean = sum(sample["reward"] for sample in samples) / 64
    assert rows[6]["eval_reward"] == pytest.approx(mean, rel=1e-6)
    gain = mean - sum(sample["reward"] for sample in read_lines(folder / "samples_0.jsonl")) / 64
    assert rows[6]["eval_gain"] == pytest.approx(gain, abs=1e-6)
    last = f"{folder}, step 6: gain {gain:.2f} over the SFT model, reward {mean:.3f} at KL {rows[6]['eval_kl']:.2f} nats"
    assert printed.splitlines()[-1].startswith(last)
    args = json.loads((folder / "args.json").read_text())["args"]
    assert args["steps"] == 6 and set(args) == set(vars(p3o.Args()))
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "checkpoint.pt"} <= files
    assert not [name for name in files if "new" in name or "tmp" in name]
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("stage", ["sft", "p3o"])
def test_plain_transformers_samples_and_stops_at_eos(chain, p3o_run, stage):
    """50 answers of the saved folder's generate(), given nothing: it knows the length, too."""
    folder = p3o_run[0] if stage == "p3o" else chain / "out/sft"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["please review the cafe and mention the coffee :"] * 50, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    ended = 0
    for answer in ids.tolist():
        length = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else 24
        assert len(answer) <= 24 and set(answer[length + 1 :]) <= {tokenizer.pad_token_id}
        ended += length < 24
    assert ended > 25 and len({tuple(answer) for answer in ids.tolist()}) > 25


@torch.no_grad()
def test_the_reward_model_of_plain_transformers_gives_the_same_scores(chain):
    """Its forward pass, on one text and on a padded batch of texts."""
    folder = chain / "out/reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "please review the cafe and mention the coffee :"
    responses = ["the coffee was lovely .", "i hated it", ""]
    prompt_ids = [tokenizer(prompt)["input_ids"]] * 3
    response_ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in responses]
    batch = sft.pad_rows(prompt_ids, response_ids, tokenizer, p3o.Args(device="cpu"))
    texts = [f"{prompt} {text} {tokenizer.eos_token}" for text in responses]
    scores = p3o.read_score(model, **batch)
    alone = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
    together = model(**tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")).logits[:, 0]
    assert scores.std() > 0.1
    torch.testing.assert_close(torch.stack(alone), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, scores, atol=1e-5, rtol=1e-5)


def test_bfloat16_runs_and_starts_at_the_reference(chain, tmp_path):
    flags = ["--steps", 1, "--prompts_per_step", 4, "--minibatch_size", 4, "--eval_prompts", 8, "--epochs", 1]
    done = run_script("p3o.py", *flags, "--dtype", "bfloat16", "--output_dir", tmp_path / "run", cwd=chain)
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert rows[0]["eval_kl"] == 0 and rows[1]["log_ratio_max"] == 0, "one update, so the first ratio"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32


def test_from_preference_pairs_to_an_aligned_policy(tmp_path):
    """Dialogues as in HH-RLHF, a small model of another source, and every stage with the flags of the recipe."""
    dialogue = "\n\nHuman: say {}{}\n\nAssistant: {}"
    pairs = [(f"{i}", word) for i in range(50) for word in ("yes", "no")]
    rows = [{"chosen": dialogue.format(w, i, w), "rejected": dialogue.format(w, i, "no!")} for i, w in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512, "vocab_size": len(tokenizer)}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **ids)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def stage(script, *flags):
        done = run_script(script, *flags, cwd=tmp_path)
        assert done.returncode == 0, f"{script}: {done.stdout[-1000:]}{done.stderr[-2000:]}"

    lengths = ["--dataset", "data/hh", "--prompt_length", 256, "--response_length", 128]
    sizes = [*lengths, "--minibatch_size", 16, "--micro_batch_size", 4]
    stage("data.py", "--dataset", "pairs.jsonl", "--model", "base", "--output_dir", "data/hh")
    stage("sft.py", "--model", "base", *sizes, "--learning_rate", 1e-3, "--steps", 5)
    stage("reward_model.py", *sizes, "--learning_rate", 1e-3, "--steps", 5)
    stage("p3o.py", *sizes, "--learning_rate", 1e-3, "--beta", 0.05, "--steps", 1)
    stage("evaluate.py", *lengths)
    stage("frontier.py")
    policies = json.loads((tmp_path / "out/evaluation/summary.json").read_text())["policies"]
    assert {"sft", "p3o"} == set(policies)
    assert all(math.isfinite(policy["reward"]) and policy["eos_rate"] > 0 for policy in policies.values())
    assert policies["p3o"]["kl"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/p3o")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.max_new_tokens == 128
