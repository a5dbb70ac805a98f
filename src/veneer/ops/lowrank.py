"""What is multiplied beside a frozen weight: one low-rank product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """s·B·A beside a frozen weight W, never made: y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ.

    A: (…, rank, in), B: (…, out, rank). `scale`: s, with an adapter's strength in it. `dropout`: the share of x that
    the product does not see, 0 outside of training. `first`: the row of W that B's first row belongs to, where W is
    several weights below one another; B's last is the one before `last`. `span`: whose rows of x it sees, where there
    are several adapters (ops/lora_segments.py); all of them elsewhere.

    The one shape in which layers, ops, compiled kernels and serving are given a pair; core.adapter.Pair makes it."""

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
        """The same where `rows` rows of other weights lie above this one's."""
        return replace(self, first=self.first + rows) if rows else self

    def dense(self) -> Tensor:
        """s·B·A"""
        return (self.B @ self.A) * self.scale

    def transposed(self) -> LowRank:
        """Of the transposed weight."""
        return replace(self, A=self.B.transpose(-1, -2), B=self.A.transpose(-1, -2))
