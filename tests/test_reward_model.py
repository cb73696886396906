"""bradley_terry_loss of reward_model.py against plain Python mathematics, and on a ranking planted by simulation."""

import itertools
import math

import pytest
import torch

from reward_model import bradley_terry_loss


def draw(B=40, scale=3.0, seed=0):
    """Two random score vectors (B,) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, B, generator=generator, dtype=torch.float64)


def naive_loss(chosen, rejected, margin=0.0):
    """Mean of -log P(chosen beats rejected) over lists of floats, P = 1 / (1 + exp(-(difference - margin)))."""
    losses = [-math.log(1 / (1 + math.exp(-(c - r - margin)))) for c, r in zip(chosen, rejected, strict=True)]
    return sum(losses) / len(losses)


def gradients(chosen, rejected, margin=0.0):
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    loss = bradley_terry_loss(chosen, rejected, margin=margin)
    return loss.detach(), *torch.autograd.grad(loss, (chosen, rejected))


@pytest.mark.parametrize("margin", [0.0, 0.75, -2.0])
def test_loss_and_gradient_against_naive_loops(margin):
    chosen, rejected = draw()
    loss, grad_chosen, grad_rejected = gradients(chosen, rejected, margin)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(naive_loss(chosen.tolist(), rejected.tolist(), margin), rel=1e-12)
    step = 1e-5
    for b in range(len(chosen)):
        move = torch.zeros_like(chosen)
        move[b] = step
        up, down = (naive_loss((chosen + s * move).tolist(), rejected.tolist(), margin) for s in (1, -1))
        assert grad_chosen[b].item() == pytest.approx((up - down) / (2 * step), abs=1e-9)
        up, down = (naive_loss(chosen.tolist(), (rejected + s * move).tolist(), margin) for s in (1, -1))
        assert grad_rejected[b].item() == pytest.approx((up - down) / (2 * step), abs=1e-9)


def test_known_values():
    zero = torch.zeros(3, dtype=torch.float64)
    assert bradley_terry_loss(zero, zero).item() == pytest.approx(math.log(2), rel=1e-15)
    odds = torch.tensor([math.log(3)], dtype=torch.float64)  # odds 3 to 1: P = 3/4
    assert bradley_terry_loss(odds, 0 * odds).item() == pytest.approx(math.log(4 / 3), rel=1e-14)


def test_margin_is_zero_by_default_and_asks_for_more_distance():
    chosen, rejected = draw()
    assert torch.equal(bradley_terry_loss(chosen, rejected), bradley_terry_loss(chosen, rejected, margin=0.0))
    losses = [bradley_terry_loss(chosen, rejected, margin=m).item() for m in (-1.0, 0.0, 0.5, 2.0)]
    assert losses == sorted(losses) and len(set(losses)) == 4
    shifted = bradley_terry_loss(chosen - 1.5, rejected).item()
    assert bradley_terry_loss(chosen, rejected, margin=1.5).item() == pytest.approx(shifted, rel=1e-12)


@pytest.mark.parametrize("scale", [1, 100, 10000])
def test_equivalent_rewards_change_no_bit(scale):
    """r -> r + delta(x) for any delta; on multiples of 1/8 float32 adds without rounding, so equality is exact."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randint(-80, 80, (2, 4096), generator=generator) / 8
    delta = torch.randint(-8 * scale, 8 * scale, (4096,), generator=generator) / 8
    for plain, shifted in zip(
        gradients(chosen, rejected), gradients(chosen + delta, rejected + delta), strict=True
    ):
        assert torch.equal(plain, shifted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "difference, loss_expected, slope", [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0), (0.0, math.log(2), -0.5)]
)
def test_extreme_differences_stay_finite(difference, loss_expected, slope, dtype):
    chosen = torch.full((2,), difference / 2, dtype=dtype)
    loss, grad_chosen, grad_rejected = gradients(chosen, -chosen)
    assert loss.item() == pytest.approx(loss_expected, rel=1e-6)
    assert grad_chosen.tolist() == pytest.approx([slope / 2] * 2, rel=1e-6)
    assert grad_rejected.tolist() == pytest.approx([-slope / 2] * 2, rel=1e-6)


def test_recovers_a_planted_ranking():
    """Free scores fitted to simulated comparisons land on the true differences, within the sampling error that the
    Fisher information of the Bradley-Terry model predicts."""
    truth = torch.tensor([-2.0, -1.2, -0.5, 0.3, 0.9, 2.5], dtype=torch.float64)
    comparisons = 400
    pairs = torch.tensor(list(itertools.combinations(range(6), 2))).repeat(comparisons, 1)
    win_rate = 1 / (1 + torch.exp(truth[pairs[:, 1]] - truth[pairs[:, 0]]))
    first_wins = (
        torch.rand(len(pairs), generator=torch.Generator().manual_seed(2), dtype=torch.float64) < win_rate
    )
    chosen = torch.where(first_wins, pairs[:, 0], pairs[:, 1])
    rejected = torch.where(first_wins, pairs[:, 1], pairs[:, 0])

    scores = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        loss = bradley_terry_loss(scores[chosen], scores[rejected])
        gradient = torch.autograd.grad(loss, scores)[0]
        scores = (scores - 10 * gradient).detach().requires_grad_()
    assert gradient.abs().max() < 1e-8, "not converged"

    information = torch.zeros(6, 6, dtype=torch.float64)
    for (i, j), p in zip(pairs[:15].tolist(), win_rate[:15].tolist(), strict=True):
        move = torch.zeros(6, dtype=torch.float64)
        move[i], move[j] = 1, -1
        information += comparisons * p * (1 - p) * torch.outer(move, move)
    covariance = torch.linalg.pinv(information)
    for i, j in itertools.combinations(range(6), 2):
        error = math.sqrt(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
        assert error < 0.25
        assert (scores[i] - scores[j]).item() == pytest.approx((truth[i] - truth[j]).item(), abs=4 * error)
