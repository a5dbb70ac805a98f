"""Fused expert weights: multiply by W + Σ s·B·A without materializing the sum.

    x·(W + Σ s·B·A) = x·W + Σ s·(x·B)·A        W: (…, m, n) frozen    B: (…, m, r)    A: (…, r, n)

Implementations of experts multiply the weights in different ways: with one linear per expert, with batched
matrix products, or with grouped matrix products. An AdaptedWeight replaces the weight and overrides all of
these torch operations, so the model's own forward runs unchanged. This module does not depend on pairs,
modules or models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.grouped_mm import grouped_mm, has_native_grouped_mm
from veneer.ops.lowrank import LowRank


class AdaptedWeight:
    """The weight W + Σ s·B·A, multiplied as x·W + Σ s·(x·B)·A.

    Overrides linear, matmul and bmm, and the grouped products that transformers calls for tokens sorted by
    expert. Any other operation computes the sum as a dense tensor, which is correct but needs more memory."""

    def __init__(self, weight: Tensor, parts: Sequence[LowRank]) -> None:
        self.weight, self.parts = weight, parts
        self.shape, self.dtype, self.device, self.ndim = weight.shape, weight.dtype, weight.device, weight.ndim
        self.is_cuda, self.requires_grad = weight.is_cuda, weight.requires_grad

    def __getitem__(self, index: Any) -> AdaptedWeight:
        """Return the experts at `index`: a number, a mask or a list.

        Only the first dimension can be indexed."""
        return AdaptedWeight(self.weight[index], [replace(p, A=p.A[index], B=p.B[index]) for p in self.parts])

    def transpose(self, first: int, second: int) -> AdaptedWeight:
        if {first % self.ndim, second % self.ndim} != {self.ndim - 1, self.ndim - 2}:
            raise NotImplementedError("only the last two dimensions of expert weights can be transposed")
        return AdaptedWeight(self.weight.transpose(-1, -2), [p.transposed() for p in self.parts])

    @property
    def mT(self) -> AdaptedWeight:
        return self.transpose(-1, -2)

    def size(self, dim: int | None = None) -> Any:
        return self.weight.size() if dim is None else self.weight.size(dim)

    def data_ptr(self) -> int:
        return self.weight.data_ptr()

    def dense(self) -> Tensor:
        out = self.weight
        for p in self.parts:
            out = out + p.dense().to(out.dtype)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    def __matmul__(self, v: Tensor) -> Tensor:
        return _matmul_left(torch.matmul, self, v)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if len(args) > 1 and isinstance(args[1], AdaptedWeight) and isinstance(args[0], Tensor):
            x, weight, other_args = args[0], args[1], args[2:]
            if name == "linear":
                parts = [p.transposed() for p in weight.parts]
                return _add(func(x, weight.weight, *other_args, **kwargs), x, parts, torch.matmul)
            if name in ("matmul", "bmm", "mm", "__matmul__"):
                return _add(func(x, weight.weight, *other_args, **kwargs), x, weight.parts, torch.matmul)
            if name in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"):
                offsets = kwargs["offs"] if "offs" in kwargs else other_args[0]
                return _add_by_expert(func(x, weight.weight, *other_args, **kwargs), x, weight.parts, offsets)
        if name in ("matmul", "bmm", "mm") and isinstance(args[0], AdaptedWeight) and isinstance(args[1], Tensor):
            return _matmul_left(func, args[0], args[1])
        dense = [a.dense() if isinstance(a, AdaptedWeight) else a for a in args]
        return func(*dense, **{k: v.dense() if isinstance(v, AdaptedWeight) else v for k, v in kwargs.items()})


def _add(y: Tensor, x: Tensor, parts: Sequence[LowRank], mul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return y + Σ s·(x·B)·A, cast back to y's dtype."""
    out = y
    for p in parts:
        u = x.to(p.B.dtype)
        u = F.dropout(u, p.dropout) if p.dropout else u
        out = torch.add(out, mul(mul(u, p.B), p.A), alpha=p.scale)
    return out.to(y.dtype)


def _add_by_expert(y: Tensor, x: Tensor, parts: Sequence[LowRank], offsets: Tensor) -> Tensor:
    if has_native_grouped_mm(x):  # as in ops.linear, products use x's dtype and gradients use the parameter's
        parts = [replace(p, A=p.A.to(x.dtype), B=p.B.to(x.dtype)) for p in parts]
    return _add(y, x, parts, lambda u, v: grouped_mm(u, v, offsets))


def expert_product(x: Tensor, weight: Tensor | AdaptedWeight, offsets: Tensor) -> Tensor:
    """Multiply each row of x by the weight of the row's expert.

    x: rows sorted by expert.
    weight: (experts, in, out).
    offsets: end of each expert's rows; rows before offsets[0] use weight[0], the next rows up to offsets[1]
        use weight[1], and so on."""
    if isinstance(weight, AdaptedWeight):
        return _add_by_expert(grouped_mm(x, weight.weight, offsets), x, weight.parts, offsets)
    return grouped_mm(x, weight, offsets)


def _matmul_left(product: Callable, weight: AdaptedWeight, v: Tensor) -> Tensor:
    """Return W·v + Σ s·B·(A·v)."""
    parts = [replace(p, A=p.B, B=p.A) for p in weight.parts]
    return _add(product(weight.weight, v), v, parts, lambda u, factor: factor @ u)
