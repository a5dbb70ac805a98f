"""A convolution whose later input channels nothing trained comes before."""

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
    """F.conv2d(x, weight, bias, padding=padding) with frozen weights. The gradient of x is right for the first `live`
    of its channels and zero for the others, of which none is wanted: those products are not made."""
    out: Tensor = _LiveConv.apply(x, weight, bias, padding, live)
    return out
