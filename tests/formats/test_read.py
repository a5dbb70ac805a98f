"""Files of every layout are read as the ΔW that their tensors define."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from tests.formats.layouts import INTO, UNIT, Layout, assert_same, changes, denoiser, dotted, encoders, kohya, shape_of
from veneer.errors import AdapterError
from veneer.formats.gguf import write_gguf
from veneer.formats.keys import FORMATS, detect_format
from veneer.formats.names import lookup
from veneer.formats.read import read, read_state_dict
from veneer.formats.reading import Reading
from veneer.formats.topology import ModuleTarget, families, flat

CLIP = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def reading(layout: Layout, **options: bool) -> Reading:
    return read_state_dict(layout.tensors, layout.metadata, where="made here", **options)


def check(layout: Layout, fmt: str, family: str) -> Reading:
    found = reading(layout)
    assert (found.format, found.family) == (fmt, family), found.reasons
    assert_same(changes(found.adapter), layout.want)
    assert sorted(k for keys in {tuple(v) for v in found.used.values()} for k in keys) == sorted(layout.tensors)
    assert (found.unused, found.unpaired) == ([], [])
    return found


# -- every module of every family, in flat names ---------------------------------------------------------------------

ALL_FLAT: dict[str, tuple[str, bool, dict[str, str]]] = {
    "sd15 in diffusers' names": ("sd15", False, {"text_encoder": "lora_te"}),
    "sd15 in LDM's names": ("sd15", True, {"text_encoder": "lora_te"}),
    "sdxl in sgm's names": ("sdxl", True, CLIP),
    "sdxl in diffusers' names": ("sdxl", False, CLIP),
    "sd3": ("sd3", True, {**CLIP, "text_encoder_3": "lora_te3"}),
    "sd3-large": ("sd3-large", True, CLIP),
    "flux1 by kohya, te3 is T5": ("flux1", True, {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"}),
    "flux1 with te2 as T5": ("flux1", True, CLIP),
    "flux2": ("flux2", True, {}),
    "qwen-image": ("qwen-image", False, {}),
    "z-image fused": ("z-image", True, {}),
    "z-image split": ("z-image", False, {}),
}


@pytest.mark.parametrize("case", ALL_FLAT)
def test_flat_names_of_every_module_are_read(case: str) -> None:
    name, original, te = ALL_FLAT[case]
    found = check(kohya(name, original=original, te=te), "kohya", name)
    family = families()[name]
    components = {family.denoiser, *te}
    linears = {m for m, k in family.modules.items() if k in ("linear", "conv") and m.partition(".")[0] in components}
    assert set(found.used) == linears


def test_sd2_is_distinguished_from_sd1() -> None:
    layout = Layout()
    for i in range(2):
        name = f"unet.down_blocks.0.attentions.{i}.transformer_blocks.0.attn2.to_k"
        layout.lora(f"lora_unet_{flat(name.removeprefix('unet.'))}", (ModuleTarget(name),), (8, 1024), alpha=1.0)
    check(layout, "kohya", "sd2")
    narrow = kohya("sd2", original=False, only="attn1", te={"text_encoder": "lora_te"})
    check(narrow, "kohya", "sd2")  # the 23 layers of the text encoder identify SD 2
    plain = kohya("sd2", original=False, only="attn1")
    assert reading(plain).family == "sd15"
    plain.metadata["ss_v2"] = "True"
    assert reading(plain).family == "sd2"


def test_sdxl_file_can_mix_both_naming_styles() -> None:
    """diffusers silently reads only 522 of 722 modules of such a file."""
    family = families()["sdxl"]
    layout = Layout()
    for i, (original, places) in enumerate(denoiser(family, original=True)):
        text = original if i % 2 else places[0].module.removeprefix("unet.")
        layout.lora(f"lora_unet_{flat(text)}", places, shape_of(family, places), alpha=1.0)
    assert len(check(layout, "kohya", "sdxl").used) == 794


def test_family_tie_is_reported_with_the_reason() -> None:
    """Attention in joint blocks has equal names in FLUX.1, SD3 and Qwen-Image.

    The shapes and the depth, 24 blocks, identify SD3."""
    layout = dotted("sd3", "transformer.", original=False, naming="peft", only=("attn.to_q", "attn.to_out"))
    found = check(layout, "diffusers", "sd3")
    assert any("sd3-large" in r and "qwen-image" in r for r in found.reasons)
    assert any("by its shapes and depth" in r for r in found.reasons)


# -- dotted names ----------------------------------------------------------------------------------------------------

DOTTED = {  # prefix, whether names are the original's, naming, alpha, expected format, expected family
    "diffusers FLUX.1": ("transformer.", False, "peft", None, "diffusers", "flux1"),
    "TheLastBen": ("transformer.", False, "peft", 4.0, "diffusers", "flux1"),
    "ai-toolkit": ("diffusion_model.", True, "peft", None, "comfyui", "flux1"),
    "ComfyUI": ("diffusion_model.", True, "kohya", 1.0, "comfyui", "flux1"),
    "ComfyUI in diffusers' names": ("diffusion_model.", False, "peft", None, "comfyui", "qwen-image"),
    "FLUX.2": ("diffusion_model.", True, "peft", None, "comfyui", "flux2"),
    "FLUX.2 by diffusers": ("transformer.", False, "peft", None, "diffusers", "flux2"),
    "Z-Image": ("diffusion_model.", True, "peft", None, "comfyui", "z-image"),
    "Z-Image by diffusers": ("transformer.", False, "default", None, "diffusers", "z-image"),
    "Qwen-Image without a prefix": ("", False, "kohya", 2.0, "plain", "qwen-image"),
    "bare PEFT of BFL's names": ("base_model.model.", True, "peft", None, "peft", "flux1"),
    "bare PEFT of diffusers' names": ("base_model.model.", False, "peft", None, "peft", "flux1"),
    "unprefixed PEFT": ("", False, "peft", None, "diffusers", "sdxl"),
    "lora.down": ("unet.", False, "dotted", None, "diffusers-old", "sd15"),
    "model.diffusion_model": ("model.diffusion_model.", True, "kohya", 1.0, "comfyui", "sdxl"),
}


@pytest.mark.parametrize("case", DOTTED)
def test_dotted_names(case: str) -> None:
    prefix, original, naming, alpha, fmt, family = DOTTED[case]
    attention = ("attn.", "attn1.", "attn2.") if family in ("sd15", "sdxl") and not original else ("",)
    check(dotted(family, prefix, original=original, naming=naming, alpha=alpha, only=attention), fmt, family)


def test_comfyui_text_encoders() -> None:
    family, layout = families()["flux1"], dotted("flux1", "diffusion_model.", original=True, naming="kohya", alpha=1.0)
    for component, name, places in encoders(family):
        prefix = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}[component]
        layout.lora(f"text_encoders.{prefix}.transformer.{name}", places, (UNIT, INTO), alpha=1.0)
    check(layout, "comfyui", "flux1")


@pytest.mark.parametrize("style", ["2023", "2023 with unet.", "without .processor"])
def test_old_diffusers_attention_processors(style: str) -> None:
    """diffusers' load_lora_weights finds no modules in a file of the first style."""
    family, layout = families()["sd15"], Layout()
    prefix = "" if style == "2023" else "unet."
    middle = "" if style == "without .processor" else ".processor"
    for text, places in denoiser(family, original=False):
        parent, _, leaf = text.removesuffix(".0").rpartition(".")
        if parent.endswith(("attn1", "attn2")):
            layout.lora(f"{prefix}{parent}{middle}.{leaf}_lora", places, (UNIT, INTO), naming="plain")
    assert len(layout.want) == 128
    check(layout, "diffusers-old", "sd15")


