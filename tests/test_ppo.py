"""ppo.py against oracles that share no code with it: loops over floats, numpy, differences, tiny models.

Legend: N responses, R tokens of the longest; "garbage" is nan and inf behind a response's end.
"""

import json
import math
import os
import random

import numpy
import pytest
import torch
from conftest import word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import ppo
import toy

LENGTHS = [5, 1, 3, 2, 5, 1]


def draw(seed=0, lengths=LENGTHS, spread=0.3):
    """Float64 (logp_new, logp_old, advantages, mask), each (N, R), all finite."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    return new, old, torch.randn(shape, generator=generator, dtype=torch.float64), mask


def with_garbage(x, mask):
    """x with nan, inf and -inf in turn outside the mask."""
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).repeat(x.numel())[: x.numel()].view(x.shape)
    return torch.where(mask, x, garbage.to(x.dtype))


def real(*tensors, mask):
    """The masked entries of each, as lists of equally many floats."""
    return [x[mask].tolist() for x in tensors]


def gradient(loss, x):
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def central_differences(function, x, mask, step=1e-6):
    """Of a function of the tensor x, in its entries under the mask; zero elsewhere."""
    result = torch.zeros_like(x)
    for place in mask.nonzero().tolist():
        move = torch.zeros_like(x)
        move[tuple(place)] = step
        result[tuple(place)] = (function(x + move) - function(x - move)) / (2 * step)
    return result


# ------------------------------------------------------------------------------------- token rewards and GAE


def test_token_rewards_against_naive_loop():
    old, ref, _, mask = draw()
    score = torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = ppo.token_rewards(score, with_garbage(old, mask), with_garbage(ref, mask), mask, beta=0.3)
    assert found.dtype == torch.float64
    for n, length in enumerate(LENGTHS):
        for t in range(max(LENGTHS)):
            expected = -0.3 * (old[n, t] - ref[n, t]).item() if t < length else 0.0
            expected += score[n].item() if t == length - 1 else 0.0
            assert found[n, t].item() == pytest.approx(expected, abs=1e-12)
    total = score - 0.3 * torch.where(mask, old - ref, 0).sum(1)
    torch.testing.assert_close(found.sum(1), total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.7, 1.0)])
def test_gae_against_its_definition(gamma, lam):
    """A_t sums the discounted temporal-difference errors from t to the end, each computed anew."""
    reward, value, _, mask = draw(seed=2)
    advantages, returns = ppo.gae(with_garbage(reward, mask), with_garbage(value, mask), mask, gamma, lam)
    for n, length in enumerate(LENGTHS):
        r, v = reward[n, :length].tolist(), value[n, :length].tolist() + [0.0]
        for t in range(max(LENGTHS)):
            later = range(t, length)
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in later)
            assert advantages[n, t].item() == pytest.approx(expected, abs=1e-12)
            target = expected + v[t] if t < length else 0.0
            assert returns[n, t].item() == pytest.approx(target, abs=1e-12)


def test_gae_defaults_are_gamma_1_lam_095_and_nothing_flows_back():
    reward, value, _, mask = draw(seed=2)
    value.requires_grad_()
    found = ppo.gae(reward, value, mask)
    assert all(torch.equal(a, b) for a, b in zip(found, ppo.gae(reward, value, mask, gamma=1.0, lam=0.95)))
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lam_1_is_the_monte_carlo_return_less_the_value(gamma):
    reward, value, _, mask = draw(seed=3)
    advantages, returns = ppo.gae(reward, value, mask, gamma, lam=1.0)
    for n, length in enumerate(LENGTHS):
        for t in range(length):
            monte_carlo = sum(gamma ** (k - t) * reward[n, k].item() for k in range(t, length))
            assert returns[n, t].item() == pytest.approx(monte_carlo, abs=1e-12)
            assert advantages[n, t].item() == pytest.approx(monte_carlo - value[n, t].item(), abs=1e-12)


# -------------------------------------------------------------------------------------------- masked moments


def test_masked_mean_and_whitening_against_numpy():
    x, _, _, mask = draw(seed=4)
    dirty, values = with_garbage(x, mask), x[mask].numpy()
    assert ppo.masked_mean(dirty, mask).item() == pytest.approx(values.mean(), rel=1e-12)
    for shift_mean in (True, False):
        white = ppo.masked_whiten(dirty, mask, shift_mean)
        expected = (values - values.mean()) / values.std() + (0 if shift_mean else values.mean())
        assert white[mask].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert (white[~mask] == 0).all()
    assert torch.equal(ppo.masked_whiten(x, mask), ppo.masked_whiten(x, mask, shift_mean=True))


def test_whitening_equal_values_gives_zeros():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert ppo.masked_whiten(torch.full((2, 3), 0.7), mask).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------------- losses


def naive_clip(new, old, advantages, clip_range):
    """(loss, clip_fraction) of lists of floats."""
    terms = []
    for n, o, a in zip(new, old, advantages, strict=True):
        rho = math.exp(n - o)
        terms.append((rho * a, min(max(rho, 1 - clip_range), 1 + clip_range) * a))
    return -sum(map(min, terms)) / len(terms), sum(held < free for free, held in terms) / len(terms)


def naive_kl(new, old):
    return sum(math.exp(n - o) - 1 - (n - o) for n, o in zip(new, old, strict=True)) / len(new)


def naive_penalty(new, old, advantages, penalty):
    surrogate = sum(math.exp(n - o) * a for n, o, a in zip(new, old, advantages, strict=True)) / len(new)
    return penalty * naive_kl(new, old) - surrogate


def naive_value(new, old, returns, clip_range):
    total = 0.0
    for v, o, r in zip(new, old, returns, strict=True):
        held = v if clip_range is None else o + min(max(v - o, -clip_range), clip_range)
        total += max((v - r) ** 2, (held - r) ** 2) / 2
    return total / len(new)


@pytest.mark.parametrize("clip_range", [0.1, 0.2, math.inf])
def test_clip_loss_gradient_and_stats_against_naive_loop(clip_range):
    new, old, advantages, mask = draw()
    dirty = [with_garbage(x, mask) for x in (old, advantages)]

    def naive(x):
        return naive_clip(*real(x, old, advantages, mask=mask), clip_range)[0]

    loss, stats = ppo.ppo_clip_loss(with_garbage(new, mask), *dirty, mask, clip_range)
    _, clipped = naive_clip(*real(new, old, advantages, mask=mask), clip_range)
    assert loss.shape == () and loss.item() == pytest.approx(naive(new), rel=1e-12)
    assert stats["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert stats["approx_kl"] == pytest.approx(naive_kl(*real(new, old, mask=mask)), rel=1e-9)
    assert stats["log_ratio_max"] == pytest.approx((new - old)[mask].abs().max().item(), rel=1e-12)
    assert 0 < clipped < 1 or clip_range == math.inf, "both sides of the clip must occur"
    grad = gradient(lambda x: ppo.ppo_clip_loss(x, *dirty, mask, clip_range)[0], with_garbage(new, mask))
    torch.testing.assert_close(grad, central_differences(naive, new, mask), rtol=0, atol=1e-8)
    rho = (new - old).exp()
    removed = ((rho > 1 + clip_range) & (advantages > 0)) | ((rho < 1 - clip_range) & (advantages < 0))
    assert torch.equal(grad == 0, removed | ~mask), "no gradient outside the mask nor where the clip acts"


def test_penalty_loss_and_gradient_against_naive_loop():
    new, old, advantages, mask = draw(seed=5)
    dirty = [with_garbage(x, mask) for x in (old, advantages)]

    def naive(x):
        return naive_penalty(*real(x, old, advantages, mask=mask), 0.7)

    loss, stats = ppo.ppo_penalty_loss(with_garbage(new, mask), *dirty, mask, penalty=0.7)
    assert loss.item() == pytest.approx(naive(new), rel=1e-12)
    assert stats["clip_fraction"] == 0
    grad = gradient(lambda x: ppo.ppo_penalty_loss(x, *dirty, mask, 0.7)[0], with_garbage(new, mask))
    torch.testing.assert_close(grad, central_differences(naive, new, mask), rtol=0, atol=1e-8)


def test_approx_kl_is_unbiased_for_kl_from_old_to_new():
    """Its expectation under pi_old over a whole vocabulary is KL(pi_old || pi), not the other KL."""
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, new = logits.log_softmax(-1)
    exact = (old.exp() * (old - new)).sum().item()
    one = torch.ones(1, 1, dtype=torch.bool)
    estimates = [ppo.importance_ratio(new[None, t, None], old[None, t, None], one)[1] for t in range(6)]
    assert sum(p * k for p, k in zip(old.exp(), estimates)).item() == pytest.approx(exact, rel=1e-12)
    assert abs((new.exp() * (new - old)).sum().item() - exact) > 0.01


@pytest.mark.parametrize("clip_range", [0.2, 0.05, None])
def test_value_loss_and_gradient_against_naive_loop(clip_range):
    new, old, returns, mask = draw(seed=6)
    dirty = [with_garbage(x, mask) for x in (old, returns)]

    def naive(x):
        return naive_value(*real(x, old, returns, mask=mask), clip_range)

    loss = ppo.value_loss(with_garbage(new, mask), *dirty, mask, clip_range)
    assert loss.shape == () and loss.item() == pytest.approx(naive(new), rel=1e-12)
    grad = gradient(lambda x: ppo.value_loss(x, *dirty, mask, clip_range), with_garbage(new, mask))
    torch.testing.assert_close(grad, central_differences(naive, new, mask), rtol=0, atol=1e-8)
    assert (grad[~mask] == 0).all()
    if clip_range == 0.2:
        assert (grad[mask] == 0).any() and (grad[mask] != 0).any(), "both sides of the clip must occur"


def test_defaults_of_the_losses_clip_at_0_2():
    new, old, advantages, mask = draw(spread=0.5)
    assert ppo.ppo_clip_loss(new, old, advantages, mask) == ppo.ppo_clip_loss(new, old, advantages, mask, 0.2)
    assert ppo.value_loss(new, old, advantages, mask) == ppo.value_loss(new, old, advantages, mask, 0.2)


@pytest.mark.parametrize("loss", [ppo.ppo_clip_loss, ppo.ppo_penalty_loss])
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_extreme_ratios_leave_loss_and_gradient_finite(loss, shift):
    """log rho is clamped to +-20: the loss is that of 20, and the token gets no gradient."""
    new, old, advantages, mask = (x.float() if x.is_floating_point() else x for x in draw())
    far, held = new.clone(), new.clone()
    far[0, 2], held[0, 2] = old[0, 2] + shift, old[0, 2] + math.copysign(20, shift)
    found, stats = loss(far, old, advantages, mask, 0.3)
    assert found.item() == pytest.approx(loss(held, old, advantages, mask, 0.3)[0].item(), rel=1e-4)
    assert stats["log_ratio_max"] == pytest.approx(1000, rel=1e-4)
    grad = gradient(lambda x: loss(x, old, advantages, mask, 0.3)[0], far)
    assert grad.isfinite().all() and grad[0, 2] == 0 and (grad[mask] != 0).any()


def test_unclipped_first_step_has_the_gradient_of_reinforce_with_baseline():
    """gamma = lam = 1, rho = 1: a token is pushed by the rewards still to come less V."""
    new, _, _, mask = draw(seed=7)
    reward, value, _, _ = draw(seed=8)
    advantages, _ = ppo.gae(reward, value, mask, gamma=1.0, lam=1.0)
    grad = gradient(lambda x: ppo.ppo_clip_loss(x, new, advantages, mask, math.inf)[0], new)
    for n, length in enumerate(LENGTHS):
        for t in range(length):
            push = sum(reward[n, t:length].tolist()) - value[n, t].item()
            assert grad[n, t].item() == pytest.approx(-push / sum(LENGTHS), abs=1e-12)


# ------------------------------------------------------------------------- running statistics, adaptive beta


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_running_normalizer_against_numpy_over_everything_seen_also_after_resume(shift_mean, clip):
    generator = torch.Generator().manual_seed(0)
    batches = [5 + 3 * torch.randn(size, generator=generator) for size in (7, 1, 64, 32)]
    normalizer, seen = ppo.RunningNormalizer(shift_mean, clip=clip), []
    for x in batches:
        found, (seen, before) = normalizer(x.double()), (seen + x.tolist(), normalizer)
        everything = numpy.array(seen)
        expected = (numpy.array(x.tolist()) - (everything.mean() if shift_mean else 0)) / everything.std()
        expected = expected if clip is None else expected.clip(-clip, clip)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
        normalizer = ppo.RunningNormalizer(shift_mean, clip=clip)
        normalizer.load_state_dict(json.loads(json.dumps(before.state_dict())))


def test_running_normalizer_on_a_large_mean_and_when_off():
    x = 1e6 + torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert ppo.RunningNormalizer()(x).std().item() == pytest.approx(1, rel=1e-3)
    assert ppo.RunningNormalizer()(torch.zeros(4, dtype=torch.float64)).tolist() == [0.0] * 4
    assert torch.equal(ppo.RunningNormalizer(scale=False)(x), x)
    assert ppo.RunningNormalizer(scale=False, clip=0.5)(torch.tensor([-2.0, 0.25, 3.0])).tolist() == [
        -0.5,
        0.25,
        0.5,
    ]


@pytest.mark.parametrize(
    "kl, expected",
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 0.0128)),
        (60.0, 0.1 * 1.00256),
        (0.0, 0.1 * 0.99744),
        (5.4, 0.1 * 0.99872),
    ],
)
def test_adaptive_beta_by_hand(kl, expected):
    assert ppo.adaptive_beta(0.1, kl, target=6.0, horizon=10000, n=128) == pytest.approx(expected, rel=1e-12)


def test_adaptive_beta_stays_positive_and_acts_within_a_run():
    """A horizon far below a rollout moves it by a fifth at most; the default one by much within --steps."""
    for kl, factor in ((0.0, 0.8), (100.0, 1.2)):
        assert ppo.adaptive_beta(0.5, kl, target=1.0, horizon=1, n=128) == pytest.approx(0.5 * factor)
    args, beta = ppo.Args(), 0.5
    for _ in range(args.steps):
        n = args.prompts_per_step * args.num_responses
        beta = ppo.adaptive_beta(beta, 100.0, 1.0, args.kl_horizon, n)
    assert beta > 1.0


# ---------------------------------------------------------------------------------------- equivalent rewards


def whitened_advantages(score, K):
    """Token advantages of a batch as the script takes them, V = 0: every prompt has K responses."""
    old, ref, _, mask = draw(lengths=[4, 2] * (len(score) // 2))
    reward = ppo.token_rewards(score, old, ref, mask, beta=0.1)
    advantages, _ = ppo.gae(reward, torch.zeros_like(reward), mask)
    return ppo.masked_whiten(advantages, mask), mask


def test_equivalent_rewards_change_ppo():
    """r + delta(x) says the same of every pair of responses, yet gives PPO advantages of other sign."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    offset = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    plain, mask = whitened_advantages(score.flatten(), 2)
    shifted, _ = whitened_advantages((score + 3 * offset).flatten(), 2)
    assert ((plain * shifted)[mask] < 0).float().mean() > 0.2
    constant, _ = whitened_advantages((score + 0 * offset).flatten(), 2)
    assert torch.equal(plain, constant)


