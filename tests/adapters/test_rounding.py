"""Stochastic rounding has the correct mean and returns one of the two neighbors."""

from __future__ import annotations

import pytest
import torch

from veneer.adapters.rounding import Rounding, seeded, stochastic

DTYPES = [torch.bfloat16, torch.float16]
VALUES = [0.1, -0.1, 1.003, -1.003, 3e-5, -3e-5, 1e-9, -1e-9, 300.7, -1.9999, 6.1e-5, 0.49999]


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the nearest numbers of `dtype` below and above x, by enumerating all numbers."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()
    every = every[torch.isfinite(every)]
    return float(every[every <= x].max()), float(every[every >= x].min())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", VALUES)
def test_mean_of_rounded_values_is_the_number(dtype, x):
    count = 40_000
    exact = float(torch.tensor(x, dtype=torch.float32))
    got = stochastic(torch.full((count,), x), dtype, seeded(0, "w")).double()
    low, high = neighbours(exact, dtype)
    assert set(got.tolist()) <= {low, high}
    p = (exact - low) / (high - low)
    spread = (high - low) * (p * (1 - p) / count) ** 0.5
    assert abs(float(got.mean()) - exact) < 5 * spread + 1e-6 * (high - low)
    nearest = float(torch.tensor(x).to(dtype))
    assert abs(nearest - exact) > 10 * spread or p < 0.02 or p > 0.98  # in contrast to rounding to nearest


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_representable_values_are_unchanged(dtype):
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 1024.0, 2.0**-14]).to(dtype).float()
    assert torch.equal(stochastic(x, dtype, seeded(1, "w")).float(), x)


def test_the_largest_number_does_not_become_infinite():
    assert torch.isfinite(stochastic(torch.full((1000,), 65504.0) + 8, torch.float16, seeded(0, "w"))).all()


def test_rounding_depends_only_on_seed_and_name():
    x = torch.rand(1000)
    a, b, c = (stochastic(x, torch.bfloat16, seeded(s, n)) for s, n in ((1, "w"), (1, "w"), (1, "v")))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_stochastic_rounding_keeps_small_deltas_on_average():
    W = torch.ones(100_000).bfloat16()
    exact = W.float() + 1e-4  # far smaller than the spacing of bfloat16 at 1, 2⁻⁷
    near, drawn = Rounding(), Rounding()
    near.add(W, exact, exact.bfloat16())
    drawn.add(W, exact, stochastic(exact, torch.bfloat16, seeded(0, "w")))
    assert (near.changed, near.kept, near.error) == (0.0, 0.0, 1.0)
    assert drawn.kept == pytest.approx(1.0, abs=0.15)
    assert drawn.error > near.error  # although each single weight has a larger error
