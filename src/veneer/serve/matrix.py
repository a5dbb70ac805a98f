"""Weights of projections as serving multiplies by them: y = x·Wᵀ + b, W (out, in)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Dense", "Int4", "Int8", "Matrix", "Reordered", "can_pack"]


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


@dataclass(frozen=True, eq=False)
class Int8:
    """W ≈ scale ⊙ q, one scale a row: max|row| / 127. q (out, in) int8, scale (out,) in the base's dtype.

    torch's own kernel multiplies by q as it is; from FEW rows on, making W again and multiplying by that is faster."""

    q: Tensor
    scale: Tensor

    FEW = 16

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        scale = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(weight.dtype)
        q = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)
        return cls(q.to(torch.int8), scale)

    def dense(self) -> Tensor:
        return self.q.to(self.scale.dtype).mul_(self.scale[:, None])

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(x) >= self.FEW:
            return F.linear(x, self.dense(), bias)
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.q, self.scale)
        return out if bias is None else out.add_(bias)

    def add_onto(self, y: Tensor, x: Tensor) -> None:
        y.add_(self(x))


@dataclass(frozen=True, eq=False)
class Int4:
    """W ≈ scale·(q - 8) + zero over GROUP inputs of a row, q in 0 … 15; scale = (max - min)/15, zero = min + 8 scale.
    `packed`: as torch's own kernel wants q; `scales`: (in / GROUP, out, 2), scale and zero."""

    packed: Tensor
    scales: Tensor

    GROUP = 32

    @classmethod
    def of(cls, weight: Tensor) -> Int4:
        """Raises ValueError where `in` is no multiple of GROUP or `out` none of 16."""
        rows, n = weight.shape
        if n % cls.GROUP or rows % 16:
            raise ValueError(f"a weight {tuple(weight.shape)} has no int4 form")
        grouped = weight.float().view(rows, -1, cls.GROUP)
        low, high = grouped.aminmax(dim=-1)
        scale = ((high - low) / 15).clamp_min(1e-8).to(weight.dtype).float()
        zero = (low + 8 * scale).to(weight.dtype).float()
        q = ((grouped - zero[..., None]) / scale[..., None] + 8).round_().clamp_(0, 15).to(torch.int32).view(rows, n)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        scales = torch.stack([scale, zero], -1).transpose(0, 1).to(weight.dtype).contiguous()
        return cls(packed, scales)

    def dense(self) -> Tensor:
        """What the kernel multiplies by: its answers to the rows of the identity."""
        n = len(self.scales) * self.GROUP
        return self(torch.eye(n, dtype=self.scales.dtype)).t().contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, self.GROUP, self.scales)
        return out if bias is None else out.add_(bias)

    def add_onto(self, y: Tensor, x: Tensor) -> None:
        y.add_(self(x))
