"""Layouts of frozen weights for serving: y = x·Wᵀ + b, W (out, in), for few rows of x.

Every product with a plain weight repacks the weight, which takes most of the time if x has few rows.
`packing` chooses a prepacked layout: panels if a kernel supports panels, else oneDNN's layout, else the
weight's own. Each weight is stored in one layout only; for prompts, all layouts reach nearly the same speed,
within a few percent.
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
        """Return x·Wᵀ + b, x (rows, in) -> (rows, out)."""
        ...

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Add x·Wᵀ + b to y (rows, out) in place."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A weight in the base's dtype, not repacked."""

    weight: Tensor

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        y.addmm_(x, self.weight.t())
        if bias is not None:
            y.add_(bias)


@dataclass(frozen=True, eq=False)
class Reordered:
    """A copy of a weight in oneDNN's packed order.

    oneDNN repacks a plain weight at every call, which dominates for few rows. With a packed weight, a product
    with one row takes half the time, with 32 rows two thirds, with 256 rows nearly the same time."""

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
    """Return whether a small product in oneDNN's packed order works with this version of torch.

    The product uses operations that are internal to torch's compiler."""
    x, w = torch.ones(3, 32, dtype=dtype), torch.eye(48, 32, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(torch.equal(Reordered.from_weight(w)(x), F.linear(x, w)))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


def packing(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], PrepackedWeight]:
    """Return the function that packs weights of `dtype` for this device.

    The function is `Dense` if no packed layout is available. It raises ValueError for a shape that the layout
    does not support."""
    pack: Callable[[Tensor], PrepackedWeight] | None
    pack = dispatch("weight_layout", torch.empty(0, dtype=dtype, device=device))
    return pack or Dense


def prepack_weight(weight: Tensor) -> PrepackedWeight:
    """Return a weight in a packed layout that supports the weight's shape.

    This is the layout of `packing` if possible, else oneDNN's, else the plain one. For example, panels do not
    support a vocabulary of 50,257."""
    try:
        return packing(weight.dtype, weight.device)(weight)
    except ValueError:
        return Reordered.from_weight(weight) if reorders(weight.dtype) else Dense(weight)
