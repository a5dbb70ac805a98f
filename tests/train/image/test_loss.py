"""Losses of image models, compared with diffusers' functions and with float64 calculations by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from veneer.train.image.loss import (
    Times,
    flux_shift,
    min_snr_weight,
    mu_of_tokens,
    noised,
    quantile_times,
    row_losses,
    sample_noise,
    shifted,
)
from veneer.train.optim import Ema


@pytest.fixture(scope="module")
def alphas() -> Tensor:
    """Return SDXL's ᾱ by definition: √β rises linearly, and β goes from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def _rows(n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x, noise = torch.randn(n, 4, 6, 8, generator=g), torch.randn(n, 4, 6, 8, generator=g)
    return x, noise, torch.tensor([0, 10, 400, 800, 999])


def test_noisy_latents_and_targets_equal_diffusers_scheduler(alphas: Tensor) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alphas, rtol=1e-5, atol=0)
    x, noise, t = _rows()
    noisy, target = noised(x, noise, t, "v", scheduler.alphas_cumprod)
    torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, t))
    torch.testing.assert_close(target, scheduler.get_velocity(x, noise, t))
    noisy, target = noised(x, noise, t, "epsilon", scheduler.alphas_cumprod)
    torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, t))
    assert torch.equal(target, noise)


def test_flow_is_the_line_between_picture_and_noise() -> None:
    x, noise, _ = _rows()
    sigma = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    noisy, target = noised(x, noise, sigma, "flow")
    torch.testing.assert_close(noisy[0], x[0])
    torch.testing.assert_close(noisy[4], noise[4])
    # the target is the line's derivative, so following the line back from any σ returns the picture
    torch.testing.assert_close(noisy - sigma.view(-1, 1, 1, 1) * target, x)


def test_min_snr_weight_equals_diffusers_training_script(alphas: Tensor) -> None:
    """Compares with the formulas of diffusers' train_text_to_image_lora.py.

    epsilon: min(snr, γ)/snr; v: min(snr, γ)/(snr + 1)"""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1000)
    snr = compute_snr(scheduler, t)
    least = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    for kind, wanted in (("epsilon", least / snr), ("v", least / (snr + 1))):
        got = min_snr_weight(t, kind, scheduler.alphas_cumprod, 5.0)  # type: ignore[arg-type]
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-7)


def test_min_snr_weight_is_finite_without_signal() -> None:
    weight = min_snr_weight(torch.tensor([0]), "epsilon", torch.tensor([0.0]), 5.0)
    assert weight.item() == 1.0
    assert min_snr_weight(torch.tensor([0]), "v", torch.tensor([0.0]), 5.0).item() == 0.0


def test_noise_depends_on_seed_step_and_row_only() -> None:
    keys = [(7, 3, row) for row in range(4)]
    for prediction in ("epsilon", "flow"):
        whole = sample_noise((4, 8, 8), keys, prediction, Times("logit-normal"), 0.1)  # type: ignore[arg-type]
        torch.manual_seed(99)
        parts = [
            sample_noise((4, 8, 8), keys[i : i + 1], prediction, Times("logit-normal"), 0.1)  # type: ignore[arg-type]
            for i in (0, 1, 2, 3)
        ]
        for crop_original, cut in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(crop_original, torch.cat(cut))
    other = [sample_noise((4, 8, 8), [key], "epsilon", Times())[0] for key in ((7, 3, 0), (8, 3, 0), (7, 4, 0))]
    assert not torch.equal(other[0], other[1])
    assert not torch.equal(other[0], other[2])


