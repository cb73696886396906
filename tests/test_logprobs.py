"""Log-probs, scores, masks, sampling and loading of the RL scripts against unpadded loops and the library's numbers.

Models: tiny random GPT-2, Llama, GPT-NeoX and Qwen2, with weights large enough that every token matters. The
oracles run each row alone, without padding, in float64.
"""

import math
import statistics

import pytest
import torch
from conftest import word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
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
import ppo
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
def words(pad=EOS):
    return word_tokenizer(VOCAB, EOS, pad)


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
    return make(request.param, 2, torch.float32, num_labels=1, pad_token_id=0)


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
    """bfloat16 weights or autocast: log-probs are float32, normalised, near the exact."""
    batch = batch_of(draw(seed=7))
    exact = p3o.response_logps(make(name, 1), *batch)
    with torch.no_grad():
        results = [p3o.response_distributions(make(name, 1, torch.bfloat16), *batch)]
        with torch.autocast("cpu", torch.bfloat16):
            results.append(p3o.response_distributions(make(name, 1, torch.float32), *batch))
    for distribution in results:
        assert distribution.dtype == torch.float32
        assert (distribution.exp().sum(-1) - 1).abs().max() < 1e-5
        logps = distribution.gather(-1, batch[2].unsqueeze(-1)).squeeze(-1).masked_fill(~batch[3], 0)
        assert (logps - exact).abs().mean() < 0.1


@torch.no_grad()
@pytest.mark.parametrize("read", [p3o.read_score, ppo.read_values])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_score_head_stays_in_float32(name, read):
    """In bfloat16 scores and values are off by what the trunk's states are, and by nothing more."""
    model, batch = make(name, 2, torch.float32, num_labels=1), batch_of(draw(seed=7))
    head, where = model.score.weight.clone(), slice(batch[0].shape[1] - 1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        found = read(model, *batch)
        states = model.base_model(**p3o.model_inputs(*batch), use_cache=False).last_hidden_state
        rounded = model.score(states)[:, where, 0].float()
    assert found.dtype == torch.float32
    assert torch.equal(model.score.weight, head) and model.score.weight.dtype == torch.float32
    by_hand = (states.double() @ head[0].double()).float()  # (B, P + R)
    if read is ppo.read_values:
        expected, mask = by_hand[:, where], batch[3]
        assert (rounded - expected)[mask].abs().max() > 1e-3, "a head in bfloat16 would show here"
    else:
        last = batch[0].shape[1] - 1 + batch[3].sum(1, keepdim=True)
        expected, mask = by_hand.gather(1, last)[:, 0], torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)
    exact = read(model, *batch)
    assert 0 < (found - exact)[mask].abs().mean() < 0.1
    model.base_model.to(torch.bfloat16)  # weights in bfloat16 but for the head's
    low = read(model, *batch)
    assert low.dtype == torch.float32 and (low - exact)[mask].abs().mean() < 0.1


# ------------------------------------------------------------------------------------------ rollout and update
ARGS = {"device": "cpu", "temperature": 0.9, "response_length": 6, "prompt_length": 9, "micro_batch_size": 2}


def tokens_of(batch, rows=slice(None)):
    return [batch[name][rows] for name in p3o.TOKENS]