# ----------------------------------------------------------------------------------------------- tiny models

TINY = dict(vocab_size=11, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
TINY |= dict(
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=0
)
TOKENIZER = word_tokenizer(11, pad=0)


def tiny_models(dtype=torch.float64):
    """Policy and critic, whose head is in float32 whatever the dtype."""
    torch.manual_seed(0)
    config, kinds = GPT2Config(**TINY, num_labels=1), (GPT2LMHeadModel, GPT2ForSequenceClassification)
    policy, critic = (kind(config).to(dtype).eval() for kind in kinds)
    critic.score.float()
    return policy, critic


def tiny_batch(args):
    """Four prompts with K responses each, all of different lengths: as lists, and padded."""
    rng = random.Random(0)
    prompts = [
        [rng.randrange(2, 11) for _ in range(n)] for n in (3, 1, 6, 2) for _ in range(args.num_responses)
    ]
    responses = [[rng.randrange(2, 11) for _ in range(rng.randrange(8))] + [1] for _ in prompts]
    return prompts, responses, ppo.pad_rows(prompts, responses, TOKENIZER, args)


def args_for(**changes):
    return ppo.Args(**{"device": "cpu", "micro_batch_size": 4, "minibatch_size": 4} | changes)


def test_values_are_those_before_each_token_and_the_score_that_after_the_last():
    """Against transformers' own forward, unpadded: V_t has seen the prompt and t response tokens."""
    critic = tiny_models(torch.float32)[1]
    prompts, responses, batch = tiny_batch(args_for())
    with torch.no_grad():
        values, score = ppo.read_values(critic, **batch), ppo.read_score(critic, **batch)
        assert values.shape == batch["response_ids"].shape
        for row, (prompt, response) in enumerate(zip(prompts, responses)):
            texts = [torch.tensor([prompt + response[:t]]) for t in range(len(response) + 1)]
            alone = [critic(text).logits.item() for text in texts]
            found = [*values[row, : len(response)].tolist(), score[row].item()]
            assert found == pytest.approx(alone, abs=1e-5)


def prepared(args):
    """Tiny models and a batch with log-probs, values, advantages and returns."""
    policy, critic = tiny_models()
    _, _, batch = tiny_batch(args)
    with torch.no_grad():
        more = {"logp_old_tok": ppo.response_logps(policy, **batch, temperature=args.temperature)}
        more["value_old_tok"] = ppo.read_values(critic, **batch)
    generator = torch.Generator().manual_seed(2)
    for name in ("advantages", "returns"):
        more[name] = torch.randn(batch["response_ids"].shape, generator=generator)
    return policy, critic, batch | more


def test_first_minibatch_has_ratio_1_and_approx_kl_0():
    args = args_for(temperature=0.5)
    policy, critic, batch = prepared(args)
    loss, stats = ppo.policy_and_value_loss(policy, critic, batch, torch.arange(8), args)
    assert stats["log_ratio_max"] < 1e-5 and abs(stats["approx_kl"]) < 1e-9 and stats["clip_fraction"] == 0
    mask, value = batch["response_mask"], batch["value_old_tok"]
    assert stats["loss"] == pytest.approx(-batch["advantages"][mask].mean().item(), abs=1e-5)
    error = (value - batch["returns"])[mask].square().mean().item()
    assert stats["value_loss"] == pytest.approx(error / 2, rel=1e-5), "nothing is clipped at first"
    assert loss.item() == pytest.approx(stats["loss"] + stats["value_loss"], rel=1e-6)


class Keep:
    """An optimizer that moves nothing and keeps the gradients of each model, or None where there is none."""

    def __init__(self, *models):
        self.models, self.seen = models, None

    def step(self):
        grads = [[p.grad.flatten() for p in m.parameters() if p.grad is not None] for m in self.models]
        self.seen = [torch.cat(grad) if grad else None for grad in grads]

    def zero_grad(self):
        for model in self.models:
            model.zero_grad()


def move(*models):
    """Moves the models a little, always in the same way, as updates since the rollout would have."""
    generator = torch.Generator().manual_seed(5)
    for parameter in [p for model in models for p in model.parameters()]:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


DEMONSTRATIONS = [{"prompt_ids": [3] * n, "response_ids": [[5, 6, 7, 4, 2][:n] + [1]]} for n in (1, 2, 3, 5)]


def gradients_of_a_step(args, learns=True):
    """[gradient of the policy, of the critic] and metrics of an optimizer step."""
    policy, critic, batch = prepared(args)
    move(policy, critic)
    policy.requires_grad_(learns)
    optimizer = Keep(policy, critic)
    torch.manual_seed(0)
    order = torch.tensor([2, 0, 3, 1])
    metrics = ppo.update_models(policy, critic, optimizer, batch, order, DEMONSTRATIONS, TOKENIZER, args)
    left = [p for model in (policy, critic) for p in model.parameters() if p.grad is not None]
    assert not left, "the next step starts without gradients"
    return optimizer.seen, metrics


MICRO = [
    {},
    {"ptx_coef": 0.4},
    {"policy_loss": "penalty"},
    {"value_clip_range": math.inf},
]


@pytest.mark.parametrize("flags", MICRO, ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up_to_the_gradient_of_the_minibatch(flags, size):
    """Responses differ in length, so a mean of micro-batch means would be another gradient."""
    flags = {"max_grad_norm": 1e9} | flags
    whole, metrics = gradients_of_a_step(args_for(**flags))
    parts, sum_of_parts = gradients_of_a_step(args_for(micro_batch_size=size, **flags))
    for a, b in zip(whole, parts, strict=True):
        assert a.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert metrics == pytest.approx(sum_of_parts, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("value_clip_range", [0.05, math.inf])
def test_step_gradient_is_that_of_the_formulas(value_clip_range):
    """The whole step, with demonstrations, against autograd through loops over tokens."""
    flags = {"ptx_coef": 0.4, "max_grad_norm": 1e9, "temperature": 0.7}
    args = args_for(**flags, value_clip_range=value_clip_range)
    found_both, metrics = gradients_of_a_step(args)
    policy, critic, batch = prepared(args)
    move(policy, critic)
    torch.manual_seed(0)
    chosen = [DEMONSTRATIONS[i] for i in torch.randint(4, (4,))]
    prompts, responses, _ = tiny_batch(args)
    surrogate = value_error = likelihood = 0.0
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        text = torch.tensor([prompt + response])
        table = (policy(text).logits[0] / 0.7).log_softmax(-1)
        hidden = critic.score(critic.transformer(text).last_hidden_state.float())[0, :, 0]
        for t, token in enumerate(response):
            here = len(prompt) + t - 1
            rho = (table[here, token] - batch["logp_old_tok"][row, t]).exp()
            a, old, target = (batch[name][row, t] for name in ("advantages", "value_old_tok", "returns"))
            surrogate = surrogate + torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a)
            held = old + (hidden[here] - old).clamp(-value_clip_range, value_clip_range)
            value_error = value_error + torch.maximum((hidden[here] - target) ** 2, (held - target) ** 2) / 2
    for row in chosen:
        prompt, (response,) = row["prompt_ids"], row["response_ids"]
        table = (policy(torch.tensor([prompt + response])).logits[0] / 0.7).log_softmax(-1)
        likelihood = likelihood + sum(table[len(prompt) + t - 1, token] for t, token in enumerate(response))
    tokens, demonstrated = sum(map(len, responses)), sum(len(row["response_ids"][0]) for row in chosen)
    policy_loss = -surrogate / tokens
    (policy_loss - 0.4 * likelihood / demonstrated).backward()
    (value_error / tokens).backward()
    for model, found in zip((policy, critic), found_both, strict=True):
        exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)
    assert metrics["loss"] == pytest.approx(policy_loss.item(), rel=1e-4)
    assert metrics["value_loss"] == pytest.approx(value_error.item() / tokens, rel=1e-4)
    assert metrics["ptx_logp"] == pytest.approx(likelihood.item() / demonstrated, rel=1e-4)


def test_gradients_are_clipped_for_each_model():
    seen, metrics = gradients_of_a_step(args_for(max_grad_norm=0.01))
    assert [x.norm().item() for x in seen] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert metrics["grad_norm"] > 0.02 and metrics["critic_grad_norm"] > 0.02


def test_a_policy_that_does_not_learn_gets_no_gradient_and_changes_nothing_for_the_critic():
    (policy, critic), metrics = gradients_of_a_step(args_for(ptx_coef=0.4), learns=False)
    (_, expected), others = gradients_of_a_step(args_for(ptx_coef=0.4))
    assert policy is None and torch.equal(critic, expected)
    assert metrics == pytest.approx(others | {"grad_norm": 0.0}, rel=1e-6)


@pytest.mark.parametrize("name", ["returns", "advantages"])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(name):
    args = args_for()
    policy, critic, batch = prepared(args)
    batch[name] = batch[name] * math.nan
    optimizer = Keep(policy, critic)
    with pytest.raises(SystemExit, match="^error: .* is not finite; start again with lower"):
        ppo.update_models(policy, critic, optimizer, batch, torch.arange(4), None, TOKENIZER, args)
    assert optimizer.seen is None


# ------------------------------------------------------------------------------------------------ short runs


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Random models over the toy's words, and a few of its rows: what the stages before PPO would leave."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, config = toy.make_model()
    config.n_layer, config.n_embd, config.n_head, config.num_labels = 1, 32, 2, 1
    torch.manual_seed(0)
    for name, kind in (("sft", AutoModelForCausalLM), ("reward_model", AutoModelForSequenceClassification)):
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)
    pairs = [(place, aspect) for place in toy.PLACES for aspect in toy.ASPECTS]
    requests = [(f"write about the {place} and its {aspect} .", place, aspect) for place, aspect in pairs]
    for folder_name, kind in (("prompts", "prompts"), ("demonstrations", "sft")):
        (folder / folder_name).mkdir()
        for split in ("train", "validation"):
            rows = [json.dumps(row) + "\n" for row in toy.make_rows(kind, requests, 12, rng)]
            (folder / folder_name / f"{split}.jsonl").write_text("".join(rows))
    return folder


