"""ppo.py against oracles that share no code with it: loops over floats, numpy, differences, tiny models.

Legend: N responses, R tokens of the longest; "garbage" is nan and inf behind a response's end.
"""

import json
import math
import random
import signal

import numpy
import pytest
import torch
from conftest import word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    HfArgumentParser,
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
    config = GPT2Config(**TINY, num_labels=1)
    policy, critic = (
        kind(config).to(dtype).eval() for kind in (GPT2LMHeadModel, GPT2ForSequenceClassification)
    )
    critic.score.float()
    return policy, critic


def tiny_batch(K=2, seed=0):
    """Four prompts with K responses each, all of different lengths: as lists, and padded."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, 11) for _ in range(n)] for n in (3, 1, 6, 2) for _ in range(K)]
    responses = [[rng.randrange(2, 11) for _ in range(rng.randrange(8))] + [1] for _ in prompts]
    padded = ppo.pad(prompts, "left", TOKENIZER, "cpu"), ppo.pad(responses, "right", TOKENIZER, "cpu")
    return prompts, responses, dict(zip(ppo.TOKENS, (*padded[0], *padded[1])))


def test_values_are_those_before_each_token_and_the_score_that_after_the_last():
    """Against transformers' own forward, unpadded: V_t has seen the prompt and t response tokens."""
    critic = tiny_models(torch.float32)[1]
    prompts, responses, batch = tiny_batch()
    with torch.no_grad():
        values, score = ppo.read_values(critic, *batch.values()), ppo.read_score(critic, *batch.values())
        assert values.shape == batch["response_ids"].shape
        for row, (prompt, response) in enumerate(zip(prompts, responses)):
            alone = [
                critic(torch.tensor([prompt + response[:t]])).logits.item() for t in range(len(response) + 1)
            ]
            assert [*values[row, : len(response)].tolist(), score[row].item()] == pytest.approx(
                alone, abs=1e-5
            )


def args_for(tmp_path, **changes):
    args = ppo.Args(output_dir=str(tmp_path / "run"), device="cpu", micro_batch_size=4, minibatch_size=4)
    vars(args).update(ppo.PRESETS["ppo"] | changes)
    return args


