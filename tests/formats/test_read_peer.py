"""veneer reads the same modules and changes as diffusers' readers, wherever diffusers is correct.

Each case states what it omits and why. Widths are FLUX.1's real ones if diffusers hard-codes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formats.layouts import INTO, UNIT, Layout, assert_same, changes, denoiser, dotted, encoders, kohya, product
from tests.formats.test_read import CLIP
from tests.formats.test_topology import denoiser as real_denoiser
from veneer.formats.read import read_state_dict
from veneer.formats.topology import ModuleTarget, families, flat

loaders = pytest.importorskip("diffusers.loaders")
to_peft = pytest.importorskip("diffusers.utils.state_dict_utils")


def peer(mixin: str, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Read a state dict with diffusers; return ΔW by canonical name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(loaders, mixin).lora_state_dict({k: t.clone() for k, t in tensors.items()}, **options)
    state, alphas = found if isinstance(found, tuple) else (found, None)
    alphas = {key.removesuffix(".alpha"): value for key, value in (alphas or {}).items()}
    alphas = {key if key.endswith(".weight") else f"{key}.lora.down.weight": v for key, v in alphas.items()}
    out = {}
    for component in sorted({k.partition(".")[0] for k in state}):
        own, own_alphas = renamed(component, state), renamed(component, alphas)
        for key, down in own.items():
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                scale = float(own_alphas.get(key, down.shape[0])) / down.shape[0]
                out[f"{component}.{name}.weight"] = scale * product(own[f"{name}.lora_B.weight"], down)
    return out


def renamed(component: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return a component's entries, renamed by diffusers to PEFT's names.

    `state`: tensors or alphas by key."""
    own = {k.partition(".")[2]: t for k, t in state.items() if k.startswith(f"{component}.")}
    if own and component.startswith("text_encoder"):
        return to_peft.convert_state_dict_to_peft(to_peft.convert_state_dict_to_diffusers(own))
    return to_peft.convert_unet_state_dict_to_peft(own)


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return changes(read_state_dict(tensors, {}).adapter)


@pytest.mark.parametrize("original", [True, False])
def test_sdxl_by_kohya(original: bool) -> None:
    """Original names: all 794 modules and both text encoders.

    diffusers' names: all except add_embedding, because diffusers replaces underscores by dots and merges the
    two modules of add_embedding into one, add.embedding.linear."""
    layout = kohya("sdxl", original=original, te=CLIP)
    if not original:
        layout.tensors = {k: t for k, t in layout.tensors.items() if "add_embedding" not in k}
    config = SimpleNamespace(layers_per_block=2)
    want = peer("StableDiffusionXLLoraLoaderMixin", layout.tensors, unet_config=config)
    assert_same(ours(layout.tensors), want, 1e-6)


def test_sd15_by_kohya() -> None:
    layout = kohya("sd15", original=False, te={"text_encoder": "lora_te"}, only="attentions")
    assert_same(ours(layout.tensors), peer("StableDiffusionLoraLoaderMixin", layout.tensors), 1e-6)


def real_flux(*originals: str, text: Callable[[str], str], naming: str = "kohya", alpha: float | None = 1.0) -> Layout:
    """Return a layout of rank-2 pairs with FLUX.1's real row counts."""
    family, layout = families()["flux1"], Layout()
    shapes = {f"transformer.{n}": tuple(p.shape) for n, p in real_denoiser("flux1").named_parameters()}
    for original in originals:
        places = family.originals[original]
        rows = sum(shapes[f"{p.module}.weight"][0] for p in places)
        layout.lora(text(original), places, (rows, INTO), alpha=alpha, naming=naming)
    return layout


def block_names(name: str, *blocks: str) -> list[str]:
    return [o for o, _ in denoiser(families()[name], original=True) if o.startswith(blocks)]


@pytest.mark.parametrize("text", [lambda o: f"lora_unet_{flat(o)}", lambda o: f"diffusion_model.{o}"])
def test_flux_by_kohya_and_comfyui(text: Callable[[str], str]) -> None:
    """Compares blocks only, because diffusers drops the modules outside the blocks.

    For diffusion_model names, diffusers only flattens the names to lora_unet_ names, so the reference always
    uses flattened names."""
    names = block_names("flux1", "double_blocks.0.", "double_blocks.18.", "single_blocks.37.")
    layout = real_flux(*names, text=text)
    flattened = real_flux(*names, text=lambda o: f"lora_unet_{flat(o)}")
    want = peer("FluxLoraLoaderMixin", flattened.tensors)
    assert len(want) == 2 * 14 + 6
    assert_same(ours(layout.tensors), want, 1e-6)


def test_flux_by_onetrainer() -> None:
    """Omits te2, which is T5, because diffusers fails an assertion for te2."""
    family, layout = families()["flux1"], Layout()
    for text, places in denoiser(family, original=False):
        if ".attn." in text or "embedder" in text or text in ("proj_out", "norm_out.linear"):
            layout.lora(f"lora_transformer_{flat(text)}", places, (UNIT, INTO), alpha=1.0)
    for component, name, places in encoders(family):
        if component == "text_encoder":
            layout.lora(f"lora_te1_{flat(name)}", places, (UNIT, INTO), alpha=1.0)
    assert_same(ours(layout.tensors), peer("FluxLoraLoaderMixin", layout.tensors), 1e-6)


