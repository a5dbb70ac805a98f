"""A pair's change as a product of two float64 factors, and inner products of such changes.

This module calls only methods of tensors and does not import torch. It therefore also works on objects with the same
methods (formats.arrays.Array).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from veneer.core.adapter import Pair

if TYPE_CHECKING:
    from torch import Tensor


def factors(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return float64 factors (A, B) of the pair's change.

    B·A is the change without the magnitude. A is (…, rank, n), and B is (…, out, rank) and includes the
    scale. For experts, there is a leading dimension."""
    collapsed = pair.collapsed()
    A, B = collapsed.A.detach().double(), collapsed.B.detach().double()
    if collapsed.kind == "conv":
        A, B = A.flatten(1), B.flatten(1)
    return A, B * collapsed.scale


def inner(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return ⟨B₁·A₁, B₂·A₂⟩ (Frobenius) = tr((B₁ᵀB₂)·(A₂A₁ᵀ)) of factors (A, B)."""
    (A1, B1), (A2, B2) = first, second
    return float(((B1.mT @ B2) * (A1 @ A2.mT)).sum())


def norm(change: tuple[Tensor, Tensor]) -> float:
    """Return ‖B·A‖ (Frobenius) of factors (A, B)."""
    return math.sqrt(max(inner(change, change), 0.0))
