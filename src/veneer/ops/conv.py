"""Convolution with frozen weights, in the machine's fastest arithmetic.

The backward pass computes the input gradient of the leading channels only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from veneer.ops.dispatch import dispatch
from veneer.ops.products import in_float32, widened

_Sizes = tuple[int, ...]


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, live: int, *how: Any) -> Tensor:
        ctx.how = x.shape, weight[:, :live], live, how
        if (run := _kernel_of(x, weight, how)) is not None:
            y = x.new_empty(len(x), len(weight), *x.shape[2:])
            run(x, weight, bias, False, y)
            return y
        wide_x, wide_weight = widened(x, weight)
        bias = None if bias is None else bias.to(wide_x.dtype)
        return F.conv2d(wide_x, wide_weight, bias, *how).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, weight, live, how = ctx.how
        if (run := _kernel_of(g := g.contiguous(), weight, how)) is not None:
            dx = g.new_empty(shape)
            run(g, weight.transpose(0, 1), None, True, dx)
            dx[:, live:] = 0
            return dx, *[None] * (3 + len(how))
        wide_g, wide_weight = widened(g, weight)
        dx = conv2d_input((shape[0], live, *shape[2:]), wide_weight, wide_g, *how).to(g.dtype)
        if live < shape[1]:
            rest = g.new_zeros(shape[0], shape[1] - live, *shape[2:])
            dx = torch.cat([dx, rest], 1)
        return dx, *[None] * (3 + len(how))


def _kernel_of(x: Tensor, weight: Tensor, how: tuple[Any, ...]) -> Any:
    """Return the implementation of "conv3x3"; None if it does not support the inputs or float32 is not faster."""
    return dispatch("conv3x3", x, weight) if how == ((1, 1), (1, 1), (1, 1), 1) and in_float32(x) else None


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Sizes = (1, 1),
    padding: _Sizes = (0, 0),
    dilation: _Sizes = (1, 1),
    groups: int = 1,
    live: int | None = None,
) -> Tensor:
    """Return F.conv2d(x, weight, bias, stride, padding, dilation, groups) with frozen weights.

    live: number of leading channels of x that need a gradient; None for all. A number requires `groups` = 1. The
        gradient of the other channels is set to zero without being computed."""
    how = stride, padding, dilation, groups
    out: Tensor = _FrozenConv.apply(x, weight, bias, weight.shape[1] * groups if live is None else live, *how)
    return out