SMALL = ["--device", "cpu", "--minibatch_size", 2, "--prompts_per_step", 4, "--prompt_length", 12]
SMALL += ["--response_length", 6, "--eval_prompts", 4, "--eval_every", 100]
PATHS = {
    "model": "sft",
    "reward_model": "reward_model",
    "dataset": "prompts",
    "ptx_dataset": "demonstrations",
}


def run(world, folder, *flags, steps=1):
    """ppo.main on the tiny world as the command line would call it. Returns the rows of metrics.jsonl."""
    words = [word for name, value in PATHS.items() for word in (f"--{name}", world / value)]
    words += [*SMALL, "--output_dir", folder, "--steps", steps, *flags]
    ppo.main(ppo.parse_args([str(word) for word in words]))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def plain_run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, run(world, folder, steps=2)


EVALUATED = "reward", "kl", "entropy", "response_length", "eos_rate"
TIMELESS = (
    "loss clip_fraction log_ratio_max grad_norm critic_grad_norm value_loss explained_variance approx_kl"
)
TIMELESS = {*EVALUATED, *TIMELESS.split(), "beta"}


def test_metrics_and_files_of_a_run(world, plain_run):
    folder, rows = plain_run
    evaluated = {"eval_gain", *(f"eval_{name}" for name in EVALUATED)}
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [set(row) - {"step"} for row in rows] == [
        evaluated,
        TIMELESS | {"seconds"},
        TIMELESS | {"seconds"} | evaluated,
    ]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-4) and abs(rows[2]["kl"]) > 1e-4
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    assert len(AutoTokenizer.from_pretrained(folder / "critic")) > 10
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for model, name in ((AutoModelForCausalLM.from_pretrained(folder), "model"), (critic, "critic")):
        for key, value in model.state_dict().items():
            assert torch.equal(value, saved[name][key])
    start = AutoModelForSequenceClassification.from_pretrained(world / "reward_model")
    assert not torch.equal(start.score.weight, critic.score.weight), "the critic has learnt"
    rates = [group["lr"] for group in saved["optimizer"]["param_groups"]]
    assert rates == [ppo.Args.learning_rate / 2, ppo.Args.critic_learning_rate / 2], "step 2 of 2"


