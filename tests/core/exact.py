"""Helpers for comparisons with float64: tolerances by dtype, seeded random tensors, assertions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Maximum error relative to the norm of the float64 result; bfloat16 rounds intermediates to 8 bits."""
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def wide(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def same(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert (a.double() - b).norm() <= tolerance * b.norm(), f"result {i}"


def same_with_gradients(
    y: Tensor, inputs: Sequence[Tensor], wanted: Tensor, wide_inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Assert that a result and its gradients equal those in float64, within the dtype's tolerance.

    Returns the result and its gradients."""
    g = draw(*y.shape, dtype=y.dtype)
    got = [y, *torch.autograd.grad(y, inputs, g)]
    same(got, [wanted, *torch.autograd.grad(wanted, wide_inputs, g.double())], TOLERANCE[y.dtype])
    return got
