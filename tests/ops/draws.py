"""What the tests of fused products draw: adapters' factors, and the mask of the next dropout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.core.exact import draw
from veneer.ops.dropout import Dropout
from veneer.ops.lowrank import LowRank


def factors(dtype: torch.dtype, *shapes: tuple[int, int]) -> list[Tensor]:
    """A and B as training holds them: float32 beside a 16-bit base."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return [draw(*s, dtype=kept, scale=0.3).requires_grad_() for s in shapes]


def with_dropout(products: tuple[LowRank, ...], dropout: float) -> tuple[LowRank, ...]:
    return tuple(replace(p, dropout=dropout) for p in products)


def mask_of_next(p: float, *shape: int, dtype: torch.dtype) -> Tensor:
    """What the next dropout of that shape multiplies by, drawn without moving torch's generator on."""
    state = torch.random.get_rng_state()
    drop = Dropout.drawn(p)
    torch.random.set_rng_state(state)
    return (drop(torch.ones(*shape, dtype=dtype)) != 0).double() / (1 - p)
