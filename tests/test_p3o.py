"""The mathematics of p3o.py against oracles that share no code with it.

The oracles are loops over plain Python floats with central differences, and the exact enumeration of every
response of a tiny autoregressive language model. B prompts, K responses per prompt, N texts of the tiny model.
"""

import itertools
import math

import pytest
import torch

import p3o

CLIPPINGS = ["joint", "separate"]
EPS = 0.2
EACH = pytest.mark.parametrize("clipping", CLIPPINGS)
EACH_AND_NONE = pytest.mark.parametrize("clipping", ["none", *CLIPPINGS])


def draw(B, K, spread=0.3, seed=0, dtype=torch.float64):
    """Random (logp_new, logp_old, reward), each (B, K); spread is the standard deviation of log rho."""
    generator = torch.Generator().manual_seed(seed)
    logp_old = -5 - 10 * torch.rand(B, K, generator=generator, dtype=torch.float64)
    logp_new = logp_old + spread * torch.randn(B, K, generator=generator, dtype=torch.float64)
    reward = torch.randn(B, K, generator=generator, dtype=torch.float64)
    return logp_new.to(dtype), logp_old.to(dtype), reward


def pair_loss(logp_new, logp_old, reward, clipping, **options):
    """The loss alone; clipping "none" is the vanilla pairwise policy gradient, which does not see logp_old."""
    if clipping == "none":
        return p3o.pairwise_policy_gradient_loss(logp_new, reward)
    return p3o.p3o_loss(logp_new, logp_old, reward, clipping=clipping, **options)[0]


