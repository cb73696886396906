"""sft.py against loops over unpadded texts, and what its folder is to later stages and to plain transformers."""

import json
import math
import random
import signal

import pytest
import torch
from conftest import CHATML, byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import p3o
import sft

TOKENIZER = word_tokenizer(20)


def tiny_model(vocab_size=20, n_embd=16, spread=0.3):
    torch.manual_seed(0)
    size = {"vocab_size": vocab_size, "n_positions": 32, "n_embd": n_embd, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**size, bos_token_id=None, eos_token_id=1, initializer_range=spread)
    return GPT2LMHeadModel(config).eval()


def random_rows(B, seed=0):
    rng = random.Random(seed)
    texts = [[rng.randrange(20) for _ in range(rng.randint(1, 7))] for _ in range(2 * B)]
    return [{"prompt_ids": texts[b], "response_ids": [texts[B + b] + [1]]} for b in range(B)]


def naive_nll(model, rows):
    """-log p of every completion token, one unpadded text at a time."""
    terms = []
    for row in rows:
        ids, start = row["prompt_ids"] + row["response_ids"][0], len(row["prompt_ids"])
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        terms += [-logps[t - 1, ids[t]] for t in range(start, len(ids))]
    return terms


# -------------------------------------------------------------------------------------------------- the loss


def test_loss_and_gradient_against_naive_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=generator, requires_grad=True)
    tokens = torch.randint(0, 5, (3, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]]) > 0
    total, gradient = 0.0, torch.zeros(3, 6, 5)
    for b, t in mask.nonzero().tolist():
        row = [math.exp(x) for x in logits[b, t - 1].tolist()]
        total -= math.log(row[tokens[b, t]] / sum(row)) / 9
        gradient[b, t - 1] = torch.tensor([x / sum(row) / 9 for x in row])
        gradient[b, t - 1, tokens[b, t]] -= 1 / 9
    loss = sft.completion_loss(logits, tokens, mask)
    assert loss.shape == () and loss.item() == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient, atol=1e-7, rtol=1e-5)
    low = sft.completion_loss(logits.bfloat16(), tokens, mask)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])  # of 5 rows: 2 leaves a short last one
def test_a_step_descends_the_mean_over_completion_tokens(micro_batch_size):
    """EOS is in it, prompt and padding are not; micro-batches weigh as they have tokens."""
    model, rows = tiny_model(), random_rows(5)
    terms = naive_nll(model, rows)
    loss = sum(terms) / len(terms)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    args = sft.Args(micro_batch_size=micro_batch_size, max_grad_norm=1e9, steps=10, device="cpu")
    args.learning_rate = 0.1 / sft.lr_share(3, args.steps)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    metrics = sft.update_on_rows(model, torch.optim.SGD(model.parameters(), 1.0), rows, 3, TOKENIZER, args)
    found = (before - torch.nn.utils.parameters_to_vector(model.parameters()).detach()) / 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


def test_held_out_perplexity_is_a_mean_over_all_tokens():
    model, rows = tiny_model(), random_rows(7)
    with torch.no_grad():
        terms = [term.item() for term in naive_nll(model, rows)]
    metrics = sft.held_out_perplexity(0, model, rows, TOKENIZER, sft.Args(micro_batch_size=3, device="cpu"))
    assert metrics["eval_loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-5)


# ------------------------------------------------------------------------------------------------ its folder


def train(folder, monkeypatch, rows, eos=None, **options):
    """sft.py's main on these rows in this process; metrics.jsonl as a list. eos: what data.py recorded."""
    data = folder.with_name(f"{folder.name}_data")
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if eos:
        (data / "data.json").write_text(json.dumps({"eos_token": eos}))
    monkeypatch.setattr(signal, "signal", lambda *ignored: None)  # pytest keeps its own handlers
    small = {"prompt_length": 8, "response_length": 6, "minibatch_size": 8, "device": "cpu"}
    sft.main(sft.Args(dataset=str(data), output_dir=str(folder), **small | options))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_end_of_a_turn_that_data_py_found_ends_texts_from_here_on(tmp_path, monkeypatch):
    """The model learns x -> ab, closed by <|im_end|> and not by its old EOS; so the folder's generate() stops
    there, as do the later stages, which read the tokenizer."""
    tokenizer = byte_tokenizer(chat_template=CHATML, eos_token="</s>")
    tiny_model(len(tokenizer), n_embd=32, spread=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows, options = [{"prompt": "x", "completion": "ab"}] * 8, {"steps": 20, "learning_rate": 0.02}
    train(tmp_path / "run", monkeypatch, rows, "<|im_end|>", model=str(tmp_path / "base"), **options)
    plain, written = (
        kind.from_pretrained(tmp_path / "run") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert written.eos_token_id == p3o.load_tokenizer(str(tmp_path / "run")).eos_token_id == end
    assert plain.generation_config.eos_token_id == end
    answers = plain.generate(**written(["x"] * 50, return_tensors="pt"))[:, 1:].tolist()
    ended = [answer for answer in answers if end in answer]
    assert sum(answer[:3] == [*tokenizer("ab")["input_ids"], end] for answer in answers) > 40
    assert all(set(answer[answer.index(end) + 1 :]) <= {written.pad_token_id} for answer in ended)


def test_a_folder_without_weights_is_initialised_at_random_and_says_so(tmp_path, monkeypatch, capsys):
    """By the seed; with weights it starts from them."""
    tiny_model().config.save_pretrained(tmp_path / "empty")
    TOKENIZER.save_pretrained(tmp_path / "empty")
    rows, first = [{"prompt": f"w{i} w3", "completion": f"w{i + 1}"} for i in range(2, 18)], {}
    for name, options in {"one": {"seed": 0}, "same": {"seed": 0}, "other": {"seed": 1}}.items():
        metrics = train(tmp_path / name, monkeypatch, rows, model=str(tmp_path / "empty"), steps=2, **options)
        first[name] = metrics[0]["eval_loss"]
        assert "holds no weights: initialised at random, 0.01M parameters" in capsys.readouterr().out
    assert first["one"] == first["same"] != first["other"]
    metrics = train(tmp_path / "on", monkeypatch, rows, model=str(tmp_path / "one"), steps=2)
    printed = capsys.readouterr().out
    assert "at random" not in printed
    last = (tmp_path / "one/metrics.jsonl").read_text().splitlines()[-1]
    assert metrics[0]["eval_loss"] == pytest.approx(json.loads(last)["eval_loss"], rel=1e-6)
    assert [line.split(" -> ")[0] for line in printed.splitlines() if " -> " in line] == [
        "  'w2 w3'",
        "  'w3 w3'",
        "  'w4 w3'",
    ]
