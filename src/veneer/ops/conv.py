"""Convolution with frozen weights, in the machine's fastest arithmetic.

Backward computes an input gradient only for leading channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from veneer.ops.products import widened

_Pair = tuple[int, int]


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, live: int, *how: Any) -> Tensor:
        ctx.how = x.shape, weight[:, :live], live, how
        wide_x, wide_weight, *wide_bias = widened(x, weight, *([] if bias is None else [bias]))
        return F.conv2d(wide_x, wide_weight, *(wide_bias or [None]), *how).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, weight, live, how = ctx.how
        wide_g, wide_weight = widened(g, weight)
        dx = conv2d_input((shape[0], live, *shape[2:]), wide_weight, wide_g, *how).to(g.dtype)
        if live < shape[1]:
            rest = g.new_zeros(shape[0], shape[1] - live, *shape[2:])
            dx = torch.cat([dx, rest], 1)
        return dx, *[None] * (3 + len(how))


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = (1, 1),
    padding: _Pair | str = (0, 0),
    dilation: _Pair = (1, 1),
    groups: int = 1,
    live: int | None = None,
) -> Tensor:
    """Return F.conv2d(x, weight, bias, stride, padding, dilation, groups) with frozen weights.

    live: number of leading channels of x that need a gradient, None for all; needs `groups` = 1. The gradient of
        the other channels is set to zero without being computed."""
    how = stride, padding, dilation, groups
    out: Tensor = _FrozenConv.apply(x, weight, bias, weight.shape[1] * groups if live is None else live, *how)
    return out
