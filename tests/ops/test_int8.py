"""Products in 8 bits stay within the bound of their rounding, and outlier channels are exact."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.core.exact import draw, seeded  # noqa: F401, seeded acts by itself
from veneer.ops.dispatch import override_ops
from veneer.ops.int8 import Int8Weight
from veneer.ops.linear import LinearMap, linear
from veneer.ops.lowrank import LowRank

BOTH = pytest.mark.parametrize("name", ["compiled", "torch"])
"""The kernel, where the processor has VNNI, and the reference."""
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def quantized(W: Tensor, x: Tensor) -> Int8Weight:
    """Return the 8-bit copy of W for inputs like x."""
    copy = Int8Weight(W)
    assert copy.product(x, W) is None
    copy.quantize(W)
    return copy


def steps(t: Tensor, dim: int) -> Tensor:
    return t.abs().amax(dim, keepdim=True) / 127


@BOTH
@DTYPES
@pytest.mark.parametrize(
    ("rows", "out", "inputs"), [(37, 80, 208), (400, 48, 64), (3, 33, 50), (0, 32, 32), (17, 1, 16), (17, 16, 1)]
)
def test_both_directions_are_within_the_bound_of_rounding(
    name: str, dtype: torch.dtype, rows: int, out: int, inputs: int
) -> None:
    """A rounded factor is at most half a step off, so a product Σ a·b is at most Σ (|a|·sb + |b|·sa + sa·sb) / 2 off.

    The weight's columns have scales between 1 and 1/8, which the balance with x can move by one bit more."""
    W, b = draw(out, inputs, dtype=dtype), draw(out, dtype=dtype)
    x, g = draw(rows, inputs, dtype=dtype).requires_grad_(), draw(rows, out, dtype=dtype)
    copy = quantized(W, x.detach())
    with override_ops(int8_linear=name):
        y = linear(x, LinearMap(W, b, copies=copy))
        (dx,) = torch.autograd.grad(y, x, g)
    xd, Wd, gd = x.detach().double(), W.double(), g.double()
    m = copy.balance.double()
    near = torch.finfo(dtype).eps
    a, w = xd / m, Wd * m
    bound = _bound(a, w.t(), steps(a, 1), steps(w, 1).t())
    exact = xd @ Wd.t() + b.double()
    assert ((y.double() - exact).abs() <= bound + near * exact.abs() + 1e-6).all()
    scaled, codes = gd * steps(w, 1).t(), w / steps(w, 1)
    bound = _bound(scaled, codes, steps(scaled, 1), torch.ones(1, 1)) / m
    exact = gd @ Wd
    assert ((dx.double() - exact).abs() <= bound + near * exact.abs() + 1e-6).all()


def _bound(a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor) -> Tensor:
    """Return the largest error of a·b, if the entries of a and b are rounded to multiples of their steps."""
    size_a, size_b = a.abs().sum(1, keepdim=True), b.abs().sum(0, keepdim=True)
    return 1.001 * (size_a * step_b + size_b * step_a + len(b) * step_a * step_b) / 2


@BOTH
def test_outlier_channels_are_exact(name: str) -> None:
    """With inputs only in the outlier channels, the product is exact; large outliers do not coarsen other channels."""
    W, x = draw(64, 96, dtype=torch.bfloat16), draw(40, 96, dtype=torch.bfloat16)
    x[:, [5, 71]] *= 3000
    copy = quantized(W, x)
    assert copy.outliers >= 2
    alone = torch.zeros_like(x)
    alone[:, [5, 71]] = x[:, [5, 71]]
    with override_ops(int8_linear=name):
        got, rest = copy.product(alone, W), copy.product(x, W)
    assert got is not None
    assert rest is not None
    torch.testing.assert_close(got.double(), alone.double() @ W.double().t(), rtol=2**-8, atol=1e-3)
    small = (x - alone).double()
    error = rest.double() - x.double() @ W.double().t()
    assert error.abs().max() < 0.05 * small.abs().max() * 96**0.5 + 2**-8 * rest.double().abs().max()


def test_kernel_and_reference_agree() -> None:
    W, x, b = (draw(*shape, dtype=torch.bfloat16) for shape in ((80, 208), (101, 208), (80,)))
    x[:, 7] *= 1000
    copy = quantized(W, x)
    for t, bias, transposed in ((x, b, True), (draw(101, 80, dtype=torch.bfloat16), None, False)):
        y = copy.product(t, W, bias, transposed)
        with override_ops(int8_linear="torch"):
            want = copy.product(t, W, bias, transposed)
        torch.testing.assert_close(y, want, rtol=2**-7, atol=2**-10 * float(want.abs().max()))


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_inputs_stay_visible(name: str, value: float) -> None:
    W, x = draw(64, 96, dtype=torch.bfloat16), draw(40, 96, dtype=torch.bfloat16)
    copy = quantized(W, x)
    x[3, 17] = value
    with override_ops(int8_linear=name):
        y = copy.product(x, W)
    assert y is not None
    assert not y[3].isfinite().any()
    assert y[:3].isfinite().all()


def test_rows_do_not_depend_on_their_batch() -> None:
    """Therefore, k micro-batches give the same result as one batch."""
    W, x = draw(80, 208, dtype=torch.bfloat16), draw(101, 208, dtype=torch.bfloat16)
    copy = quantized(W, x)
    whole = copy.product(x, W)
    parts = [copy.product(part, W) for part in x.split([1, 60, 40])]
    assert whole is not None
    assert torch.equal(whole, torch.cat([part for part in parts if part is not None]))


def test_sums_are_exact_without_vnni() -> None:
    """All codes are 127, so without VNNI, oneDNN would saturate each sum."""
    code = (
        "import torch; from veneer.ops.int8 import Int8Weight\nx = torch.ones(40, 64); copy = Int8Weight(x)\n"
        "copy.product(x); copy.quantize(x); print((copy.product(x) - 64).abs().max().item() < 1e-3)"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "VENEER_OPS": "torch"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert ran.stdout.strip() == "True"


def test_low_rank_products_are_unchanged() -> None:
    W, x, g = (draw(*shape, dtype=torch.bfloat16) for shape in ((64, 96), (40, 96), (40, 64)))
    A, B = draw(4, 96, dtype=torch.float32).requires_grad_(), draw(64, 4, dtype=torch.float32).requires_grad_()
    copy = quantized(W, x)
    plain, eight = (
        torch.autograd.grad(linear(x, LinearMap(W, None, (LowRank(A, B, 0.5),), copies=c)), (A, B), g)
        for c in (None, copy)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, eight, strict=True))
