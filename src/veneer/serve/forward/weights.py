"""Weights that serving has beside those of ops/weight_layouts.py: a quantised base's codes as they are, and blocks of
rows, so that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.quantized import Quantized, dequantized, quantized_linear, stacked_rows
from veneer.ops.weight_layouts import PrepackedWeight
from veneer.ops.weight_panels import Panels

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

    weight: PrepackedWeight
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
        whole = [part for part in self.parts if isinstance(part, Quantized)]
        if len(whole) == len(self.parts):  # into one piece of memory
            stacked = stacked_rows(whole)
            made = None if self.rows else quantized_linear(x, stacked, bias)
            if made is not None:
                return made
            weight = stacked.dense()
        else:
            weight = torch.cat([dequantized(part) for part in self.parts])
        return in_blocks(lambda part: F.linear(part, weight, bias), x, self.rows)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.add_(self(x, bias))


def invariant(weight: PrepackedWeight, rows: int) -> PrepackedWeight:
    """A weight by which a row's product has the same bits whoever shares its batch. Panels are so by themselves."""
    if isinstance(weight, Coded):  # dequantised once and not for each block
        return replace(weight, rows=rows)
    return weight if isinstance(weight, Panels) or not rows else Blocks(weight, rows)
