"""Log-probs, scores, masks and sampling of the RL scripts against unpadded loops and the library's numbers.

Models: tiny random GPT-2, Llama, GPT-NeoX and Qwen2, with weights large enough that every token matters. The
oracles run each row alone, without padding, in float64.
"""

import math

import pytest
import torch
from conftest import byte_tokenizer
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

import p3o
import reward_model
import sft

VOCAB, EOS = 23, 1
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": VOCAB, "initializer_range": 0.3, "eos_token_id": EOS, "bos_token_id": None}
CONFIGS = {
    "gpt2": (
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **COMMON),
        GPT2LMHeadModel,
        GPT2ForSequenceClassification,
    ),
    "llama": (
        LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **SIZES, **COMMON),
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    ),
    "gpt_neox": (
        GPTNeoXConfig(max_position_embeddings=64, **SIZES, **COMMON),
        GPTNeoXForCausalLM,
        GPTNeoXForSequenceClassification,
    ),
    "qwen2": (
        Qwen2Config(num_key_value_heads=2, max_position_embeddings=64, **SIZES, **COMMON),
        Qwen2ForCausalLM,
        Qwen2ForSequenceClassification,
    ),
}


# ---------------------------------------------------------------------------------------------------- helpers
def make(name, kind, dtype=torch.float64, **config):
    """A random model in eval mode; kind: 1 for the language model, 2 for the sequence classifier."""
    torch.manual_seed(0)
    settings = CONFIGS[name][0].to_dict() | config
    return CONFIGS[name][kind](type(CONFIGS[name][0])(**settings)).to(dtype).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request):
    return make(request.param, 1)


@pytest.fixture(scope="module", params=CONFIGS)
def scorer(request):
    return make(request.param, 2, num_labels=1, pad_token_id=0)


def draw(rows=5, seed=0, longest=9):
    """Random prompts and responses of different lengths; some responses hold EOS, and pad, in the middle."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows, 2), generator=g).tolist()
    return [[torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in pair] for pair in lengths]


def batch_of(rows, pad_id=0, extra_left=0, extra_right=0):
    """(prompt_ids, prompt_mask, response_ids, response_mask), padded, with columns of padding to spare."""
    columns = []
    for which, side, extra in ((0, "left", extra_left), (1, "right", extra_right)):
        length = max(len(row[which]) for row in rows) + extra
        ids = torch.full((len(rows), length), pad_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for b, row in enumerate(rows):
            at = slice(length - len(row[which]), length) if side == "left" else slice(0, len(row[which]))
            ids[b, at], mask[b, at] = torch.tensor(row[which]), True
        columns += [ids, mask]
    return columns


@torch.no_grad()
def naive_logps(model, row, temperature=1.0):
    """log p of each response token, a forward pass for each: no padding, mask or positions; float64."""
    prompt, response = row
    values = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1].double() / temperature
        values.append((logits[token] - torch.logsumexp(logits, 0)).item())
    return values


def assert_rows(result, rows, expected, atol=2e-6):
    """Every real token has its expected value, everything else is exactly 0."""
    for got, row, want in zip(result, rows, expected, strict=True):
        n = len(row[1])
        torch.testing.assert_close(got[:n].double(), torch.tensor(want).double(), atol=atol, rtol=1e-6)
        assert (got[n:] == 0).all()


# -------------------------------------------------------------------------------------------------- log-probs
def test_logps_equal_an_unpadded_loop(lm):
    rows = draw()
    result = p3o.response_logps(lm, *batch_of(rows))
    assert result.dtype == torch.float32
    assert result.shape == (5, max(len(row[1]) for row in rows))
    assert_rows(result, rows, [naive_logps(lm, row) for row in rows])


@pytest.mark.parametrize("temperature", [0.7, 1.9])
def test_temperature_divides_the_logits(lm, temperature):
    rows = draw(3, seed=1)
    result = p3o.response_logps(lm, *batch_of(rows), temperature=temperature)
    assert_rows(result, rows, [naive_logps(lm, row, temperature) for row in rows])


def test_logps_are_the_librarys_own_loss(lm):
    """The library's loss (prompt and padding labelled -100) is our mean per response token; sft.py's too."""
    batch = prompt_ids, prompt_mask, response_ids, response_mask = batch_of(draw(seed=2))
    ids, mask = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    counted = torch.cat([torch.zeros_like(prompt_mask), response_mask], 1)
    output = lm(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        labels=ids.masked_fill(~counted, -100),
    )
    mean = p3o.response_logps(lm, *batch).sum() / response_mask.sum()
    assert output.loss.item() == pytest.approx(-mean.item(), abs=1e-6)
    assert sft.completion_loss(output.logits, ids, counted).item() == pytest.approx(
        output.loss.item(), abs=1e-6
    )


def test_padding_changes_nothing(lm):
    """Neither padding, nor its content (EOS, any token), nor the batch's other rows show in the result."""
    rows = draw(4, seed=3)
    plain = p3o.response_logps(lm, *batch_of(rows))
    length = plain.shape[1]
    for pad_id, left, right in ((EOS, 0, 0), (7, 1, 0), (VOCAB - 1, 0, 3), (EOS, 6, 5)):
        result = p3o.response_logps(lm, *batch_of(rows, pad_id, left, right))
        torch.testing.assert_close(result[:, :length], plain, atol=1e-6, rtol=1e-6)
        assert (result[:, length:] == 0).all()
    batch = batch_of(rows, 0, 4, 4)
    for ids, mask in (batch[:2], batch[2:]):
        ids[~mask] = torch.randint(0, VOCAB, ((~mask).sum(),), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        p3o.response_logps(lm, *batch)[:, :length], plain, atol=1e-6, rtol=1e-6
    )  # every pad its own content
    for order in ([3, 1, 0, 2], [2], [0, 0, 3]):
        part = p3o.response_logps(lm, *batch_of([rows[b] for b in order], 0, 2))
        torch.testing.assert_close(part, plain[order][:, : part.shape[1]], atol=1e-6, rtol=1e-6)


