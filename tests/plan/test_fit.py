"""Tokens per micro-batch: as many as the matrix products need and memory allows."""

from __future__ import annotations

import pytest

from veneer.ops.step_sizes import MICRO_TOKENS
from veneer.plan.fit import fitting_micro_tokens, memory_after_base
from veneer.plan.memory import Load, text_memory
from veneer.plan.shape import text_shape
from veneer.plan.tables import base_config, device_named


@pytest.mark.parametrize(
    ("base", "quantize", "rank", "tokens"),
    [
        ("meta-llama/Llama-3.1-8B", None, 16, 2048),  # the matrix products need 1,233
        ("meta-llama/Llama-3.1-8B", "nf4", 16, 8192),  # the matrix products need 7,375
        (
            "meta-llama/Llama-3.1-70B",
            "nf4",
            16,
            2048,
        ),  # the matrix products need 8,192, but neither 8,192 nor 4,096 fits in memory
    ],
)
def test_micro_tokens_fit_products_and_memory(base: str, quantize: str | None, rank: int, tokens: int) -> None:
    shape, device = text_shape(base_config(base)), device_named("h100-80gb")

    def load(n: int) -> Load:
        return Load((512,) * (n // 512), micros=1024 * 512 // n, rank=rank, quantize=quantize)

    room = memory_after_base(shape, device, "bfloat16", quantize)
    assert fitting_micro_tokens(shape, device, quantize, room, load) == tokens
    assert tokens == MICRO_TOKENS or text_memory(shape, load(tokens), device).beyond_base <= 0.9 * room
    assert fitting_micro_tokens(shape, device, quantize, 1 << 50, load) == (8192 if quantize else 2048)
    if fitting_micro_tokens(shape, device, quantize, 1 << 50, load) > tokens:
        assert text_memory(shape, load(2 * tokens), device).beyond_base > 0.9 * room
    assert fitting_micro_tokens(shape, device, quantize, 0, load) == MICRO_TOKENS
