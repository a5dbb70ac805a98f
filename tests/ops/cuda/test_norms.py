"""Laws of the norms' kernels against float64, and of the op that runs them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.cuda.laws import DTYPES, FEW, SEEDS, close, drawn
from veneer.ops.choice import chosen
from veneer.ops.cuda import norms
from veneer.ops.norms import rms_norm


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
    assert chosen("rms_norm", x.contiguous(), w) is norms.rms_norm_forward
    y = rms_norm(x, w, 1e-5)
    (dx,) = torch.autograd.grad(y, x, g)
    wide = x.detach().double().requires_grad_()
    want = F.rms_norm(wide, (width,), w.double(), 1e-5)
    close(y, want, dtype)
    close(dx, torch.autograd.grad(want, wide, g.double())[0], dtype)
