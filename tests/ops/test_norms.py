"""Each norm against the same formula in plain torch, in float64 if possible: values and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.core.exact import DTYPES, TOLERANCE, draw, same, seeded, wide  # noqa: F401, seeded acts by itself
from veneer.ops.norms import norm_silu, rms_norm


@DTYPES
def test_rms_norm(dtype: torch.dtype) -> None:
    x, w = draw(2, 7, 72, dtype=dtype).requires_grad_(), draw(72, dtype=dtype)
    y = rms_norm(x, w, 1e-5)
    g = draw(2, 7, 72, dtype=dtype)
    xd = wide(x)
    yd = F.rms_norm(xd, (72,), w.double(), 1e-5)
    wanted = [yd, *torch.autograd.grad(yd, xd, g.double())]
    same([y, *torch.autograd.grad(y, x, g)], wanted, TOLERANCE[dtype])


@DTYPES
def test_a_norm_whose_weight_has_more_bits_than_x(dtype: torch.dtype) -> None:
    """Rounds once: 16 bits cannot represent 1 + w of Gemma's norms."""
    weight = torch.promote_types(dtype, torch.float32)
    x, w, g = draw(9, 72, dtype=dtype).requires_grad_(), 1 + draw(72, dtype=weight), draw(9, 72, dtype=dtype)
    y = rms_norm(x, w, 1e-5)
    assert y.dtype == dtype
    xd = wide(x)
    yd = F.rms_norm(xd, (72,), w.double(), 1e-5)
    wanted = [yd, *torch.autograd.grad(yd, xd, g.double())]
    same([y, *torch.autograd.grad(y, x, g)], wanted, TOLERANCE[dtype])


def test_input_keeps_its_dtype_with_narrower_weight() -> None:
    x, w = draw(9, 72, dtype=torch.float32), draw(72, dtype=torch.bfloat16)
    wanted = F.rms_norm(x.double(), (72,), w.double(), 1e-5)
    same([rms_norm(x, w, 1e-5)], [wanted], TOLERANCE[torch.float32])


@DTYPES
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("places", [(3, 3), (4, 8), (40,)])
def test_norm_silu(dtype: torch.dtype, shifted: bool, places: tuple[int, ...]) -> None:
    x, (w, b) = draw(3, 12, *places, dtype=dtype).requires_grad_(), draw(2, 12, dtype=dtype)
    shift = draw(3, 12, dtype=dtype) if shifted else None
    y = norm_silu(x, shift, w, b, 4, 1e-5)
    g = draw(*y.shape, dtype=dtype)
    xd = wide(x)
    moved = xd if shift is None else xd + shift.double().view(3, 12, *[1] * len(places))
    yd = F.silu(F.group_norm(moved, 4, w.double(), b.double(), 1e-5))
    wanted = [yd, *torch.autograd.grad(yd, xd, g.double())]
    same([y, *torch.autograd.grad(y, x, g)], wanted, TOLERANCE[dtype])


def test_norm_silu_of_far_values_and_of_a_trained_norm() -> None:
    """Covers values for which e^-z overflows float32, and gradients of the norm's weight, which the kernel
    lacks."""
    x = torch.linspace(-1, 1, 128).view(1, 2, 64).bfloat16().requires_grad_()
    w, b = torch.tensor([400.0, -400.0]).bfloat16().requires_grad_(), torch.zeros(2).bfloat16()
    want = F.silu(F.group_norm(x.double(), 1, w.double(), b.double(), 1e-5))
    with torch.no_grad():
        same([norm_silu(x, None, w.detach(), b, 1, 1e-5)], [want], 1e-2)
    assert torch.autograd.grad(norm_silu(x, None, w, b, 1, 1e-5).sum(), w)[0].isfinite().all()
