"""The tables of module names match the real classes, built on the meta device."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from veneer.formats.topology import Family, ModuleRow, ModuleTarget, clip, families, flat, flux1, flux2, sd3, t5

diffusers = pytest.importorskip("diffusers")

UNETS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SD3 = {"qk_norm": "rms_norm", "attention_head_dim": 64}
TRANSFORMERS = {
    "sd3": ("SD3Transformer2DModel", dict(num_layers=24, dual_attention_layers=tuple(range(13)), **SD3)),
    "sd3-large": ("SD3Transformer2DModel", dict(num_layers=38, **SD3)),
    "flux1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
}


def kinds(model: nn.Module, component: str) -> dict[str, str]:
    """Return the kind of every module that has its own parameters, by name."""
    out = {}
    for name, module in model.named_modules():
        own = {key for key, _ in module.named_parameters(recurse=False)}
        if name and own:
            kind = {nn.Linear: "linear", nn.Conv2d: "conv", nn.Embedding: "embedding"}.get(type(module))
            assert kind or "Norm" in type(module).__name__, f"{name}: {type(module)}"
            out[f"{component}.{name}"] = kind or "norm"
    return out


@cache
def denoiser(name: str) -> nn.Module:
    with torch.device("meta"):
        if name in UNETS:
            return diffusers.UNet2DConditionModel(**UNETS[name])
        kind, config = TRANSFORMERS[name]
        return getattr(diffusers, kind)(**config)


def of(family: Family, component: str) -> dict[str, str]:
    return {n: k for n, k in family.modules.items() if n.startswith(f"{component}.")}


def table(rows: list[ModuleRow]) -> dict[str, str]:
    return {row.module: row.kind for row in rows}


@pytest.mark.parametrize("name", list(families()))
def test_denoiser_tables_match_the_real_classes(name: str) -> None:
    family = families()[name]
    assert of(family, family.denoiser) == kinds(denoiser(name), family.denoiser)


def test_variants_differ_only_in_their_counts() -> None:
    with torch.device("meta"):
        schnell = diffusers.FluxTransformer2DModel(guidance_embeds=False)
        klein = diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )
    assert table(list(flux1(19, 38, False))) == kinds(schnell, "transformer")
    assert table(list(flux2(5, 20, False))) == kinds(klein, "transformer")
    assert kinds(klein, "transformer").items() <= families()["flux2"].modules.items()
    assert kinds(schnell, "transformer").items() <= families()["flux1"].modules.items()
    with torch.device("meta"):
        medium = diffusers.SD3Transformer2DModel(num_layers=24, qk_norm=None)
    assert kinds(medium, "transformer").items() <= table(list(sd3(24, ()))).items()


def test_text_encoder_tables_match_the_real_classes() -> None:
    with torch.device("meta"):
        plain = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
        projected = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32))
        t5_xxl = T5EncoderModel(T5Config(num_layers=24, feed_forward_proj="gated-gelu"))
    component = "te" if any(n.startswith("text_model.") for n, _ in plain.named_modules()) else "te.text_model"
    assert table(list(clip("te", 12, False))) == kinds(plain, component)
    assert table(list(clip("te", 32, True))) == kinds(projected, "te")
    assert table(list(t5("te", 24))) == kinds(t5_xxl, "te")


@pytest.mark.parametrize("name", list(families()))
def test_each_row_of_a_weight_has_one_original(name: str) -> None:
    """Each denoiser module is part of exactly one original module.

    The parts cover the original's rows in order, without overlap."""
    family = families()[name]
    homes = Counter(place.module for places in family.originals.values() for place in places)
    homes = Counter({n: c for n, c in homes.items() if n.startswith(f"{family.denoiser}.")})
    assert dict(homes) == dict.fromkeys(of(family, family.denoiser), 1)
    for original, places in family.originals.items():
        if places == (ModuleTarget(places[0].module, None, places[0].swap),):
            continue
        at = 0
        for place in places:
            assert (place.part[0], place.part[2]) == (at, places[0].part[2]), original
            at = place.part[1]
        assert at == places[0].part[2], original


@pytest.mark.parametrize("name", list(families()))
def test_fused_units_match_the_real_shapes(name: str) -> None:
    """At official widths, the row counts of the parts are proportional to their units."""
    family = families()[name]
    shapes = {f"{family.denoiser}.{n}": tuple(p.shape) for n, p in denoiser(name).named_parameters()}
    for places in family.originals.values():
        if len(places) > 1:
            rows = [shapes[f"{p.module}.weight"][0] for p in places]
            units = [p.part[1] - p.part[0] for p in places if p.part]
            assert [r * sum(units) for r in rows] == [u * sum(rows) for u in units]
        for place in places:
            if place.swap:
                assert shapes[f"{place.module}.weight"][0] == 2 * shapes[f"{place.module}.weight"][1]


@pytest.mark.parametrize("name", list(families()))
def test_flattened_names_stay_unique(name: str) -> None:
    family = families()[name]
    assert len({flat(m) for m in family.modules}) == len(family.modules)
    assert len({flat(o) for o in family.originals}) == len(family.originals)


def test_sdxl_module_counts_match_trainers() -> None:
    weights = {n for n, k in of(families()["sdxl"], "unet").items() if k != "norm"}
    attention = {n for n in weights if ".attentions." in n}
    blocks = {n for n in weights if re.search(r"\.(attentions|resnets|downsamplers|upsamplers)\.", n)}
    assert (len(attention), len(blocks), len(weights)) == (722, 788, 794)
    for component, layers in (("text_encoder", 12), ("text_encoder_2", 32)):
        linears = [n for n, k in of(families()["sdxl"], component).items() if k == "linear" and ".encoder." in n]
        assert len(linears) == layers * 6


def test_flux_module_counts_match_trainers() -> None:
    family = families()["flux1"]
    fused = {
        o: p
        for o, p in family.originals.items()
        if re.match(r"(double|single)_blocks\.", o) and family.modules[p[0].module] == "linear"
    }
    assert len(fused) == 19 * 10 + 38 * 3 == 304
    assert sum(len(places) for places in fused.values()) == 494
    assert fused["single_blocks.37.linear1"][3] == ModuleTarget(
        "transformer.single_transformer_blocks.37.proj_mlp", (3, 7, 7)
    )
    assert family.originals["final_layer.adaLN_modulation.1"] == (
        ModuleTarget("transformer.norm_out.linear", swap=True),
    )
