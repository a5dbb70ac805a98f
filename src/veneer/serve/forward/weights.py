"""Weights used only in serving; ops/weight_layouts.py has the others.

`QuantizedWeights` uses a quantized base's codes in their original layout. `Blocks` computes products in
blocks of rows, so that a row's bits do not depend on its batch. `EightBits` rounds both factors to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.int8 import Int8Weight
from veneer.ops.quantized import Quantized, dequantized, quantized_linear, stacked_rows
from veneer.ops.weight_layouts import PrepackedWeight
from veneer.ops.weight_panels import Panels

ROWS = 8
"""Rows per block of a batch-invariant product."""


def in_blocks(product: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Return product(x), a row-wise function, computed in zero-padded blocks of `rows` rows.

    torch and oneDNN choose the order of summation by shape, so a fixed shape makes a row's bits independent
    of its batch. If `rows` is 0, all rows are computed at once.
    """
    if not rows or not len(x):
        return product(x)
    padded = F.pad(x, (0, 0, 0, -len(x) % rows))
    return torch.cat([product(part) for part in padded.split(rows)])[: len(x)]


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight whose products are computed in blocks of `rows` rows; see `in_blocks`."""

    weight: PrepackedWeight
    rows: int

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return in_blocks(lambda part: self.weight(part, bias), x, self.rows)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """Stacked weights of a quantized base, used without a copy.

    Some parts can be plain tensors. Small batches use the quantized kernel if the device has one. Otherwise
    the weight is dequantized once per step. `rows`: see `in_blocks`; if above 0, the quantized kernel is not
    used.
    """

    parts: tuple[Tensor, ...]
    rows: int = 0

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        quantized = [part for part in self.parts if isinstance(part, Quantized)]
        if len(quantized) == len(self.parts):  # stacked without a copy
            stacked = stacked_rows(quantized)
            product = None if self.rows else quantized_linear(x, stacked, bias)
            if product is not None:
                return product
            weight = stacked.dense()
        else:
            weight = torch.cat([dequantized(part) for part in self.parts])
        return in_blocks(lambda part: F.linear(part, weight, bias), x, self.rows)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


@dataclass(frozen=True, eq=False)
class EightBits:
    """A weight with an 8-bit copy. Once quantized, the copy computes the products (ops/int8.py)."""

    weight: PrepackedWeight
    copy: Int8Weight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product = self.copy.product(x, bias=bias)
        return self.weight(x, bias) if product is None else product

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


def invariant(weight: PrepackedWeight, rows: int) -> PrepackedWeight:
    """Return the weight with batch-invariant products. `Panels` are returned as they are."""
    if isinstance(weight, QuantizedWeights):  # dequantize once, not once per block
        return replace(weight, rows=rows)
    return weight if isinstance(weight, Panels) or not rows else Blocks(weight, rows)