def test_times_have_the_stated_distributions() -> None:
    n = 4000
    keys = [(0, 0, i) for i in range(n)]

    def sample(times: Times, prediction: str = "flow") -> Tensor:
        return sample_noise((1, 2, 2), keys, prediction, times)[1].double()  # type: ignore[arg-type]

    uniform = sample(Times("uniform"))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02
    logit = torch.logit(sample(Times("logit-normal")))
    assert abs(logit.mean()) < 0.05
    assert abs(logit.std() - 1) < 0.05
    # for every distribution, the shift moves the median as the formula says
    moved = sample(Times("uniform", shift=3.0))
    assert abs(moved.median() - shifted(torch.tensor(0.5), 3.0)) < 0.02
    whole = sample(Times(), "epsilon")
    assert set(whole.frac().tolist()) == {0.0}
    assert abs(whole.mean() - 499.5) < 20


def test_resolution_dependent_shift_equals_flux_scheduler() -> None:
    """Compares with calculate_shift and with time_shift of FlowMatchEulerDiscreteScheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    for side in (8, 32, 64, 96):
        tokens = side * side
        assert mu_of_tokens(tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12)
        wanted = torch.as_tensor(scheduler.time_shift(calculate_shift(tokens), 1.0, u.numpy()))
        torch.testing.assert_close(shifted(u, flux_shift(256, 4096, 0.5, 1.15)(tokens)), wanted)
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0)
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(shifted(steps, 3.0).flip(0).float(), plain.sigmas[:1000], rtol=1e-5, atol=1e-6)


def test_noise_offset_shifts_whole_channels() -> None:
    keys = [(0, 0, i) for i in range(400)]
    offset = sample_noise((4, 16, 16), keys, "epsilon", Times(), offset=0.5)[0].double()
    means = offset.mean(dim=(2, 3))
    # the variance of a channel's mean is offset² + 1/256
    assert means.std().item() == pytest.approx(math.sqrt(0.25 + 1 / 256), rel=0.06)
    plain = sample_noise((4, 16, 16), keys, "epsilon", Times())[0].double()
    centred = offset - means[:, :, None, None]
    torch.testing.assert_close(centred, plain - plain.mean(dim=(2, 3), keepdim=True), rtol=0, atol=1e-5)


def test_masked_loss_is_a_weighted_mean() -> None:
    x, y, _ = _rows()
    ones = torch.ones(5, 1, 6, 8)
    torch.testing.assert_close(row_losses(x, y, ones), row_losses(x, y))
    torch.testing.assert_close(row_losses(x, y), ((x.double() - y.double()) ** 2).mean(dim=(1, 2, 3)).float())
    mask = torch.zeros(5, 1, 6, 8)
    mask[:, :, 2:4, 1:3] = 1.0
    wanted = ((x - y).double() ** 2)[:, :, 2:4, 1:3].mean(dim=(1, 2, 3))
    torch.testing.assert_close(row_losses(x, y, mask), wanted.float())
    assert torch.isfinite(row_losses(x, y, torch.zeros(5, 1, 6, 8))).all()


def test_quantile_times_are_midpoints_of_equal_intervals() -> None:
    assert quantile_times(4, "flow").tolist() == [0.125, 0.375, 0.625, 0.875]
    assert quantile_times(4, "epsilon").tolist() == [125, 375, 625, 875]


def test_moving_average_equals_float64_and_diffusers() -> None:
    from diffusers.training_utils import EMAModel

    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ema, theirs = Ema({"m.A": p}, 0.3), EMAModel([p], decay=0.3)
    by_hand = None
    for step in range(1, 8):
        with torch.no_grad():
            p.add_(step)
        ema.update(step)
        theirs.step([p])
        d = 0.0 if step == 1 else min(0.3, step / (9 + step))
        now = p.detach().double()
        by_hand = now if by_hand is None else d * by_hand + (1 - d) * now
    torch.testing.assert_close(ema.averages["m.A@ema"].double(), by_hand, rtol=1e-6, atol=0)
    torch.testing.assert_close(ema.averages["m.A@ema"], theirs.shadow_params[0], rtol=1e-6, atol=0)
    before = p.detach().clone()
    with ema.using_averages():
        assert torch.equal(p.detach(), ema.averages["m.A@ema"])
    assert torch.equal(p.detach(), before)
