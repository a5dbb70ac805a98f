"""The plan's time of a step is within 20% of steps that were measured on an otherwise idle machine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from veneer.core.adapter import LoraSpec
from veneer.models.builtin import packaged_folder
from veneer.ops.profile import Profile, use_profile
from veneer.plan.image import ImageLoad, image_counts
from veneer.plan.memory import Load, text_counts
from veneer.plan.shape import TextShape, text_shape
from veneer.plan.tables import cpu_device
from veneer.plan.time import rates_of, run_work


def llama(vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, kv: int) -> TextShape:
    return text_shape(
        {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": hidden, "intermediate_size": mlp,
         "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary}
    )  # fmt: skip


SMOLLM2, SMALL = llama(49152, 576, 1536, 30, 9, 3), llama(8192, 256, 768, 8, 4, 2)
MIDDLE, WIDE = llama(32000, 512, 1408, 12, 8, 4), llama(32000, 1024, 2816, 6, 16, 4)


def profile_of(bandwidth: float, **gflops: float) -> Profile:
    return Profile("", "", 2, "", "", {dtype: {"1024x1024x1024": rate} for dtype, rate in gflops.items()}, bandwidth, 0)


EPYC = profile_of(50.0, float32=455.0, bfloat16=900.0, int8=1800.0)
"""Two cores of an AMD EPYC (Zen 5), on average over one hour: bfloat16 780 to 945, bandwidth 42 to 65."""
XEON = profile_of(30.0, float32=311.0, bfloat16=167.0)
"""Two cores of an Intel Xeon with AVX512-BF16 and without AMX, on which float32 is faster. Its bandwidth is assumed."""


def seconds(
    profile: Profile, lengths: tuple[int, ...], dtype: str = "bfloat16", base: TextShape = SMOLLM2, **more: Any
) -> float:
    form = {key: more.pop(key) for key in ("dora", "dropout", "targets", "rank") if key in more}
    planned = Load(lengths, more.pop("trained", 0.25), dtype=dtype, spec=LoraSpec(**{"rank": 16, **form}), **more)
    with use_profile(profile):
        device = cpu_device()
        return rates_of(device, dtype).seconds(run_work(text_counts(base, planned, device), planned))


@pytest.mark.parametrize(
    ("measured", "base", "lengths", "more"),
    [
        (0.211, SMOLLM2, (128,), {}),
        (1.636, SMOLLM2, (512,) * 4, {}),
        (1.524, SMOLLM2, (512,) * 4, {"targets": ("q_proj", "v_proj")}),
        (2.433, SMOLLM2, (512,) * 4, {"targets": ("q_proj", "v_proj"), "checkpointing": True}),
        (0.541, SMOLLM2, (128,) * 4, {"rank": 64}),
        (0.594, SMOLLM2, (256,) * 2, {"rank": 32, "trained": 1.0}),
        (1.655, SMOLLM2, (256,) * 4, {"dora": True, "dropout": 0.05}),
        (1.813, SMOLLM2, (512,) * 4, {"quantize": "nf4"}),
        (1.222, SMOLLM2, (512,) * 4, {"compute": "int8"}),
        (3.466, SMOLLM2, (2048,), {"checkpointing": True}),
        (0.025, SMALL, (64,) * 2, {}),
        (0.475, SMALL, (2048,) * 2, {"trained": 1.0}),
        (0.601, MIDDLE, (512,) * 4, {}),
        (0.457, MIDDLE, (512,) * 4, {"compute": "int8"}),
        (0.611, MIDDLE, (512,) * 2, {"dtype": "float32"}),
        (0.422, WIDE, (256,) * 4, {}),
        (0.941, WIDE, (1024,) * 2, {"targets": ("q_proj", "v_proj"), "rank": 32}),
    ],
)
def test_measured_text_steps_on_an_epyc(
    measured: float, base: TextShape, lengths: tuple[int, ...], more: dict[str, Any]
) -> None:
    assert seconds(EPYC, lengths, base=base, **more) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("measured", "base", "pictures", "size", "checkpointing"),
    [
        (0.059, "catalogue-sdxl/unet", 4, 128, False),
        (0.205, "catalogue-sdxl/unet", 16, 256, False),
        (0.318, "catalogue-sdxl/unet", 16, 256, True),
        (0.030, "catalogue-flux/transformer", 4, 128, False),
        (0.868, "catalogue-flux/transformer", 64, 256, False),
        (0.645, "catalogue-flux/transformer", 32, 256, True),
    ],
)
def test_measured_image_steps_on_an_epyc(
    measured: float, base: str, pictures: int, size: int, checkpointing: bool
) -> None:
    config = json.loads((packaged_folder() / base / "config.json").read_text(encoding="utf-8"))
    load = ImageLoad(pictures, size, size, text_tokens=32, checkpointing=checkpointing)
    with use_profile(EPYC):
        rates = rates_of(cpu_device(), kind="image")
    found = rates.seconds(run_work(image_counts({**config, "vae_scale": 8}, load), load))
    assert found == pytest.approx(measured, rel=0.2)


def test_measured_steps_on_a_xeon_with_slow_bfloat16() -> None:
    """277 tokens/s in bfloat16 and 421 in float32; a plan with the rate of another dtype would be off by half."""
    assert seconds(XEON, (512,) * 4, "float32") == pytest.approx(2048 / 421, rel=0.2)
    slow = profile_of(30.0, float32=167.0, bfloat16=167.0)  # products of bfloat16 weights in bfloat16
    assert seconds(slow, (512,) * 4) == pytest.approx(2048 / 277, rel=0.2)
    assert seconds(XEON, (512,) * 4) < seconds(XEON, (512,) * 4, "float32"), "float32 products read 16-bit weights"
