"""Seeded dropout: the fraction dropped, the scale, and independence of seeds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops.dropout import Dropout


def seed_of(generator: int) -> int:
    """Draw a seed from torch's generator, as a run does.

    torch's generators with seeds 0, 1, 2 … give similar sequences."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator)
        return Dropout.sample(0.1).seed


SEEDS = st.integers(0, 2**62 - 1).map(seed_of)
N = 200_000
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
"""The compiled kernel's dtype, if there is a kernel, and a dtype of torch's dropout."""


def mask(p: float, seed: int, dtype: torch.dtype, n: int = N) -> torch.Tensor:
    return Dropout(p, seed)(torch.ones(n, dtype=dtype)) != 0


def near(share: float, wanted: float, n: int) -> bool:
    """Return whether `share` is within six standard deviations of `wanted`."""
    return abs(share - wanted) <= 6 * math.sqrt(wanted * (1 - wanted) / n)


@DTYPES
@given(p=st.floats(0.01, 0.9), seed=SEEDS)
def test_dropout_drops_the_requested_fraction(dtype: torch.dtype, p: float, seed: int) -> None:
    x = torch.linspace(1, 2, N).to(dtype)
    y = Dropout(p, seed)(x)
    kept = y != 0
    assert near(float((~kept).double().mean()), p, N)
    torch.testing.assert_close(y[kept], (x.double() / (1 - p)).to(dtype)[kept])
    assert torch.equal(y, Dropout(p, seed)(x))


@DTYPES
@given(seed=SEEDS, other=SEEDS, shift=st.integers(0, 1000))
def test_masks_of_two_seeds_agree_only_by_chance(dtype: torch.dtype, seed: int, other: int, shift: int) -> None:
    """Also covers a mask that is shifted against another mask or against itself."""
    p, n = 0.3, N - shift
    a, b = mask(p, seed, dtype), mask(p, other, dtype)
    if seed != other:
        assert near(float((a[:n] == b[shift:]).double().mean()), p * p + (1 - p) ** 2, n)
    if shift:
        assert near(float((a[:n] == a[shift:]).double().mean()), p * p + (1 - p) ** 2, n)


def test_dropout_seeds_come_from_torchs_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        one, two = Dropout.sample(0.1), Dropout.sample(0.1)
        torch.manual_seed(3)
        assert Dropout.sample(0.1) == one != two


def test_mask_does_not_depend_on_contiguity() -> None:
    x = torch.ones(40, 24, dtype=torch.bfloat16)
    drop = Dropout(0.5, 7)
    assert torch.equal(drop(x), drop(torch.ones(24, 40, dtype=torch.bfloat16).t()))
