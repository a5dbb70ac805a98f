"""Weights of projections as serving multiplies by them: y = x·Wᵀ + b, W (out, in)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.cpu import compiled
from veneer.ops.quantised import Quantised, dequantised, product_of_codes, stacked_rows
from veneer.serve.forward.panels import GROUP, Panels, rounded4, rounded8


class PackedWeight(Protocol):
    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (rows, in) -> (rows, out)"""
        ...

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """y (rows, out) += x·Wᵀ + b, in place."""
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


ROWS = 8
"""Rows that a batch-invariant product is taken of at a time."""


def in_blocks(product: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """product(x), a function of each row by itself, of `rows` rows at a time, the last ones beside rows of zeros: torch
    and oneDNN choose how to add up by the shape, so that in one shape a row's bits are its own. 0 rows: all at once."""
    if not rows or not len(x):
        return product(x)
    padded = F.pad(x, (0, 0, 0, -len(x) % rows))
    return torch.cat([product(part) for part in padded.split(rows)])[: len(x)]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Another packed weight, multiplied by so many rows at a time; see `in_blocks`."""

    weight: PackedWeight
    rows: int

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return in_blocks(lambda part: self.weight(part, bias), x, self.rows)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


@dataclass(frozen=True, eq=False)
class Coded:
    """Weights of a quantised base below one another, some may be plain. They stay as the base has them. A few rows are
    multiplied by the codes where the device does that; else the dequantised weight lives for the length of a product,
    which all rows of a step share. `rows`: see `in_blocks`, of which the codes' product is none."""

    parts: tuple[Tensor, ...]
    rows: int = 0

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        whole = [part for part in self.parts if isinstance(part, Quantised)]
        if len(whole) == len(self.parts):  # into one piece of memory
            stacked = stacked_rows(whole)
            made = None if self.rows else product_of_codes(x, stacked, bias)
            if made is not None:
                return made
            weight = stacked.dense()
        else:
            weight = torch.cat([dequantised(part) for part in self.parts])
        return in_blocks(lambda part: F.linear(part, weight, bias), x, self.rows)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


def invariant(weight: PackedWeight, rows: int) -> PackedWeight:
    """A weight by which a row's product has the same bits whoever shares its batch. Panels are so by themselves."""
    if isinstance(weight, Coded):  # dequantised once and not for each block
        return replace(weight, rows=rows)
    return weight if isinstance(weight, Panels) or not rows else Blocks(weight, rows)


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


def best_packing(dtype: torch.dtype, device: torch.device) -> type[Panels] | type[Reordered] | None:
    """How weights of `dtype` are best kept for many small products here: None, as they are.

    oneDNN's order where the processor has AMX, which our kernels do not use, or where we have none; whether this torch
    has it is found out by doing it, as the operations are its compiler's own."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return None
    if compiled.has("panel_product") and not torch.cpu._is_amx_tile_supported():
        return Panels
    return Reordered if _reorders(dtype) else None


def pack_weight(weight: Tensor) -> PackedWeight:
    """A weight as `best_packing` says; one whose shape has no panels (a vocabulary of 50,257) as it can be."""
    kind = best_packing(weight.dtype, weight.device)
    if kind is Panels and weight.shape[0] % 16 == 0 == weight.shape[1] % 2:
        return Panels.of(weight)
    return Reordered.of(weight) if kind is not None and _reorders(weight.dtype) else Dense(weight)


def _reorders(dtype: torch.dtype) -> bool:
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


class QuantisedWeight(PackedWeight, Protocol):
    def dense(self) -> Tensor:
        """The weight that it multiplies by, (out, in), in the base's dtype."""
        ...


def quantised_packing(kind: str) -> Callable[[Tensor], QuantisedWeight]:
    """What makes "int8" and "int4" weights as they are best kept here: panels also where oneDNN multiplies bfloat16,
    for it has no product of codes."""
    if compiled.has("panel_product"):
        return _int8 if kind == "int8" else Panels.int4
    return Int8.of if kind == "int8" else Int4.of


def _int8(weight: Tensor) -> QuantisedWeight:
    """In panels; what has none (a vocabulary of 32,001) as it can be."""
    try:
        return Panels.int8(weight)
    except ValueError:
        return Int8.of(weight)
