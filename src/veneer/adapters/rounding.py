"""Round to 16 bits, and measure how much of a delta remains.

    to nearest         a delta below half a step vanishes, and a larger delta can double; the error per weight
                       is at most half a step
    stochastic         up with probability (x − below)/(above − below): E[rounded] = x, so sums over many
                       weights keep the delta; the error per weight is below one step (arXiv 1502.02551)

This module depends only on tensors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def seeded(seed: int, name: str) -> torch.Generator:
    """Return a random generator seeded by (seed, name).

    With one generator per name, results do not depend on the order in which names are processed."""
    word = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(word[:7], "little"))


def stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round `x` stochastically to one of its two neighbors in `dtype`, so that the mean is x.

    Values that `dtype` represents exactly are unchanged. Values beyond the largest number of `dtype` are
    rounded to nearest."""
    nearest = x.to(dtype)
    if dtype == x.dtype:
        return nearest
    off = x - nearest.to(x.dtype)
    away = (off > 0) == (nearest > 0)  # whether the other neighbor is farther from zero
    bits = nearest.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    neighbor = (bits + torch.where(away, 1, -1).to(bits.dtype)).view(dtype)
    tiny = torch.tensor(1, dtype=bits.dtype, device=x.device).view(dtype)
    neighbor = torch.where(nearest == 0, torch.where(off > 0, tiny, -tiny), neighbor)
    step = (neighbor.to(x.dtype) - nearest.to(x.dtype)).abs()
    chance = torch.where((off != 0) & torch.isfinite(step), off.abs() / step, 0.0)
    uniform = torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x.device)
    return torch.where(uniform < chance, neighbor, nearest)


@dataclass
class Rounding:
    """Statistics on how much of the deltas remains after rounding.

    Covers all tensors passed to `add`; computed in float64.

    changed: the share of weights that change after rounding, among those with a nonzero exact delta.
    error: ‖(W'−W) − Δ‖/‖Δ‖.
    kept: ⟨W'−W, Δ⟩/‖Δ‖², the share of the delta in the rounded weights; 1 means all of it, on average."""

    moved: int = 0
    weights: int = 0
    off: float = 0.0
    size: float = 0.0
    along: float = 0.0

    def add(self, original: Tensor, exact: Tensor, after: Tensor) -> None:
        delta = exact - original.to(exact.dtype)
        there = delta != 0
        start = original.to(after.dtype)
        self.weights += int(there.sum())
        self.moved += int(((start != after) & there).sum())
        change = after.to(exact.dtype) - start.to(exact.dtype)
        self.off += float((change - delta).double().square().sum())
        self.size += float(delta.double().square().sum())
        self.along += float((change.double() * delta).sum())

    @property
    def changed(self) -> float:
        return self.moved / self.weights if self.weights else 0.0

    @property
    def error(self) -> float:
        return float((self.off / self.size) ** 0.5) if self.size else 0.0

    @property
    def kept(self) -> float:
        return self.along / self.size if self.size else 0.0