def rollout(name):
    """A batch of p3o.py, 4 prompts with 3 responses, with tiny random models; the models, and the prompts."""
    policy, reference = make(name, 1, torch.float32), make(name, 1, torch.float32, initializer_range=0.2)
    scorer, args = make(name, 2, torch.float32, num_labels=1), p3o.Args(**ARGS)
    prompts = [prompt for prompt, _ in draw(4, seed=8)]
    rows = [{"prompt": f"prompt {n}", "prompt_ids": prompt} for n, prompt in enumerate(prompts)]
    torch.manual_seed(0)
    batch = p3o.sample_batch(policy, rows, 3, words(), args)
    models = policy, reference, lambda part: p3o.read_score(scorer, *tokens_of(part))
    return (
        p3o.score_batch(batch, models, args.micro_batch_size * 3, args),
        (policy, reference, scorer),
        prompts,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_first_ratio_is_exactly_one(name):
    """Old log-probs come from the forward pass of training: on the same rows no bit differs."""
    (batch, (policy, *_), _), args = rollout(name), p3o.Args(**ARGS)
    size = args.micro_batch_size * 3
    for first in range(0, 12, size):
        new = p3o.response_logps(policy, *tokens_of(batch, slice(first, first + size)), args.temperature)
        assert new.requires_grad
        assert torch.equal((new - batch["logp_old_tok"][first : first + size]).exp(), torch.ones_like(new))
    whole = p3o.response_logps(policy, *tokens_of(batch), args.temperature)  # other batches round differently
    assert (whole - batch["logp_old_tok"]).sum(1).abs().max() < 1e-4
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    reward = torch.randn(4, 3, dtype=torch.float64)
    update = p3o.update_policy(policy, optimizer, batch, reward, torch.tensor([2, 0, 3, 1]), 1, args)
    assert update["log_ratio_max"] < 1e-4 and update["grad_norm"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_rollout_numbers_equal_a_loop(name):
    """Log-probs, exact KL, entropy and score of a rollout, each row alone and unpadded, in float64."""
    batch, (policy, reference, scorer), prompts = rollout(name)
    policy, reference, scorer = (model.double() for model in (policy, reference, scorer))
    assert batch["score"].dtype == torch.float64 and not batch["logp_old_tok"].requires_grad
    for n in range(12):
        ids, prompt = batch["response_ids"][n][batch["response_mask"][n]].tolist(), prompts[n // 3]
        assert batch["prompt_ids"][n][batch["prompt_mask"][n]].tolist() == prompt
        assert batch["prompt"][n] == f"prompt {n // 3}"
        for x, model in (("logp_old_tok", policy), ("logp_ref_tok", reference)):
            assert_rows([batch[x][n]], [(prompt, ids)], [naive_logps(model, (prompt, ids), 0.9)], 1e-4)
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


def test_a_reward_of_ones_own_is_given_texts():
    """Any function of a batch: here of the texts, which come in parts, in order."""
    batch, (policy, reference, _), _ = rollout("gpt2")
    args, seen = p3o.Args(**ARGS, missing_eos_penalty=2.0), []

    def reward(part):
        seen.append(len(part["response"]))
        return [100 * int(p.split()[1]) + len(r) for p, r in zip(part["prompt"], part["response"])]

    score = p3o.score_batch(batch, (policy, reference, reward), 5, args)["score"]
    lengths = [len(text) for text in batch["response"]]
    penalties = (2.0 * ~batch["ended"]).tolist()
    assert score.tolist() == [100.0 * (n // 3) + lengths[n] - penalties[n] for n in range(12)]
    assert seen == [5, 5, 2] and score.dtype == torch.float64


@pytest.mark.parametrize("clipping", ["joint", "separate", "none"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_update_descends_the_loss_of_its_prompts(clipping, size):
    """On 3 of 4 prompts, whatever the micro-batches (2 leaves a short one), after the policy has moved: the
    gradient of the loss over log-probs of unpadded texts, one after another."""
    batch, (policy, *_), prompts = rollout("gpt2")
    reward = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data += 0.005 * noise
    minibatch, rows = torch.tensor([2, 0, 3]), [6, 7, 8, 0, 1, 2, 9, 10, 11]
    new = []
    for n in rows:
        ids = batch["response_ids"][n][batch["response_mask"][n]].tolist()
        logits = policy(torch.tensor([prompts[n // 3] + ids])).logits[0, len(prompts[n // 3]) - 1 : -1]
        new.append(torch.log_softmax(logits / 0.9, -1)[range(len(ids)), ids].sum())
    new, old = torch.stack(new).view(3, 3), batch["logp_old_tok"][rows].sum(1).view(3, 3)
    if clipping == "none":
        loss, clipped = p3o.pairwise_policy_gradient_loss(new, reward[minibatch]), 0.0
    else:
        loss, stats = p3o.p3o_loss(new, old, reward[minibatch], 0.2, clipping, 1.5)
        clipped = stats["clip_fraction"]
        assert 0 < clipped < 1, "both sides of the clip must occur"
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    options = {"clipping": clipping, "max_importance_weight": 1.5, "max_grad_norm": 1e9}
    args = p3o.Args(**(ARGS | {"micro_batch_size": size} | options))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)  # its step shows the gradient
    update = p3o.update_policy(policy, optimizer, batch, reward, minibatch, 1, args)
    found = (before - torch.nn.utils.parameters_to_vector(policy.parameters()).detach()) / 0.1
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert update["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert update["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert update["log_ratio_max"] == pytest.approx((new - old).abs().max().item(), abs=1e-4)
    assert update["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    assert all(p.grad is None for p in policy.parameters()), "gradient left over"
    args.max_grad_norm, optimizer.param_groups[0]["lr"] = 1e-4, 10.0
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    p3o.update_policy(policy, optimizer, batch, reward, minibatch, 1, args)
    moved = (before - torch.nn.utils.parameters_to_vector(policy.parameters()).detach()).norm().item()
    assert moved / 10 == pytest.approx(1e-4, rel=1e-2), "clipped"


def test_metrics_of_a_batch_by_hand():
    """Two prompts with three responses, of 1 to 3 tokens. Of the six pairs one is identical, by its real tokens."""
    ids = [[5, 1, 7], [5, 1, 9], [5, 6, 1], [4, 1, 1], [1, 4, 4], [4, 4, 4]]
    lengths = [2, 2, 3, 2, 1, 3]
    mask = [[t < n for t in range(3)] for n in lengths]
    score, old, ref = [1.0, 2.0, 3.0, 4.0, 5.0, 9.0], [-1.0, -2.0, -3.0], [-1.5, -2.25, -3.125]
    table = {
        "logp_old_tok": old,
        "logp_ref_tok": ref,
        "kl_tok": [0.5, 1.0, 2.0],
        "entropy_tok": [3.0, 2.0, 1.0],
    }
    batch = {x: torch.tensor([values] * 6) * torch.tensor(mask) for x, values in table.items()}
    batch |= {"response_ids": torch.tensor(ids), "response_mask": torch.tensor(mask)}
    batch |= {"score": torch.tensor(score, dtype=torch.float64), "ended": torch.tensor([True] * 5 + [False])}
    found = p3o.batch_metrics(batch, 3, beta=0.5)
    kl = [sum(o - r for o, r in zip(old[:n], ref[:n])) for n in lengths]
    expected = {"reward": 4.0, "kl": sum(kl) / 6, "objective": 4.0 - 0.5 * sum(kl) / 6}
    expected |= {"reward_std": statistics.pstdev(score), "kl_std": statistics.pstdev(kl)}
    expected["kl_exact"] = sum(sum(table["kl_tok"][:n]) for n in lengths) / 6
    expected["entropy"] = sum(sum(table["entropy_tok"][:n]) for n in lengths) / 13
    expected["perplexity"] = math.exp(-sum(sum(ref[:n]) for n in lengths) / 13)
    expected |= {"response_length": 13 / 6, "eos_rate": 5 / 6, "frac_identical_pairs": 1 / 6}
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in found.values())
    del expected["frac_identical_pairs"]
    assert p3o.batch_metrics(batch, 1, beta=0.5) == pytest.approx(expected, rel=1e-6)


def test_costs_by_hand():
    costs = p3o.cost_metrics({"response_mask": torch.ones(3, 4) > 0}, [10.0, 11.0, 13.0, 16.0])
    assert costs == {
        **{"seconds_rollout": 1.0, "seconds_score": 2.0, "seconds_update": 3.0},
        **{"tokens_per_second": 2.0, "peak_memory_gb": 0.0},
    }


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
    """V(x, y_<t): column t of read_values is the score of the response cut before token t; column 0 the prompt's."""
    rows = draw(4, seed=11)
    values = ppo.read_values(scorer, *batch_of(rows, 5, 3, 2))
    assert values.shape == (4, max(len(r) for _, r in rows) + 2) and values.dtype == torch.float32
    for b, (prompt, response) in enumerate(rows):
        for t in range(len(response)):
            with torch.no_grad():
                hidden = scorer.base_model(torch.tensor([prompt + response[:t]])).last_hidden_state[0, -1]
            assert values[b, t].item() == pytest.approx(scorer.score(hidden).item(), abs=1e-5)


# ------------------------------------------------------------------------------------------ masks and padding
class Fixed:
    """A policy whose answers are given."""

    def __init__(self, answers):
        self.answers = torch.tensor(answers)

    def generate(self, input_ids, attention_mask, **options):
        assert torch.equal(input_ids[attention_mask == 1], torch.full((len(self.answers),), 3))
        return torch.cat([input_ids, self.answers], 1)


def answers(ids, pad=EOS):
    """The batch of a policy that answers with these ids, each row to a prompt of its own."""
    rows = [{"prompt": "w3", "prompt_ids": [3]}] * len(ids)
    return p3o.sample_batch(Fixed(ids), rows, 1, words(pad), p3o.Args(**ARGS))


@pytest.mark.parametrize("pad", [EOS, 0])
def test_the_first_eos_counts_and_nothing_behind_it_by_hand(pad):
    e, x = EOS, 9
    cases = {
        (x, x, x, x): ([1, 1, 1, 1], False, "w9 w9 w9 w9"),  # no EOS: everything counts
        (x, x, e, x): ([1, 1, 1, 0], True, "w9 w9"),
        (x, e, e, e): ([1, 1, 0, 0], True, "w9"),  # pad == EOS: the first one counts, once
        (e, e, e, e): ([1, 0, 0, 0], True, ""),
        (e, x, e, x): ([1, 0, 0, 0], True, ""),
        (x, x, x, e): ([1, 1, 1, 1], True, "w9 w9 w9"),
        (x, e, 0, 0): ([1, 1, 0, 0], True, "w9"),  # another pad
    }
    batch = answers(list(cases), pad)
    assert batch["response_mask"].dtype == batch["ended"].dtype == torch.bool
    assert batch["response_ids"].tolist() == [list(ids) for ids in cases]
    assert batch["response_mask"].tolist() == [[bool(v) for v in want[0]] for want in cases.values()]
    assert batch["ended"].tolist() == [want[1] for want in cases.values()]
    assert batch["response"] == [want[2] for want in cases.values()]


def test_the_first_eos_counts_on_random_rows():
    ids = torch.randint(0, 4, (500, 7), generator=torch.Generator().manual_seed(0)).tolist()
    batch = answers(ids)
    for row, mask, ended in zip(ids, batch["response_mask"].tolist(), batch["ended"].tolist(), strict=True):
        length = row.index(EOS) + 1 if EOS in row else len(row)
        assert mask == [t < length for t in range(len(row))]
        assert ended == (EOS in row)


@pytest.mark.parametrize("pad_id", [EOS, 0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(side, pad_id):
    sequences = [[3, 4, 5], [6], [7, EOS], [0, EOS, 0]]
    ids, mask = p3o.pad(sequences, side, words(pad_id), "cpu")
    assert ids.shape == mask.shape == (4, 3) and mask.dtype == torch.bool and ids.dtype == torch.int64
    assert [row[m].tolist() for row, m in zip(ids, mask)] == sequences
    assert (ids[~mask] == pad_id).all()
    assert mask[:, -1 if side == "left" else 0].all()


# --------------------------------------------------------------------------------------------------- sampling
def sample(model, prompts, K, length, temperature=1.0, pad=EOS):
    """sample_batch on lists of ids: (response_ids, response_mask)."""
    rows = [{"prompt": "", "prompt_ids": prompt} for prompt in prompts]
    torch.manual_seed(0)
    args = p3o.Args(device="cpu", temperature=temperature, response_length=length)
    batch = p3o.sample_batch(model, rows, K, words(pad), args)
    return batch["response_ids"], batch["response_mask"]


@pytest.mark.parametrize("name, temperature", [*zip(CONFIGS, [1.0, 0.7, 1.0, 0.7])])
def test_samples_follow_the_models_own_distribution(name, temperature):
    """Two tokens sampled 2000 times from each of two prompts, against the exact probabilities of all outcomes
    (chi-square), on a model whose own defaults (top-k, penalties, minimal length) would ruin it."""
    model = make(name, 1, torch.float32, vocab_size=6, initializer_range=0.15)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, repetition_penalty=3.0, temperature=0.1, min_new_tokens=2
    )
    prompts, n = [[2, 5, 5, 3], [4]], 2000
    ids, mask = sample(model, prompts, n, 2, temperature)
    assert ids.shape == mask.shape == (2 * n, 2) and mask[:, 0].all()
    assert torch.equal(mask[:, 1], ids[:, 0] != EOS)
    for b, prompt in enumerate(prompts):
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
    ids, _ = sample(model, [[3, 4]], 3000, 1)
    assert len(ids.unique()) > 190


def test_sampling_stops_at_eos_and_at_the_length():
    model = make("gpt2", 1, torch.float32, initializer_range=0.02)
    ids, mask = sample(model, [[3, 4]], 200, 12, pad=0)
    lengths = mask.sum(1)
    assert ids.shape[1] == 12 and 1 <= lengths.min() and lengths.max() == 12
    for row, n in zip(ids.tolist(), lengths.tolist(), strict=True):
        assert EOS not in row[: n - 1]
        assert row[n - 1] == EOS or n == 12
        assert row[n:] == [0] * (12 - n)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_saved_policy_samples_as_in_training(name, tmp_path):
    """What sample_batch drew is what plain transformers draws from the saved folder, which knows temperature, EOS
    and length, on a model whose own config ends texts with other tokens and samples otherwise."""
    model = make(name, 1, torch.float32, eos_token_id=5, pad_token_id=7, initializer_range=0.1)
    model.generation_config = GenerationConfig(eos_token_id=[5, 6], top_k=2, repetition_penalty=2.0)
    ids, mask = sample(model, [[3, 4]], 50, 8, temperature=0.8)
    assert ids.shape == (50, 8) and EOS in ids and (ids[~mask] == EOS).all(), "ends at EOS"
    assert all((ids[:, 1:][ids[:, :-1] == token] != EOS).any() for token in (5, 6)), "and nowhere else"
    model.save_pretrained(tmp_path)
    plain, prompt = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[3, 4]] * 50)
    torch.manual_seed(0)
    assert torch.equal(plain.generate(prompt, attention_mask=torch.ones_like(prompt))[:, 2:], ids)


# ---------------------------------------------------------------------------------------------------- loading
KINDS = (AutoModelForCausalLM, {}), (AutoModelForSequenceClassification, {"num_labels": 1})


def saved(model, folder, **config):
    model.config.update({"pad_token_id": 0} | config)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_only_models_load_without_dropout_in_float32(name, tmp_path):
    for kind, (auto, options) in enumerate(KINDS, 1):
        model = make(name, kind, torch.bfloat16, **options)
        folder = saved(model, tmp_path / str(kind))
        found = p3o.load_model(auto, folder, words(), p3o.Args(device="cpu"), **options)
        assert type(found) is type(model) and found.dtype == torch.float32 and not found.training
        for a, b in zip(found.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b.float())


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("deaf_to", ["position_ids", "attention_mask"])
def test_models_that_see_padding_are_refused(deaf_to, kind, tmp_path, monkeypatch, capsys):
    """Those whose positions, or whose attention, do not go by the mask."""
    model = make("gpt2", kind, torch.float32, num_labels=1)
    folder, (auto, options), trunk = saved(model, tmp_path), KINDS[kind - 1], type(model.base_model)
    forward = trunk.forward

    def deaf(self, input_ids, **inputs):
        plain = {
            "position_ids": torch.arange(input_ids.shape[1])[None],
            "attention_mask": torch.ones_like(input_ids),
        }
        return forward(self, input_ids, **(inputs | {deaf_to: plain[deaf_to]}))

    monkeypatch.setattr(trunk, "forward", deaf)
    with pytest.raises(SystemExit) as stop:
        p3o.load_model(auto, folder, words(), p3o.Args(device="cpu"), **options)
    assert stop.value.code == 2 and "sees padding or later tokens" in capsys.readouterr().err


BERT = BertConfig(vocab_size=VOCAB, num_labels=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)


def test_other_models_are_refused_in_one_line(tmp_path, capsys):
    """Bidirectional, not finite, without an embedding for EOS, too short, and each kind where the other belongs."""
    lm, scorer = make("gpt2", 1, torch.float32), make("gpt2", 2, torch.float32, num_labels=1)
    nan = make("gpt2", 1, torch.float32)
    nan.transformer.h[0].mlp.c_fc.weight.data[0, 0] = math.nan
    models = {"lm": lm, "scorer": scorer, "nan": nan, "bert": BertLMHeadModel(BERT)}
    models |= {"small": make("gpt2", 1, vocab_size=1), "unused": make("gpt2", 1, vocab_size=VOCAB - 1)}
    models |= {"berts": BertForSequenceClassification(BERT)}
    folders = {name: saved(model, tmp_path / name) for name, model in models.items()}
    cases = [
        ("bert", 0, 24, "sees padding or later tokens"),
        ("berts", 1, 24, "sees padding or later tokens"),
        ("nan", 0, 24, "is not finite"),
        ("small", 0, 24, "cannot use"),
        ("lm", 0, 33, "holds 64 tokens, not 65; lower --prompt_length"),
        ("lm", 1, 24, "is not a whole SequenceClassification"),
        ("scorer", 0, 24, "is not a whole CausalLM"),
        ("nothing", 0, 24, "cannot use"),
    ]
    for name, kind, length, message in cases:
        args = p3o.Args(device="cpu", response_length=length)
        with pytest.raises(SystemExit) as stop:
            p3o.load_model(KINDS[kind][0], folders.get(name, name), words(), args, **KINDS[kind][1])
        printed = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and printed.startswith("error: ") and message in printed, printed
    args = p3o.Args(device="cpu", response_length=32)
    assert p3o.load_model(AutoModelForCausalLM, folders["lm"], words(), args), "just fits"
    assert p3o.load_model(AutoModelForCausalLM, folders["unused"], words(), args), "a token that is not used"