@pytest.mark.parametrize("style", ["to_q_lora", "q_proj.lora_linear_layer", "transformers 5"])
def test_old_diffusers_text_encoders(style: str) -> None:
    family, layout = families()["sd15"], Layout()
    for component, name, places in encoders(family):
        parent, _, leaf = name.rpartition(".")
        if not parent.endswith("self_attn"):
            continue
        if style == "to_q_lora":
            layout.lora(f"{component}.{parent}.to_{leaf[: -len('_proj')]}_lora", places, (UNIT, INTO), naming="plain")
        elif style == "transformers 5":
            layout.lora(f"{component}.{name.removeprefix('text_model.')}", places, (UNIT, INTO), naming="peft")
        else:
            layout.lora(f"{component}.{name}", places, (UNIT, INTO), naming="linear_layer")
    assert len(layout.want) == 48
    check(layout, "diffusers" if style == "transformers 5" else "diffusers-old", "sd15")


def test_onetrainer_flux() -> None:
    family, layout = families()["flux1"], Layout()
    for text, places in denoiser(family, original=False):
        layout.lora(f"lora_transformer_{flat(text)}", places, (UNIT, INTO), alpha=1.0)
    for component, name, places in encoders(family):
        prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
        layout.lora(f"{prefix}_{flat(name)}", places, (UNIT, INTO), alpha=1.0)
    check(layout, "onetrainer", "flux1")


# -- shared A, views, files ------------------------------------------------------------------------------------------


