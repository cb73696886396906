"""sft.py against loops over unpadded texts, and what its folder is to later stages and to plain transformers."""

import io
import json
import math
import random
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, GPT2Config

import p3o
import sft

TOKENIZER = word_tokenizer(20)


def tiny_model(vocab_size=20, n_embd=16, spread=0.3):
    torch.manual_seed(0)
    size = {"vocab_size": vocab_size, "n_positions": 32, "n_embd": n_embd, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**size, bos_token_id=None, eos_token_id=1, initializer_range=spread)
    return AutoModelForCausalLM.from_config(config).eval()


def random_rows(B):
    rng = random.Random(0)
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
    loss = torch.stack(naive_nll(model, rows)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    args = sft.Args(micro_batch_size=micro_batch_size, max_grad_norm=1e9, steps=10, device="cpu")
    args.minibatch_size, args.learning_rate = 5, 0.1 / sft.lr_share(3, args.steps)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    metrics = sft.train_step(3, model, torch.optim.SGD(model.parameters()), rows, TOKENIZER, args)
    found = (before - torch.nn.utils.parameters_to_vector(model.parameters()).detach()) / 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    wanted = [loss.item(), expected.norm().item()]
    assert [metrics["loss"], metrics["grad_norm"]] == pytest.approx(wanted, rel=1e-4)


def test_held_out_perplexity_is_a_mean_over_all_tokens():
    model, rows = tiny_model(), random_rows(7)
    with torch.no_grad():
        terms = [term.item() for term in naive_nll(model, rows)]
    metrics = sft.held_out_perplexity(model, rows, TOKENIZER, sft.Args(micro_batch_size=3, device="cpu"))
    loss = sum(terms) / len(terms)
    assert metrics == pytest.approx({"eval_loss": loss, "eval_perplexity": math.exp(loss)}, rel=1e-5)


def test_the_learning_rate_rises_and_falls():
    shares = [sft.lr_share(step, 100) for step in range(1, 101)]
    assert shares[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert shares[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 100)])
    assert max(shares) == 1 and sft.lr_share(1, 1) == pytest.approx(1 / 0.9)


def without(model, name, instead):
    """The model, whose trunk never sees this input, but something instead."""
    forward = model.base_model.forward
    model.base_model.forward = lambda **inputs: forward(**inputs | {name: instead(inputs[name])})
    return model


def tiny_bert(is_decoder):
    torch.manual_seed(0)
    size = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(**size, num_attention_heads=2, is_decoder=is_decoder, initializer_range=0.3)
    return BertLMHeadModel(config).eval()


