"""Losses of image models: random noise and times, and the prediction error.

| prediction | noisy x_t         | target            | time                                          |
| epsilon    | √ᾱ·x + √(1−ᾱ)·n   | n                 | t in 0..999, uniform                          |
| v          | √ᾱ·x + √(1−ᾱ)·n   | √ᾱ·n − √(1−ᾱ)·x   | the same                                      |
| flow       | (1−σ)·x + σ·n     | n − x             | σ in (0, 1): uniform or logit-normal, shifted |

x: latents (n, c, h, w). The loss of a row is the mean squared error over its elements (with a mask: over the
mask), times the min-SNR weight, times the row's weight. Each row has a separate generator, seeded by (seed,
step, row), so the random numbers do not depend on the micro-batches or on the step where a run resumes. This
module does not depend on models or files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from veneer.ops.device_transfer import sent

_Prediction = Literal["epsilon", "v", "flow"]


@dataclass(frozen=True)
class Times:
    """The distribution of timesteps.

    For flow, u is uniform, or u = sigmoid(z) with z ~ N(0, 1) (logit-normal, arXiv 2403.03206), and `shift`
    moves u toward noise.

    shift: a number s, or a function from the number of image tokens to s. patch: latents per token."""

    kind: Literal["uniform", "logit-normal"] = "uniform"
    shift: float | Callable[[int], float] = 1.0
    steps: int = 1000
    patch: int = 4

    def shift_of(self, tokens: int) -> float:
        return self.shift(tokens) if callable(self.shift) else self.shift


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded with a digest of `key`.

    The random numbers do not depend on the device or on the order in which generators are created."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def sample_noise(
    shape: Sequence[int],
    keys: Sequence[tuple[int | str, ...]],
    prediction: _Prediction,
    times: Times,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return noise (n, c, h, w) and times (n,), with one row per key.

    Times are integers below `times.steps` for epsilon and v, and float32 sigmas in (0, 1) for flow.

    shape: shape of one row of latents, (c, h, w). offset: scale of a noise offset: offset·z is added to the
    noise, with one z per channel of each row.
    """
    rows, times_of_rows = [], []
    for key in keys:
        g = generator(*key)
        times_of_rows.append(_time(shape, prediction, times, g))
        noise = torch.randn(tuple(shape), generator=g)
        if offset:
            noise = noise + offset * torch.randn((shape[0], 1, 1), generator=g)
        rows.append(noise)
    return torch.stack(rows), torch.stack(times_of_rows)


def _time(shape: Sequence[int], prediction: _Prediction, times: Times, g: torch.Generator) -> Tensor:
    if prediction != "flow":
        return torch.randint(times.steps, (), generator=g)
    u = torch.rand((), generator=g) if times.kind == "uniform" else torch.sigmoid(torch.randn((), generator=g))
    return shifted(u, times.shift_of(shape[-1] * shape[-2] // times.patch))


def shifted(u: Tensor, shift: float) -> Tensor:
    """Return σ = s·u / (1 + (s − 1)·u).

    The map is monotone, maps 0 to 0 and 1 to 1, and its inverse has 1/s in place of s (arXiv 2403.03206, eq. 23).
    FLUX's exp(μ)/(exp(μ) + 1/u − 1) is the same with s = exp(μ)."""
    return shift * u / (1 + (shift - 1) * u)


def mu_of_tokens(tokens: int, *, low: int = 256, high: int = 4096, at_low: float = 0.5, at_high: float = 1.15) -> float:
    """Return FLUX's μ for an image of `tokens` tokens (2 × 2 latents each).

    μ is linear in `tokens`, through the points (low, at_low) and (high, at_high)."""
    slope = (at_high - at_low) / (high - low)
    return at_low + slope * (tokens - low)


def noised(
    latents: Tensor, noise: Tensor, times: Tensor, prediction: _Prediction, alphas_cumprod: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (noisy latents, target) as in the table above, in the dtype of `latents`.

    alphas_cumprod: ᾱ by time."""
    if prediction == "flow":
        sigma = sent(times, latents.device).to(latents.dtype).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, noise - latents
    assert alphas_cumprod is not None
    a = sent(alphas_cumprod.float()[times.to(alphas_cumprod.device)], latents.device)
    signal, spread = a.sqrt().view(-1, 1, 1, 1).to(latents.dtype), (1 - a).sqrt().view(-1, 1, 1, 1).to(latents.dtype)
    target = noise if prediction == "epsilon" else signal * noise - spread * latents
    return signal * latents + spread * noise, target


def min_snr_weight(times: Tensor, prediction: _Prediction, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """Return min(SNR, γ) / SNR for epsilon, or min(SNR, γ) / (SNR + 1) for v: (n,) in float32.

    SNR = ᾱ / (1 − ᾱ) (arXiv 2303.09556, section 3.4). At SNR 0 (a schedule with zero terminal SNR), the
    weight for epsilon is its limit, 1."""
    a = alphas_cumprod.float()[times.to(alphas_cumprod.device)]
    snr = a / (1 - a)
    least = snr.clamp(max=gamma)
    return least / (snr + 1) if prediction == "v" else torch.where(snr > 0, least / snr.clamp_min(1e-38), 1.0)


def row_losses(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each row: (n,) in float32.

    mask: (n, 1, h, w), weights from 0 to 1 for each position. With a mask, the mean is weighted by the mask,
    so that a small subject counts as much as a large one."""
    error = (predicted.float() - target.float()).square()
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    weights = mask.float().expand_as(error)
    return (error * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp_min(1e-6)


def quantile_times(count: int, prediction: _Prediction, steps: int = 1000) -> Tensor:
    """Return the middles of `count` equal parts of the range of times.

    Used for validation without randomness."""
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return middle.float() if prediction == "flow" else (middle * steps).floor().long()


def flux_shift(low: int, high: int, at_low: float, at_high: float) -> Callable[[int], float]:
    """Return the function tokens -> s = exp(μ), for `Times.shift`."""
    return lambda tokens: math.exp(mu_of_tokens(tokens, low=low, high=high, at_low=at_low, at_high=at_high))
