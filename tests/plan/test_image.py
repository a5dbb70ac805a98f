"""The activations that a denoiser saves equal the plan's count, for the built-in bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import ConfigError, TargetError
from veneer.models.builtin import packaged_folder
from veneer.models.image.families import TARGET_WORDS
from veneer.models.image.fast import fast_denoiser
from veneer.models.image.memory import measured_activations
from veneer.ops.cpu import compiled
from veneer.plan.image import ImageLoad, image_counts, is_denoiser
from veneer.plan.tables import base_config

TEXT = 32
PICTURES = 2


def given(name: str, size: int) -> dict[str, Any]:
    """Return inputs for a forward pass, with the widths of the base's text encoders."""
    n = PICTURES
    if name == "catalogue-sdxl":
        cond = {"text_embeds": torch.randn(n, 96).bfloat16(), "time_ids": torch.zeros(n, 6).bfloat16()}
        x = torch.randn(n, 16, size // 8, size // 8).bfloat16()
        text = torch.randn(n, TEXT, 192).bfloat16()
        return {"sample": x, "timestep": torch.ones(n), "encoder_hidden_states": text, "added_cond_kwargs": cond}
    places = (size // 16) ** 2
    return {
        "hidden_states": torch.randn(n, places, 64).bfloat16(),
        "timestep": torch.rand(n).bfloat16(),
        "encoder_hidden_states": torch.randn(n, TEXT, 128).bfloat16(),
        "pooled_projections": torch.randn(n, 96).bfloat16(),
        "img_ids": torch.zeros(places, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.ones(n).bfloat16(),
    }


def denoiser(name: str) -> tuple[Any, dict[str, Any]]:
    import diffusers

    kind, part = ("UNet2DConditionModel", "unet") if "sdxl" in name else ("FluxTransformer2DModel", "transformer")
    folder = packaged_folder() / name / part
    model = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.bfloat16).train().requires_grad_(False)
    return model, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def check_activations(model: Any, config: dict[str, Any], load: ImageLoad, forward: Callable[[], torch.Tensor]) -> None:
    """Compare autograd's saved bytes and the number of trained parameters with the plan's counts."""
    spec = LoraSpec(rank=16, targets=(TARGET_WORDS[str(load.targets)],))
    with attach(model) as attachment:
        attachment.add("a", create(model, spec, seed=0), trainable=True)
        attachment.use("a")
        pairs = attachment.parameters("a").values()
        with fast_denoiser(model):
            saved = measured_activations(forward, [*model.parameters(), *pairs])
        trainable = sum(p.numel() for p in pairs)
    counts = image_counts(config, load)
    assert counts.trainable == trainable
    assert saved == pytest.approx(2 * counts.saved, rel=0.2)


@pytest.mark.skipif(
    not compiled.has("attend", "attend_backward"), reason="counted for the compiled attention (AVX512-BF16)"
)
@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("name", ["catalogue-sdxl", "catalogue-flux"])
@pytest.mark.parametrize("word", ["attention", "attention+ff+conv"])
def test_kept_activations_equal_the_count(word: str, name: str, size: int) -> None:
    torch.manual_seed(0)
    model, config = denoiser(name)
    inputs, load = given(name, size), ImageLoad(PICTURES, size, size, text_tokens=TEXT, targets=word)
    check_activations(model, config, load, lambda: model(**inputs, return_dict=False)[0].float().sum())


LARGER: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "UNet2DConditionModel": (
        {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1, "cross_attention_dim": 64,
         "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "attention_head_dim": 8,
         "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "norm_num_groups": 8, "in_channels": 4},
        (64, 4),
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 32, "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 8,
         "joint_attention_dim": 64, "caption_projection_dim": 256, "pooled_projection_dim": 64,
         "pos_embed_max_size": 32, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm", "out_channels": 16,
         "in_channels": 16},
        (64, 16),
    ),
    "ZImageTransformer2DModel": (
        {"dim": 384, "n_layers": 4, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 64,
         "axes_dims": [32, 32, 32], "in_channels": 16},
        (64, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("word", ["attention", "attention+ff"])
@pytest.mark.parametrize("kind", LARGER)
def test_kept_activations_of_diffusers_attention_equal_the_count(kind: str, word: str) -> None:
    import diffusers

    torch.manual_seed(0)
    config, (text, channels) = LARGER[kind]
    model = getattr(diffusers, kind)(**config).to(torch.bfloat16).requires_grad_(False)
    n, side, words = PICTURES, 32, 64
    x, t = torch.randn(n, channels, side, side).bfloat16(), torch.full((n,), 0.5)
    embeds = torch.randn(n, words, text).bfloat16()

    def forward() -> torch.Tensor:
        if kind.startswith("ZImage"):
            made = torch.stack(model(list(x[:, :, None].unbind()), t, list(embeds.unbind()), return_dict=False)[0])
        elif kind.startswith("UNet"):
            made = model(x, t, embeds, return_dict=False)[0]
        else:
            pooled = torch.randn(n, 64).bfloat16()
            made = model(x, embeds, pooled, t * 1000, return_dict=False)[0]
        return made.float().sum()

    load = ImageLoad(PICTURES, 8 * side, 8 * side, text_tokens=words, targets=word)
    check_activations(model, {**config, "_class_name": kind}, load, forward)


def test_unknown_denoisers_and_targets_are_refused() -> None:
    assert not is_denoiser({"_class_name": "SanaTransformer2DModel"})
    with pytest.raises(ConfigError, match="does not know the denoiser 'SanaTransformer2DModel'"):
        image_counts({"_class_name": "SanaTransformer2DModel"}, ImageLoad())
    with pytest.raises(TargetError, match="atention"):
        image_counts(base_config("sdxl"), ImageLoad(targets="atention"))


@pytest.mark.parametrize(
    ("base", "before", "error"),
    [
        ("flux.1-dev", 3, "takes at most 1 picture per edit, but the plan has 3"),
        ("flux.1-schnell", 1, "this base edits no pictures"),
        ("black-forest-labs/FLUX.2-klein-4B", 5, "at most 4 pictures per edit"),
        ("sdxl", 1, "this base edits no pictures"),
    ],
)
def test_too_many_source_pictures_are_refused(base: str, before: int, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        image_counts(base_config(base), ImageLoad(before=before))
