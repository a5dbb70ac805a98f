"""Selection of the image family by names, shapes, depth and metadata."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.errors import AdapterError
from veneer.formats.names import choose_family
from veneer.formats.read import read, read_state_dict
from veneer.formats.reading import Reading
from veneer.formats.topology import families

R = 2
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def pairs(shapes: dict[str, tuple[int, int]], kind: str = "peft") -> dict[str, Tensor]:
    """Return pairs of zeros, because only names and shapes matter here."""
    a, b = {"peft": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}[kind]
    out = {}
    for name, (rows, into) in shapes.items():
        out |= {f"{name}.{a}.weight": torch.zeros(R, into), f"{name}.{b}.weight": torch.zeros(rows, R)}
        if kind == "kohya":
            out[f"{name}.alpha"] = torch.tensor(1.0)
    return out


def attention(blocks: range, width: int, prefix: str = "transformer.transformer_blocks.{}.attn.") -> dict:
    return {prefix.format(i) + leaf: (width, width) for i in blocks for leaf in ATTENTION}


def look(tensors: dict[str, Tensor], **metadata: str) -> Reading:
    return read_state_dict(tensors, metadata)


def unknown(found: Reading, *near: str) -> None:
    assert found.family is None
    told = next(r for r in found.reasons if r.startswith("unknown family; shapes: "))
    assert all(n in told for n in near)
    assert found.adapter.card.kind == "image"


def test_hunyuan_video_is_not_qwen_image() -> None:
    """The width 3,072 is that of FLUX.1 and Qwen-Image, but neither has 20 such blocks."""
    shapes = attention(range(20), 3072)
    for i in range(20):
        shapes |= {f"transformer.transformer_blocks.{i}.attn.add_{p}_proj": (3072, 3072) for p in "qkv"}
    unknown(look(pairs(shapes)), "near: hunyuan-video")
    assert look(pairs(attention(range(60), 3072))).family == "qwen-image"


def test_other_widths_and_depths_are_not_sd3_large() -> None:
    unknown(look(pairs(attention(range(30), 6144))), "sd3-large")
    assert look(pairs(attention(range(38), 2432))).family == "sd3-large"


def test_wan_and_ltx_are_not_read_as_text_adapters() -> None:
    """Both are read as image adapters of an unknown family, and keep their names."""
    wan = {f"transformer.blocks.{i}.attn{k}.{p}": (1536, 1536) for i in range(30) for k in "12" for p in ATTENTION}
    ltx = {f"transformer.transformer_blocks.{i}.attn1.{p}": (2048, 2048) for i in range(28) for p in ATTENTION}
    for shapes in (wan, ltx):
        found = look(pairs(shapes))
        unknown(found)
        assert set(found.adapter.pairs) == set(shapes)


def folder(path: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    path.mkdir()
    tensors = pairs({f"base_model.model.{n}": s for n, s in shapes.items()})
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": sorted(set(shapes))}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("context", "family"), [(768, "sd15"), (1024, "sd2")])
def test_unet_peft_folder_is_recognized_by_context_width(tmp_path, context, family) -> None:
    at = "down_blocks.0.attentions.0.transformer_blocks.0"
    shapes = {f"{at}.attn1.to_q": (320, 320), f"{at}.attn2.to_k": (320, context), f"{at}.attn2.to_v": (320, context)}
    assert read(folder(tmp_path / "a", shapes)).family == family


def test_indistinguishable_families_are_read_without_a_choice(tmp_path) -> None:
    shapes = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640)}
    found = read(folder(tmp_path / "a", shapes))
    told = next(r for r in found.reasons if r.startswith("unknown family; shapes: "))
    assert "sd15" in told
    assert "sd2" in told
    assert set(found.adapter.pairs) == {f"unet.{n}" for n in shapes}
    assert read(tmp_path / "a", family="sd2").family == "sd2"  # the base determines the family


LUMINA = {"attention.qkv": (2304 + 768 + 768, 2304), "attention.out": (2304, 2304), "feed_forward.w1": (9216, 2304)}
STRANGERS = {
    "lumina 2": {f"layers.{i}.{n}": s for i in range(26) for n, s in LUMINA.items()},
    "lumina 2, qkv": {f"layers.{i}.attention.qkv": (3840, 2304) for i in range(26)},
    "lumina 2, mlp": {f"layers.{i}.feed_forward.w1": (9216, 2304) for i in range(26)},
    "lumina 2, refiner": {f"noise_refiner.{i}.feed_forward.w1": (9216, 2304) for i in range(2)},
    "hunyuan, single": {f"single_blocks.{i}.linear1": (21504, 3072) for i in range(40)},
    "hunyuan, double": {f"double_blocks.{i}.img_attn.qkv": (9216, 3072) for i in range(20)},
}


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("kind", ["kohya", "peft"])
@pytest.mark.parametrize("case", STRANGERS)
def test_unknown_widths_and_depths_match_no_family(case: str, kind: str, partial: bool) -> None:
    name = lambda own: "lora_unet_" + own.replace(".", "_") if kind == "kohya" else f"diffusion_model.{own}"  # noqa: E731
    tensors = pairs({name(n): s for n, s in STRANGERS[case].items()}, kind)
    for claim in ({}, {"modelspec.architecture": "z-image"}, {"modelspec.architecture": "flux2"}):
        with pytest.raises(AdapterError, match="unknown family; near: "):
            read_state_dict(tensors, claim, allow_partial=partial)


SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": "rms_norm"}
SD3_LARGE = SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
KLEIN_9B = {"joint_attention_dim": 7680, "guidance_embeds": False, "num_single_layers": 24, "num_attention_heads": 32}
KLEIN_4B = KLEIN_9B | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
SDXL = {
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
}
OFFICIAL = {
    "FLUX.1": ("flux1", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.2 dev": ("flux2", "Flux2Transformer2DModel", {}),
    "FLUX.2 klein 9B": ("flux2", "Flux2Transformer2DModel", KLEIN_9B),
    "FLUX.2 klein 4B": ("flux2", "Flux2Transformer2DModel", KLEIN_4B),
    "Qwen-Image": ("qwen-image", "QwenImageTransformer2DModel", {}),
    "Z-Image": ("z-image", "ZImageTransformer2DModel", {}),
    "SD 3.5 medium": ("sd3", "SD3Transformer2DModel", SD3 | {"dual_attention_layers": tuple(range(13))}),
    "SD 3.5 large": ("sd3-large", "SD3Transformer2DModel", SD3_LARGE),
    "SD 1.5": ("sd15", "UNet2DConditionModel", {"cross_attention_dim": 768}),
    "SD 2": ("sd2", "UNet2DConditionModel", {"cross_attention_dim": 1024, "use_linear_projection": True}),
    "SDXL": ("sdxl", "UNet2DConditionModel", SDXL),
}
"""Official models: family, class in diffusers, and settings that differ from the class's defaults."""


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_widths_fit_every_block_group(case: str) -> None:
    """Tests all linear layers at once, and each group of blocks separately.

    Both are tested with diffusers' names and with original names."""
    diffusers = pytest.importorskip("diffusers")
    name, kind, settings = OFFICIAL[case]
    family = families()[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**settings)
    shapes = {
        f"{family.denoiser}.{n}": (m.out_features, m.in_features)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert set(shapes) <= set(family.modules)
    fused = {}
    for original, places in family.originals.items():
        if all(p.module in shapes for p in places):
            fused[original] = (sum(shapes[p.module][0] for p in places), shapes[places[0].module][1])
    for own in (shapes, fused):
        found = choose_family(own)
        assert found.family is family, found.reasons
        for group in {re.split(r"\.\d+\.", n)[0] for n in own}:
            found = choose_family({n: s for n, s in own.items() if n.startswith(group)}, target_family=name)
            assert found.family is family, (group, found.reasons)


# -- layouts of known families -----------------------------------------------------------------------------------------


def random_pairs(
    names: list[str], shape: tuple[int, int], kind: str = "kohya", alpha: float = 1.0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    out = pairs(dict.fromkeys(names, shape), kind)
    out = {k: torch.randn(t.shape, generator=g) if t.ndim == 2 else torch.tensor(alpha) for k, t in out.items()}
    return out


def delta(adapter: Adapter, name: str) -> Tensor:
    pair = adapter.pairs[name]
    return pair.scale * pair.B.double() @ pair.A.double()


def by_hand(tensors: dict[str, Tensor], name: str) -> Tensor:
    up, down = (tensors[f"{name}.lora_{k}.weight"].double() for k in ("up", "down"))
    return float(tensors[f"{name}.alpha"]) / len(down) * up @ down


def test_onetrainer_splits_of_fused_projections_are_read() -> None:
    """For example, `transformer.double_blocks.0.img_attn.qkv.0` is a pair for q only."""
    places = {}
    for i in range(19):
        for side, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            for n, name in enumerate(names):
                places[f"double_blocks.{i}.{side}_attn.qkv.{n}"] = f"transformer_blocks.{i}.attn.{name}"
    for i in range(38):
        for n, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
            places[f"single_blocks.{i}.linear1.{n}"] = f"single_transformer_blocks.{i}.{name}"
    for start in ("transformer.", "lora_transformer_", "lora_unet_"):
        name = lambda own: start + (own if start.endswith(".") else own.replace(".", "_"))  # noqa: B023, E731
        tensors = random_pairs([name(own) for own in places], (8, 8))
        found = look(tensors, ss_base_model_version="flux1")
        assert found.family == "flux1"
        assert len(found.adapter.pairs) == len(places)
        for own, module in places.items():
            got = delta(found.adapter, f"transformer.{module}")
            torch.testing.assert_close(got, by_hand(tensors, name(own)), rtol=1e-12, atol=1e-12)


def test_uso_names_cover_qkv_rows_only() -> None:
    names = [f"diffusion_model.single_blocks.{i}.linear1_qkv" for i in range(38)]
    tensors = random_pairs(names, (24, 8))
    found = look(tensors)
    assert found.family == "flux1"
    for i, name in enumerate(names):
        whole = by_hand(tensors, name)
        for n, leaf in enumerate(("to_q", "to_k", "to_v")):
            got = delta(found.adapter, f"transformer.single_transformer_blocks.{i}.attn.{leaf}")
            torch.testing.assert_close(got, whole[8 * n : 8 * (n + 1)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", ["lora_unet_", ""])
def test_flux_1_lite_has_eight_double_blocks(start) -> None:
    shapes = {f"double_blocks.{i}.img_attn.qkv": (3 * 3072, 3072) for i in range(8)}
    shapes |= {f"single_blocks.{i}.linear2": (3072, 5 * 3072) for i in range(38)}
    name = lambda own: start + (own.replace(".", "_") if start else own)  # noqa: E731
    found = look(pairs({name(own): shape for own, shape in shapes.items()}, "kohya" if start else "peft"))
    assert found.family == "flux1"
    assert len(found.adapter.pairs) == 8 * 3 + 38


OTHER_MODELS = {
    "LTX-Video 13B": ("LTXVideoTransformer3DModel", {"num_layers": 48, "attention_head_dim": 128}),
    "Cosmos-Predict2 14B": ("CosmosTransformer3DModel", {"num_layers": 36, "num_attention_heads": 40}),
    "CogVideoX-5B": ("CogVideoXTransformer3DModel", {"num_layers": 42, "num_attention_heads": 48}),
    "Ideogram 4": ("Ideogram4Transformer2DModel", {}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
}


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("case", OTHER_MODELS)
def test_unknown_diffusers_models_keep_their_names(case: str, some: bool) -> None:
    """Tests all linear layers of a model, or only q, k and v of its attention (`some`)."""
    diffusers = pytest.importorskip("diffusers")
    kind, settings = OTHER_MODELS[case]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**settings)
    linear = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    shapes = {f"transformer.{n}": s for n, s in linear.items() if not some or n.endswith(("to_q", "to_k", "to_v"))}
    found = look(pairs(shapes))
    assert found.family is None
    assert set(found.adapter.pairs) == set(shapes)
    assert found.adapter.card.kind == "image"
