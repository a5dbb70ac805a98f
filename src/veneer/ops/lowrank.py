"""A low-rank product added to a frozen weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """s·B·A, added to a frozen weight W without materializing the sum.

        y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ

    A: (…, rank, in), B: (…, out, rank).
    scale: s, including an adapter's strength.
    dropout: probability that a value of x is dropped in the low-rank product; 0 outside training.
    first: the row of W that the first row of B is added to, if W is a concatenation of several weights.
        `last` is the row after the last row of B.
    span: the segment of x's rows that the product applies to, if there are several adapters
        (ops/lora_segments.py); otherwise the product applies to all rows.

    Layers, ops, compiled kernels and serving use this class to represent an adapter's A and B for one module;
    `core.adapter.Pair.low_rank` creates it."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    dropout: float = 0.0
    first: int = 0
    span: int = 0

    @property
    def last(self) -> int:
        return self.first + len(self.B)

    def below(self, rows: int) -> LowRank:
        """Return the product with `first` increased by `rows`."""
        return replace(self, first=self.first + rows) if rows else self

    def dense(self) -> Tensor:
        """Return s·B·A."""
        return (self.B @ self.A) * self.scale

    def transposed(self) -> LowRank:
        """Return the product for the transposed weight."""
        return replace(self, A=self.B.transpose(-1, -2), B=self.A.transpose(-1, -2))
