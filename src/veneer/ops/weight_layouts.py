"""In which order serving keeps a weight: y = x·Wᵀ + b for few rows at a time, W (out, in).

A plain weight is laid out anew by every product, which takes most of the time of a few rows. `packing` says which order
is kept instead: panels where a kernel multiplies by them, else oneDNN's, else the weight's own. A weight is kept once;
the products of prompts are within a few percent of one another in every order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.dispatch import dispatch
from veneer.ops.weight_panels import GROUP, rounded4, rounded8


class PrepackedWeight(Protocol):
    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (rows, in) -> (rows, out)"""
        ...

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """y (rows, out) += x·Wᵀ + b, in place."""
        ...


class QuantizedWeight(PrepackedWeight, Protocol):
    def dense(self) -> Tensor:
        """The weight that it multiplies by, (out, in), in the base's dtype."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """In the base's dtype."""

    weight: Tensor

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.addmm_(x, self.weight.t())
        if bias is not None:
            y.add_(bias)


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

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


def _mkldnn() -> Any:
    return torch.ops.mkldnn


@functools.cache
def reorders(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's order, found out by doing it: the operations are its compiler's own."""
    x, w = torch.ones(3, 32, dtype=dtype), torch.eye(48, 32, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(torch.equal(Reordered.of(w)(x), F.linear(x, w)))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


@dataclass(frozen=True, eq=False)
class Int8:
    """W ≈ scale ⊙ q, see `rounded8`.

    torch's own kernel multiplies by q as it is; from FEW rows on, making W again and multiplying by that is faster."""

    q: Tensor
    scale: Tensor

    FEW = 16

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        """Raises ValueError where `in` is no multiple of 16: torch's kernel reads beyond its rows there."""
        if weight.shape[1] % 16:
            raise ValueError(f"a weight {tuple(weight.shape)} has no int8 form")
        return cls(*rounded8(weight))

    def dense(self) -> Tensor:
        return self.q.to(self.scale.dtype).mul_(self.scale[:, None])

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(x) >= self.FEW:
            return F.linear(x, self.dense(), bias)
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.q, self.scale)
        return out if bias is None else out.add_(bias)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


@dataclass(frozen=True, eq=False)
class Int4:
    """W ≈ scale·(q - 8) + zero, see `rounded4`. `packed`: as torch's own kernel wants q; `scales`:
    (in / GROUP, out, 2), scale and zero."""

    packed: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int4:
        """Raises what `rounded4` does."""
        q, scales = rounded4(weight)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        return cls(packed, scales.transpose(0, 1).contiguous())

    def dense(self) -> Tensor:
        """What the kernel multiplies by: its answers to the rows of the identity."""
        n = len(self.scales) * GROUP
        return self(torch.eye(n, dtype=self.scales.dtype)).t().contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, GROUP, self.scales)
        return out if bias is None else out.add_(bias)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


_PLAIN: dict[int, Callable[[Tensor], PrepackedWeight]] = {16: Dense, 8: Int8.of, 4: Int4.of}


def packing(dtype: torch.dtype, device: torch.device, bits: int = 16) -> Callable[[Tensor], PrepackedWeight]:
    """How weights of `dtype` are best kept here: as they are (16 bits), or rounded to 8 or to 4; `Dense` where there is
    no other order. The result raises ValueError for a weight whose shape has no such order."""
    probe = torch.empty(0, dtype=dtype, device=device)
    orders = dispatch("weight_layout", probe, bits) or _PLAIN
    found: Callable[[Tensor], PrepackedWeight] = orders[bits]
    return found


def prepack_weight(weight: Tensor) -> PrepackedWeight:
    """A weight as `packing` says; one whose shape has no panels (a vocabulary of 50,257) as it can be."""
    try:
        return packing(weight.dtype, weight.device)(weight)
    except ValueError:
        return Reordered.of(weight) if reorders(weight.dtype) else Dense(weight)


def quantized_prepacking(bits: int) -> Callable[[Tensor], QuantizedWeight]:
    """What makes weights of 8 or 4 bits as they are best kept here; what has no panels of 8 (a vocabulary of 32,001) as
    it can be."""

    def pack(weight: Tensor) -> Any:
        try:
            return packing(weight.dtype, weight.device, bits)(weight)
        except ValueError:
            if bits == 4:
                raise
            return Int8.of(weight)

    return pack
