"""Weights of projections as serving multiplies by them: y = x·Wᵀ + b, W (out, in)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Dense", "Matrix"]


class Matrix(Protocol):
    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (rows, in) -> (rows, out)"""
        ...

    def add_onto(self, y: Tensor, x: Tensor) -> None:
        """y (rows, out) += x·Wᵀ, in place."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """In the base's dtype."""

    weight: Tensor

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def add_onto(self, y: Tensor, x: Tensor) -> None:
        y.addmm_(x, self.weight.t())
