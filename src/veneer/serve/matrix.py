"""Weights of projections as serving multiplies by them: y = x·Wᵀ + b, W (out, in)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Dense", "Matrix", "Reordered", "can_pack"]


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


@dataclass(frozen=True, eq=False)
class Reordered:
    """A copy in the order in which oneDNN multiplies by it. Plain weights are put into that order at every call, which
    takes most of the time where few rows share it: one row takes half as long, 32 two thirds, 256 nearly the same."""

    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor, rows: int = 8) -> Reordered:
        return cls(_mkldnn()._reorder_linear_weight(weight.contiguous(), rows))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
        return out

    def add_onto(self, y: Tensor, x: Tensor) -> None:
        y.add_(self(x))


def _mkldnn() -> Any:
    return torch.ops.mkldnn


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch packs weights of `dtype`, found out by doing it: the operations are torch's compiler's own."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    x, w = torch.ones(3, 32, dtype=dtype), torch.eye(48, 32, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(torch.equal(Reordered.of(w)(x), F.linear(x, w)))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False