def loss_and_grad(logp_new, logp_old, reward, clipping, **options):
    leaf = logp_new.detach().clone().requires_grad_()
    loss = pair_loss(leaf, logp_old, reward, clipping, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def naive_terms(new, old, reward, at, clip_range, clipping, c=None):
    """Terms of the objective (to be maximised) of ONE prompt as (unclipped, clipped) pairs of floats.

    One term per unordered pair (joint, V2) or per ordered pair (separate, V1). Whatever the paper puts under a
    stop-gradient is evaluated at the log-probs `at`, so that differences in `new` do not see it.
    """
    log_rho, frozen = ([a - b for a, b in zip(logp, old)] for logp in (new, at))
    terms = []
    for i, j in itertools.permutations(range(len(new)), 2):
        weight = math.exp(frozen[j]) * (math.exp(frozen[i]) if clipping == "joint" else 1)
        if c is not None:
            weight = min(max(weight, 1 / c), c)
        w = (reward[i] - reward[j]) * weight
        if clipping == "joint" and i < j:
            d = log_rho[i] - log_rho[j]
            terms.append((w * d, w * min(max(d, -clip_range), clip_range)))
        if clipping == "separate":
            rho = math.exp(log_rho[i])
            terms.append((w * rho, w * min(max(rho, 1 - clip_range), 1 + clip_range)))
    return terms


def naive_objective(new, old, reward, at, clip_range, clipping, c=None):
    """Mean over prompts of V1 or V2. V1: half the sum over both members of a pair = the mean over ordered pairs."""
    total = 0.0
    for row in zip(new, old, reward, at, strict=True):
        values = [min(term) for term in naive_terms(*row, clip_range, clipping, c)]
        total += sum(values) / len(values) / (2 if clipping == "joint" else 1)
    return total / len(new)


def naive_gradient(logp_new, logp_old, reward, clip_range, clipping, c=None, step=1e-6):
    """Central differences of naive_objective in every log-prob, stop-gradients frozen at logp_new."""
    at, old, reward = logp_new.tolist(), logp_old.tolist(), reward.tolist()
    gradient = torch.zeros_like(logp_new)
    for b, k in itertools.product(*map(range, logp_new.shape)):
        for sign in (1, -1):
            moved = logp_new.clone()
            moved[b, k] += sign * step
            value = naive_objective(moved.tolist(), old, reward, at, clip_range, clipping, c)
            gradient[b, k] += sign * value / (2 * step)
    return gradient


# Every text of at most three tokens over {0, 1, EOS = 2}: one that reaches the length limit has no EOS.
PREFIXES = [prefix for length in range(3) for prefix in itertools.product((0, 1), repeat=length)]  # 7
RESPONSES = [
    (*prefix, token) for prefix in PREFIXES for token in range(3) if token == 2 or len(prefix) == 2
]  # 15


class TinyLanguageModel:
    """An autoregressive language model: one row of logits for each prefix that can be continued."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()

    def logps(self):
        """log pi(y) of every response, the EOS included.  (N,)"""
        table = self.logits.log_softmax(-1)
        texts = ([table[PREFIXES.index(y[:t]), y[t]] for t in range(len(y))] for y in RESPONSES)
        return torch.stack([sum(text) for text in texts])


def expected_descent(policy, sampler_logps, reward, K, clipping, **options):
    """E over y_1..y_K ~ sampler of minus the loss's gradient in the policy's logits, by enumeration.

    reward (N,). Every tuple is one prompt of the batch, weighted by its probability; the loss's own mean over
    prompts is undone.
    """
    index = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=K)))  # (N^K, K)
    probability = sampler_logps.detach()[index].sum(-1).exp()  # (N^K,)
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    logp = policy.logps()
    _, grad = loss_and_grad(logp[index], sampler_logps.detach()[index], reward[index], clipping, **options)
    weighted = -grad * len(index) * probability[:, None]
    return torch.autograd.grad((weighted * logp[index]).sum(), policy.logits)[0]


@pytest.fixture(scope="module")
def world():
    """(policy, older policy, reference, score of each response)"""
    score = 2 * torch.randn(15, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return TinyLanguageModel(1), TinyLanguageModel(2), TinyLanguageModel(3), score


def test_trajectory_reward_by_hand():
    score = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
    logp_old = torch.tensor([[-3.0, -4.0], [-1.0, -2.0]])
    logp_ref = torch.tensor([[-5.0, -3.0], [-1.0, -2.5]])
    reward = p3o.trajectory_reward(score, logp_old, logp_ref, beta=0.25)
    assert reward.tolist() == [[0.5, -1.75], [0.5, -0.125]]
    assert reward.dtype == torch.float64, "a float64 score must not be rounded to the log-probs' dtype"


@EACH_AND_NONE
@pytest.mark.parametrize("K", [2, 3])
def test_theorem_1_expected_gradient_is_the_gradient_of_expected_reward(world, K, clipping):
    policy, _, _, score = world
    exact = torch.autograd.grad((policy.logps().exp() * score).sum(), policy.logits)[0]
    found = expected_descent(policy, policy.logps(), score, K, clipping)
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@EACH_AND_NONE
def test_trajectory_reward_yields_the_gradient_of_reward_minus_beta_kl(world, clipping):
    policy, _, reference, score = world
    beta, logp, logp_ref = 0.7, policy.logps(), reference.logps().detach()
    kl = (logp.exp() * (logp - logp_ref)).sum()
    exact = torch.autograd.grad((logp.exp() * score).sum() - beta * kl, policy.logits)[0]
    reward = p3o.trajectory_reward(score[:, None], logp.detach()[:, None], logp_ref[:, None], beta)[:, 0]
    found = expected_descent(policy, logp, reward, 2, clipping)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@EACH
@pytest.mark.parametrize("K", [2, 3])
def test_unclipped_off_policy_expectation_is_exact(world, K, clipping):
    policy, older, _, score = world
    exact = torch.autograd.grad((policy.logps().exp() * score).sum(), policy.logits)[0]
    found = expected_descent(policy, older.logps(), score, K, clipping, clip_range=math.inf)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    wrong = expected_descent(policy, older.logps(), score, K, "none")
    assert (wrong - exact).abs().max() > 0.01, "the two policies are too close for this test to say anything"


@EACH
@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize(
    "clip_range, c", [(0.1, None), (EPS, None), (math.inf, None), (EPS, 1.5), (EPS, 10.0)]
)
def test_loss_gradient_and_stats_against_naive_loops(clipping, K, clip_range, c):
    """c bounds the importance weight, from above and from below."""
    new, old, reward = draw(12, K, seed=5, spread=2.0 if c else 0.3)
    options = {"clip_range": clip_range, "max_importance_weight": c}
    loss, grad = loss_and_grad(new, old, reward, clipping, **options)
    _, stats = p3o.p3o_loss(new, old, reward, clipping=clipping, **options)
    lists = new.tolist(), old.tolist(), reward.tolist(), new.tolist()
    terms = [t for row in zip(*lists, strict=True) for t in naive_terms(*row, clip_range, clipping, c)]
    clipped = sum(low < free for free, low in terms) / len(terms)
    assert loss.shape == () and loss.dtype == torch.float64
    naive = -naive_objective(*lists, clip_range, clipping, c)
    assert loss.item() == pytest.approx(naive, rel=1e-12, abs=1e-12)
    exact = -naive_gradient(new, old, reward, clip_range, clipping, c)
    torch.testing.assert_close(grad, exact, rtol=0, atol=1e-7)
    assert stats["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert stats["log_ratio_max"] == pytest.approx((new - old).abs().max().item(), rel=1e-6)
    assert 0 < clipped < 1 or clip_range == math.inf, "both sides of the clip must occur"
    weight = ((new - old)[:, :2].sum(-1) if clipping == "joint" else new - old).exp()
    assert not c or ((weight > c).any() and (weight < 1 / c).any()), "and of the bound"


@EACH
@pytest.mark.parametrize("K", [2, 3, 5])
def test_first_step_is_the_pairwise_policy_gradient(clipping, K):
    new, _, reward = draw(6, K)
    leaf = new.clone().requires_grad_()
    loss, stats = p3o.p3o_loss(leaf, new, reward, clipping=clipping)
    _, ppg = loss_and_grad(new, new, reward, "none")
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], ppg, rtol=0, atol=1e-14)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert stats["clip_fraction"] == 0 and stats["log_ratio_max"] == 0


@EACH_AND_NONE
@pytest.mark.parametrize("K", [2, 3, 6])
def test_on_policy_is_leave_one_out_reinforce(clipping, K):
    new, _, reward = draw(4, K)
    _, grad = loss_and_grad(new, new, reward, clipping)
    for b, k in itertools.product(range(4), range(K)):
        others = [reward[b, j].item() for j in range(K) if j != k]
        advantage = reward[b, k].item() - sum(others) / len(others)
        assert grad[b, k].item() == pytest.approx(-advantage / K / 4, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("difference", [1.5, -1.5])
@pytest.mark.parametrize("d", [-0.5, -0.21, -0.19, 0.0, 0.19, 0.21, 0.5])
@pytest.mark.parametrize("common", [0.0, 0.7, -0.7])
def test_joint_clip_by_sign(difference, d, common):
    """d is log(rho_1 / rho_2). `common` moves both ratios and must not matter to the clip, only to the weight."""
    old = torch.tensor([[-3.0, -4.0]], dtype=torch.float64)
    new = old + torch.tensor([[common + d / 2, common - d / 2]], dtype=torch.float64)
    reward = torch.tensor([[difference, 0.0]], dtype=torch.float64)
    _, stats = p3o.p3o_loss(new, old, reward, clip_range=EPS, clipping="joint")
    _, grad = loss_and_grad(new, old, reward, "joint", clip_range=EPS)
    removed = (difference > 0 and d > EPS) or (difference < 0 and d < -EPS)
    push = 0.0 if removed else difference * math.exp(2 * common) / 2
    assert grad[0].tolist() == pytest.approx([-push, push], rel=1e-12, abs=0)
    assert stats["clip_fraction"] == (1.0 if removed else 0.0)


@pytest.mark.parametrize("difference", [1.5, -1.5])
@pytest.mark.parametrize("rho_1", [0.79, 0.81, 1.0, 1.19, 1.21])
@pytest.mark.parametrize("rho_2", [0.79, 0.81, 1.0, 1.19, 1.21])
def test_separate_clip_by_sign(difference, rho_1, rho_2):
    old = torch.tensor([[-3.0, -4.0]], dtype=torch.float64)
    new = old + torch.tensor([[rho_1, rho_2]], dtype=torch.float64).log()
    reward = torch.tensor([[difference, 0.0]], dtype=torch.float64)
    _, stats = p3o.p3o_loss(new, old, reward, clip_range=EPS, clipping="separate")
    _, grad = loss_and_grad(new, old, reward, "separate", clip_range=EPS)
    expected, removed = [], 0
    for advantage, rho in ((difference, rho_1), (-difference, rho_2)):
        gone = (advantage > 0 and rho > 1 + EPS) or (advantage < 0 and rho < 1 - EPS)
        expected.append(0.0 if gone else -advantage * rho_1 * rho_2 / 2)
        removed += gone
    assert grad[0].tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    assert stats["clip_fraction"] == removed / 2


@EACH_AND_NONE
@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("K", [2, 4])
def test_equivalent_scores_change_no_bit(clipping, scale, K):
    """r -> r + delta(x) on 4096 prompts at once. Scores and offsets are float32 numbers carried in float64."""
    new, old, _ = draw(4096, K, dtype=torch.float32)
    generator = torch.Generator().manual_seed(8)
    ref = old + torch.randn(4096, K, generator=generator)
    score = torch.randn(4096, K, generator=generator).double()
    delta = (scale * torch.randn(4096, 1, generator=generator)).double()
    rewards = [p3o.trajectory_reward(s, old, ref, beta=0.05) for s in (score, score + delta)]
    (loss, grad), (shifted_loss, shifted_grad) = (loss_and_grad(new, old, r, clipping) for r in rewards)
    assert loss.dtype == grad.dtype == torch.float32
    assert torch.equal(loss, shifted_loss) and torch.equal(grad, shifted_grad)


@EACH_AND_NONE
def test_difference_is_taken_before_the_cast(clipping):
    """1e9 and 1e9 + 0.5 are the same float32 number, and different rewards."""
    logp = torch.full((1, 2), -7.0)
    reward = torch.tensor([[1e9 + 0.5, 1e9]], dtype=torch.float64)
    _, grad = loss_and_grad(logp, logp, reward, clipping)
    assert grad.tolist() == [[-0.25, 0.25]]


@EACH_AND_NONE
def test_order_of_responses_is_irrelevant(clipping):
    new, old, reward = draw(8, 4, seed=3)
    loss, grad = loss_and_grad(new, old, reward, clipping)
    for order in map(list, itertools.permutations(range(4))):
        permuted_loss, permuted_grad = loss_and_grad(new[:, order], old[:, order], reward[:, order], clipping)
        torch.testing.assert_close(permuted_loss, loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(permuted_grad, grad[:, order], rtol=1e-12, atol=1e-14)


@EACH_AND_NONE
def test_equal_responses_give_no_gradient(clipping):
    """Two samples of the same text share log-prob and reward, also after the policy has moved."""
    new, old, reward = (x[:, :1].expand(4, 3) for x in draw(4, 1))
    loss, grad = loss_and_grad(new, old, reward, clipping)
    assert loss.item() == 0 and (grad == 0).all()


@EACH
@pytest.mark.parametrize("c", [None, 10.0])
@pytest.mark.parametrize("difference", [1.0, -100.0, 0.0])
def test_log_rho_is_clamped_at_20(clipping, c, difference):
    """The formula holds up to there. Beyond it, that response has no gradient, and the other one may have one."""
    log_rho = torch.tensor([*itertools.product([-1e3, -21, -19, 0, 19, 21, 1e3], repeat=2)])
    old, reward = torch.full_like(log_rho, -1e4), torch.tensor([[difference, 0]]).expand_as(log_rho).double()
    leaf = (old + log_rho).requires_grad_()
    loss, stats = p3o.p3o_loss(leaf, old, reward, clipping=clipping, max_importance_weight=c)
    loss.backward()
    assert loss.isfinite() and stats["log_ratio_max"] == 1e3 and 0 <= stats["clip_fraction"] <= 1
    expected = []
    for a, b in log_rho.clamp(-20, 20).tolist():
        weights = [min(max(math.exp(x), 1 / (c or math.inf)), c or math.inf) for x in (a + b, a, b)]
        if clipping == "joint":
            push = 0.0 if difference * (a - b) > 0 else difference * weights[0] / 2
            expected.append([-push, push])
        else:
            terms = (difference * weights[2], a), (-difference * weights[1], b)
            expected.append([0.0 if A * x > 0 else -A * math.exp(x) / 2 for A, x in terms])
    expected = torch.tensor(expected) / len(log_rho) * (log_rho.abs() < 20)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=0)
    assert (expected != 0).any() == (difference != 0)


def test_wrong_options_are_refused():
    new, old, reward = draw(2, 2)
    with pytest.raises(ValueError, match="'joint' or 'separate', got 'triple'"):
        p3o.p3o_loss(new, old, reward, clipping="triple")
    with pytest.raises(ValueError, match="0.5, not at least 1"):
        p3o.p3o_loss(new, old, reward, max_importance_weight=0.5)


@EACH_AND_NONE
@pytest.mark.parametrize("shape", [(4, 2), (1, 3), (3,), (4, 1), (4, 3, 1)])
def test_one_response_and_shapes_that_would_broadcast_are_refused(clipping, shape):
    new, other = draw(4, 3)[0], torch.zeros(shape, dtype=torch.float64)
    wrong = [draw(4, 1), (new, new, other)] + [(new, other, new)] * (clipping != "none")
    for tensors in wrong:
        with pytest.raises(ValueError, match="K >= 2"):
            pair_loss(*tensors, clipping)


@pytest.mark.parametrize("clipping", ["joint", "separate", None])
def test_no_gradient_reaches_the_reward(clipping):
    logp, reward = torch.randn(2, 3, 4, requires_grad=True).unbind()
    reward.retain_grad()
    if clipping:
        loss, _ = p3o.p3o_loss(logp, logp.detach() - 0.1, reward, clipping=clipping)
    else:
        loss = p3o.pairwise_policy_gradient_loss(logp, reward)
    loss.backward()
    assert reward.grad is None or not reward.grad.any()
