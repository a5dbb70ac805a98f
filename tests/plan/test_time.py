"""The plan's time of a step is within 20% of steps that were measured on an otherwise idle machine."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.core.adapter import LoraSpec
from veneer.ops.profile import Profile, use_profile
from veneer.plan.memory import Load, text_counts
from veneer.plan.shape import text_shape
from veneer.plan.tables import cpu_device
from veneer.plan.time import rates_of, run_work

SMOLLM2 = text_shape(
    {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 576, "intermediate_size": 1536,
     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
)  # fmt: skip


def profile_of(bandwidth: float, **gflops: float) -> Profile:
    return Profile("", "", 2, "", "", {dtype: {"1024x1024x1024": rate} for dtype, rate in gflops.items()}, bandwidth, 0)


EPYC = profile_of(59.7, float32=195.2, bfloat16=843.9)
"""Two cores of an AMD EPYC (Zen 5)."""
XEON = profile_of(30.0, float32=311.0, bfloat16=167.0)
"""Two cores of an Intel Xeon with AVX512-BF16 and without AMX, on which float32 is faster."""


def seconds(
    profile: Profile, lengths: tuple[int, ...], dtype: str = "bfloat16", *, dora: bool = False, **load: Any
) -> float:
    planned = Load(lengths, 0.25, dtype=dtype, spec=LoraSpec(rank=16, dora=dora), **load)
    with use_profile(profile):
        device = cpu_device()
        return rates_of(device, dtype).seconds(run_work(text_counts(SMOLLM2, planned, device), planned))


@pytest.mark.parametrize(
    ("measured", "lengths", "more"),
    [
        (0.187, (128,), {}),
        (1.834, (512,) * 4, {}),
        (1.793, (256,) * 8, {}),
        (2.420, (2048,), {}),
        (0.252, (128,), {"dora": True}),
        (1.975, (512,) * 4, {"dora": True}),
        (2.542, (512,) * 4, {"checkpointing": True}),
        (3.680, (2048,), {"checkpointing": True}),
    ],
)
def test_measured_steps_on_an_epyc(measured: float, lengths: tuple[int, ...], more: dict[str, Any]) -> None:
    assert seconds(EPYC, lengths, **more) == pytest.approx(measured, rel=0.2)


def test_measured_steps_on_a_xeon_with_slow_bfloat16() -> None:
    """277 tokens/s in bfloat16 and 421 in float32; a plan with the rate of another dtype would be off by half."""
    assert seconds(XEON, (512,) * 4, "float32") == pytest.approx(2048 / 421, rel=0.2)
    slow = profile_of(30.0, float32=167.0, bfloat16=167.0)  # products of bfloat16 weights in bfloat16
    assert seconds(slow, (512,) * 4) == pytest.approx(2048 / 277, rel=0.2)
    assert seconds(XEON, (512,) * 4) < seconds(XEON, (512,) * 4, "float32"), "float32 products read 16-bit weights"
