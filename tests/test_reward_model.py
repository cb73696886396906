"""reward_model.py against plain Python mathematics, unpadded forward passes and plain transformers."""

import itertools
import json
import math
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import reward_model
from reward_model import bradley_terry_loss


def naive_loss(chosen, rejected, margin):
    """Mean of -log P(chosen beats rejected) over lists of floats, P = 1 / (1 + exp(-(difference - margin)))."""
    losses = [-math.log(1 / (1 + math.exp(-(c - r - margin)))) for c, r in zip(chosen, rejected, strict=True)]
    return sum(losses) / len(losses)


def gradients(chosen, rejected, margin=0.0):
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    loss = bradley_terry_loss(chosen, rejected, margin=margin)
    return loss.detach(), *torch.autograd.grad(loss, (chosen, rejected))


@pytest.mark.parametrize("margin", [0.0, 0.75, -2.0])
def test_loss_and_gradient_against_naive_loops(margin):
    scores = 3 * torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, *grads = gradients(*scores, margin)
    assert loss.shape == () and loss.item() == pytest.approx(naive_loss(*scores.tolist(), margin), rel=1e-12)
    for side, b in itertools.product(range(2), range(40)):
        move = torch.zeros_like(scores)
        move[side, b] = 1e-5
        up, down = (naive_loss(*(scores + sign * move).tolist(), margin) for sign in (1, -1))
        assert grads[side][b].item() == pytest.approx((up - down) / 2e-5, abs=1e-9)


@pytest.mark.parametrize("scale", [1, 100, 10000])
def test_equivalent_rewards_change_no_bit(scale):
    """r -> r + delta(x) for any delta; on multiples of 1/8 float32 adds without rounding, so equality is exact."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randint(-80, 80, (2, 4096), generator=generator) / 8
    delta = torch.randint(-8 * scale, 8 * scale, (4096,), generator=generator) / 8
    shifted = gradients(chosen + delta, rejected + delta)
    assert all(map(torch.equal, gradients(chosen, rejected), shifted))


@pytest.mark.parametrize(
    "difference, expected, slope", [(1e4, 0, 0), (-1e4, 1e4, -1), (0, math.log(2), -0.5)]
)
def test_extreme_differences_stay_finite(difference, expected, slope):
    chosen = torch.full((2,), difference / 2)
    loss, *grads = gradients(chosen, -chosen)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.cat(grads).tolist() == pytest.approx([slope / 2] * 2 + [-slope / 2] * 2, rel=1e-6)


def test_calibration_error_against_a_naive_loop():
    """A tie is half right."""
    difference = 2 * torch.randn(300, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    difference[:20] = 0
    bins = {}
    for d in difference.tolist():
        sure = 1 / (1 + math.exp(-abs(d)))
        bins.setdefault(min(int((sure - 0.5) * 14), 6), []).append((sure, (d > 0) / 2 + (d >= 0) / 2))
    means = [[sum(column) / len(pairs) for column in zip(*pairs)] for pairs in bins.values()]
    expected = sum(len(pairs) * abs(a - b) for (a, b), pairs in zip(means, bins.values())) / 300
    assert len(bins) == 7 and expected > 0.1
    assert reward_model.calibration_error(difference, bins=7) == pytest.approx(expected, rel=1e-9)
    assert reward_model.calibration_error(torch.tensor([-50.0, 50.0, 50.0])) == pytest.approx(1 / 3)


SIZES = dict(vocab_size=20, initializer_range=0.3, eos_token_id=1, bos_token_id=None, pad_token_id=None)
LLAMA = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, **SIZES),
    "llama": transformers.LlamaConfig(max_position_embeddings=64, num_key_value_heads=1, **LLAMA, **SIZES),
}


def sft_model(folder, name="gpt2", pad=1):
    """A random language model and its tokenizer, saved as sft.py would leave them. Returns (folder, tokenizer)."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
    word_tokenizer(20, pad=pad).save_pretrained(folder)
    return str(folder), reward_model.load_tokenizer(SimpleNamespace(model=folder, dataset="none"))


def args_for(model, **changes):
    return reward_model.Args(model=model, device="cpu", **({"micro_batch_size": 4, "steps": 10} | changes))


def random_rows(B):
    """Preference pairs of random words, of all lengths; responses end in EOS, which also stands inside some."""
    rng = random.Random(0)
    texts = [[rng.randrange(20) for _ in range(rng.randint(1, 7))] + [1] for _ in range(3 * B)]
    return [{"prompt_ids": texts[b][:-1], "response_ids": texts[B + b :: B]} for b in range(B)]


def lone_score(model, ids):
    """The score of one text, unpadded: the head on the state of its last token."""
    return model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1])[0]