def rollout(world, folder, *flags):
    """The batch as train_step hands it to the updates in step 1, with the metrics of the step."""
    seen = []

    def update_models(policy, critic, optimizer, batch, *rest):
        seen.append(batch)
        return {"log_ratio_max": 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "update_models", update_models)
        row = run(world, folder, *flags)[1]
    return seen[0], row


@pytest.mark.parametrize("flags", [(), ("--micro_batch_size", 1, "--gamma", 0.9, "--lam", 0.5)], ids=str)
def test_advantages_returns_and_their_metrics_against_loops(world, tmp_path, flags):
    """Returns and metrics are those before whitening. explained_variance compares V with Monte-Carlo returns."""
    batch, row = rollout(world, tmp_path / "plain", *flags, "--whiten_advantages", "false")
    white, white_row = rollout(world, tmp_path / "white", *flags)
    gamma, lam = (0.9, 0.5) if flags else (1.0, 0.95)
    critic = AutoModelForSequenceClassification.from_pretrained(world / "reward_model").eval()
    advantages, errors, to_come = [], [], []
    for n, length in enumerate(batch["response_mask"].sum(1).tolist()):
        ids = [*batch["prompt_ids"][n][batch["prompt_mask"][n]], *batch["response_ids"][n, :length]]
        with torch.no_grad():
            texts = [torch.tensor([ids[: len(ids) - length + t]]) for t in range(length)]
            value = [critic(text).logits.item() for text in texts] + [0.0]
        kl = (batch["logp_old_tok"][n] - batch["logp_ref_tok"][n]).tolist()
        reward = [-0.5 * kl[t] for t in range(length)]
        reward[-1] += batch["score"][n].item()
        for t in range(length):
            delta = [reward[k] + gamma * value[k + 1] - value[k] for k in range(t, length)]
            advantages.append(sum((gamma * lam) ** k * delta[k] for k in range(length - t)))
            to_come.append(sum(gamma**k * reward[t + k] for k in range(length - t)))
            errors.append(to_come[-1] - value[t])
            assert batch["returns"][n, t].item() == pytest.approx(advantages[-1] + value[t], abs=1e-5)
    mask = batch["response_mask"]
    assert batch["advantages"][mask].tolist() == pytest.approx(advantages, abs=1e-5)
    assert row["explained_variance"] == pytest.approx(1 - numpy.var(errors) / numpy.var(to_come), abs=1e-4)
    expected = (numpy.array(advantages) - numpy.mean(advantages)) / numpy.std(advantages)
    assert white["advantages"][mask].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert torch.equal(white["returns"], batch["returns"])
    assert all(white_row[name] == row[name] for name in TIMELESS & set(row))
    clipped, _ = rollout(world, tmp_path / "clipped", *flags, "--advantage_clip", 0.5)
    torch.testing.assert_close(clipped["advantages"], white["advantages"].clamp(-0.5, 0.5))


