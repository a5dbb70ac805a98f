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


class PrepackedWeight(Protocol):
    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x·Wᵀ + b: x (rows, in) -> (rows, out)."""
        ...

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Add x·Wᵀ + b to y (rows, out) in place."""
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
    def from_weight(cls, weight: Tensor, rows: int = 8) -> Reordered:
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
            return bool(torch.equal(Reordered.from_weight(w)(x), F.linear(x, w)))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


def packing(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], PrepackedWeight]:
    """Return the function that packs weights of `dtype` best on this device; `Dense` if there is no other layout.

    The function raises ValueError for a shape that the layout does not support."""
    pack: Callable[[Tensor], PrepackedWeight] | None
    pack = dispatch("weight_layout", torch.empty(0, dtype=dtype, device=device))
    return pack or Dense


def prepack_weight(weight: Tensor) -> PrepackedWeight:
    """Pack a weight as `packing` does, or in the best layout that supports its shape.

    A vocabulary of 50,257, for example, has no panels."""
    try:
        return packing(weight.dtype, weight.device)(weight)
    except ValueError:
        return Reordered.from_weight(weight) if reorders(weight.dtype) else Dense(weight)
