"""Activations against the same formula in float64, values and gradients; the gated one is in test_fused.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.ops import activations


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("name", ["geglu", "gelu_tanh"])
def test_activations_against_float64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Over all of where gelu bends, and far outside."""
    gate = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4])]).to(dtype)
    up = torch.randn(len(gate), generator=torch.Generator().manual_seed(0)).to(dtype)
    g = torch.randn(1, len(gate), generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.cat([up, gate])[None] if name == "geglu" else gate[None]

    def exactly(x: Tensor) -> Tensor:
        if name == "gelu_tanh":
            return torch.nn.functional.gelu(x, approximate="tanh")
        return x[:, : len(gate)] * torch.nn.functional.gelu(x[:, len(gate) :])

    results = []
    for function, given in ((getattr(activations, name), x), (exactly, x.double())):
        leaf = given.clone().requires_grad_(True)
        y = function(leaf)
        results.append((y.detach().double(), torch.autograd.grad(y, leaf, g.to(y.dtype))[0].double()))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=tolerance, atol=1e-5 if dtype is torch.float32 else 1e-4)