MODELS = {  # name: (how to make it, whether it passes)
    "gpt2": (tiny_model, True),
    "causal bert": (lambda: tiny_bert(True), True),
    "bert": (lambda: tiny_bert(False), False),
    "pads attended to": (lambda: without(tiny_model(), "attention_mask", torch.ones_like), False),
    "positions that count pads": (lambda: without(tiny_model(), "position_ids", lambda ids: None), False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pad", [0, 1])  # 1 is EOS
def test_the_probe_tells_decoders_from_other_models(name, pad):
    make, passes = MODELS[name]
    probe = make(), word_tokenizer(20, pad=pad), SimpleNamespace(model="some/model", device="cpu")
    refused = pytest.raises(SystemExit, match="^error: some/model sees padding or later .*; use a decoder")
    with nullcontext() if passes else refused:
        sft.probe_model(*probe)


def train(folder, rows, eos=None, **options):
    """sft.py's main on these rows in this process; metrics.jsonl as a list. eos: what data.py recorded."""
    data = folder.with_name(f"{folder.name}_data")
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if eos:
        (data / "data.json").write_text(json.dumps({"eos_token": eos}))
    small = {"prompt_length": 8, "response_length": 6, "minibatch_size": 8, "device": "cpu"}
    sft.main(sft.Args(dataset=str(data), output_dir=str(folder), **small | options))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def save_model(folder, model=None, tokenizer=TOKENIZER):
    (model or tiny_model()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ROWS = [{"prompt": f"w{i} w3", "completion": f"w{i + 1} w{i}"} for i in range(2, 18)]


def test_chosen_serves_where_there_is_no_completion(tmp_path):
    """A preference data set is enough for all stages. The rejected responses and a `completion` beside are told apart."""
    model, losses = save_model(tmp_path / "model"), {}
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "w2"} for row in ROWS]
    both = [row | {"chosen": "w2", "rejected": "w2"} for row in ROWS]
    for name, rows in {"plain": ROWS, "pairs": pairs, "both": both}.items():
        metrics = train(tmp_path / name, rows, model=model, steps=3)
        losses[name] = [line.get("loss", line.get("eval_loss")) for line in metrics]
    assert len(losses["plain"]) == 4 and losses["plain"] == losses["pairs"] == losses["both"]


@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_an_end_of_turn_that_the_tokenizer_lacks_is_refused(eos, tmp_path):
    """Also a tokenizer without any EOS, and a folder in which the tokenizer's files are missing."""
    folder = save_model(tmp_path / "model")
    if eos is None:
        for file in (tmp_path / "model").glob("tokenizer*"):
            file.unlink()
    with pytest.raises(SystemExit, match="^error: .*no tokenizer or no token .*; use another model$"):
        train(tmp_path / "run", ROWS, eos, model=folder, steps=1)
    assert not (tmp_path / "run").exists()


def test_the_end_of_a_turn_that_data_py_found_ends_texts_from_here_on(tmp_path):
    """The model learns x -> ab, closed by <|im_end|> and not by its old EOS; so the folder's generate() stops
    there, as do the later stages, which read the tokenizer."""
    tokenizer = byte_tokenizer(chat_template=CHATML, eos_token="</s>")
    save_model(tmp_path / "base", tiny_model(len(tokenizer), n_embd=32, spread=0.1), tokenizer)
    rows, options = [{"prompt": "x", "completion": "ab"}] * 8, {"steps": 20, "learning_rate": 0.02}
    train(tmp_path / "run", rows, "<|im_end|>", model=str(tmp_path / "base"), **options)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    written = AutoTokenizer.from_pretrained(tmp_path / "run")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    later = SimpleNamespace(model=str(tmp_path / "run"), dataset=str(tmp_path / "run_data"))
    assert written.eos_token_id == p3o.load_tokenizer(later).eos_token_id == end
    assert plain.generation_config.eos_token_id == plain.config.eos_token_id == end
    answers = plain.generate(**written(["x"] * 50, return_tensors="pt"))[:, 1:].tolist()
    assert sum(answer[:3] == [*tokenizer("ab")["input_ids"], end] for answer in answers) > 40
    assert all(set(y[y.index(end) + 1 :]) <= {written.pad_token_id} for y in answers if end in y)
    later.model = str(tmp_path / "base")
    with pytest.raises(SystemExit, match="run sft.py first"):
        p3o.load_tokenizer(later)


def test_a_run_goes_on_from_the_weights_of_another(tmp_path, capsys):
    """The second begins with the perplexity that the first has reached."""
    first = train(tmp_path / "one", ROWS, model=save_model(tmp_path / "model"), steps=5, learning_rate=0.01)
    assert len(first) == 6 and first[5]["eval_loss"] < first[0]["eval_loss"] - 0.1
    second = train(tmp_path / "two", ROWS, model=str(tmp_path / "one"), steps=1)
    assert second[0]["eval_loss"] == pytest.approx(first[-1]["eval_loss"], rel=1e-6)
    line = f"{tmp_path}/one, step 5: perplexity {math.exp(first[-1]['eval_loss']):.2f} on 16 held-out rows"
    assert line in capsys.readouterr().out.splitlines()


def test_samples_come_after_the_last_checkpoint_and_before_the_last_line(tmp_path, monkeypatch):
    """What the terminal cannot show becomes a question mark; a failure there costs nothing."""
    tokenizer = byte_tokenizer(eos_token="</s>", pad_token="<pad>")
    folder = save_model(tmp_path / "model", tiny_model(len(tokenizer)), tokenizer)
    rows, options = [{"prompt": "ł≥é", "completion": "猫"}] * 8, {"steps": 1, "prompt_length": 9}
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        train(tmp_path / "run", rows, model=folder, **options)
    terminal.flush()
    *_, first, second, third, last = terminal.buffer.getvalue().decode("cp1252").splitlines()
    assert all(line.startswith("  '??é' -> '") for line in (first, second, third))
    assert last.startswith(f"{tmp_path}/run, step 1: perplexity ")
    monkeypatch.setattr(sft, "print_samples", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "two", rows, model=folder, **options)
    assert torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)["step"] == 1
