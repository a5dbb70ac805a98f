"""Laws of the norms' kernels against float64, and of the op that runs them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.cuda.laws import DTYPES, FEW, SEEDS, close, drawn
from veneer.ops.cuda import norms
from veneer.ops.dispatch import dispatch
from veneer.ops.norms import norm_silu, rms_norm


@FEW
@given(DTYPES, st.integers(0, 5), st.integers(1, 300), SEEDS, st.booleans(), st.booleans())
def test_rms_norm(
    device: str, dtype: torch.dtype, rows: int, width: int, seed: int, turned: bool, wide_weight: bool
) -> None:
    x = (
        drawn(seed, 2, width, rows, dtype=dtype, device=device).transpose(1, 2)
        if turned
        else drawn(seed, 2, rows, width, dtype=dtype, device=device)
    )
    x, w, g = (
        x.requires_grad_(),
        drawn(seed + 1, width, dtype=torch.float32 if wide_weight else dtype, device=device),
        drawn(seed + 2, 2, rows, width, dtype=dtype, device=device),
    )
    assert dispatch("rms_norm", x.contiguous(), w) is norms.rms_norm_forward
    y = rms_norm(x, w, 1e-5)
    (dx,) = torch.autograd.grad(y, x, g)
    wide = x.detach().double().requires_grad_()
    want = F.rms_norm(wide, (width,), w.double(), 1e-5)
    close(y, want, dtype)
    close(dx, torch.autograd.grad(want, wide, g.double())[0], dtype)


@FEW
@given(
    DTYPES,
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([(4, 2), (6, 3), (12, 4)]),
    st.sampled_from([(3, 3), (40,), (7, 9)]),
    SEEDS,
)
def test_norm_silu(
    device: str,
    dtype: torch.dtype,
    shifted: bool,
    n: int,
    channels: tuple[int, int],
    places: tuple[int, ...],
    seed: int,
) -> None:
    """Groups of several chunks, the last of them not full."""
    count, groups = channels
    x, g = (drawn(seed + i, n, count, *places, dtype=dtype, device=device) for i in (0, 1))
    w, b = drawn(seed + 2, 2, count, dtype=dtype, device=device)
    shift = drawn(seed + 3, n, count, dtype=dtype, device=device) if shifted else None
    x.requires_grad_()
    assert dispatch("norm_silu", x, w, b) is norms.NormSilu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "CHUNK", 64)
        y = norm_silu(x, shift, w, b, groups, 1e-5)
        (dx,) = torch.autograd.grad(y, x, g)
    wide = x.detach().double().requires_grad_()
    moved = wide if shift is None else wide + shift.double().view(n, count, *[1] * len(places))
    want = F.silu(F.group_norm(moved, groups, w.double(), b.double(), 1e-5))
    close(y, want, dtype)
    close(dx, torch.autograd.grad(want, wide, g.double())[0], dtype, 3)


def test_a_group_far_from_zero_is_normed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of 1,000 with a spread of 1: a variance as a difference of sums of squares would be lost in float32."""
    monkeypatch.setattr(norms, "CHUNK", 64)
    x, one = 1000 + drawn(0, 1, 2, 150, dtype=torch.float32), torch.ones(2)
    want = F.silu(F.group_norm(x.double(), 1, one.double(), one.double(), 1e-5))
    torch.testing.assert_close(norm_silu(x, None, one, one, 1, 1e-5).double(), want, rtol=1e-3, atol=1e-3)
