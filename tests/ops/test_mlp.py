"""Gated MLPs and activations, compared with the same formula in plain torch.

Values and every gradient are compared, in float64 if possible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from tests.core.exact import DTYPES, draw, same_with_gradients, seeded, wide  # noqa: F401, seeded acts by itself
from tests.ops.draws import factors, mask_of_next, with_dropout
from veneer.ops import mlp
from veneer.ops.linear import LinearMap
from veneer.ops.lowrank import LowRank
from veneer.ops.mlp import gated_mlp


def next_masks(dropout: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the masks of the next two dropouts: before the first and last products."""
    state = torch.random.get_rng_state()
    mask = mask_of_next(dropout, 9, 32, dtype=dtype)
    torch.randint(1 << 62, ())
    mask_down = mask_of_next(dropout, 9, 48, dtype=dtype)
    torch.random.set_rng_state(state)
    return mask, mask_down


@DTYPES
def test_gated_mlp_with_dropout_before_each_product(dtype: torch.dtype) -> None:
    x = draw(9, 32, dtype=dtype).requires_grad_()
    W, D = draw(96, 32, dtype=dtype, scale=0.2), draw(32, 48, dtype=dtype, scale=0.2)
    A1, B1, A3, B3 = ab = factors(dtype, (4, 32), (48, 4), (3, 48), (32, 3))
    first, last = (LowRank(A1, B1, 2.0),), (LowRank(A3, B3, 1.5),)
    mask, mask_down = next_masks(0.2, dtype)
    y = gated_mlp(x, LinearMap(W, None, with_dropout(first, 0.2)), LinearMap(D, None, with_dropout(last, 0.2)))

    xd, (A1, B1, A3, B3) = wide(x), (abd := [wide(t) for t in ab])
    h = F.silu(xd @ W[:48].double().T + 2.0 * ((xd * mask) @ A1.T) @ B1.T) * (xd @ W[48:].double().T)
    yd = h @ D.double().T + 1.5 * ((h * mask_down) @ A3.T) @ B3.T
    same_with_gradients(y, [x, *ab], yd, [xd, *abd])


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gated_mlp_with_gains(dtype: torch.dtype, dropout: float) -> None:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    x = draw(9, 32, dtype=dtype).requires_grad_()
    W, D = draw(96, 32, dtype=dtype, scale=0.2), draw(32, 48, dtype=dtype, scale=0.2)
    A1, B1, A3, B3 = ab = factors(dtype, (4, 32), (96, 4), (3, 48), (32, 3))
    m, n = ms = [(1 + draw(size, dtype=kept, scale=0.1)).requires_grad_() for size in (96, 32)]
    first = LinearMap(W, None, (LowRank(A1, B1, 2.0, dropout),), m)
    mask, mask_down = torch.ones(9, 32, dtype=torch.float64), torch.ones(9, 48, dtype=torch.float64)
    if dropout:
        mask, mask_down = next_masks(dropout, dtype)
    y = gated_mlp(x, first, LinearMap(D, None, (LowRank(A3, B3, 1.5, dropout),), n))

    def adapted(x: Tensor, mask: Tensor, W: Tensor, m: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ W.T + (m - 1) * ((x * mask) @ W.T) + m * ((x * mask) @ A.T @ B.T)

    xd, (m, n), (A1, B1, A3, B3) = wide(x), (msd := [wide(t) for t in ms]), (abd := [wide(t) for t in ab])
    gate, up = adapted(xd, mask, W.double(), m, A1, 2.0 * B1).chunk(2, -1)
    yd = adapted(F.silu(gate) * up, mask_down, D.double(), n, A3, 1.5 * B3)
    same_with_gradients(y, [x, *ab, *ms], yd, [xd, *abd, *msd])


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_gated_mlp(dtype: torch.dtype, act: str) -> None:
    x = draw(2, 9, 32, dtype=dtype).requires_grad_()
    W, D = draw(96, 32, dtype=dtype, scale=0.2), draw(32, 48, dtype=dtype, scale=0.2)
    A1, B1, A2, B2, A3, B3 = ab = factors(dtype, (4, 32), (48, 4), (2, 32), (48, 2), (3, 48), (32, 3))
    up = (LowRank(A1, B1, 2.0), LowRank(A2, B2, 0.5, first=48))
    y = gated_mlp(x, LinearMap(W, None, up), LinearMap(D, None, (LowRank(A3, B3, 1.5),)), act)

    xd, (A1, B1, A2, B2, A3, B3) = wide(x), (abd := [wide(t) for t in ab])
    gate = xd @ W[:48].double().T + 2.0 * (xd @ A1.T) @ B1.T
    over = xd @ W[48:].double().T + 0.5 * (xd @ A2.T) @ B2.T
    h = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none")
    h = h * over
    yd = h @ D.double().T + 1.5 * (h @ A3.T) @ B3.T
    same_with_gradients(y, [x, *ab], yd, [xd, *abd])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("name", ["geglu", "gelu_tanh"])
def test_activations_against_float64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Covers the whole range in which gelu is curved, and values far outside it."""
    gate = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4])]).to(dtype)
    up = torch.randn(len(gate), generator=torch.Generator().manual_seed(0)).to(dtype)
    g = torch.randn(1, len(gate), generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.cat([up, gate])[None] if name == "geglu" else gate[None]

    def exactly(x: Tensor) -> Tensor:
        if name == "gelu_tanh":
            return torch.nn.functional.gelu(x, approximate="tanh")
        return x[:, : len(gate)] * torch.nn.functional.gelu(x[:, len(gate) :])

    results = []
    for function, given in ((getattr(mlp, name), x), (exactly, x.double())):
        leaf = given.clone().requires_grad_(True)
        y = function(leaf)
        results.append((y.detach().double(), torch.autograd.grad(y, leaf, g.to(y.dtype))[0].double()))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=tolerance, atol=1e-5 if dtype is torch.float32 else 1e-4)
