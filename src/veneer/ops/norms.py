"""Norms of a training step that read their input once and keep it alone.

    rms_norm     y = w ⊙ x / √(mean x² + ε)
    norm_silu    y = silu(w ⊙ x̂ + b), x̂ over groups of channels of x plus a shift of each channel

As ops/fused.py has it: the frozen weights never get a gradient, each has its slow reference, and on the CPU in
bfloat16 they go through veneer.ops.cpu where those could be compiled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.cpu import compiled

__all__ = ["norm_silu", "normed", "rms_norm"]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` where no gradient is wanted; x contiguous."""
    d = x.shape[-1]
    native = compiled.usable("rms_norm", x, weight)
    if native is None:
        return F.rms_norm(x, (d,), weight, eps)
    y = torch.empty_like(x)
    native.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // d, d, eps, torch.get_num_threads())
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return normed(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        d = x.shape[-1]
        g = g.contiguous()
        native = compiled.usable("rms_norm_backward", g, x, weight)
        if native is not None:
            dx = torch.empty_like(x)
            pointers = (t.data_ptr() for t in (g, x, weight, dx))
            native.rms_norm_backward(*pointers, x.numel() // d, d, ctx.eps, torch.get_num_threads())
            return dx, None, None
        # dx = r·(w⊙g) − x·r³·mean(w⊙g⊙x) in at least float32
        wide = torch.promote_types(x.dtype, torch.float32)
        xf, gw = x.to(wide), (g * weight).to(wide)
        r = (xf.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        c = torch.linalg.vecdot(gw, xf).unsqueeze(-1).mul_(r.square()).div_(d)
        return gw.addcmul_(xf, c, value=-1).mul_(r).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = w ⊙ x / √(mean x² + ε) over the last dimension, keeping x alone; the frozen w gets no gradient.

    Reference: F.rms_norm."""
    out: Tensor = _RmsNorm.apply(x.contiguous(), weight, eps)
    return out


_NORM_SILU = ("norm_silu", "norm_silu_backward")


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        native = compiled.usable(_NORM_SILU, x)
        assert native is not None
        ctx.save_for_backward(x, shift, weight, bias)
        n, channels = x.shape[:2]
        ctx.how = n, groups, channels // groups, x[0, 0].numel(), eps, torch.get_num_threads()
        y = torch.empty_like(x)
        native.norm_silu(*(_pointer(t) for t in (x, shift, weight, bias, y)), *ctx.how)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias = ctx.saved_tensors
        g, dx = g.contiguous(), torch.empty_like(x)
        native = compiled.usable(_NORM_SILU, g)
        assert native is not None
        native.norm_silu_backward(*(_pointer(t) for t in (g, x, shift, weight, bias, dx)), *ctx.how)
        return dx, *[None] * 5


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def norm_silu(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """silu(F.group_norm(x + shift)). x: (n, channels, …), shift: (n, channels) or None.

    Reads x once and keeps it alone. Reference, and what runs where anything but x is trained or there is no kernel: the
    same line by line."""
    given = [t for t in (shift, weight, bias) if t is not None]
    if any(t.requires_grad for t in given) or not x.numel() or compiled.usable(_NORM_SILU, x, *given) is None:
        x = x if shift is None else x + shift.view(*shift.shape, *[1] * (x.ndim - 2))
        return F.silu(F.group_norm(x, groups, weight, bias, eps))
    out: Tensor = _NormSilu.apply(x, shift, weight, bias, groups, eps)
    return out
