"""Matrix products of a training step, in the machine's fastest arithmetic.

    product(a, b)    a·b, accumulated in float32 and rounded once

Every product of 16-bit tensors in this package calls `product`, or checks `in_float32`. The rule of the op
"product" (dispatch.py) chooses between the processor's bfloat16 instructions and float32 arithmetic. Float32
arithmetic widens values one block at a time, so that it needs no more memory than bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.dispatch import dispatch


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    add: bool = False,
    more: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return a·b + bias without autograd: a (N, k), b (k, M) → (N, M).

    out: tensor with contiguous rows; the result is written to it, or with `add`, added to it.
    more: contiguous u (N, r) and v (r, M), both float32; u·v is added before rounding. Requires that `out` is None
        and `in_float32` is true. A small u·v would be lost if it were added to a rounded a·b.
    dtype: the result's dtype if `out` is None, by default that of `a`.

    In float32 arithmetic, a and b can be float32 or bfloat16, in any combination. Reference: a @ b + bias."""
    run = dispatch("product", a, b, out)
    if run is not None:
        if out is None:
            out, add = a.new_empty(len(a), b.shape[1], dtype=dtype or a.dtype), False
        run(a, b, bias, out, add, more)
        return out
    if out is None:
        result = a @ b if bias is None else F.linear(a, b.t(), bias)
        result = result if more is None else result.addmm(*more)
        return result if dtype is None else result.to(dtype)
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def in_float32(a: Tensor, b: Tensor | None = None) -> bool:
    """Return whether `product` computes a·b in float32 although `a` has 16 bits.

    If `a` is not a matrix, the result is that for matrices of the same dtype."""
    a = a if a.dim() == 2 else a.new_empty(1, 1)
    return a.dtype != torch.float32 and dispatch("product", a, a if b is None else b, None) is not None


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return 16-bit tensors in float32 if their products are computed in float32, otherwise unchanged.

    For products that `product` does not support, for example of batches of matrices."""
    return tuple(t.float() for t in tensors) if in_float32(tensors[0]) else tensors
