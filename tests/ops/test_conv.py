"""Frozen convolutions equal torch's, in the arithmetic of the op "product"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.conv import frozen_conv
from veneer.ops.dispatch import override_ops

_SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3 x 3": ((2, 32, 8, 8), (48, 32, 3, 3), {"padding": (1, 1)}),
    "odd sides": ((3, 20, 7, 5), (18, 20, 3, 3), {"padding": (1, 1)}),
    "wide": ((1, 70, 3, 150), (20, 70, 3, 3), {"padding": (1, 1)}),
    "half the sides": ((2, 16, 8, 8), (16, 16, 3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    "1 x 1": ((2, 16, 4, 4), (24, 16, 1, 1), {}),
    "dilated, in groups": ((1, 16, 9, 9), (16, 8, 3, 3), {"dilation": (2, 2), "groups": 2}),
}


def _results(x: Tensor, weight: Tensor, bias: Tensor, run: Any, **how: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x, weight, bias, **how)
    return [y.detach(), *torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().to(y.dtype))]


@pytest.mark.parametrize("kernel_of", ["compiled", "torch"])
@pytest.mark.parametrize("name", _SHAPES)
def test_16_bit_convolutions_round_once_in_float32_arithmetic(name: str, kernel_of: str) -> None:
    shape, kernel, how = _SHAPES[name]
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g).bfloat16() for s in (shape, kernel, kernel[:1]))
    exact = _results(x.double(), weight.double(), bias.double(), F.conv2d, **how)
    with override_ops(product="columns", conv3x3=kernel_of):
        y, dx = _results(x, weight, bias, frozen_conv, **how)
    torch.testing.assert_close(y, exact[0].bfloat16(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(dx, exact[1].bfloat16(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("live", [None, 4])
def test_bfloat16_arithmetic_gives_torch_s_own_bits(live: int | None) -> None:
    x, weight, bias = torch.randn(2, 8, 6, 6).bfloat16(), torch.randn(8, 8, 3, 3).bfloat16(), torch.randn(8).bfloat16()
    y, dx = _results(x, weight, bias, frozen_conv, padding=(1, 1), live=live)
    want, wanted_dx = _results(x, weight, bias, F.conv2d, padding=(1, 1))
    assert torch.equal(y, want)
    assert torch.equal(dx[:, :live], wanted_dx[:, :live])
    assert live is None or not dx[:, live:].any()