ONE_BY_ONE = [  # --kl_target, --critic_warmup_steps, --reward_shift and --preset have tests of their own
    ("--policy_loss", "penalty"),
    ("--policy_loss", "penalty", "--penalty_coef", 50),
    ("--lam", 0),
    ("--clip_range", 0.001),
    ("--value_clip_range", 0.001),
    ("--normalize_reward", "true"),
    ("--scale_reward",),
    ("--reward_clip", 0.01),
    ("--critic_init", "sft"),
    ("--critic_learning_rate", 0.01),
    ("--ptx_coef", 2),
    ("--max_grad_norm", 0.0001),
    ("--dtype", "bfloat16", "--ptx_coef", 0.1),
    ("--learning_rate", 0.01, "--epochs", 1, "--num_responses", 1, "--micro_batch_size", 1, "--beta", 0),
    ("--missing_eos_penalty", 5, "--temperature", 0.5, "--seed", 1, "--minibatch_size", 4),
]


@pytest.mark.parametrize("flags", ONE_BY_ONE, ids=lambda flags: " ".join(map(str, flags[:4])))
def test_every_flag_runs_and_changes_the_run(world, plain_run, tmp_path, flags):
    """Step 1 of 1 does what step 1 of 2 does: the learning rate of a run's first step is the highest."""
    rows = run(world, tmp_path / "run", *flags)
    assert any(rows[1].get(name) != plain_run[1][1][name] for name in TIMELESS)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    if "--critic_init" in flags:
        assert rows[1]["explained_variance"] == 0, "V = 0 at first"


