"""Changes other than plain pairs: what each layout can express, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch

from tests.formats.image_adapters import IN, UNIT, numbers, pair_for
from veneer.core.adapter import Adapter, Pair, TokenRows
from veneer.core.forms import Delta, delta_of
from veneer.errors import AdapterError
from veneer.formats.convert import encode, write
from veneer.formats.read import read, read_state_dict
from veneer.formats.topology import families

SDXL, FLUX = families()["sdxl"], families()["flux1"]
ROWS = 2 * UNIT
TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
NORM = "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm1"
CONV = "unet.mid_block.resnets.0.conv1"
EMBEDDING = "text_encoder.text_model.embeddings.token_embedding"
QKV = [f"transformer.transformer_blocks.0.attn.to_{p}" for p in "qkv"]


def loha(rows: int = ROWS, seed: str = "", magnitude=None) -> Delta:
    parts = {f"{p}{n}": numbers((rows, 2) if p == "a" else (2, IN), f"{p}{n}{seed}") for n in "12" for p in "ab"}
    return Delta("hadamard", parts, (rows, IN), 0.5, magnitude)


def lokr(rows: int = ROWS, magnitude=None) -> Delta:
    parts = {"w1": numbers((2, 3), "w1"), "a2": numbers((rows // 2, 1), "a2"), "b2": numbers((1, IN // 3), "b2")}
    return Delta("kronecker", parts, (rows, IN), 2.0, magnitude)


def core_of(*shape: int) -> dict[str, torch.Tensor]:
    return {f"t{n}": numbers((*shape, 3, 3), f"t{n}") for n in "12"}


def loha_core() -> Delta:
    """Return a LoHa delta with cores, for a 3 × 3 convolution."""
    return Delta("hadamard", loha().parts | core_of(2, 2), (ROWS, IN, 3, 3), 1 / 3)


def lokr_core() -> Delta:
    return Delta("kronecker", lokr().parts | {"t2": core_of(1, 1)["t2"]}, (ROWS, IN, 3, 3), 1 / 3)


def dense(*shape: int, scale: float = 1.0) -> Delta:
    return Delta("dense", {"value": numbers(shape, "dense")}, shape, scale)


def dora(module: str, axis: int) -> Adapter:
    pair = pair_for(SDXL, module, 2, 0.5)
    length = (pair.B.shape[0], pair.A.shape[1])[axis]
    m = numbers((length,), "m").abs()
    pair.magnitude = m if axis == 0 else m.reshape(1, -1, *[1] * (pair.A.ndim - 2))
    return Adapter({module: pair})


BOTH = lokr()
BOTH.parts |= {"a1": numbers((2, 1), "a1"), "b1": numbers((1, 3), "b1")}
del BOTH.parts["w1"]
WHOLE = Delta("kronecker", {"w1": numbers((2, 3), "w1"), "w2": numbers((ROWS // 2, IN // 3), "w2")}, (ROWS, IN), 0.3)
HELD: dict[str, tuple[Adapter, set[str]]] = {
    "loha": (Adapter(deltas={f"{TO_Q}.weight": loha()}), {"kohya", "comfyui", "peft"}),
    "loha dora": (Adapter(deltas={f"{TO_Q}.weight": loha(magnitude=numbers((1, IN), "m"))}), {"kohya", "comfyui"}),
    "lokr": (Adapter(deltas={f"{TO_Q}.weight": lokr()}), {"kohya", "comfyui", "peft"}),
    "lokr dora": (Adapter(deltas={f"{TO_Q}.weight": lokr(magnitude=numbers((ROWS,), "m"))}), {"kohya"}),
    "loha core": (Adapter(deltas={f"{CONV}.weight": loha_core()}), {"kohya", "comfyui", "peft"}),
    "lokr core": (Adapter(deltas={f"{CONV}.weight": lokr_core()}), {"kohya", "comfyui", "peft"}),
    "lokr of two pairs": (Adapter(deltas={f"{TO_Q}.weight": BOTH}), {"kohya", "comfyui", "peft"}),
    "lokr whole": (Adapter(deltas={f"{TO_Q}.weight": WHOLE}), {"kohya", "comfyui", "peft"}),
    "diff": (Adapter(deltas={f"{TO_Q}.weight": dense(ROWS, IN, scale=0.5)}), {"kohya", "comfyui"}),
    "conv diff": (Adapter(deltas={f"{CONV}.weight": dense(ROWS, IN, 3, 3)}), {"kohya", "comfyui"}),
    "ia3 outputs": (Adapter(deltas={f"{TO_Q}.weight": Delta("gain", {"value": numbers((ROWS,), "g")})}), {"kohya"}),
    "ia3 inputs": (Adapter(deltas={f"{TO_Q}.weight": Delta("gain", {"value": numbers((1, IN), "g")})}), {"kohya"}),
    "norm": (Adapter(deltas={f"{NORM}.weight": dense(ROWS), f"{NORM}.bias": dense(ROWS)}), {"kohya", "comfyui"}),
    "bias": (
        Adapter({CONV: pair_for(SDXL, CONV)}, deltas={f"{CONV}.bias": dense(ROWS, scale=3)}),
        {"kohya", "comfyui"},
    ),
    "lora_bias": (
        Adapter({CONV: pair_for(SDXL, CONV)}, deltas={f"{CONV}.bias": dense(ROWS)}),
        {"kohya", "comfyui", "diffusers", "peft"},
    ),
    "dora outputs": (dora(TO_Q, 0), {"kohya", "diffusers", "peft"}),
    "dora inputs": (dora(TO_Q, 1), {"kohya", "comfyui"}),
    "dora conv": (dora(CONV, 0), {"kohya", "diffusers", "peft"}),
    "embedding": (
        Adapter({EMBEDDING: Pair(numbers((2, 5), "A"), numbers((IN, 2), "B"), 0.5, "embedding")}),
        {"comfyui"},
    ),
    "full": (Adapter(modules={TO_Q: {"weight": numbers((ROWS, IN), "full")}}), {"comfyui", "peft"}),
    "token rows": (Adapter(token_rows={EMBEDDING: TokenRows((1, 4), numbers((2, IN), "rows"))}), set()),
}


def effects(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the change of each parameter in float64, for fixed random base weights."""
    out = {}
    for name, pair in adapter.pairs.items():
        product = pair.scale * (pair.B.double().flatten(1) @ pair.A.double().flatten(1))
        product = product.t() if pair.kind == "embedding" else product.reshape(pair.B.shape[0], *pair.A.shape[1:])
        W = numbers(product.shape, "W", torch.float64)
        if pair.magnitude is None:
            out[f"{name}.weight"] = product
        else:
            new = W + product
            axis = 0 if pair.magnitude.ndim == 1 else 1
            norm = new.transpose(0, axis).flatten(1).norm(dim=1)
            scale = (pair.magnitude.double().reshape(-1) / norm).reshape(
                [-1 if d == axis else 1 for d in range(new.ndim)]
            )
            out[f"{name}.weight"] = new * scale - W
    for name, delta in adapter.deltas.items():
        shape = delta.shape or (ROWS, IN)
        out[name] = out.get(name, 0) + delta_of(numbers(shape, "W", torch.float64), delta).double()
    for name, own in adapter.modules.items():
        out |= {f"{name}={k}": t.double() for k, t in own.items()}
    for name, rows in adapter.token_rows.items():
        out[f"{name}#{rows.indices}"] = rows.rows.double()
    return out


