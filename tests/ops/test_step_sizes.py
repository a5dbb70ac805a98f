"""Sizes of a step's micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops.loss import token_nll
from veneer.ops.step_sizes import MICRO_TOKENS, ROW_STEP, micro_tokens, rounded_sizes
from veneer.plan.tables import device_named


@given(st.integers(1, 1 << 20))
def test_rounded_sizes_are_close_and_monotonic(n: int) -> None:
    size = rounded_sizes(n)
    assert n <= size <= max(n + ROW_STEP - 1, n * 17 / 16 + 1)
    assert rounded_sizes(size) == size
    assert rounded_sizes(n + 1) >= size


def test_at_most_sixteen_sizes_per_octave() -> None:
    assert len({rounded_sizes(n) for n in range(1025, 2049)}) == 16


CARDS = ("a100-80gb", "h100-80gb", "l40s-48gb", "rtx-4090-24gb")


@given(st.sampled_from(CARDS), st.integers(6, 15), st.sampled_from([None, 0.5, 1.0]))
def test_gpu_micro_batch_reaches_the_roofline_corner(card: str, power: int, code: float | None) -> None:
    """Checks one square weight: operations per byte, and the cost of dequantizing."""
    device, d = device_named(card), 1 << power
    corner = device.flops / device.bandwidth
    n = micro_tokens("cuda", corner, weights=d * d, operations=d * d, values=2 * d, code_bytes=code)
    assert n & (n - 1) == 0
    assert MICRO_TOKENS <= n <= 16384

    def reach(tokens: float) -> float:
        return 1 / (1 / tokens + 2 / d) / corner

    assert reach(n) >= min(3.0, 0.8 * reach(1e12)) or n == 16384
    if code is not None and n < 16384:
        dequantizing, product = (2 + code) * d * d / device.bandwidth, 2 * n * d * d / device.flops
        assert dequantizing <= 0.05 * product
    if n > MICRO_TOKENS and code is None:
        assert reach(n / 2) < min(3.0, 0.8 * reach(1e12)) * 1.0001


def test_cpu_micro_batch_is_fixed() -> None:
    assert micro_tokens("cpu", 50.0, weights=1e8, operations=1e6, values=1e4, code_bytes=0.5) == MICRO_TOKENS == 2048


@pytest.mark.parametrize("rows", [255, 256, 257])
def test_cpu_chunk_has_256_positions(rows: int) -> None:
    hidden, weight = torch.randn(rows, 8), torch.randn(50, 8)
    targets = torch.arange(rows) % 50
    assert torch.equal(token_nll(hidden, weight, targets), token_nll(hidden, weight, targets, 256))