def test_adaptive_beta_moves_by_the_kl_of_each_rollout_after_the_critics_first_steps(world, tmp_path):
    flags = "--beta", 0.2, "--kl_target", 0.001, "--kl_horizon", 8, "--learning_rate", 0.01
    rows = run(world, tmp_path / "run", *flags, "--critic_warmup_steps", 1, steps=4)
    assert rows[1]["beta"] == rows[2]["beta"] == 0.2 != rows[3]["beta"], "KL 0 of the first says nothing"
    for row, later in zip(rows[2:], rows[3:]):
        step = min(max(row["kl"] / 0.001 - 1, -0.2), 0.2)  # the horizon is the 8 responses of one step
        assert later["beta"] == pytest.approx(row["beta"] * (1 + step), rel=1e-12)
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["beta"]
    assert saved == ppo.adaptive_beta(rows[4]["beta"], rows[4]["kl"], 0.001, 8, 8)


def test_critic_pretraining_leaves_the_policy_alone(world, tmp_path):
    rows = run(world, tmp_path / "run", "--critic_warmup_steps", 2, "--ptx_coef", 0.1, steps=3)
    assert rows[1]["kl"] == rows[2]["kl"] == rows[3]["kl"] == 0 == rows[2]["grad_norm"] < rows[3]["grad_norm"]
    assert rows[1]["ptx_logp"] < 0 and rows[3]["eval_kl"] != 0
    assert rows[2]["value_loss"] != rows[1]["value_loss"] and rows[1]["critic_grad_norm"] > 0


