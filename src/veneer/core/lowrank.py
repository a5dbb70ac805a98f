"""A weight that multiplies as W + Σ s·L·R without being made.

    x·(W + Σ s·L·R) = x·W + Σ s·(x·L)·R              W: (…, m, n) frozen    L: (…, m, r)    R: (…, r, n)

Fused expert weights are multiplied inside their module's own forward, in ways that differ from one expert
implementation to the next (a loop of linears, batched, grouped products). A LowRank stands in for such a weight there
and answers torch's products, so that the forward stays the model's own. Does not know about pairs, modules or models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Factor", "LowRank"]


class Factor(NamedTuple):
    """One summand s·L·R of a stored weight (…, m, n); L: (…, m, r), R: (…, r, n)."""

    L: Tensor
    R: Tensor
    scale: float
    dropout: float

    def t(self) -> Factor:
        return self._replace(L=self.R.transpose(-1, -2), R=self.L.transpose(-1, -2))


class LowRank:
    """The weight W + Σ s·L·R, multiplied as x·W + Σ s·(x·L)·R and never made.

    Answers torch's products as a tensor would: linear, matmul, bmm, and the grouped products that transformers sorts
    tokens by expert for. An operation it does not know gets the sum as a dense tensor, which is right but large."""

    def __init__(self, weight: Tensor, parts: Sequence[Factor]) -> None:
        self.weight, self.parts = weight, parts
        self.shape, self.dtype, self.device, self.ndim = weight.shape, weight.dtype, weight.device, weight.ndim
        self.is_cuda, self.requires_grad = weight.is_cuda, weight.requires_grad

    def __getitem__(self, index: Any) -> LowRank:
        """Experts by number, mask or list: the first dimension only."""
        return LowRank(self.weight[index], [f._replace(L=f.L[index], R=f.R[index]) for f in self.parts])

    def transpose(self, first: int, second: int) -> LowRank:
        if {first % self.ndim, second % self.ndim} != {self.ndim - 1, self.ndim - 2}:
            raise NotImplementedError("expert weights are transposed in their last two dimensions only")
        return LowRank(self.weight.transpose(-1, -2), [f.t() for f in self.parts])

    @property
    def mT(self) -> LowRank:
        return self.transpose(-1, -2)

    def size(self, dim: int | None = None) -> Any:
        return self.weight.size() if dim is None else self.weight.size(dim)

    def data_ptr(self) -> int:
        return self.weight.data_ptr()

    def dense(self) -> Tensor:
        out = self.weight
        for f in self.parts:
            out = out + ((f.L @ f.R) * f.scale).to(out.dtype)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    def __matmul__(self, v: Tensor) -> Tensor:
        return _left(torch.matmul, self, v)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if len(args) > 1 and isinstance(args[1], LowRank) and isinstance(args[0], Tensor):
            x, weight, rest = args[0], args[1], args[2:]
            if name == "linear":
                parts = [f.t() for f in weight.parts]
                return _add(func(x, weight.weight, *rest, **kwargs), x, parts, torch.matmul)
            if name in ("matmul", "bmm", "mm", "__matmul__"):
                return _add(func(x, weight.weight, *rest, **kwargs), x, weight.parts, torch.matmul)
            if name in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"):
                offsets = kwargs["offs"] if "offs" in kwargs else rest[0]
                y = func(x, weight.weight, *rest, **kwargs)
                return _add(y, x, weight.parts, lambda u, v: _by_expert(u, v, offsets))
        if name in ("matmul", "bmm", "mm") and isinstance(args[0], LowRank) and isinstance(args[1], Tensor):
            return _left(func, args[0], args[1])
        dense = [a.dense() if isinstance(a, LowRank) else a for a in args]
        return func(*dense, **{k: v.dense() if isinstance(v, LowRank) else v for k, v in kwargs.items()})


def _add(y: Tensor, x: Tensor, parts: Sequence[Factor], mul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """y + Σ s·(x·L)·R, cast back to y's dtype."""
    out = y
    for f in parts:
        u = x.to(f.L.dtype)
        u = F.dropout(u, f.dropout) if f.dropout else u
        out = out + mul(mul(u, f.L), f.R) * f.scale
    return out.to(y.dtype)


def _left(product: Callable, weight: LowRank, v: Tensor) -> Tensor:
    """W·v + Σ s·L·(R·v)"""
    parts = [f._replace(L=f.R, R=f.L) for f in weight.parts]
    return _add(product(weight.weight, v), v, parts, lambda u, factor: factor @ u)


def _by_expert(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of x up to offsets[e] times weight[e]: the grouped product, for any rank and dtype. Rows after the last
    offset belong to no expert and give zero."""
    out, start = [], 0
    for end, w in zip(offsets.tolist(), weight.unbind(0), strict=True):
        out.append(x[start:end] @ w)
        start = end
    joined: Tensor = torch.cat([*out, x.new_zeros(len(x) - start, weight.shape[-1])])
    return joined
