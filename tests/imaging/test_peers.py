"""Mixes and block strengths equal those of diffusers and PEFT (load_lora_weights, set_adapters)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.image_twins import diffusers_pipeline, levels, picture, random_adapter
from tests.tiny_image_base import tiny_image_base
from veneer.core.adapter import Adapter
from veneer.formats.convert import write
from veneer.imaging.adapters import ImagePipeline, parse_use
from veneer.imaging.generate import ImageRequest, Options, generate
from veneer.models.image.base import load_image
from veneer.models.loading import errors_only

pytestmark = pytest.mark.peers


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT's, for the second adapter
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux1", "sd3"])
def test_mix_equals_set_adapters(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = tiny_image_base(tmp_path, family)
    base, pipe = load_image(str(place)), diffusers_pipeline(place)
    for i, name in enumerate(("brand", "look")):
        held = random_adapter(base.model, i + 1)
        # diffusers loads no LoRA for this text encoder
        second = {"flux1": "text_encoder_2.", "sd3": "text_encoder_3."}.get(family, "no")
        own = Adapter({n: p for n, p in held.pairs.items() if not n.startswith(second)})
        write(own, f"{name}.safetensors", to="diffusers", family=family)
        with errors_only():
            pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
    with ImagePipeline(base) as mixer:
        for strengths in ((0.8, -0.5), (1.0, 0.0)):
            pipe.set_adapters(["brand", "look"], list(strengths))
            uses = tuple(parse_use((f"{n}.safetensors", s)) for n, s in zip(("brand", "look"), strengths, strict=True))
            (found,) = generate(mixer, [ImageRequest("a cat", seed=1, uses=uses)], Options(steps=4, guidance=3.0))
            assert levels(found.image, picture(pipe, "a cat", 1, guidance_scale=3.0)) <= 1


def test_block_strengths_equal_set_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers attention only, because diffusers ignores block strengths elsewhere."""
    monkeypatch.chdir(tmp_path)
    place = tiny_image_base(tmp_path, "sdxl")
    base, pipe = load_image(str(place)), diffusers_pipeline(place)
    held = random_adapter(base.model, 1)
    own = Adapter({n: p for n, p in held.pairs.items() if n.startswith("text_encoder") or ".attn" in n})
    write(own, "brand.safetensors", to="diffusers", family="sdxl")
    with errors_only():
        pipe.load_lora_weights(str(tmp_path), weight_name="brand.safetensors", adapter_name="brand")
        scales: dict[str, Any] = {"text_encoder": 0.3, "text_encoder_2": 0.3}
        scales["unet"] = {"down": 0.5, "mid": 1.5, "up": 0.2}
        pipe.set_adapters(["brand"], [scales])
    use = parse_use("brand.safetensors@text=0.3,down=0.5,mid=1.5,up=0.2")
    with ImagePipeline(base) as mixer:
        (found,) = generate(mixer, [ImageRequest("a cat", seed=1, uses=(use,))], Options(steps=4, guidance=3.0))
    assert levels(found.image, picture(pipe, "a cat", 1, guidance_scale=3.0)) <= 1