def test_reward_shift_is_not_in_the_reported_reward(world, tmp_path, plain_run):
    rows = run(world, tmp_path / "run", "--reward_shift", 5)
    assert rows[1]["reward"] == plain_run[1][1]["reward"]
    assert rows[1]["value_loss"] > 2 * plain_run[1][1]["value_loss"], "the critic has to learn the offsets"


def test_a_reward_of_ones_own_needs_no_reward_model(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ppo, "load_reward", lambda tokenizer, args: lambda batch: list(map(len, batch["response"]))
    )
    rows = run(world, tmp_path / "run", "--critic_init", "sft", "--reward_model", "none", "--beta", 0)
    texts = [json.loads(line) for line in (tmp_path / "run/samples_1.jsonl").read_text().splitlines()]
    assert rows[1]["value_loss"] > 0
    assert {len(row["response"]) - row["reward"] for row in texts} <= {0.0, 1.0}, "1 is for a missing EOS"


# -------------------------------------------------------------------------------------------------- presets
PPO_MAX = {"beta": 0.05, "normalize_reward": True, "reward_clip": 0.8, "whiten_advantages": False}
PPO_MAX |= {"critic_warmup_steps": 10, "ptx_coef": 0.05}
LEFT = {"critic_init": "reward", "value_clip_range": 0.2, "max_grad_norm": 1.0, "clip_range": 0.2}
LEFT |= {"advantage_clip": None, "scale_reward": False, "kl_target": None}