def prepared(args, seed=0):
    """Tiny models and a rollout batch with log-probs, values, advantages and returns."""
    policy, critic = tiny_models()
    _, _, batch = tiny_batch(args.num_responses, seed)
    with torch.no_grad():
        old = ppo.response_logps(policy, *batch.values())
        reference = old - torch.rand(old.shape, generator=torch.Generator().manual_seed(1)) / 4
    score = torch.randn(len(old), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batch |= {"logp_old_tok": old, "logp_ref_tok": reference}
    metrics = ppo.estimate_advantages(critic, batch, score, args.beta, args)
    return policy, critic, batch, score, metrics


def test_returns_are_taken_before_whitening_and_metrics_too(tmp_path):
    plain = prepared(args_for(tmp_path, whiten_advantages=False))
    white = prepared(args_for(tmp_path))
    mask = plain[2]["response_mask"]
    assert torch.equal(plain[2]["returns"], white[2]["returns"])
    assert plain[4] == white[4]
    raw, value = plain[2]["advantages"][mask], plain[2]["value_old_tok"][mask]
    torch.testing.assert_close(plain[2]["returns"][mask], raw + value, rtol=0, atol=1e-5)
    assert plain[4]["advantage_mean"] == pytest.approx(raw.mean().item(), rel=1e-4)
    assert plain[4]["advantage_std"] == pytest.approx(raw.std(unbiased=False).item(), rel=1e-4)
    args = args_for(tmp_path)
    reward_tok = ppo.token_rewards(
        plain[3], *(plain[2][x] for x in ("logp_old_tok", "logp_ref_tok")), mask, args.beta
    )
    to_come = torch.stack([reward_tok[:, t:].sum(1) for t in range(mask.shape[1])], 1)[mask]  # gamma is 1
    unexplained = (to_come - value).var(unbiased=False) / to_come.var(unbiased=False)
    assert plain[4]["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-4)
    found = white[2]["advantages"][mask]
    assert found.mean().abs() < 1e-5 and found.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    clipped = prepared(args_for(tmp_path, advantage_clip=0.5))[2]["advantages"]
    assert clipped.abs().max() == 0.5 and (clipped.abs() < 0.5)[mask].any()


def test_first_minibatch_has_ratio_1_and_approx_kl_0(tmp_path):
    args = args_for(tmp_path)
    policy, critic, batch, *_ = prepared(args)
    loss, critic_loss, stats = ppo.losses(policy, critic, batch, torch.arange(8), False, args)
    assert stats["log_ratio_max"] < 1e-5 and abs(stats["approx_kl"]) < 1e-9 and stats["clip_fraction"] == 0
    mask, value = batch["response_mask"], batch["value_old_tok"]
    assert loss.item() == pytest.approx(-batch["advantages"][mask].mean().item(), abs=1e-5)
    error = (value - batch["returns"])[mask].square().mean().item()
    assert critic_loss.item() == pytest.approx(error / 2, rel=1e-5), "nothing is clipped at first"


class Keep:
    """An optimizer that moves nothing and keeps the gradients."""

    def __init__(self, model):
        self.model, self.seen = model, None

    def step(self):
        grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.seen = torch.cat(grads) if grads else None

    def zero_grad(self):
        self.model.zero_grad()


def gradients_of_a_step(args, demonstrations=None, step=1):
    """Gradients of policy and critic in a step whose models have moved a little since the rollout."""
    policy, critic, batch, *_ = prepared(args)
    generator = torch.Generator().manual_seed(5)
    for parameter in [*policy.parameters(), *critic.parameters()]:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.02 * noise
    optimizers = Keep(policy), Keep(critic)
    torch.manual_seed(0)
    order = torch.tensor([2, 0, 3, 1])
    settings = order, demonstrations, step, TOKENIZER, args
    total = ppo.update_models((policy, critic), optimizers, batch, *settings)
    assert all(p.grad is None for model in (policy, critic) for p in model.parameters()), (
        "left for the next step"
    )
    return [optimizer.seen for optimizer in optimizers], total


DEMONSTRATIONS = [{"prompt_ids": [3] * n, "response_ids": [[5, 6, 7, 4, 2][:n] + [1]]} for n in (1, 2, 3, 5)]
MICRO_FLAGS = [
    {},
    {"entropy_coef": 0.3},
    {"ptx_coef": 0.4},
    {"policy_loss": "penalty"},
    {"value_clip_range": 0},
]


@pytest.mark.parametrize("flags", MICRO_FLAGS, ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up_to_the_gradient_of_the_minibatch(tmp_path, flags, size):
    """Responses differ in length, so a mean of micro-batch means would be another gradient."""
    flags = {"max_grad_norm": 1e9} | flags
    whole, total = gradients_of_a_step(args_for(tmp_path, **flags), DEMONSTRATIONS)
    parts, sum_of_parts = gradients_of_a_step(
        args_for(tmp_path, micro_batch_size=size, **flags), DEMONSTRATIONS
    )
    for a, b in zip(whole, parts):
        assert a.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert total == pytest.approx(sum_of_parts, rel=1e-4, abs=1e-7)


def test_step_gradient_is_that_of_the_formulas(tmp_path):
    """The whole step, with entropy and demonstrations, against autograd through loops over tokens."""
    args = args_for(tmp_path, entropy_coef=0.3, ptx_coef=0.4, max_grad_norm=1e9, value_clip_range=0.05)
    (found_policy, found_critic), _ = gradients_of_a_step(args, DEMONSTRATIONS)
    policy, critic, batch, *_ = prepared(args)
    generator = torch.Generator().manual_seed(5)
    for parameter in [*policy.parameters(), *critic.parameters()]:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    chosen = [DEMONSTRATIONS[i] for i in torch.randint(4, (4,))]
    prompts, responses, _ = tiny_batch()
    surrogate = entropy = value_error = likelihood = 0.0
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        text = torch.tensor([prompt + response])
        table = policy(text).logits[0].log_softmax(-1)
        hidden = critic.score(critic.transformer(text).last_hidden_state.float())[0, :, 0]
        for t, token in enumerate(response):
            here = len(prompt) + t - 1
            rho = (table[here, token] - batch["logp_old_tok"][row, t]).exp()
            a, old, target = (batch[x][row, t] for x in ("advantages", "value_old_tok", "returns"))
            surrogate = surrogate + torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a)
            entropy = entropy - (table[here].exp() * table[here]).sum()
            held = old + (hidden[here] - old).clamp(-0.05, 0.05)
            value_error = value_error + torch.maximum((hidden[here] - target) ** 2, (held - target) ** 2) / 2
    for example in chosen:
        prompt, (response,) = example["prompt_ids"], example["response_ids"]
        table = policy(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        likelihood = likelihood + sum(table[len(prompt) + t - 1, token] for t, token in enumerate(response))
    tokens, demonstrated = sum(map(len, responses)), sum(len(e["response_ids"][0]) for e in chosen)
    (-(surrogate + 0.3 * entropy) / tokens - 0.4 * likelihood / demonstrated).backward()
    (value_error / tokens).backward()
    for model, found in ((policy, found_policy), (critic, found_critic)):
        exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)


def test_gradient_clip_and_critic_pretraining(tmp_path):
    seen, total = gradients_of_a_step(args_for(tmp_path, max_grad_norm=0.01))
    assert [x.norm().item() for x in seen] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert total["grad_norm"] > 0.02 and total["critic_grad_norm"] > 0.02
    seen, _ = gradients_of_a_step(args_for(tmp_path, critic_warmup_steps=1), step=1)
    assert seen[0] is None and seen[1] is not None, "the policy rests"
    assert all(
        x is not None for x in gradients_of_a_step(args_for(tmp_path, critic_warmup_steps=1), step=2)[0]
    )


@pytest.mark.parametrize("bad", ["returns", "advantages"])
def test_a_non_finite_loss_stops_before_the_weights(tmp_path, capsys, bad):
    args = args_for(tmp_path)
    policy, critic, batch, *_ = prepared(args)
    batch[bad] = batch[bad] * math.nan
    optimizers = Keep(policy), Keep(critic)
    with pytest.raises(SystemExit) as stop:
        ppo.update_models((policy, critic), optimizers, batch, torch.arange(4), None, 7, TOKENIZER, args)
    assert stop.value.code == 1 and capsys.readouterr().err.startswith("error: step 7 is not finite, {")
    assert [optimizer.seen for optimizer in optimizers] == [None, None]


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


def parse(*flags):
    parser = HfArgumentParser(ppo.Args, allow_abbrev=False)
    return parser.parse_args_into_dataclasses([str(flag) for flag in flags], look_for_args_file=False)[0]


SMALL = ["--device", "cpu", "--minibatch_size", 2, "--prompts_per_step", 4, "--prompt_length", 12]
SMALL += ["--response_length", 6, "--eval_prompts", 4, "--eval_every", 0]


def run(world, folder, *flags, steps=1):
    """ppo.main on the tiny world as the command line would call it. Returns the rows of metrics.jsonl."""
    inputs = {
        "model": "sft",
        "reward_model": "reward_model",
        "dataset": "prompts",
        "ptx_dataset": "demonstrations",
    }
    words = [word for name, value in inputs.items() for word in (f"--{name}", world / value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *ignored: None)  # pytest keeps its own handlers
        ppo.main(parse(*words, *SMALL, "--output_dir", folder, "--steps", steps, *flags))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def plain_run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, run(world, folder, steps=2)


COMMON = (
    "reward reward_std objective kl kl_std entropy perplexity response_length eos_rate clip_fraction loss"
)
COMMON += " log_ratio_max grad_norm frac_identical_pairs tokens_per_second"
COMMON += " seconds_rollout seconds_score seconds_update peak_memory_gb"
COMMON += " value_loss explained_variance advantage_mean advantage_std approx_kl beta"
COMMON += " log_ratio_first critic_grad_norm"
TIMELESS = [x for x in COMMON.split() if not x.startswith(("seconds", "tokens", "peak"))]


def test_metrics_and_files_of_a_run(plain_run):
    folder, rows = plain_run
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert set(COMMON.split()) <= set(rows[1])
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["log_ratio_first"] < 1e-4 and rows[1]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[2]["kl"] != rows[1]["kl"] and "eval_objective" in rows[2]
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name, value in critic.state_dict().items():
        assert torch.equal(value, saved["parts"]["critic"][name])
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "gpt2"
    rates = [saved["parts"][name]["param_groups"][0]["lr"] for name in ("optimizer", "critic_optimizer")]
    assert rates == [ppo.Args.learning_rate / 2, ppo.Args.critic_learning_rate / 2], "step 2 of 2"


ONE_BY_ONE = [  # --kl_target, --critic_warmup_steps, --reward_shift and --preset have tests of their own
    ("--policy_loss", "penalty"),
    ("--policy_loss", "penalty", "--penalty_coef", 50),
    ("--gamma", 0.9),
    ("--lam", 0),
    ("--clip_range", 0.001),
    ("--value_clip_range", 0),
    ("--normalize_reward", "true"),
    ("--scale_reward",),
    ("--reward_clip", 0.01),
    ("--whiten_advantages", "false"),
    ("--advantage_clip", 0.1),
    ("--critic_init", "sft"),
    ("--critic_learning_rate", 0.01),
    ("--ptx_coef", 2),
    ("--entropy_coef", 2),
    ("--max_grad_norm", 0.0001),
    ("--learning_rate", 0.01, "--epochs", 1, "--num_responses", 1, "--micro_batch_size", 1, "--beta", 0),
    ("--missing_eos_penalty", 5, "--temperature", 0.5, "--seed", 1, "--minibatch_size", 4),
]


@pytest.mark.parametrize("flags", ONE_BY_ONE, ids=lambda flags: " ".join(map(str, flags[:4])))
def test_every_flag_runs_and_changes_the_run(world, plain_run, tmp_path, flags):
    rows = run(world, tmp_path / "run", *flags, steps=2)
    assert any(rows[2].get(name) != plain_run[1][2][name] for name in TIMELESS)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    if "--critic_init" in flags:
        assert rows[1]["explained_variance"] == 0 != rows[2]["explained_variance"], "V = 0 at first"


def test_adaptive_beta_moves_by_the_rollouts_kl(world, tmp_path):
    flags = "--beta", 0.2, "--kl_target", 0.001, "--kl_horizon", 8, "--learning_rate", 0.01
    rows, beta = run(world, tmp_path / "run", *flags, steps=3), 0.2
    for row in rows[1:]:
        assert row["beta"] == pytest.approx(beta, rel=1e-12)
        assert row["objective"] == pytest.approx(row["reward"] - 0.2 * row["kl"], abs=1e-6)
        beta = ppo.adaptive_beta(beta, row["kl_exact"], 0.001, 8, 8)


def test_critic_pretraining_leaves_the_policy_alone(world, tmp_path):
    rows = run(world, tmp_path / "run", "--critic_warmup_steps", 2, steps=3)
    assert rows[1]["kl"] == rows[2]["kl"] == rows[3]["kl"] == 0
    assert rows[3]["eval_kl"] != 0


def test_reward_shift_is_not_in_the_reported_reward(world, tmp_path, plain_run):
    rows = run(world, tmp_path / "run", "--reward_shift", 5)
    assert rows[1]["reward"] == plain_run[1][1]["reward"]
    assert rows[1]["advantage_std"] > 2 * plain_run[1][1]["advantage_std"]


# -------------------------------------------------------------------------------------------------- presets
def filled_in(args, monkeypatch, capsys):
    """The args as main takes them from the preset, of which it says nothing."""

    def stop(args, may_be_zero):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(ppo, "check_args", stop)
        ppo.main(args)
    assert capsys.readouterr() == ("", "")
    return args


PPO_MAX = {"beta": 0.05, "normalize_reward": True, "reward_clip": 0.8, "whiten_advantages": False}
PPO_MAX |= {"critic_warmup_steps": 10, "ptx_coef": 0.05}
WITH_EVERY_PRESET = {
    "critic_init": "reward",
    "value_clip_range": 0.2,
    "max_grad_norm": 1.0,
    "clip_range": 0.2,
}
WITH_EVERY_PRESET |= {"entropy_coef": 0.0, "advantage_clip": 0.0, "scale_reward": False, "kl_target": None}


def test_presets_decide_the_flags_without_a_default(monkeypatch, capsys):
    """PPO-max is that of "Secrets of RLHF", section 5.4, also in what it leaves as it is."""
    plain = filled_in(parse(), monkeypatch, capsys)
    for flags in (
        ["--preset", "ppo_max"],
        ["--preset", "ppo_max", "--output_dir", "beta", "--dataset", "ptx_coef"],
    ):
        args = vars(filled_in(parse(*flags), monkeypatch, capsys))
        assert {name: args[name] for name in PPO_MAX} == PPO_MAX
        assert {name: args[name] for name in WITH_EVERY_PRESET} == WITH_EVERY_PRESET
    assert vars(filled_in(ppo.Args(), monkeypatch, capsys)) == vars(plain)
    assert vars(filled_in(parse("--preset", "ppo"), monkeypatch, capsys)) == vars(plain)
    changed = {name for name, value in vars(ppo.Args()).items() if value != vars(plain)[name]}
    assert changed == set(PPO_MAX) and all(vars(plain)[name] != PPO_MAX[name] for name in PPO_MAX)


def test_a_value_that_is_given_wins_over_the_preset(monkeypatch, capsys):
    """Also one that the other preset would have set: every flag, on the command line and in Args."""
    for preset, other in (("ppo", "ppo_max"), ("ppo_max", "ppo")):
        for name, value in ppo.PRESETS[other].items():
            expected = ppo.PRESETS[preset] | {name: value}
            for args in (
                parse("--preset", preset, f"--{name}", value),
                ppo.Args(preset=preset, **{name: value}),
            ):
                args = vars(filled_in(args, monkeypatch, capsys))
                assert {name: args[name] for name in expected} == expected
    args = filled_in(parse("--preset", "ppo_max", "--beta", 0.5, "--reward_clip=0"), monkeypatch, capsys)
    assert (args.beta, args.reward_clip, args.ptx_coef) == (0.5, 0.0, 0.05)


def test_a_run_of_ppo_max_records_what_it_took(world, plain_run, tmp_path):
    rows = run(world, tmp_path / "run", "--preset", "ppo_max", "--critic_warmup_steps", 1, steps=2)
    record = json.loads((tmp_path / "run/args.json").read_text())["args"]
    assert {name: record[name] for name in PPO_MAX} == PPO_MAX | {"critic_warmup_steps": 1}
    assert (
        "ptx_logp" not in rows[1]
        and rows[2]["ptx_logp"] < 0
        and rows[2]["kl"] == 0
        and rows[2]["eval_kl"] != 0
    )
    record = json.loads((plain_run[0] / "args.json").read_text())["args"]
    assert {name: record[name] for name in PPO_MAX} == ppo.PRESETS["ppo"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--gamma", 1.5), "--gamma or --lam is above 1"),
        (("--lam", 1.5), "--gamma or --lam is above 1"),
        (("--normalize_reward", "true", "--scale_reward"), "--normalize_reward already scales"),
        (("--preset", "ppo_max", "--scale_reward"), "--normalize_reward already scales"),
        (("--critic_learning_rate", 0), "--critic_learning_rate 0.0 is out of range"),
        (("--minibatch_size", 3), "--minibatch_size does not divide --prompts_per_step"),
        (("--ptx_coef", 1, "--ptx_dataset", "data/none"), "cannot read data set 'data/none'"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(world, tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(world, tmp_path / "run", *flags)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_resume_after_a_signal_is_bit_identical_with_critic_normalizer_and_beta(world, tmp_path):
    flags = ["--normalize_reward", "true", "--kl_target", 0.001, "--kl_horizon", 50, "--ptx_coef", 0.1]
    straight = run(world, tmp_path / "straight", *flags, steps=4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        signals, end_step = [], ppo.end_step

        def stop_at_2(args, step, *rest):
            signals.extend([15] * (step == 2))
            end_step(args, step, *rest)

        patch.setattr(ppo, "stop_signals", signals)
        patch.setattr(ppo, "end_step", stop_at_2)
        run(world, tmp_path / "halves", *flags, steps=4)
    halves = run(world, tmp_path / "halves", *flags, "--resume", steps=4)
    for row, other in zip(straight, halves, strict=True):
        assert [row[x] for x in TIMELESS if x in row] == [other[x] for x in TIMELESS if x in other]
    ends = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("straight", "halves")
    ]
    assert ends[0]["parts"]["normalizer"] == ends[1]["parts"]["normalizer"]
    assert ends[0]["parts"]["normalizer"]["count"] == 4 * 4 * 2
    assert ends[0]["metrics"]["beta"] == ends[1]["metrics"]["beta"] != straight[1]["beta"]
    for name in ("", "critic"):
        for key, value in ends[0]["parts"][name].items():
            assert torch.equal(value, ends[1]["parts"][name][key])
