"""Policy losses equal the papers' formulas, calculated by hand in float64, per completion and per token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.elsewhere import OnMps
from veneer.ops.device_transfer import in_float64
from veneer.train.text.policy_losses import (
    advantages,
    clipped,
    importance_weights,
    kl_estimates,
    length_factors,
    per_token,
    policy_ratios,
)
from veneer.train.text.rollouts import SamplerMismatch

LENGTHS = [3, 1, 4, 2]
GROUPS = [0, 0, 1, 1]


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities now and at sampling, and the rewards."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(sum(LENGTHS), generator=g, dtype=torch.float64) * 3 - 0.1
    now = (old + 0.4 * torch.randn(len(old), generator=g, dtype=torch.float64)).clamp(max=-0.01)
    return now, old, torch.randn(len(LENGTHS), generator=g, dtype=torch.float64)


def test_advantages_by_hand() -> None:
    r = [1.0, 0.0, 0.5, 2.5, 1.5]
    groups = [7, 7, 3, 3, 3]
    rewards = torch.tensor(r)
    means = {7: 0.5, 3: 1.5}
    spreads = {7: math.sqrt(0.5), 3: 1.0}
    mean = sum(r) / 5
    spread = math.sqrt(sum((x - mean) ** 2 for x in r) / 4)
    reference = {
        ("group", "group"): [(x - means[g]) / (spreads[g] + 1e-4) for x, g in zip(r, groups, strict=True)],
        ("group", "none"): [x - means[g] for x, g in zip(r, groups, strict=True)],
        ("others", "none"): [1.0 - 0.0, 0.0 - 1.0, 0.5 - 2.0, 2.5 - 1.0, 1.5 - 1.5],
        ("batch", "batch"): [(x - mean) / (spread + 1e-4) for x in r],
        ("none", "none"): r,
    }
    for (baseline, scale), expected in reference.items():
        actual = advantages(rewards, groups, baseline=baseline, scale=scale)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("baseline", ["group", "others"])
def test_single_or_equal_rewards_have_zero_advantage(baseline: str) -> None:
    equals = torch.full((7,), 0.1, dtype=torch.float64)
    assert (
        float(equals.mean()) != 0.1
    )  # rounding error; dividing by the tiny deviation would amplify the error a thousandfold
    actual = advantages(torch.cat([torch.tensor([5.0]), equals]), [0, *[1] * 7], baseline=baseline, scale="group")  # type: ignore[arg-type]
    assert actual.tolist() == [0.0] * 8


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bounds", [(0.2, 0.2), (0.2, 0.28), (None, None), (None, 0.1)])
def test_the_clipped_loss_and_its_gradient_by_hand(level: str, bounds: tuple[float | None, float | None]) -> None:
    low, high = bounds
    now, old, rewards = drawn(1)
    now.requires_grad_()
    worth = advantages(rewards, GROUPS, baseline="group", scale="none")
    ratios = policy_ratios(now, old, LENGTHS, level=level)  # type: ignore[arg-type]
    losses = clipped(ratios, per_token(worth, LENGTHS), low, high)
    factors = length_factors(LENGTHS, "answer", 0)
    loss = (per_token(factors, LENGTHS) * losses).sum() / len(LENGTHS)
    (gradient,) = torch.autograd.grad(loss, now)

    total, expected, at = 0.0, [], 0
    for n, a in zip(LENGTHS, worth.tolist(), strict=True):
        d = [x - y for x, y in zip(now[at : at + n].tolist(), old[at : at + n].tolist(), strict=True)]
        each = [math.exp(x) for x in d] if level == "token" else [math.exp(sum(d) / n)] * n
        answer, slopes = 0.0, []
        for rho in each:
            bounded = min(max(rho, 1 - low if low is not None else 0.0), 1 + high if high is not None else math.inf)
            answer += min(rho * a, bounded * a) / n
            slopes.append(rho * a if rho * a <= bounded * a else 0.0)
        total -= answer / len(LENGTHS)
        # Per token, ∂ρ/∂log p_t = ρ. Per sequence, each of the n tokens gets ρ/n from each of the n losses.
        expected += [-(s if level == "token" else sum(slopes) / n) / n / len(LENGTHS) for s in slopes]
        at += n
    assert math.isclose(float(loss.detach()), total, rel_tol=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


def test_length_factors_by_hand() -> None:
    sums = torch.tensor([sum(range(n)) for n in LENGTHS], dtype=torch.float64)
    tokens = sum(LENGTHS)
    for how, expected in (
        ("answer", sum(s / n for s, n in zip(sums.tolist(), LENGTHS, strict=True)) / 4),
        ("batch", float(sums.sum()) / tokens),
        ("limit", float(sums.sum()) / (4 * 32)),
        ("none", float(sums.sum()) / 4),
    ):
        assert math.isclose(float((length_factors(LENGTHS, how, 32) * sums).mean()), expected)  # type: ignore[arg-type]


def test_kl_estimates_have_the_mean_of_kl() -> None:
    """The average of the estimates over the whole vocabulary, weighted by p, is exactly the KL divergence."""
    g = torch.Generator().manual_seed(3)
    logps, reference = (torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    kl = (logps.exp() * (logps - reference)).sum()
    actual = kl_estimates(logps, reference)
    assert math.isclose(float((logps.exp() * actual).sum()), float(kl), rel_tol=1e-12)
    assert bool((actual >= 0).all())


def test_importance_weights_are_capped() -> None:
    p, q = torch.tensor([0.5, 0.1, 0.9]).log(), torch.tensor([0.25, 0.4, 0.1]).log()
    torch.testing.assert_close(importance_weights(p, q, 3.0), torch.tensor([2.0, 0.25, 3.0]))


def test_sampler_mismatch_works_on_devices_without_float64() -> None:
    gap = SamplerMismatch()
    gap.add(torch.tensor([-1.0, -2.0]).as_subclass(OnMps), torch.tensor([-1.0, -2.5], dtype=torch.float64))
    assert (gap.worst, gap.metric_means.sums["gap_mean"], gap.metric_means.sums["gap_share"]) == (0.5, 0.5, 1.0)


def test_float64_on_the_cpu_keeps_gradients() -> None:
    x = torch.tensor([0.1, 0.2], requires_grad=True)
    wide = in_float64(x.as_subclass(OnMps))
    assert (wide.dtype, wide.device.type) == (torch.float64, "cpu")
    wide.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())
