"""Each norm, compared with the same formula in plain torch.

Values and every gradient are compared, in float64 if possible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.core.exact import (  # noqa: F401, seeded acts by itself
    DTYPES,
    TOLERANCE,
    draw,
    same,
    same_with_gradients,
    seeded,
    wide,
)
from veneer.ops.norms import norm_silu, rms_norm


@DTYPES
@pytest.mark.parametrize("wider", [False, True])
def test_rms_norm(dtype: torch.dtype, wider: bool) -> None:
    """Results are rounded once, even if the weight has more bits than x.

    16 bits cannot represent the factor 1 + w of Gemma's norms exactly."""
    x = draw(2, 7, 72, dtype=dtype).requires_grad_()
    w = 1 + draw(72, dtype=torch.promote_types(dtype, torch.float32)) if wider else draw(72, dtype=dtype)
    y, xd = rms_norm(x, w, 1e-5), wide(x)
    assert y.dtype == dtype
    same_with_gradients(y, [x], F.rms_norm(xd, (72,), w.double(), 1e-5), [xd])


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
    xd = wide(x)
    moved = xd if shift is None else xd + shift.double().view(3, 12, *[1] * len(places))
    yd = F.silu(F.group_norm(moved, 4, w.double(), b.double(), 1e-5))
    same_with_gradients(norm_silu(x, shift, w, b, 4, 1e-5), [x], yd, [xd])


def test_norm_silu_with_extreme_values_or_a_trained_norm() -> None:
    """Covers values for which e^-z overflows float32, and a trained norm.

    The kernel does not compute gradients of a norm's weight."""
    x = torch.linspace(-1, 1, 128).view(1, 2, 64).bfloat16().requires_grad_()
    w, b = torch.tensor([400.0, -400.0]).bfloat16().requires_grad_(), torch.zeros(2).bfloat16()
    want = F.silu(F.group_norm(x.double(), 1, w.double(), b.double(), 1e-5))
    with torch.no_grad():
        same([norm_silu(x, None, w.detach(), b, 1, 1e-5)], [want], 1e-2)
    assert torch.autograd.grad(norm_silu(x, None, w, b, 1, 1e-5).sum(), w)[0].isfinite().all()
