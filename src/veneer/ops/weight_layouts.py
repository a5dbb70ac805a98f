"""Layouts of frozen weights for serving: y = x·Wᵀ + b, W (out, in).

For few rows of x at a time.

Every product repacks a plain weight, which takes most of the time of a few rows. `packing` chooses a
prepacked layout: panels if a kernel multiplies by them, else oneDNN's, else the weight's own. A weight is
stored once; products of prompts are within a few percent of each other in every layout.
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
        """Return x·Wᵀ + b: x (rows, in) -> (rows, out)."""
        ...

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Add x·Wᵀ + b to y (rows, out) in place."""
        ...


class QuantizedWeight(PrepackedWeight, Protocol):
    def dense(self) -> Tensor:
        """Return the weight that the product uses, (out, in), in the base's dtype."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A weight in the base's dtype and order."""

    weight: Tensor

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.addmm_(x, self.weight.t())
        if bias is not None:
            y.add_(bias)


@dataclass(frozen=True, eq=False)
class Reordered:
    """A copy in oneDNN's packed order.

    Plain weights are repacked at every call, which dominates for few rows: with a packed weight, one row
    takes half as long, 32 two thirds, 256 nearly the same."""

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
    """Return whether this torch supports oneDNN's packed order, by trying it.

    The operations are internal to torch's compiler."""
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

    torch's kernel multiplies by q directly; from FEW rows on, dequantizing W and multiplying by it is faster.
    """

    q: Tensor
    scale: Tensor

    FEW = 16

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        """Return the weight in int8.

        Raises ValueError unless `in` is a multiple of 16: torch's kernel would read beyond the rows."""
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
    """W ≈ scale·(q - 8) + zero, see `rounded4`.

    packed: q in the order of torch's kernel; scales: (in / GROUP, out, 2), scale and zero."""

    packed: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int4:
        """Return the weight in int4; raises as `rounded4`."""
        q, scales = rounded4(weight)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        return cls(packed, scales.transpose(0, 1).contiguous())

    def dense(self) -> Tensor:
        """Return the weight that the kernel uses: its products with the identity's rows."""
        n = len(self.scales) * GROUP
        return self(torch.eye(n, dtype=self.scales.dtype)).t().contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, GROUP, self.scales)
        return out if bias is None else out.add_(bias)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


_PLAIN: dict[int, Callable[[Tensor], PrepackedWeight]] = {16: Dense, 8: Int8.of, 4: Int4.of}


def packing(dtype: torch.dtype, device: torch.device, bits: int = 16) -> Callable[[Tensor], PrepackedWeight]:
    """Return the function that packs weights of `dtype` best on this device.

    bits: 16, or 8 or 4 to round. Returns `Dense` if there is no other layout. The function raises
        ValueError for a shape that the layout does not support."""
    probe = torch.empty(0, dtype=dtype, device=device)
    orders = dispatch("weight_layout", probe, bits) or _PLAIN
    found: Callable[[Tensor], PrepackedWeight] = orders[bits]
    return found


def prepack_weight(weight: Tensor) -> PrepackedWeight:
    """Pack a weight as `packing` does, or in the best layout that supports its shape.

    A vocabulary of 50,257, for example, has no panels."""
    try:
        return packing(weight.dtype, weight.device)(weight)
    except ValueError:
        return Reordered.of(weight) if reorders(weight.dtype) else Dense(weight)


def quantized_prepacking(bits: int) -> Callable[[Tensor], QuantizedWeight]:
    """Return the function that packs weights of 8 or 4 bits best here.

    If a weight has no 8-bit panels (a vocabulary of 32,001), it uses another 8-bit layout."""

    def pack(weight: Tensor) -> Any:
        try:
            return packing(weight.dtype, weight.device, bits)(weight)
        except ValueError:
            if bits == 4:
                raise
            return Int8.of(weight)

    return pack
