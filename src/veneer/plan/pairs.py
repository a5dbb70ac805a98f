"""The cost of an adapter's form per frozen matrix.

    PairForm("loha").beside((out, in), rank)        PairCosts

A LoHa of rank r is multiplied as a pair of rank r², a LoKr factor by factor (core.layers); values that are
not kept are recomputed in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from veneer.core.forms import trained_shapes

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec


@dataclass(frozen=True)
class PairCosts:
    """The cost of one pair.

    forward: operations per token.
    rank: kept values per token.
    made: float32 values computed from the parts and kept, for any number of tokens."""

    parameters: int
    forward: float
    rank: int
    made: int = 0

    @property
    def operations(self) -> float:
        """Operations per token, forward and backward.

        Twice the forward for the backward pass, and once more if nothing is kept."""
        return (3 if self.rank else 4) * self.forward


@dataclass(frozen=True)
class PairForm:
    """The `adapter.kind`, `factor` and `decompose_both` of a configuration."""

    kind: Literal["lora", "loha", "lokr"] = "lora"
    factor: int | None = None
    both: bool = False

    @classmethod
    def of(cls, spec: LoraSpec | None) -> PairForm:
        return cls() if spec is None else cls(spec.kind, spec.factor, spec.decompose_both)

    def beside(self, shape: tuple[int, ...], rank: int) -> PairCosts:
        """Return the cost on a frozen weight of shape (out, in, k…)."""
        rows, columns = shape[0], math.prod(shape[1:])
        if self.kind == "lora":
            return PairCosts(rank * (rows + columns), 2.0 * rank * (rows + columns), rank)
        parts = trained_shapes(self.kind, shape, rank, self.factor, self.both)
        count = sum(map(math.prod, parts.values()))
        if self.kind == "loha":
            made = rank * rank * (rows + columns)
            return PairCosts(count, 2.0 * made, rank**2, made) if made <= rows * columns else _whole(count, shape)
        l, m = parts["w1"] if "w1" in parts else (parts["a1"][0], parts["b1"][1])
        return PairCosts(count, 2.0 * (rows // l * columns + m * rows), 0)


PAIRS = PairForm()
"""Plain pairs."""


def _whole(count: int, shape: tuple[int, ...]) -> PairCosts:
    return PairCosts(count, 2.0 * math.prod(shape), 0)