def effects_added_by_round_trip(adapter: Adapter, path, to: str, family: str) -> dict[str, torch.Tensor]:
    """Write the adapter, read it back, and assert that every effect of the original is unchanged.

    Returns the effects that only the adapter read back has."""
    write(adapter, path, to, family=family)
    got = effects(read(path).adapter)
    for name, change in effects(adapter).items():
        torch.testing.assert_close(got.pop(name), change, rtol=1e-6, atol=1e-6)
    return got


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers", "peft"])
@pytest.mark.parametrize("form", HELD)
def test_form_round_trips_or_is_refused_by_name(form, to, tmp_path):
    adapter, held = HELD[form]
    module = next(iter({m.removesuffix(".weight").removesuffix(".bias") for m, _ in _items(adapter)}))
    out = tmp_path / ("it" if to == "peft" else "it.safetensors")
    if to not in held:
        with pytest.raises(AdapterError) as refusal:
            write(adapter, out, to, family="sdxl")
        assert module.partition(".")[2] in refusal.value.what
        assert re.search(r"merge it|--to \w+|make pairs|token ids", str(refusal.value)), str(refusal.value)
        assert not out.exists()
        return
    assert effects_added_by_round_trip(adapter, out, to, "sdxl") == {}


def _items(adapter: Adapter):
    for what in ("pairs", "deltas", "modules", "token_rows"):
        yield from getattr(adapter, what).items()


# -- fused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_fused_loha_bias_and_whole_weights(to, tmp_path):
    adapter = Adapter(
        deltas={f"{m}.weight": loha(UNIT, m) for m in QKV} | {f"{QKV[1]}.bias": dense(UNIT)},
        modules={} if to == "kohya" else {QKV[0].replace("blocks.0", "blocks.1"): {"weight": numbers((UNIT, IN), "q")}},
    )
    if adapter.modules:
        with pytest.raises(AdapterError, match="only some of its parts have a full replacement weight"):
            encode(adapter, to, family="flux1")
        adapter.modules = {m.replace("blocks.0", "blocks.1"): {"weight": numbers((UNIT, IN), m)} for m in QKV}
    assert not any(
        t.any() for t in effects_added_by_round_trip(adapter, tmp_path / "it.safetensors", to, "flux1").values()
    )


