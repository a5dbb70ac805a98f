"""Reading LyCORIS changes, DoRA, split_qkv files and diffusers' metadata."""

from __future__ import annotations

import json

import pytest
import torch

from tests.formats.layouts import INTO, UNIT, Layout, assert_same, changes, product, rows, shape_of
from tests.formats.test_read import check, reading
from veneer.errors import AdapterError
from veneer.formats.metadata import pack_configs
from veneer.formats.topology import ModuleTarget, families, flat

FLUX, SDXL = families()["flux1"], families()["sdxl"]
QKV, LINEAR1, LAST = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"


def flux(*originals: str, prefix: str = "lora_unet_") -> list[tuple[str, tuple[ModuleTarget, ...], int, int]]:
    """Return (name in the file, targets, rows, columns) for each original name.

    A file with single_blocks.37 is identified as FLUX.1."""
    out = []
    for original in originals:
        places = FLUX.originals[original]
        out.append((f"{prefix}{flat(original)}", places, *shape_of(FLUX, places)))
    return out


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_loha_on_plain_fused_and_swapped_modules(prefix: str) -> None:
    layout = Layout()
    for text, places, out, into in flux(QKV, LINEAR1, LAST, "single_blocks.37.modulation.lin", prefix=prefix):
        parts = {"hada_w1_a": (out, 2), "hada_w1_b": (2, into), "hada_w2_a": (out, 2), "hada_w2_b": (2, into)}
        made = {name: layout.random(*shape) for name, shape in parts.items()}
        layout.tensors |= {f"{text}.{name}": t for name, t in made.items()}
        layout.tensors[f"{text}.alpha"] = torch.tensor(1.0)
        d = {name: t.double() for name, t in made.items()}
        first, second = d["hada_w1_a"] @ d["hada_w1_b"], d["hada_w2_a"] @ d["hada_w2_b"]
        layout.expect(places, 0.5 * first * second)
    check(layout, "lycoris", "flux1")