def test_distributions_are_normalised_and_hold_the_logps(lm):
    batch = batch_of(draw(seed=5))
    distribution = p3o.response_distributions(lm, *batch)
    assert distribution.shape == (*batch[2].shape, VOCAB) and distribution.dtype == torch.float32
    torch.testing.assert_close(distribution.exp().sum(-1), torch.ones(batch[2].shape))
    picked = distribution.gather(-1, batch[2].unsqueeze(-1)).squeeze(-1).masked_fill(~batch[3], 0)
    assert torch.equal(picked, p3o.response_logps(lm, *batch))


def test_gradients_flow_and_none_from_masked_positions(lm):
    """The gradient of a padded batch is that of its rows alone; masked positions give none at all."""
    rows = draw(3, seed=6)
    weights = [
        torch.randn(len(row[1]), generator=torch.Generator().manual_seed(b)) for b, row in enumerate(rows)
    ]

    def gradient(batch, weight):
        lm.zero_grad()
        (p3o.response_logps(lm, *batch) * weight).sum().backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])

    batch = batch_of(rows, 0, 3, 3)
    weight = torch.full(
        batch[2].shape, 1e6
    )  # what stands behind the mask is weighted heavily, and must not show
    for b, w in enumerate(weights):
        weight[b, : len(w)] = w
    padded = gradient(batch, weight)
    alone = sum(gradient(batch_of([row]), w.unsqueeze(0)) for row, w in zip(rows, weights))
    assert padded.isfinite().all() and padded.abs().max() > 0.1
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
    assert gradient(batch, torch.ones(batch[2].shape) * ~batch[3]).abs().max() == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_whatever_the_models_dtype(name):
    """bfloat16 weights or autocast: log-probs and scores are float32, normalised, near the exact."""
    rows = draw(seed=7)
    batch = batch_of(rows)
    exact = p3o.response_logps(make(name, 1), *batch)
    low = make(name, 1, torch.bfloat16)
    scorers = make(name, 2, torch.float64, num_labels=1), make(name, 2, torch.bfloat16, num_labels=1)
    exact_score = p3o.read_score(scorers[0], *batch)
    with torch.no_grad():
        results = [(p3o.response_distributions(low, *batch), p3o.read_score(scorers[1], *batch))]
        with torch.autocast("cpu", torch.bfloat16):
            model, scorer = make(name, 1, torch.float32), make(name, 2, torch.float32, num_labels=1)
            results.append((p3o.response_distributions(model, *batch), p3o.read_score(scorer, *batch)))
    for distribution, score in results:
        assert distribution.dtype == score.dtype == torch.float32
        assert (distribution.exp().sum(-1) - 1).abs().max() < 1e-5
        logps = distribution.gather(-1, batch[2].unsqueeze(-1)).squeeze(-1).masked_fill(~batch[3], 0)
        assert (logps - exact).abs().mean() < 0.1 and (score - exact_score).abs().mean() < 0.1


