"""Convolution whose backward computes an input gradient only for leading channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input


class _LiveConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], live: int
    ) -> Tensor:
        ctx.how = x.shape, weight[:, :live], padding, live
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, weight, padding, live = ctx.how
        dx = g.new_zeros(shape)
        dx[:, :live] = conv2d_input((shape[0], live, *shape[2:]), weight, g, padding=padding)
        return dx, None, None, None, None


def live_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], live: int) -> Tensor:
    """Return F.conv2d(x, weight, bias, padding=padding) with frozen weights.

    live: number of leading channels of x that need a gradient. The gradient of the other channels is set to
        zero without being computed."""
    out: Tensor = _LiveConv.apply(x, weight, bias, padding, live)
    return out
