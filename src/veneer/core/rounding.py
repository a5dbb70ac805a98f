"""Rounding to 16 bits, to nearest or stochastic, and how much of a delta is left.

    to nearest         deltas below half a step vanish, or count double: the error of one weight is at most half a step
    stochastic         up with probability (x − below)/(above − below): E[rounded] = x, so that sums keep what single
                       weights lose; the error of one weight is below a step (arXiv 1502.02551)

This module knows only tensors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""User-facing name -> dtype that a result can be rounded to."""


def seeded(seed: int, name: str) -> torch.Generator:
    """Return a generator for (seed, name).

    Results then do not depend on the order of work."""
    word = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(word[:7], "little"))


def stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round `x` to `dtype` stochastically: one of its two neighbors, with mean x.

    Values that `dtype` holds are unchanged; beyond its largest number, values round to nearest."""
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
    """How much of the deltas is left after rounding, over everything added.

    Computed in float64.

    changed: share of the weights with a nonzero exact delta that moved.
    error: ‖(W'−W) − Δ‖/‖Δ‖.
    kept: ⟨W'−W, Δ⟩/‖Δ‖², the share of the delta in the written weights; 1 means all of it, on average."""

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