def test_lokr_on_plain_and_fused_modules() -> None:
    """LyCORIS ignores alpha if neither factor is decomposed."""
    layout = Layout()
    for i, (text, places, out, into) in enumerate(flux(QKV, LINEAR1, "single_blocks.37.modulation.lin")):
        w1, a, b = layout.random(out // 2, 2), layout.random(2, 1), layout.random(1, into // 2)
        w2 = a @ b
        layout.tensors |= {f"{text}.lokr_w1": w1, f"{text}.alpha": torch.tensor(8.0)}
        layout.tensors |= {f"{text}.lokr_w2": w2} if i == 0 else {f"{text}.lokr_w2_a": a, f"{text}.lokr_w2_b": b}
        wide = w2.double() if i == 0 else a.double() @ b.double()
        layout.expect(places, (1.0 if i == 0 else 8.0) * torch.kron(w1.double(), wide))
    check(layout, "lycoris", "flux1")


def test_tucker_and_plain_convolutions() -> None:
    layout = Layout()
    for name in ("unet.down_blocks.0.resnets.0.conv1", "unet.up_blocks.2.resnets.2.conv2"):
        text = f"lora_unet_{flat(name.removeprefix('unet.'))}"
        down, mid, up = layout.random(2, 6, 1, 1), layout.random(2, 2, 3, 3), layout.random(4, 2, 1, 1)
        layout.tensors |= {f"{text}.lora_down.weight": down, f"{text}.lora_mid.weight": mid}
        layout.tensors |= {f"{text}.lora_up.weight": up, f"{text}.alpha": torch.tensor(1.0)}
        o, m, i = up.double().flatten(1), mid.double(), down.double().flatten(1)
        layout.want[f"{name}.weight"] = 0.5 * torch.einsum("op,pqhw,qi->oihw", o, m, i)
    found = reading(layout)
    assert_same(changes(found.adapter), layout.want, tolerance=1e-6)  # Tucker pairs are stored in float32


@pytest.mark.parametrize("stored", [2, 4])
def test_pointwise_convolution_and_linear_shapes_are_interchangeable(stored: int) -> None:
    """SD 1's proj_in is a convolution, SDXL's is linear; files use either shape."""
    for family, name, ndim in (("sd15", "unet.mid_block.attentions.0.proj_in", 4), ("sdxl", None, 2)):
        layout = Layout()
        name = name or "unet.down_blocks.2.attentions.1.proj_in"
        extra = "unet.up_blocks.3.attentions.2.proj_out" if family == "sd15" else "unet.add_embedding.linear_1"
        for module in (name, extra):
            shape = (4, 6, *[1] * (stored - 2))
            layout.lora(f"lora_unet_{flat(module.removeprefix('unet.'))}", (ModuleTarget(module),), shape, alpha=1.0)
        want = {k: v.reshape(4, 6, *[1] * (ndim - 2)) for k, v in layout.want.items()}
        found = reading(layout)
        assert found.family == family
        assert_same(changes(found.adapter), want)


def test_full_differences_norms_and_gains_are_read() -> None:
    layout, texts = Layout(), flux(QKV, LAST, "single_blocks.37.modulation.lin")
    for text, places, out, into in texts:
        diff, bias = layout.random(out, into), layout.random(out)
        layout.tensors |= {f"{text}.diff": diff, f"{text}.diff_b": bias}
        layout.expect(places, diff)
        layout.expect(places, bias, "bias")
    norm = layout.random(8)
    layout.tensors["lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm"] = norm
    layout.want["transformer.transformer_blocks.0.attn.norm_q.weight"] = norm.double()
    check(layout, "lycoris", "flux1")

    gain = Layout()
    text, places, out, _ = flux("double_blocks.1.txt_attn.qkv")[0]
    value = gain.random(out)
    gain.tensors = {f"{text}.weight": value, f"{text}.on_input": torch.tensor(False)}
    found = reading(gain).adapter.deltas
    assert {n: d.form for n, d in found.items()} == {f"{p.module}.weight": "gain" for p in places}
    for place in places:
        assert torch.equal(found[f"{place.module}.weight"].parts["value"], rows(value, place))


def test_dora_on_a_fused_module_needs_output_magnitudes() -> None:
    layout, (text, places, out, into) = Layout(), flux(QKV)[0]
    layout.lora(text, places, (out, into), alpha=1.0)
    layout.tensors[f"{text}.dora_scale"] = m = layout.random(out, 1)
    pairs = check(layout, "kohya", "flux1").adapter.pairs
    for place in places:
        magnitude = pairs[place.module].magnitude
        assert torch.equal(magnitude, rows(m.reshape(-1), place))
    layout.tensors[f"{text}.dora_scale"] = layout.random(1, into)
    with pytest.raises(AdapterError, match=r"lora_unet_double_blocks_0_img_attn_qkv: a magnitude of the inputs"):
        reading(layout)


def test_a_pair_on_an_embedding_is_transposed() -> None:
    """ComfyUI stores the pair as for a linear layer: up·down has shape (rows, dim)."""
    layout, name = Layout(), "text_encoder.text_model.embeddings.position_embedding"
    layout.lora(
        "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding", (ModuleTarget(name),), (7, 5)
    )
    found = reading(layout)
    assert found.adapter.pairs[name].kind == "embedding"
    assert_same(changes(found.adapter), layout.want)


# -- split_qkv -------------------------------------------------------------------------------------------------------


def blocks(
    text: str, places: tuple[ModuleTarget, ...], layout: Layout, *, rank: int, alpha: float, scale: float
) -> None:
    """Add a pair in sd-scripts' split_qkv form: A = [A₀; …], B = diag(B₀, …)."""
    downs = [layout.random(rank, INTO) for _ in places]
    sizes = [UNIT * (p.part[1] - p.part[0]) for p in places if p.part]
    ups = [layout.random(n, rank) for n in sizes]
    layout.tensors |= {
        f"{text}.lora_down.weight": torch.cat(downs),
        f"{text}.lora_up.weight": torch.block_diag(*ups),
        f"{text}.alpha": torch.tensor(alpha),
    }
    for place, up, down in zip(places, ups, downs, strict=True):
        layout.want[f"{place.module}.weight"] = scale * product(up, down)


@pytest.mark.parametrize("told", ["by the metadata", "by the modules that are not fused", "converted", "not"])
def test_split_qkv_files_have_the_correct_scale(told: str) -> None:
    """Each part was trained with rank 2 and alpha 1, so its scale is 1/2.

    Dividing alpha by the stored ranks, 6 and 8, would make the scale three or four times too small. If a
    converter has set alpha to the stored rank, the scale is 1."""
    layout = Layout()
    converted = told == "converted"
    for text, places, _, _ in flux(QKV, LINEAR1):
        stored = 2 * len(places)
        alpha = float(stored) if converted else 1.0
        scale = 1.0 if converted else alpha / stored if told == "not" else 0.5
        blocks(text, places, layout, rank=2, alpha=alpha, scale=scale)
    if told in ("by the modules that are not fused", "converted"):
        for text, places, out, into in flux("double_blocks.0.img_attn.proj", "single_blocks.37.linear2"):
            layout.lora(text, places, (out, into), alpha=2.0 if converted else 1.0)
    if told in ("by the metadata", "converted"):
        layout.metadata = {"ss_network_args": json.dumps({"split_qkv": "True"}), "ss_network_alpha": "1.0"}
    found = check(layout, "kohya", "flux1")
    ranks = {found.adapter.pairs[p.module].rank for _, places, _, _ in flux(QKV, LINEAR1) for p in places}
    assert ranks == ({6, 8} if told in ("not", "converted") else {2})
    assert any("split_qkv" in n for n in found.notes) is (told.startswith("by"))
    assert any("alpha may be for one part only" in n for n in found.notes) is (told == "not")


@pytest.mark.parametrize("plain", [True, False])
def test_converted_split_qkv_alpha_is_unchanged(plain: bool) -> None:
    """A converter has already multiplied alpha by the number of parts.

    The file does not contain the alpha used in training."""
    layout = Layout(metadata={"ss_network_args": json.dumps({"split_qkv": "True"})})
    trained = (
        1.0 if plain else 2.0
    )  # without other modules to compare with, only an alpha equal to the rank reveals the converter
    for text, places, _, _ in flux(QKV, LINEAR1):
        blocks(text, places, layout, rank=2, alpha=trained * len(places), scale=trained / 2)
    if plain:
        for text, places, out, into in flux("double_blocks.0.img_attn.proj", "single_blocks.37.linear2"):
            layout.lora(text, places, (out, into), alpha=trained)
    check(layout, "kohya", "flux1")


def test_ordinary_fused_pair_is_not_split_qkv() -> None:
    layout = Layout(metadata={"ss_network_args": json.dumps({"split_qkv": "True"}), "ss_network_alpha": "1.0"})
    for text, places, out, into in flux(QKV, LINEAR1):
        layout.lora(text, places, (out, into), rank=12, alpha=1.0)
    check(layout, "kohya", "flux1")


# -- lora_adapter_metadata -------------------------------------------------------------------------------------------


def diffusers_layout(scale: float = 1.0) -> Layout:
    layout = Layout()
    for i in (0, 37):
        name = f"transformer.single_transformer_blocks.{i}.attn.to_q"
        layout.lora(name, (ModuleTarget(name),), (4, 6), naming="peft", rank=4, scale=scale)
    return layout


def test_diffusers_metadata_gives_alpha_by_component_and_pattern() -> None:
    layout = diffusers_layout()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"], "use_rslora": False}
    config["alpha_pattern"] = {"single_transformer_blocks.37.attn.to_q": 2}
    layout.metadata["lora_adapter_metadata"] = pack_configs({"transformer": config})
    for i, factor in ((0, 2.0), (37, 0.5)):
        layout.want[f"transformer.single_transformer_blocks.{i}.attn.to_q.weight"] *= factor
    check(layout, "diffusers", "flux1")
    config |= {"use_rslora": True, "alpha_pattern": {}}
    layout = diffusers_layout(scale=4.0)  # 8/√4
    layout.metadata["lora_adapter_metadata"] = pack_configs({"transformer": config})
    check(layout, "diffusers", "flux1")


DIFFUSERS_METADATA = [
    ({"r": 2}, r"r of lora_adapter_metadata says rank 2, but A is \(4, 6\)"),
    ({"use_dora": True}, "use_dora is set in lora_adapter_metadata, but there is no magnitude"),
    ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
]


@pytest.mark.parametrize(("change", "message"), DIFFUSERS_METADATA)
def test_diffusers_metadata_contradicting_the_tensors_is_refused(change: dict[str, object], message: str) -> None:
    layout = diffusers_layout()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"], **change}
    layout.metadata["lora_adapter_metadata"] = pack_configs({"transformer": config})
    with pytest.raises(AdapterError, match=message):
        reading(layout)