class RolloutArgs:
    device, temperature, response_length, prompt_length = "cpu", 0.9, 6, 9
    micro_batch_size, missing_eos_penalty, max_grad_norm = 2, 1.0, 1.0
    clipping, clip_range, max_importance_weight = "joint", 0.2, None


def rollout(name):
    """A rollout of p3o.py with tiny random models, and the policy."""
    policy, reference = make(name, 1, torch.float32), make(name, 1, torch.float32, initializer_range=0.2)
    models = policy, reference, make(name, 2, torch.float32, num_labels=1), None
    examples = [{"prompt_ids": prompt} for prompt, _ in draw(4, seed=8)]
    torch.manual_seed(0)
    tokenizer = type("Tokenizer", (), {"pad_token_id": EOS, "eos_token_id": EOS})
    return p3o.rollout(models, examples, 3, EOS, tokenizer, RolloutArgs)[0], models, examples


@pytest.mark.parametrize("name", CONFIGS)
def test_first_ratio_is_exactly_one(name):
    """Old log-probs come from the forward pass of training: on the same rows no bit differs."""
    batch, (policy, *_), _ = rollout(name)
    inputs = [batch[x] for x in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")]
    size = RolloutArgs.micro_batch_size * 3
    for first in range(0, 12, size):
        new = p3o.response_logps(policy, *(x[first : first + size] for x in inputs), RolloutArgs.temperature)
        assert new.requires_grad
        assert torch.equal((new - batch["logp_old_tok"][first : first + size]).exp(), torch.ones_like(new))
    whole = p3o.response_logps(policy, *inputs, RolloutArgs.temperature)  # other batches round differently
    assert (whole - batch["logp_old_tok"]).sum(1).abs().max() < 1e-4
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    reward = torch.randn(4, 3, dtype=torch.float64)
    update = p3o.update_policy(policy, optimizer, batch, reward, torch.tensor([2, 0, 3, 1]), 1, RolloutArgs)
    assert update["log_ratio_max"] < 1e-4 and update["grad_norm"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_rollout_numbers_equal_a_loop(name):
    """Log-probs, exact KL, entropy and score of a rollout, each row alone and unpadded, in float64."""
    batch, (policy, reference, scorer, _), examples = rollout(name)
    policy, reference, scorer = (model.double() for model in (policy, reference, scorer))
    for n in range(12):
        ids = batch["response_ids"][n][batch["response_mask"][n]].tolist()
        prompt = examples[n // 3]["prompt_ids"]
        assert batch["prompt_ids"][n][batch["prompt_mask"][n]].tolist() == prompt
        assert_rows(
            [batch["logp_old_tok"][n]], [(prompt, ids)], [naive_logps(policy, (prompt, ids), 0.9)], 1e-4
        )
        assert_rows(
            [batch["logp_ref_tok"][n]], [(prompt, ids)], [naive_logps(reference, (prompt, ids), 0.9)], 1e-4
        )
        with torch.no_grad():
            tokens = torch.tensor([prompt + ids])
            p, q = (
                torch.log_softmax(m(tokens).logits[0, len(prompt) - 1 : -1] / 0.9, -1)
                for m in (policy, reference)
            )
            score = scorer.score(scorer.base_model(tokens).last_hidden_state[0, -1]).item()
        kl, entropy = (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1)
        assert_rows([batch["kl_tok"][n]], [(prompt, ids)], [kl.tolist()], 1e-4)
        assert_rows([batch["entropy_tok"][n]], [(prompt, ids)], [entropy.tolist()], 1e-4)
        ended = ids[-1] == EOS
        assert batch["ended"][n].item() == ended
        assert batch["score"][n].item() == pytest.approx(score - (0 if ended else 1.0), abs=1e-4)
    assert 0 < batch["ended"].sum() < 12, "both cases should occur"


# ----------------------------------------------------------------------------------------------------- scores
def test_scores_are_the_librarys_own_on_unpadded_input(scorer):
    """transformers' own forward, one row at a time, with its last-token rule: ids free of its pad id."""
    rows = [[[max(x, 2) for x in part] for part in row] for row in draw(seed=9)]
    with torch.no_grad():
        expected = torch.stack([scorer(torch.tensor([p + r])).logits[0, 0] for p, r in rows]).float()
    assert expected.std() > 0.1
    for pad_id, left, right in ((0, 0, 0), (EOS, 5, 0), (7, 0, 4), (EOS, 3, 3)):
        for script in (p3o, reward_model):
            result = script.read_score(scorer, *batch_of(rows, pad_id, left, right))
            assert result.dtype == torch.float32
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_score_is_read_by_position_whatever_the_tokens_are(scorer):
    """Responses that end in EOS or hold the pad id: the hidden state of the last real token, by hand."""
    rows = [row[:1] + [row[1] + [EOS]] for row in draw(3, seed=10)] + [[[0, 0], [0]], [[EOS], [4, 0]]]
    with torch.no_grad():
        hidden = [scorer.base_model(torch.tensor([p + r])).last_hidden_state[0, -1] for p, r in rows]
        expected = torch.stack([scorer.score(h)[0] for h in hidden]).float()
    for pad_id in (0, EOS):
        result = p3o.read_score(scorer, *batch_of(rows, pad_id, 2, 2))
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_values_of_every_prefix(scorer):
    """Column t of read_values is the score of the response cut after t tokens; column 0 of the prompt."""
    rows = draw(4, seed=11)
    values = p3o.read_values(scorer, *batch_of(rows, 5, 3, 2))
    assert values.shape == (4, max(len(r) for _, r in rows) + 2 + 1) and values.dtype == torch.float32
    for b, (prompt, response) in enumerate(rows):
        for t in range(len(response) + 1):
            with torch.no_grad():
                hidden = scorer.base_model(torch.tensor([prompt + response[:t]])).last_hidden_state[0, -1]
            assert values[b, t].item() == pytest.approx(scorer.score(hidden).item(), abs=1e-5)


# ------------------------------------------------------------------------------------------ masks and padding
def test_first_eos_mask_by_hand():
    e, x = EOS, 9
    cases = {
        (x, x, x, x): [1, 1, 1, 1],  # no EOS: everything counts
        (x, x, e, x): [1, 1, 1, 0],
        (x, e, e, e): [1, 1, 0, 0],  # pad == EOS: the first one counts, once
        (e, e, e, e): [1, 0, 0, 0],
        (e, x, e, x): [1, 0, 0, 0],
        (x, x, x, e): [1, 1, 1, 1],
        (x, e, 0, 0): [1, 1, 0, 0],  # another pad
    }
    mask = p3o.first_eos_mask(torch.tensor(list(cases)), e)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[bool(v) for v in want] for want in cases.values()]


def test_first_eos_mask_on_random_rows():
    ids = torch.randint(0, 4, (500, 7), generator=torch.Generator().manual_seed(0))
    for row, mask in zip(ids.tolist(), p3o.first_eos_mask(ids, EOS).tolist(), strict=True):
        length = row.index(EOS) + 1 if EOS in row else len(row)
        assert mask == [t < length for t in range(len(row))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(side):
    sequences = [[3, 4, 5], [6], [7, EOS]]
    ids, mask = p3o.pad(sequences, side, EOS, "cpu")
    assert ids.shape == mask.shape == (3, 3) and mask.dtype == torch.bool and ids.dtype == torch.int64
    assert [row[m].tolist() for row, m in zip(ids, mask)] == sequences
    assert (ids[~mask] == EOS).all()
    assert mask[:, -1 if side == "left" else 0].all()


# --------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_samples_follow_the_models_own_distribution(name, temperature):
    """Two tokens sampled 2000 times from each of two prompts, against the exact probabilities of all outcomes
    (chi-square), on a model whose own defaults (top-k, penalties, minimal length) would ruin it."""
    model = make(name, 1, torch.float32, vocab_size=6, initializer_range=0.15)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, repetition_penalty=3.0, temperature=0.1, min_new_tokens=2
    )
    rows, n = [[[2, 5, 5, 3], []], [[4], []]], 2000
    prompt_ids, prompt_mask = (x.repeat_interleave(n, 0) for x in batch_of(rows)[:2])
    torch.manual_seed(0)
    ids, mask = p3o.sample_responses(model, prompt_ids, prompt_mask, 2, temperature, EOS, EOS)
    assert ids.shape == mask.shape == (2 * n, 2)
    assert torch.equal(mask, p3o.first_eos_mask(ids, EOS))
    for b, (prompt, _) in enumerate(rows):
        got, cells, rare = ids[b * n : (b + 1) * n].tolist(), [], [0, 0.0]
        for first in range(6):
            for second in [EOS] if first == EOS else range(6):  # behind EOS there is only padding, EOS here
                response = [first] if first == EOS else [first, second]
                expected = n * math.exp(sum(naive_logps(model, (prompt, response), temperature)))
                cell = [got.count([first, second]), expected]
                if expected < 10:
                    rare = [x + y for x, y in zip(rare, cell)]
                else:
                    cells.append(cell)
        cells.append(rare)
        assert sum(expected for _, expected in cells) == pytest.approx(n, rel=1e-4)
        statistic = sum((hits - expected) ** 2 / max(expected, 1) for hits, expected in cells)
        freedom = len(cells) - 1
        assert freedom > 5 and statistic < freedom + 4.5 * math.sqrt(2 * freedom)  # mean and deviation


def test_every_token_can_be_sampled():
    """A vocabulary larger than the library's default top-k of 50."""
    model = make("gpt2", 1, torch.float32, vocab_size=200, initializer_range=0.02)
    prompt_ids, prompt_mask = batch_of([[[3, 4], []]] * 3000)[:2]
    torch.manual_seed(0)
    ids, _ = p3o.sample_responses(model, prompt_ids, prompt_mask, 1, 1.0, EOS, 0)
    assert len(ids.unique()) > 190


def test_sampling_stops_at_eos_and_at_the_length():
    model = make("gpt2", 1, torch.float32, initializer_range=0.02)
    prompt_ids, prompt_mask = batch_of([[[3, 4], []]] * 200)[:2]
    torch.manual_seed(0)
    ids, mask = p3o.sample_responses(model, prompt_ids, prompt_mask, 12, 1.0, EOS, 0)
    lengths = mask.sum(1)
    assert ids.shape[1] == 12 and 1 <= lengths.min() and lengths.max() == 12
    for row, n in zip(ids.tolist(), lengths.tolist(), strict=True):
        assert EOS not in row[: n - 1]
        assert row[n - 1] == EOS or n == 12
        assert row[n:] == [0] * (12 - n)


# ---------------------------------------------------------------------------------- another model's tokenizer
def test_translate_says_the_same_in_other_tokens():
    one = byte_tokenizer(eos_token="<end>", pad_token="<end>")
    other = byte_tokenizer(reverse=True, pad_token="[PAD]", eos_token="[EOS]")
    texts = [
        ("Hello, world", " a fine day", True),
        ("é", "日本語 \n\t", True),
        ("two  spaces ", "cut o", False),
    ]
    encoded = [
        [one(p)["input_ids"], one(r)["input_ids"] + [one.eos_token_id] * ended] for p, r, ended in texts
    ]
    batch = batch_of(encoded, one.pad_token_id, 2, 2)
    prompt_ids, prompt_mask, response_ids, response_mask = p3o.translate(batch, one, other)
    assert prompt_mask[:, -1].all() and response_mask[:, 0].all(), "padded on the wrong side"
    assert (prompt_ids[~prompt_mask] == other.pad_token_id).all()
    for b, (prompt, response, ended) in enumerate(texts):
        assert prompt_ids[b][prompt_mask[b]].tolist() == other(prompt)["input_ids"] != encoded[b][0]
        ids = response_ids[b][response_mask[b]].tolist()
        assert ids == other(response)["input_ids"] + [other.eos_token_id] * ended
        assert other.decode(ids, skip_special_tokens=True) == response


def test_translate_of_nothing_still_has_a_token():
    """A prompt without text and a response of EOS alone."""
    one = byte_tokenizer(eos_token="<end>", pad_token="<end>")
    other = byte_tokenizer(reverse=True, pad_token="[PAD]", eos_token="[EOS]")
    batch = batch_of([[[one.eos_token_id], [one.eos_token_id]], [[5], [6, one.eos_token_id]]])
    prompt_ids, prompt_mask, response_ids, response_mask = p3o.translate(batch, one, other)
    assert response_ids[0][response_mask[0]].tolist() == [other.eos_token_id]
    assert prompt_mask.any(1).all()
