"""RMS norm: a row a program, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cuda.launch import kernel, power_of_2, rounded, run_kernel, tl


@kernel
def _rms_norm(x, weight, y, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    there = at < width
    v = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row + at, rounded(v * r * w, y), mask=there)


@kernel
def _rms_norm_backward(g, x, weight, dx, width, eps, BLOCK: tl.constexpr):
    """dx = r·w⊙g − x·r³·mean(w⊙g⊙x)"""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    there = at < width
    v = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    gw = tl.load(g + row + at, mask=there, other=0.0).to(tl.float32)
    gw *= tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    mean = tl.sum(gw * v, 0) / width
    tl.store(dx + row + at, rounded(r * (gw - v * (r * r * mean)), dx), mask=there)


def _warps(width: int) -> int:
    return min(max(power_of_2(width) // 512, 1), 16)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width if width else 0
    run_kernel(_rms_norm, (rows,), x, weight, y, width, eps, BLOCK=power_of_2(width), num_warps=_warps(width))
    return y


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dx, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width if width else 0
    run_kernel(
        _rms_norm_backward, (rows,), g, x, weight, dx, width, eps, BLOCK=power_of_2(width), num_warps=_warps(width)
    )
    return dx
