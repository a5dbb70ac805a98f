"""Norms that read their input once and save only their input for backward.

    rms_norm     y = w ⊙ x / √(mean x² + ε)
    norm_silu    y = silu(w ⊙ x̂ + b), where x̂ is x plus a shift per channel, group-normalized

Frozen weights never get a gradient. Each norm has a torch reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.dispatch import dispatch


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `rms_norm` of a contiguous x, without autograd."""
    run = dispatch("rms_norm", x, weight)
    y: Tensor = _norm_reference(x, weight, eps) if run is None else run(x, weight, eps)
    return y


def _norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return torch's norm, computed in the wider of the two dtypes and rounded once."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return normed(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return _norm_gradient(g.contiguous(), x, weight, ctx.eps), None, None


def _norm_gradient(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return dx = r·(w⊙g) − x·r³·mean(w⊙g⊙x), r = 1/√(mean x² + ε).

    Computed in float32 or wider."""
    run = dispatch("rms_norm_backward", g, x, weight)
    if run is not None:
        dx: Tensor = run(g, x, weight, eps)
        return dx
    wide = torch.promote_types(x.dtype, torch.float32)
    xf, gw = x.to(wide), (g * weight).to(wide)
    r = (xf.square().mean(-1, keepdim=True) + eps).rsqrt()
    c = torch.linalg.vecdot(gw, xf).unsqueeze(-1).mul_(r.square()).div_(x.shape[-1])
    return gw.addcmul_(xf, c, value=-1).mul_(r).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y = w ⊙ x / √(mean x² + ε) over the last dimension, saving only x.

    The frozen w gets no gradient. w has the dtype of x, or is float32 if rounding would change w (Gemma's
    1 + w). y has the dtype of x. Reference: F.rms_norm."""
    x = x.contiguous()
    run = dispatch("rms_norm_autograd", x, weight)
    out: Tensor = _RmsNorm.apply(x, weight, eps) if run is None else run(x, weight, eps)
    return out


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, shift, weight, bias)
        ctx.run, ctx.how = dispatch("norm_silu", x), (groups, eps)
        y: Tensor = ctx.run.forward(x, shift, weight, bias, groups, eps)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dx = ctx.run.backward(g.contiguous(), *ctx.saved_tensors, *ctx.how)
        return dx, *[None] * 5


def norm_silu(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Return silu(F.group_norm(x + shift)), reading x once and saving only x.

    x: (n, channels, …).
    shift: (n, channels) or None.

    The torch reference runs if anything other than x needs a gradient, or if no kernel is available."""
    tensors = [t for t in (shift, weight, bias) if t is not None]
    if any(t.requires_grad for t in tensors) or not x.numel() or dispatch("norm_silu", x, *tensors) is None:
        x = x if shift is None else x + shift.view(*shift.shape, *[1] * (x.ndim - 2))
        return F.silu(F.group_norm(x, groups, weight, bias, eps))
    out: Tensor = _NormSilu.apply(x, shift, weight, bias, groups, eps)
    return out
