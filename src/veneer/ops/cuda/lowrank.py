"""Low-rank products on a GPU: products of torch's own, from 16-bit copies of A and B that are made once a step.

y += s·u·Bᵀ and du = s·g·B have the scale in the product, so that s·B is never made; projections of one x share one
u = x·Aᵀ, and each multiplies with its own columns of it alone: no block of zeros is stored or multiplied.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from veneer.ops.lowrank import LowRank


class _Shadows(NamedTuple):
    """A of all products below one another, and each B, in the dtype of the products; `of`: (weak reference, version,
    address, optimizers' steps till then) of each tensor that they are copies of."""

    A: Tensor
    B: list[Tensor]
    of: list[tuple[weakref.ref[Tensor], int, int, int]]


_kept: dict[tuple[object, ...], _Shadows] = {}
"""By the tensors' identity. A copy goes with its first A."""


_steps = 0
"""Steps of any optimizer so far. A tensor's version does not tell: a fused optimizer, or bitsandbytes', changes it
and leaves its version as it was."""


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _state(t: Tensor) -> tuple[weakref.ref[Tensor], int, int, int]:
    return weakref.ref(t), t._version, t.data_ptr(), _steps


def _shadows(products: Sequence[LowRank], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The copies, made again where an optimizer's step has changed a tensor."""
    tensors = [t for p in products for t in (p.A, p.B)]
    if not all(t.is_leaf and type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
        return _copied(products, dtype)  # made anew for each forward
    key = (dtype, *map(id, tensors))
    found = _kept.get(key)
    if found is not None and all(
        ref() is t and (version, at, steps) == (t._version, t.data_ptr(), _steps)
        for t, (ref, version, at, steps) in zip(tensors, found.of, strict=True)
    ):
        return found.A, found.B
    if found is None:
        weakref.finalize(tensors[0], _kept.pop, key, None)
    made = _copied(products, dtype)
    _kept[key] = _Shadows(*made, [_state(t) for t in tensors])
    return made


def _copied(products: Sequence[LowRank], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        A = products[0].A if len(products) == 1 else torch.cat([p.A for p in products])
        return A.detach().to(dtype), [p.B.detach().to(dtype) for p in products]


class ShadowedProducts:
    """ops.linear.LowRankProducts for GPUs; see the module."""

    def __init__(self, products: Sequence[LowRank], rows: int, dtype: torch.dtype) -> None:
        self.products = products
        self.A, self.B = _shadows(products, dtype)
        self.columns, at = [], 0
        for p in products:
            self.columns.append(slice(at, at + len(p.A)))
            at += len(p.A)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        u = x @ self.A.t()
        for p, B, columns in zip(self.products, self.B, self.columns, strict=True):
            y[:, p.first : p.last].addmm_(u[:, columns], B.t(), alpha=p.scale)
        return u

    def through(self, g: Tensor, dx: Tensor | None) -> Tensor:
        du = g.new_empty(len(g), len(self.A))
        for p, B, columns in zip(self.products, self.B, self.columns, strict=True):
            du[:, columns].addmm_(g[:, p.first : p.last], B, beta=0, alpha=p.scale)
        if dx is not None:
            dx.addmm_(du, self.A)
        return du

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        dA = du.t() @ x
        out = []
        for p, columns in zip(self.products, self.columns, strict=True):
            dB = torch.addmm(g.new_empty(1, 1), g[:, p.first : p.last].t(), u[:, columns], beta=0, alpha=p.scale)
            out += [dA[columns].to(p.A.dtype), dB.to(p.B.dtype)]
        return out