def test_fused_pair_becomes_views_that_share_one_A() -> None:
    adapter = reading(kohya("flux1", original=True, only="single_blocks.0.linear1")).adapter
    block = "transformer.single_transformer_blocks.0"
    pairs = [adapter.pairs[f"{block}.{n}"] for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert len({id(p.A) for p in pairs}) == 1
    assert [len(p.B) for p in pairs] == [UNIT, UNIT, UNIT, 4 * UNIT]
    assert len({p.B.untyped_storage().data_ptr() for p in pairs}) == 1


def test_a_file_and_a_folder_read_the_same(tmp_path) -> None:
    layout = kohya("flux1", original=True, only="double_blocks.1.")
    save_file(layout.tensors, tmp_path / "pytorch_lora_weights.safetensors", {"ss_output_name": "a"})
    for place in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        found = read(place)
        assert_same(changes(found.adapter), layout.want)
        assert found.metadata == {"ss_output_name": "a"}
        assert found.adapter.card.extra["title"] == "a"
    save_file(layout.tensors, tmp_path / "other.safetensors")
    read(tmp_path)  # the file with diffusers' usual name takes precedence
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "third.safetensors")
    with pytest.raises(AdapterError, match=r"2 adapter files: other\.safetensors, third\.safetensors"):
        read(tmp_path)


def test_a_peft_folder_of_a_denoiser_gets_canonical_names(tmp_path) -> None:
    layout = dotted("flux1", "base_model.model.", original=False, naming="peft", only=("attn.to_q",))
    layout.want = {name: 2 * change for name, change in layout.want.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(layout.tensors, tmp_path / "adapter_model.safetensors")
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = read(place)
        assert (found.format, found.family) == ("peft", "flux1")
        assert_same(changes(found.adapter), layout.want)
        assert sum(map(len, found.used.values())) == len(layout.tensors)


def test_a_peft_folder_of_a_language_model_keeps_its_names(tmp_path) -> None:
    layout, name = Layout(), "model.layers.0.self_attn.q_proj"
    layout.lora(f"base_model.model.{name}", (ModuleTarget(name),), (4, 6), naming="peft", scale=4.0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(layout.tensors, tmp_path / "adapter_model.safetensors")
    found = read(tmp_path)
    assert (found.format, found.family) == ("peft", None)
    assert_same(changes(found.adapter), layout.want)
    assert list(found.used) == [name]
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="does not state the scale"):
        read(tmp_path)
    assert_same(changes(read(tmp_path, alpha=8).adapter), layout.want)
    bare = read(tmp_path, assume_scale=True)
    assert bare.assumed_scale == [f"base_model.model.{name}"]
    assert_same(changes(bare.adapter), {n: c / 4 for n, c in layout.want.items()})


@pytest.mark.parametrize("name", list(families()))
def test_each_original_name_means_one_module(name: str) -> None:
    """Original and canonical names share one lookup table without conflicts."""
    family = families()[name]
    for original, places in family.originals.items():
        for text in (original, f"diffusion_model.{original}", f"lora_unet_{flat(original)}"):
            assert lookup(family, text) == places
    for module in family.modules:
        assert lookup(family, module) in ((ModuleTarget(module),), *family.originals.values())


def test_gguf_is_recognized_by_its_extension(tmp_path) -> None:
    """test_gguf tests the format; this test checks that a .gguf file is recognized."""
    layout, name = Layout(), "model.layers.0.mlp.up_proj"
    layout.lora(name, (ModuleTarget(name),), (4, 6), naming="peft")
    adapter = reading(layout).adapter
    write_gguf(adapter, tmp_path / "a.gguf", architecture="qwen2")
    for place in (tmp_path, tmp_path / "a.gguf"):
        found = read(place)
        assert (found.format, found.family, list(found.used)) == ("gguf", None, [name])
        assert_same(changes(found.adapter), layout.want, 1e-6)


LAYOUT_NAMES = [
    ("double_blocks.0.processor.qkv_lora1.down.weight", "xlabs"),
    ("single_blocks.0.norm.query_norm.scale", "bfl-control"),
    ("double_blocks.0.img_attn.qkv.lora_B.bias", "bfl-control"), ("lycoris_x.lora_up.weight", "lycoris"),
    ("lora_unet_x.hada_w1_a", "lycoris"), ("lora_unet_x.lokr_w2", "lycoris"), ("lora_unet_x.diff_b", "lycoris"),
    ("lora_transformer_x.alpha", "onetrainer"), ("lora_te2_x.lora_mid.weight", "kohya"),
    ("diffusion_model.x.lora_A.weight", "comfyui"), ("base_model.model.x.lora_A.weight", "peft"),
    ("unet.x.processor.to_q_lora.up.weight", "diffusers-old"),
    ("text_encoder.x.lora_linear_layer.up.weight", "diffusers-old"),
    ("text_encoder_2.x.lora_A.weight", "diffusers"), ("x.lora_down.weight", "plain"), ("x.y", "unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "fmt"), LAYOUT_NAMES)
def test_each_layout_has_its_name(key: str, fmt: str) -> None:
    name, reasons = detect_format([key], {})
    assert (name, len(reasons)) == (fmt, 1)
    assert name in FORMATS or name == "unknown"
    many = [f"lora_unet_{i}.lora_down.weight" for i in range(5)]
    marks = {"xlabs", "bfl-control", "lycoris", "onetrainer"}
    assert detect_format([key, *many], {})[0] == (fmt if fmt in marks else "kohya")
