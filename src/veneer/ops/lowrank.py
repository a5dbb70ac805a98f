"""One low-rank product next to a frozen weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """s·B·A next to a frozen weight W, never materialized.

        y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ

    A: (…, rank, in), B: (…, out, rank).
    scale: s, including an adapter's strength.
    dropout: dropout probability of the product's x, 0 outside training.
    first: the row of W of B's first row, if W is several weights concatenated; `last` is one past B's last
        row.
    span: the segment of x's rows that the product sees, if there are several adapters
        (ops/lora_segments.py); otherwise it sees all rows.

    Layers, ops, compiled kernels and serving all take a pair in this form; core.adapter.Pair makes it."""

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
        """Return the product shifted down by `rows` rows of other weights."""
        return replace(self, first=self.first + rows) if rows else self

    def dense(self) -> Tensor:
        """Return s·B·A."""
        return (self.B @ self.A) * self.scale

    def transposed(self) -> LowRank:
        """Return the product for the transposed weight."""
        return replace(self, A=self.B.transpose(-1, -2), B=self.A.transpose(-1, -2))
