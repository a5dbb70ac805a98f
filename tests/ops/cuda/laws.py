"""What laws of kernels share: draws of every layout, and tolerances against float64."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

FEW = settings(max_examples=12)
"""The interpreter takes a millisecond and more for each program of a kernel."""
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative to the norm of the float64 result, of a result that is rounded once or twice."""
SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).to(device, dtype)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """Within `times` the tolerance of `dtype`, in shape too."""
    assert got.shape == wanted.shape
    assert bool(got.isfinite().all())
    error, size = (got.double() - wanted.double()).norm(), wanted.double().norm()
    assert error <= times * TOLERANCE[dtype] * size + 1e-30, f"{error / size:.2g}"