@pytest.mark.parametrize("lm_coef", [0.0, 0.7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])  # of 5 pairs: 2 leaves a short last one
def test_a_step_descends_the_loss_of_its_pairs(tmp_path, micro_batch_size, lm_coef):
    """The gradient is that of a loop over unpadded texts, with the LM loss of [Secrets] per token of the chosen."""
    folder, tokenizer = sft_model(tmp_path)
    args = args_for(folder, micro_batch_size=micro_batch_size, lm_coef=lm_coef, margin=0.3, max_grad_norm=1e9)
    args.minibatch_size, args.learning_rate = 5, 0.1 / reward_model.lr_share(3, args.steps)
    model, language_model = reward_model.make_reward_model(tokenizer, args)
    rows = random_rows(5)
    losses, likelihood, tokens, right = 0.0, 0.0, 0, 0
    for row in rows:
        chosen, rejected = (lone_score(model, row["prompt_ids"] + y) for y in row["response_ids"])
        losses += torch.log1p(torch.exp(-(chosen - rejected - 0.3))) / 5
        right += (chosen > rejected).item()
        if lm_coef:
            assert language_model.base_model is model.base_model, "one trunk"
            prompt, response = row["prompt_ids"], row["response_ids"][0]
            hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
            logps = (hidden @ model.get_input_embeddings().weight.T).log_softmax(-1)  # the tied output layer
            likelihood += sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(response))
            tokens += len(response)
    loss = losses - (lm_coef * likelihood / tokens if lm_coef else 0)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters())
    metrics = reward_model.train_step(3, model, language_model, optimizer, rows, tokenizer, args)
    found = (before - torch.nn.utils.parameters_to_vector(model.parameters()).detach()) / 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    wanted = {"loss": loss.item(), "accuracy": right / 5, "grad_norm": expected.norm().item()}
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_held_out_metrics_are_means_over_all_pairs(tmp_path):
    (folder, tokenizer), rows = sft_model(tmp_path), random_rows(7)
    model, _ = reward_model.make_reward_model(tokenizer, args_for(folder))
    metrics = reward_model.held_out_accuracy(0, model, rows, tokenizer, args_for(folder, micro_batch_size=3))
    scores = [lone_score(model, row["prompt_ids"] + y).item() for row in rows for y in row["response_ids"]]
    margins = [chosen - rejected for chosen, rejected in zip(scores[::2], scores[1::2])]
    expected = {"eval_loss": sum(math.log1p(math.exp(-m)) for m in margins) / 7}
    expected["eval_accuracy"] = sum(m > 0 for m in margins) / 7
    expected["eval_calibration_error"] = reward_model.calibration_error(torch.tensor(margins))
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_an_sft_model_gets_a_new_head_and_a_reward_model_keeps_its_own(tmp_path):
    folder, tokenizer = sft_model(tmp_path / "sft")
    make = lambda seed: reward_model.make_reward_model(tokenizer, args_for(folder, seed=seed))[0]  # noqa: E731
    one, other = make(0), make(1)
    assert torch.equal(one.score.weight, make(0).score.weight)
    heads = torch.cat([one.score.weight, other.score.weight])  # 32 draws
    assert heads.std().item() == pytest.approx(1 / math.sqrt(17), rel=0.3) and (heads[0] != heads[1]).all()
    start = AutoModelForCausalLM.from_pretrained(folder)
    assert all(map(torch.equal, one.base_model.parameters(), start.base_model.parameters()))
    other.save_pretrained(folder)  # over it
    assert torch.equal(make(0).score.weight, other.score.weight)


def run(tmp_path, folder, eos=None, **options):
    """reward_model.py's main on a few pairs in this process. eos: what data.py recorded."""
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        rows = [{"prompt": f"w{i} w3", "chosen": f"w{i + 1} w5", "rejected": "w6"} for i in range(2, 10)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if eos:
        (tmp_path / "data/data.json").write_text(json.dumps({"eos_token": eos}))
    args = args_for(folder, dataset=str(tmp_path / "data"), output_dir=str(tmp_path / "rm"), **options)
    args.prompt_length, args.response_length, args.minibatch_size = 8, 8, 4
    reward_model.main(args)


@pytest.mark.parametrize("name, pad", [("gpt2", 1), ("gpt2", 0), ("llama", 1), ("llama", 0)])
def test_plain_transformers_gives_the_scores_of_a_written_folder(name, pad, tmp_path):
    """Its own forward pass on single texts, also where EOS pads (1), and on batches where it does not (0)."""
    folder, _ = sft_model(tmp_path / "sft", name, pad)
    run(tmp_path, folder, steps=2)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    responses = [[token or 2 for token in row["response_ids"][0]] for row in random_rows(6)]  # no pad of 0
    batch = reward_model.pad_rows([[3, 4]] * 6, responses, tokenizer, args_for(folder))
    texts = [[3, 4] + response for response in responses]
    with torch.no_grad():
        scores = reward_model.read_score(model, **batch)
        alone = torch.stack([model(torch.tensor([text])).logits[0, 0] for text in texts])
        torch.testing.assert_close(alone, scores, atol=1e-5, rtol=1e-5)
        together = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        with nullcontext() if pad == 0 else pytest.raises(ValueError, match="padding token"):
            torch.testing.assert_close(model(**together).logits[:, 0], scores, atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.1 and model.score.weight.dtype == torch.float32


def test_the_last_line_and_the_log_have_the_held_out_metrics(tmp_path, capsys):
    run(tmp_path, sft_model(tmp_path / "sft")[0], epochs=1, steps=None, eval_every=1)
    log = [json.loads(line) for line in (tmp_path / "rm/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2], "8 pairs, 4 in a step"
    text = "accuracy {eval_accuracy:.3f}, calibration error {eval_calibration_error:.3f}".format(**log[2])
    assert capsys.readouterr().out.endswith(f"{tmp_path}/rm, step 2: {text} on 8 held-out pairs\n")


FAULTS = {"encoder": "lacks the weights", "NaN": "use a decoder-only", "turns": "run sft.py first"}


@pytest.mark.parametrize("fault", FAULTS)
def test_models_that_do_not_suit_end_in_one_line(fault, tmp_path):
    """An encoder, whose head is not `score`; weights that are no numbers; other ends of texts than the data have."""
    folder, _ = sft_model(tmp_path / "sft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    if fault == "encoder":
        config = transformers.BertConfig(**LLAMA, vocab_size=20, num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config)
    if fault == "NaN":
        model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = math.nan
    model.save_pretrained(folder)
    with pytest.raises(SystemExit, match=f"^error: .*{FAULTS[fault]}"):
        run(tmp_path, folder, eos="w3" if fault == "turns" else None, steps=1)
    assert not (tmp_path / "rm").exists()
