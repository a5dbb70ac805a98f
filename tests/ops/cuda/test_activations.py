"""Laws of gates, activations, gains and dropout against float64, by the ops that run their kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cuda.laws import DTYPES, FEW, SEEDS, close, drawn
from veneer.ops.dispatch import dispatch
from veneer.ops.dropout import Dropout
from veneer.ops.linear import gained
from veneer.ops.mlp import gated, geglu, gelu_tanh

ACTS = st.sampled_from(["silu", "gelu", "gelu_tanh"])


def activated(z: Tensor, act: str) -> Tensor:
    return F.silu(z) if act == "silu" else F.gelu(z, approximate="tanh" if act == "gelu_tanh" else "none")


@FEW
@given(DTYPES, ACTS, st.integers(0, 4), st.integers(1, 1100), SEEDS)
def test_a_gate(device: str, dtype: torch.dtype, act: str, rows: int, width: int, seed: int) -> None:
    both, dh = (
        drawn(seed, rows, 2 * width, dtype=dtype, device=device),
        drawn(seed + 1, rows, width, dtype=dtype, device=device),
    )
    wide = both.double().requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    want = activated(gate, act) * up
    close(gated(both, act), want, dtype)
    run = dispatch(f"{act}_gate_backward", dh, both)
    assert run is not None
    d, h = run(dh, both)
    close(h, want, dtype)
    close(d, torch.autograd.grad(want, wide, dh.double())[0], dtype)


@FEW
@given(DTYPES, st.integers(0, 3), st.integers(1, 300), SEEDS)
def test_geglu_and_gelu(device: str, dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    both, g = (
        drawn(seed, 2, rows, 2 * width, dtype=dtype, device=device),
        drawn(seed + 1, 2, rows, width, dtype=dtype, device=device),
    )
    wide = both.double().requires_grad_()
    up, gate = wide.chunk(2, dim=-1)
    for got, want in (
        (lambda x: geglu(x), up * F.gelu(gate)),
        (lambda x: gelu_tanh(x)[..., :width], F.gelu(wide, approximate="tanh")[..., :width]),
    ):
        x = both.clone().requires_grad_()
        y = got(x)
        close(y, want, dtype)
        (dx,) = torch.autograd.grad(y, x, g)
        close(dx, torch.autograd.grad(want, wide, g.double(), retain_graph=True)[0], dtype)


def test_activations_far_from_zero_stay_finite() -> None:
    both = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    with np.errstate(over="ignore"):
        for act in ("silu", "gelu", "gelu_tanh"):
            torch.testing.assert_close(gated(both, act), torch.tensor([[0.0, 0.0, 100.0, 1e4]]))
            run = dispatch(f"{act}_gate_backward", both[:, :4].contiguous(), both)
            assert run is not None
            assert all(t.isfinite().all() for t in run(torch.ones(1, 4), both))


@FEW
@given(DTYPES, st.integers(0, 150), st.integers(1, 300), SEEDS, st.booleans())
def test_a_gain(device: str, dtype: torch.dtype, rows: int, width: int, seed: int, biased: bool) -> None:
    y, g = (
        drawn(seed, rows, width, dtype=dtype, device=device),
        drawn(seed + 1, rows, width, dtype=dtype, device=device),
    )
    gain = drawn(seed + 2, width, dtype=torch.float32, device=device) + 1
    bias = drawn(seed + 3, width, dtype=dtype, device=device) if biased else None
    want = y.double() * gain.double() + (0 if bias is None else bias.double())
    close(gained(y, gain, bias), want, dtype)
    run = dispatch("gain_backward", gain, g, y)
    assert run is not None
    dy, d_gain = run(g, y, gain)
    close(dy, g.double() * gain.double(), dtype)
    close(d_gain, (g.double() * y.double()).sum(0), torch.float32, 10)


@FEW
@given(DTYPES, st.integers(0, 3000), st.floats(0.0, 0.99), st.integers(0, 2**62 - 1), SEEDS)
def test_dropout_is_the_reference_bit_for_bit(
    device: str, dtype: torch.dtype, n: int, p: float, seed: int, values: int
) -> None:
    x = drawn(values, n, dtype=dtype, device=device)
    got = Dropout(p, seed)(x)
    assert n == 0 or dispatch("dropout", x) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer.ops.dispatch.DEVICE", "torch")
        kept = Dropout(p, seed)(torch.ones(n, device=device)) != 0
    assert torch.equal(got != 0, kept & (x != 0))
    close(got, torch.where(kept, x.double() / (1 - p), 0.0), dtype)
