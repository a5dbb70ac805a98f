"""Adapters used by name on an image base of the same family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_base import tiny_base_dir
from tests.tiny_image_base import tiny_image_base
from veneer.adapters.use import attach_adapters, load_adapter
from veneer.core.adapter import Adapter, Card, LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError, MismatchError
from veneer.formats import convert, peft
from veneer.models.image.base import ImageBase, load_image
from veneer.models.text.base import load_text

pytest.importorskip("diffusers")

TARGETS = {
    "sd15": "re:unet.*attentions.*to_(q|out\\.0)",
    "sdxl": "re:unet.*attentions.*to_(q|out\\.0)",
    "flux1": "re:transformer.*(to_q|to_k|to_v|ff\\.net\\.2|proj_mlp)",
    "sd3": "re:transformer.*attn\\.(to_q|add_k_proj)",
    "klein": "re:transformer.*(to_q|to_k|to_v|to_qkv_mlp_proj)",
    "qwen-image": "re:transformer.*(to_q|img_mod\\.1)",
    "z-image": "re:transformer.*(to_q|to_out\\.0|w2|adaLN_modulation\\.0)",
}
ENCODERS = "re:text_encoder.*(q_proj|SelfAttention\\.q)"


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "image-bases"


@pytest.fixture
def load(bases: Path) -> Any:
    return lambda family: load_image(str(tiny_image_base(bases, family)))


def adapter_for(base: ImageBase, family: str, *targets: str, seed: int = 0) -> Adapter:
    made = create(base.model, LoraSpec(rank=2, alpha=4, targets=(TARGETS[family], *targets)), seed=seed)
    for pair in made.pairs.values():
        pair.B.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return made


def same_pairs(got: Adapter, want: Adapter) -> None:
    """Assert that both adapters change every module equally.

    `got` can also have pairs whose ΔW is zero, for unchanged parts of a fused projection."""
    assert set(want.pairs) <= set(got.pairs)
    for name, pair in got.pairs.items():
        theirs = want.pairs.get(name)
        change = pair.scale * (pair.B.double() @ pair.A.double())
        expected = theirs.scale * (theirs.B.double() @ theirs.A.double()) if theirs else torch.zeros_like(change)
        assert torch.allclose(change, expected, atol=1e-5), name


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("layout", ["kohya", "comfyui", "diffusers", "peft"])
def test_an_adapter_of_any_layout_fits_its_base(family: str, layout: str, load: Any, tmp_path: Path) -> None:
    base = load(family)
    encoders = [ENCODERS] if base.row.encoders and layout in ("kohya", "comfyui") else []
    adapter = adapter_for(base, family, *encoders)
    out = tmp_path / ("it" if layout == "peft" else "it.safetensors")
    convert.write(adapter, out, layout, family=base.family)
    same_pairs(load_adapter(base, str(out)), adapter)
    with attach_adapters(base, [f"{out}:0.5"]) as attachment:
        assert set(attachment.adapters) == {str(out)}


def test_ambiguous_names_take_the_base_family(load: Any, tmp_path: Path) -> None:
    """Without a base, this file is read as FLUX.1, the more common family."""
    base = load("sd3")
    whole = adapter_for(base, "sd3")
    name = "transformer.transformer_blocks.0.attn.to_q"
    convert.write(Adapter({name: whole.pairs[name]}), tmp_path / "it.safetensors", "diffusers", family="sd3")
    assert set(load_adapter(base, str(tmp_path / "it.safetensors")).pairs) == {name}


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("sdxl", "flux1", r"this is an SDXL adapter, the base is FLUX\.1"),
        ("flux1", "sdxl", r"this is a FLUX\.1 adapter, the base is SDXL"),
        ("flux1", "sd15", r"this is a FLUX\.1 adapter, the base is Stable Diffusion 1\.x"),
        ("klein", "flux1", r"this is a FLUX\.2 adapter, the base is FLUX\.1"),
        ("z-image", "flux1", r"this is a Z-Image adapter, the base is FLUX\.1"),
        ("qwen-image", "sd3", r"this is a Qwen-Image adapter, the base is Stable Diffusion 3"),
    ],
)
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_refusal_names_the_adapter_and_both_families(
    theirs: str, ours: str, said: str, layout: str, load: Any, tmp_path: Path
) -> None:
    other = load(theirs)
    out = tmp_path / ("it" if layout == "peft" else "it.safetensors")
    convert.write(adapter_for(other, theirs), out, layout, family=other.family)
    with pytest.raises(MismatchError, match=said) as caught:
        load_adapter(load(ours), str(out))
    assert str(out) in str(caught.value)


def test_metadata_family_is_used_if_it_fits(load: Any, tmp_path: Path) -> None:
    """At these widths, `to_q` has the same names and shapes in SD3 and in Qwen-Image."""
    theirs, ours = load("sd3"), load("qwen-image")
    adapter = adapter_for(theirs, "sd3")
    adapter.pairs = {n: p for n, p in adapter.pairs.items() if n.endswith("attn.to_q")}
    convert.write(adapter, tmp_path / "it.safetensors", "diffusers", family="sd3")
    with pytest.raises(
        MismatchError,
        match=r"this is a Stable Diffusion 3 adapter, the base is Qwen-Image[\s\S]*names and shapes match",
    ):
        load_adapter(ours, str(tmp_path / "it.safetensors"))
    same_pairs(load_adapter(ours, str(tmp_path / "it.safetensors"), allow_other_base=True), adapter)


def test_text_and_image_adapters_are_not_taken_for_each_other(load: Any, tmp_path: Path) -> None:
    image, text = load("sdxl"), load_text(str(tiny_base_dir(tmp_path)))
    made = create(text.model, LoraSpec(rank=2, alpha=2, targets=("q_proj",)), seed=0)
    peft.write_folder(made, str(tmp_path / "text"), base_name="t", base=text.model)
    with pytest.raises(MismatchError, match="this is a text adapter, the base is SDXL"):
        load_adapter(image, str(tmp_path / "text"))
    convert.write(adapter_for(image, "sdxl"), tmp_path / "image.safetensors", "kohya", family="sdxl")
    with pytest.raises(MismatchError, match=r"this is an SDXL adapter, the base is a language model \(llama\)"):
        load_adapter(text, str(tmp_path / "image.safetensors"))  # type: ignore[arg-type]


def test_width_misfit_lists_the_modules(load: Any, tmp_path: Path) -> None:
    base = load("sdxl")
    adapter = adapter_for(base, "sdxl")
    name, pair = next(iter(adapter.pairs.items()))
    adapter.pairs[name] = replace(pair, A=torch.cat([pair.A, pair.A], 1))
    convert.write(adapter, tmp_path / "it.safetensors", "kohya", family="sdxl")
    with pytest.raises(AdapterError, match=name):
        load_adapter(base, str(tmp_path / "it.safetensors"))


def test_the_card_names_the_base(load: Any, tmp_path: Path) -> None:
    base, other = load("flux1"), load("schnell")
    adapter = adapter_for(base, "flux1")
    adapter.card = Card(base=base.name, base_fingerprint=base.fingerprint, kind="image")
    convert.write(adapter, tmp_path / "it.safetensors", "kohya", family="flux1")
    assert load_adapter(base, str(tmp_path / "it.safetensors")).card.base_fingerprint == base.fingerprint
    with pytest.raises(MismatchError, match="belongs to another base"):
        load_adapter(other, str(tmp_path / "it.safetensors"))
    same_pairs(load_adapter(other, str(tmp_path / "it.safetensors"), allow_other_base=True), adapter)


def test_refused_adapter_leaves_the_base_clean(load: Any, tmp_path: Path) -> None:
    base, other = load("sdxl"), load("flux1")
    convert.write(adapter_for(base, "sdxl"), tmp_path / "a.safetensors", "kohya", family="sdxl")
    convert.write(adapter_for(other, "flux1"), tmp_path / "b.safetensors", "kohya", family="flux1")
    with pytest.raises(MismatchError):
        attach_adapters(base, [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")])
    attach_adapters(base, [str(tmp_path / "a.safetensors")]).detach()