def test_fused_parts_with_different_forms_are_refused():
    adapter = Adapter({QKV[0]: pair_for(FLUX, QKV[0])}, deltas={f"{QKV[2]}.weight": lokr(UNIT)})
    with pytest.raises(AdapterError, match=r"double_blocks\.0\.img_attn\.qkv") as refusal:
        encode(adapter, "kohya", family="flux1")
    assert QKV[2] in refusal.value.what


def test_every_refused_module_is_listed():
    embedding = Pair(numbers((2, 5), "A"), numbers((IN, 2), "B"), 0.5, "embedding")
    pairs = {TO_Q: pair_for(SDXL, TO_Q), "unet.nowhere": pair_for(SDXL, TO_Q), EMBEDDING: embedding}
    adapter = Adapter(pairs, modules={CONV: {"weight": numbers((ROWS, IN, 3, 3), "full")}})
    with pytest.raises(AdapterError, match=r"3 module\(s\) are in the way") as refusal:
        encode(adapter, "kohya", family="sdxl")
    for module in ("unet.nowhere", EMBEDDING, CONV):
        assert re.search(rf"^ +{re.escape(module)}$", refusal.value.what, re.M), module
    assert TO_Q not in refusal.value.what


MODULES = [
    ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "flux1", "diffusers", "diffusers loads nothing"),
    ("transformer.transformer_blocks.0.attn.to_q", "sdxl", "kohya", "Stable Diffusion XL has no such module"),
    ("model.layers.0.self_attn.q_proj", None, "kohya", "is for adapters of image models"),
    ("transformer.transformer_blocks.0.attn.to_q", "flux3", "kohya", "there is no family 'flux3'"),
]


@pytest.mark.parametrize(("module", "family", "to", "why"), MODULES)
def test_modules_without_a_name_are_refused(module, family, to, why):
    pair = Pair(numbers((2, IN), "A"), numbers((ROWS, 2), "B"), 1.0)
    with pytest.raises(AdapterError, match=why):
        encode(Adapter({module: pair}), to, family=family)


def test_comfyui_layout_refuses_norms_of_flux():
    adapter = Adapter(deltas={"transformer.transformer_blocks.0.attn.norm_q.weight": dense(UNIT)})
    assert set(encode(adapter, "kohya", family="flux1").tensors) == {
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm"
    }
    with pytest.raises(AdapterError, match="this one is named scale"):
        encode(adapter, "comfyui", family="flux1")


def test_several_components_do_not_fit_a_peft_folder():
    modules = (TO_Q, "text_encoder.text_model.encoder.layers.0.mlp.fc1")
    adapter = Adapter({m: pair_for(SDXL, m) for m in modules})
    with pytest.raises(AdapterError, match=r"(?s)a PEFT folder holds an adapter for one model.*--to kohya or comfyui"):
        encode(adapter, "peft")


def test_dora_is_noted_where_readers_differ():
    assert "A1111" in encode(dora(TO_Q, 0), "kohya", family="sdxl").notes[0]


def test_vector_without_a_pair_replaces_only_norm_weights():
    """`….norm_q.weight` next to pairs replaces the norm's weight, as in diffusers.

    A vector for a linear layer is refused, because it would be an (IA)³ without on_input."""
    norm, linear, other = (f"transformer.transformer_blocks.0.attn.{n}" for n in ("norm_q", "to_q", "to_k"))
    pair = {f"{other}.lora_A.weight": torch.ones(2, UNIT), f"{other}.lora_B.weight": torch.ones(UNIT, 2)}
    found = read_state_dict({f"{norm}.weight": torch.ones(UNIT), **pair}, {}).adapter
    assert torch.equal(found.modules[norm]["weight"], torch.ones(UNIT))
    with pytest.raises(AdapterError, match="a vector as the full replacement weight"):
        read_state_dict({f"{norm}.weight": torch.ones(UNIT), f"{linear}.weight": torch.ones(UNIT), **pair}, {})


def test_fused_changes_with_a_part_missing_and_fused_dora(tmp_path):
    """A part with no change becomes zero rows of the fused LoHa or dense change.

    If all parts have DoRA, the fused weight has DoRA."""
    single = [f"transformer.single_transformer_blocks.0.attn.to_{p}" for p in "qkv"]
    adapter = Adapter(
        {m: pair_for(FLUX, m, 2, 0.5, shared="A") for m in QKV},
        deltas={f"{single[0]}.weight": loha(UNIT), f"{single[2]}.weight": loha(UNIT, "v")},
    )
    for module in QKV:
        adapter.pairs[module].magnitude = numbers((UNIT,), module).abs()
    context = [m.replace("to_", "add_") + "_proj" for m in QKV]
    adapter.deltas |= {f"{context[1]}.weight": dense(UNIT, IN)}
    got = effects_added_by_round_trip(adapter, tmp_path / "it.safetensors", "kohya", "flux1")
    assert got
    assert not any(t.any() for t in got.values())
    del adapter.pairs[QKV[1]]
    with pytest.raises(AdapterError, match="some have a magnitude and some have none"):
        encode(adapter, "kohya", family="flux1")