def test_presets_set_defaults():
    """PPO-max is that of "Secrets of RLHF", section 5.4, also in what it leaves as it is."""
    plain = ppo.Args()
    assert ppo.parse_args([]) == ppo.parse_args(["--preset", "ppo"]) == plain
    assert all(getattr(plain, name) != value for name, value in PPO_MAX.items())
    expected = ppo.Args(preset="ppo_max", **PPO_MAX)
    assert ppo.parse_args(["--preset", "ppo_max"]) == ppo.parse_args(["--preset=ppo_max"]) == expected
    assert {name: getattr(expected, name) for name in LEFT} == LEFT
    assert ppo.parse_args(["--dataset", "ppo_max", "--output_dir", "preset"]).beta == plain.beta


@pytest.mark.parametrize("name", PPO_MAX)
def test_a_flag_that_is_given_wins_over_the_preset_on_either_side_of_it(name):
    """Also one that is given the value that it would have without the preset."""
    value = {"reward_clip": math.inf}.get(name, getattr(ppo.Args(), name))
    for words in (
        ["--preset", "ppo_max", f"--{name}={value}"],
        [f"--{name}", str(value), "--preset=ppo_max"],
    ):
        assert ppo.parse_args(words) == ppo.Args(preset="ppo_max", **PPO_MAX | {name: value})


def test_help_shows_the_defaults_of_the_preset(capsys):
    shown = {}
    for preset in ppo.PRESETS:
        with pytest.raises(SystemExit, match="^0$"):
            ppo.parse_args(["--help", "--preset", preset])
        text = " ".join(capsys.readouterr().out.split())
        parts = [text[text.rindex(f" --{name} ") :] for name in ("reward_clip", "ptx_coef", "clip_range")]
        shown[preset] = [part[part.index("(default: ") + 10 :].split(")")[0] for part in parts]
    assert shown == {"ppo": ["None", "0.0", "0.2"], "ppo_max": ["0.8", "0.05", "0.2"]}


def test_an_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        ppo.parse_args(["--preset", "ppo_min"])
    assert "--preset" in capsys.readouterr().err


def test_a_run_of_ppo_max_records_its_settings(world, tmp_path):
    rows = run(world, tmp_path / "run", "--preset", "ppo_max", "--critic_warmup_steps", 1, steps=2)
    record = json.loads((tmp_path / "run/args.json").read_text())["args"]
    assert {name: record[name] for name in PPO_MAX} == PPO_MAX | {"critic_warmup_steps": 1}
    assert rows[2]["ptx_logp"] < 0 and rows[2]["kl"] == 0 != rows[2]["eval_kl"] and rows[2]["beta"] == 0.05


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--gamma", 1.5), "--gamma and --lam must be at most 1"),
        (("--lam", 1.5), "--gamma and --lam must be at most 1"),
        (("--critic_learning_rate", 0), "--critic_learning_rate 0.0 is out of range"),
        (("--reward_clip", 0), "--reward_clip 0.0 is out of range"),
        (("--value_clip_range", "nan"), "--value_clip_range nan is out of range"),
        (("--minibatch_size", 3), "--minibatch_size must divide --prompts_per_step"),
        (("--ptx_coef", 1, "--ptx_dataset", "prompts"), "prompts has no columns"),
        (("--reward_model", "none"), ""),
        (("--critic_init", "sft", "--reward_model", "sft"), "sft lacks the weights ['score.weight']"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(world, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as stop:
        run(world, tmp_path / "run", *flags)
    assert stop.value.code.startswith(f"error: {message}") and "\n" not in stop.value.code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", ["in step 3", "before its checkpoint is in place"])
def test_resume_after_a_kill_is_bit_identical_with_critic_normalizer_and_beta(world, tmp_path, moment):
    flags = ["--normalize_reward", "true", "--kl_target", 0.001, "--kl_horizon", 50, "--ptx_coef", 0.1]
    flags += ["--critic_warmup_steps", 1, "--save_every", 1]
    straight = run(world, tmp_path / "straight", *flags, steps=4)
    calls, function = [], ppo.update_models if moment == "in step 3" else os.replace
    fatal = 2 * 4 + 2 if moment == "in step 3" else 3  # two epochs of two minibatches; steps 0, 1, 2 and 3

    def stop(*args):
        calls.append(args)
        if len(calls) > fatal:
            raise InterruptedError
        return function(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(*((ppo, "update_models") if moment == "in step 3" else (os, "replace")), stop)
        run(world, tmp_path / "halves", *flags, steps=4)
    assert torch.load(tmp_path / "halves/checkpoint.pt", weights_only=True)["step"] == 2
    halves = run(world, tmp_path / "halves", *flags, "--resume", steps=4)
    assert [row | {"seconds": 0} for row in straight] == [row | {"seconds": 0} for row in halves]
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("straight", "halves")
    )
    assert one["normalizer"] == other["normalizer"] and one["normalizer"]["count"] == 4 * 4 * 2
    assert one["beta"] == other["beta"] != straight[1]["beta"]
    for name in ("model", "critic"):
        assert all(torch.equal(value, other[name][key]) for key, value in one[name].items())
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()