def test_xlabs() -> None:
    layout, width = Layout(), 8
    for i in (0, 18):
        for n in (1, 2):
            name = f"double_blocks.{i}.processor"
            layout.lora(f"{name}.qkv_lora{n}", (ModuleTarget(f"{i}{n}a"),), (3 * width, width), naming="plain")
            layout.lora(f"{name}.proj_lora{n}", (ModuleTarget(f"{i}{n}b"),), (width, width), naming="plain")
    layout.lora("single_blocks.37.processor.qkv_lora", (ModuleTarget("c"),), (3 * width, width), naming="plain")
    layout.lora("single_blocks.37.processor.proj_lora", (ModuleTarget("d"),), (width, 5 * width), naming="plain")
    want = peer("FluxLoraLoaderMixin", layout.tensors)
    assert len(want) == 2 * 2 * 4 + 3 + 1
    assert_same(ours(layout.tensors), want, 1e-6)


def test_bfl_control_lora() -> None:
    """Reads the complete file with real widths, which diffusers requires.

    For the last modulation, diffusers also swaps the halves of A, although A's rows are ranks. The test
    undoes that swap before it compares."""
    family, layout = families()["flux1"], Layout()
    shapes = {f"transformer.{n}": tuple(p.shape) for n, p in real_denoiser("flux1").named_parameters()}
    biases: dict[str, Tensor] = {}
    for name, places in family.originals.items():
        if family.modules[places[0].module] == "norm":
            layout.tensors[f"{name}.scale"] = layout.random(128, dtype=torch.float16)
            continue
        rows = sum(shapes[f"{p.module}.weight"][0] for p in places)
        into = 128 if name == "img_in" else shapes[f"{places[0].module}.weight"][1]
        layout.tensors[f"{name}.lora_A.weight"] = layout.random(2, into, dtype=torch.float16)
        layout.tensors[f"{name}.lora_B.weight"] = layout.random(rows, 2, dtype=torch.float16)
        layout.tensors[f"{name}.lora_B.bias"] = layout.random(rows, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = loaders.FluxLoraLoaderMixin.lora_state_dict(dict(layout.tensors), return_alphas=False)
    found = read_state_dict(layout.tensors, {}).adapter
    theirs = {k.removesuffix(".lora_B.bias"): t for k, t in state.items() if k.endswith(".lora_B.bias")}
    biases = {k.removesuffix(".bias"): d.parts["value"] for k, d in found.deltas.items()}
    assert biases.keys() == theirs.keys()
    for name, bias in theirs.items():
        assert torch.equal(biases[name], bias), name
        A = state[f"{name}.lora_A.weight"]
        A = A.flip(0) if name.endswith(".norm_out.linear") else A
        assert torch.equal(found.pairs[name].A, A), name
        assert torch.equal(found.pairs[name].B, state[f"{name}.lora_B.weight"]), name
    norms = {k.removesuffix(".weight"): t for k, t in state.items() if ".norm_" in k and ".lora_" not in k}
    assert found.modules.keys() == norms.keys()
    assert all(torch.equal(found.modules[n]["weight"], t) for n, t in norms.items())


def test_flux2_by_ai_toolkit() -> None:
    """Compares final_layer.adaLN separately, because diffusers contradicts itself.

    diffusers' LoRA reader keeps the order of the weight's halves, but diffusers' checkpoint reader swaps them
    (see test_topology_peer)."""
    layout = dotted("flux2", "diffusion_model.", original=True, naming="peft")
    want = peer("Flux2LoraLoaderMixin", layout.tensors)
    got = ours(layout.tensors)
    name = "transformer.norm_out.linear.weight"
    theirs, mine = want.pop(name), got.pop(name)
    assert torch.equal(theirs.roll(len(theirs) // 2, 0), mine)
    assert_same(got, want, 1e-6)


def test_flux2_by_kohya() -> None:
    layout = kohya("flux2", original=True, only="_blocks.")
    assert_same(ours(layout.tensors), peer("Flux2LoraLoaderMixin", layout.tensors), 1e-6)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "transformer."])
def test_qwen_image(prefix: str) -> None:
    if prefix == "lora_unet_":
        layout = kohya("qwen-image", original=False, only="transformer_blocks")
    else:
        layout = dotted("qwen-image", prefix, original=False, naming="peft")
    assert_same(ours(layout.tensors), peer("QwenImageLoraLoaderMixin", layout.tensors), 1e-6)


@pytest.mark.parametrize("written", ["musubi-tuner", "kohya, original attention", "ai-toolkit"])
def test_z_image(written: str) -> None:
    """Covers the layers, both refiners, and the modules outside them.

    diffusers also reads the original's fused qkv, if names are flat."""
    if written == "ai-toolkit":
        layout = dotted("z-image", "diffusion_model.", original=False, naming="peft")
    elif written == "musubi-tuner":
        layout = kohya("z-image", original=False)
    else:
        layout = kohya("z-image", original=True, only="attention")
    assert_same(ours(layout.tensors), peer("ZImageLoraLoaderMixin", layout.tensors), 1e-6)


@pytest.mark.parametrize("style", ["processor", "lora", "peft"])
def test_sd15_by_diffusers_old_and_new(style: str) -> None:
    family, layout = families()["sd15"], Layout()
    for text, places in denoiser(family, original=False):
        if ".attn" not in text:
            continue
        parent, _, leaf = text.removesuffix(".0").rpartition(".")
        name = {"processor": f"unet.{parent}.processor.{leaf}_lora"}.get(style, f"unet.{text}")
        naming = {"processor": "plain", "lora": "dotted"}.get(style, "peft")
        layout.lora(name, places, (UNIT, INTO), naming=naming)
    for component, name, places in encoders(family):
        naming = "peft" if style == "peft" else "linear_layer"
        layout.lora(f"{component}.{name}", places, (UNIT, INTO), naming=naming)
    assert_same(ours(layout.tensors), peer("StableDiffusionLoraLoaderMixin", layout.tensors), 1e-6)
