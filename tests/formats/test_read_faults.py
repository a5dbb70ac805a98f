"""Tensors that cannot be read are listed in an error, or returned with allow_partial."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.layouts import INTO, UNIT, Layout, assert_same, changes, dotted, kohya
from tests.formats.test_read import reading
from veneer.errors import AdapterError, UnsafeFileError
from veneer.formats.names import choose_family
from veneer.formats.read import read, read_state_dict
from veneer.formats.structure import Structure
from veneer.formats.topology import ModuleTarget, families, flat

PROJ = "double_blocks.3.img_attn.proj"
TARGET = "transformer.transformer_blocks.3.attn.to_out.0"


def small() -> Layout:
    return kohya("flux1", original=True, only="double_blocks.3.")


def test_all_faults_are_listed_and_partial_read_works() -> None:
    layout = small()
    extra = {
        "lora_unet_double_blocks_99_img_attn_proj.lora_down.weight": torch.ones(2, 6),
        "lora_unet_double_blocks_99_img_attn_proj.lora_up.weight": torch.ones(4, 2),
        "first_stage_model.decoder.conv_in.weight": torch.ones(2),
        "nonsense": torch.ones(1),
    }
    up = "lora_unet_double_blocks_3_txt_mod_lin.lora_up.weight"
    layout.tensors = {k: t for k, t in (layout.tensors | extra).items() if k != up}
    layout.tensors["lora_unet_double_blocks_3_img_mod_lin.lora_up.weight"] = torch.ones(UNIT, 3)
    with pytest.raises(AdapterError) as caught:
        reading(layout)
    text = str(caught.value)
    for key in extra:
        assert key in text
    assert "lora_unet_double_blocks_3_txt_mod_lin" in text
    assert f"(2, {INTO})" in text
    assert f"({UNIT}, 3)" in text
    assert "allow_partial" in text

    part = reading(layout, allow_partial=True)
    assert part.unused == sorted(extra)
    broken = ("lora_unet_double_blocks_3_txt_mod_lin.", "lora_unet_double_blocks_3_img_mod_lin.")
    assert sorted(part.unpaired) == sorted(k for k in layout.tensors if k.startswith(broken))
    assert_same(changes(part.adapter), {n: c for n, c in layout.want.items() if ".norm1" not in n})
    used = {k for keys in part.used.values() for k in keys}
    assert used | set(part.unused) | set(part.unpaired) == set(layout.tensors)
    assert not used & {*part.unused, *part.unpaired}


SECOND_NAMES = [
    f"lora_unet_{flat('transformer_blocks.3.attn.to_out.0')}",
    f"diffusion_model.{PROJ}",
    f"transformer.{PROJ}",
    TARGET,
    "lora_transformer_transformer_blocks_3_attn_to_out_0",
    "double_blocks.3.processor.proj_lora1",
]


@pytest.mark.parametrize("second", SECOND_NAMES)
def test_two_names_for_one_module_are_refused(second: str) -> None:
    layout = small()
    naming = "plain" if "processor" in second else "kohya"
    other = Layout(seed=1000)
    other.lora(second, (ModuleTarget(TARGET),), (UNIT, INTO), naming=naming)
    layout.tensors |= other.tensors
    with pytest.raises(AdapterError) as caught:
        reading(layout)
    assert f"lora_unet_{flat(PROJ)}" in str(caught.value)
    assert second in str(caught.value)
    assert f"changes {TARGET}, as does" in str(caught.value)


def test_fused_projection_with_one_of_its_parts_is_refused() -> None:
    layout = small()
    other = Layout(seed=1000)
    other.lora("transformer.transformer_blocks.3.attn.to_k", (ModuleTarget("x"),), (UNIT, INTO), naming="peft")
    with pytest.raises(AdapterError, match=r"changes transformer\.transformer_blocks\.3\.attn\.to_k, as does"):
        read_state_dict(layout.tensors | other.tensors, {})


def test_two_spellings_of_one_tensor_are_refused() -> None:
    layout = small()
    key = next(k for k in layout.tensors if k.endswith(".lora_down.weight"))
    layout.tensors[key.replace(".lora_down", "_lora_down")] = layout.tensors[key]
    with pytest.raises(AdapterError, match="a duplicate of"):
        reading(layout)


def test_unknown_names_have_no_family() -> None:
    layout = Layout()
    layout.lora("lora_unet_no_such_module", (ModuleTarget("x"),), (4, 6))
    for allow_partial in (False, True):
        with pytest.raises(AdapterError, match="no module of any known family"):
            reading(layout, allow_partial=allow_partial)


@pytest.mark.parametrize("name", ["model.diffusion_model.input_blocks.0.0.weight", "x.scale", "x.bias", "x"])
def test_checkpoint_is_refused_as_an_adapter(name: str) -> None:
    for allow_partial in (False, True):
        with pytest.raises(AdapterError, match="none of the 2 tensors is an adapter tensor"):
            read_state_dict({name: torch.ones(2, 2), f"y{name}": torch.ones(2, 2)}, {}, allow_partial=allow_partial)


def test_unknown_name_suggests_the_nearest() -> None:
    layout = small()
    layout.tensors |= {"lora_unet_double_blocks_3_img_attn_prof.alpha": torch.tensor(1.0)}
    with pytest.raises(AdapterError, match="nearest: lora_unet_double_blocks_3_img_attn_proj"):
        reading(layout)


def test_rows_that_cannot_be_split_evenly_are_refused() -> None:
    layout = Layout()
    layout.lora("lora_unet_single_blocks_37_linear1", (ModuleTarget("x"),), (UNIT * 7 + 1, INTO))
    with pytest.raises(AdapterError, match="29 rows cannot be cut into 7 equal units"):
        reading(layout)
    layout = Layout()
    layout.lora("lora_unet_final_layer_adaLN_modulation_1", (ModuleTarget("x"),), (5, INTO))
    layout.lora("lora_unet_single_blocks_37_modulation_lin", (ModuleTarget("y"),), (5, INTO))
    with pytest.raises(AdapterError, match="5 rows have no halves"):
        reading(layout)


def test_pickles_need_from_pickle(tmp_path) -> None:
    layout = dotted("sd15", "", original=False, naming="peft", only=("attn1",))
    torch.save(layout.tensors, tmp_path / "a.bin")
    with pytest.raises(UnsafeFileError, match="pickle"):
        read(tmp_path / "a.bin")
    with pytest.raises(AdapterError, match="no adapter file"):
        read(tmp_path)
    for place in (tmp_path, tmp_path / "a.bin"):
        assert_same(changes(read(place, from_pickle=True).adapter), layout.want)


def test_shapes_come_from_the_base_and_are_checked() -> None:
    """A convolution's LoHa can be stored as a matrix; the base gives the kernel size."""
    layout, name = Layout(), "unet.down_blocks.0.resnets.0.conv1"
    text = f"lora_unet_{flat(name.removeprefix('unet.'))}"
    shapes = {"w1_a": (4, 2), "w1_b": (2, 54), "w2_a": (4, 2), "w2_b": (2, 54)}
    layout.tensors = {f"{text}.hada_{n}": layout.random(*shape) for n, shape in shapes.items()}
    base = Structure({name: "conv"}, {f"{name}.weight": (4, 6, 3, 3)})
    assert read_state_dict(layout.tensors, {}, base=base).adapter.deltas[f"{name}.weight"].shape == (4, 6, 3, 3)
    wrong = Structure({name: "conv"}, {f"{name}.weight": (4, 7, 3, 3)})
    with pytest.raises(AdapterError, match=r"the base's is \(4, 7, 3, 3\)"):
        read_state_dict(layout.tensors, {}, base=wrong)
    other = Structure({"unet.conv_in": "conv"}, {"unet.conv_in.weight": (4, 4, 3, 3)})
    with pytest.raises(AdapterError, match=r"unet\.down_blocks\.0\.resnets\.0\.conv1: no such module in the base"):
        read_state_dict(layout.tensors, {}, base=other)


def test_bare_denoiser_can_be_the_base(tmp_path) -> None:
    """Module names of such a base have no component prefix; shapes are still checked."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2)
    layout, text = Layout(), "lora_unet_single_blocks_0_linear1"
    block = "transformer.single_transformer_blocks.0"
    places = families()["flux1"].originals["single_blocks.0.linear1"]
    layout.lora(text, places, (7 * 256, 256), alpha=1.0)
    found = read_state_dict(layout.tensors, {}, base=model)
    assert sorted(found.used) == sorted(f"{block}.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    narrow = Layout()
    narrow.lora(text, places, (7 * 128, 128), alpha=1.0)
    with pytest.raises(AdapterError, match=r"the pair is for a weight \(128, 128\), the base's is \(256, 256\)"):
        read_state_dict(narrow.tensors, {}, base=model)
    further = Layout()
    further.lora("lora_unet_single_blocks_1_linear2", (ModuleTarget(f"{block}.x"),), (256, 5 * 256), alpha=1.0)
    with pytest.raises(AdapterError, match=r"single_transformer_blocks\.1\.proj_out: no such module in the base"):
        read_state_dict(further.tensors, {}, base=model)


FLUX_SHAPES = [
    ("single_blocks.0.linear1", (7 * 32, 32), "flux1"),
    ("single_blocks.0.linear1", (9 * 32, 32), "flux2"),
    ("single_blocks.0.linear2", (32, 5 * 32), "flux1"),
    ("single_blocks.0.linear2", (32, 4 * 32), "flux2"),
    ("double_blocks.0.txt_mlp.2", (32, 3 * 32), "flux2"),
    ("double_blocks.0.img_mlp.0", (4 * 32, 32), "flux1"),
    ("double_blocks.0.img_attn.qkv", (3 * 6144, 6144), "flux2"),
]


@pytest.mark.parametrize(("name", "shape", "family"), FLUX_SHAPES)
def test_flux_1_and_2_are_distinguished_by_shape_ratios(name: str, shape: tuple[int, int], family: str) -> None:
    for text in (f"diffusion_model.{name}", f"lora_unet_{flat(name)}"):
        choice = choose_family({text: shape})
        assert choice.family is families()[family], choice.reasons


def test_metadata_breaks_family_ties_only() -> None:
    qkv = {f"diffusion_model.double_blocks.{i}.img_attn.qkv": None for i in (1, 3)}
    assert choose_family(qkv).family is families()["flux1"]  # without a known width, the more common family is chosen
    assert choose_family(qkv, "flux2").family is families()["flux2"]
    choice = choose_family({f"diffusion_model.double_blocks.{i}.img_attn.qkv": None for i in range(5)}, "flux1")
    assert choice.family is families()["flux2"]  # FLUX.2 klein has 5 such blocks
    choice = choose_family({**qkv, "diffusion_model.double_blocks.18.img_attn.qkv": None}, "flux2")
    assert choice.family is families()["flux1"]
    assert "the metadata says flux2" in choice.reasons[-1]


KEYS = sorted(small().tensors)


@settings(deadline=None)
@given(st.sets(st.sampled_from(KEYS), max_size=len(KEYS) - 3), st.data())
def test_every_tensor_of_a_mutated_file_is_accounted_for(gone: set[str], data) -> None:
    """With allow_partial, each key is in one of `used`, `unused` and `unpaired`."""
    tensors = {k: t for k, t in small().tensors.items() if k not in gone}
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3, unique=True)):
        new = data.draw(st.sampled_from([f"x.{key}", f"{key}.weight", key.replace("double", "triple")]))
        tensors[new] = tensors.pop(key)
    if not any(k.replace("_down", "_up") in tensors for k in tensors if k in KEYS and k.endswith("lora_down.weight")):
        with pytest.raises(AdapterError, match=r"the file contains no adapter tensors|none of the"):
            read_state_dict(tensors, {}, allow_partial=True)
        return
    found = read_state_dict(tensors, {}, allow_partial=True)
    lists = [{k for keys in found.used.values() for k in keys}, set(found.unused), set(found.unpaired)]
    assert set().union(*lists) == set(tensors)
    assert sum(map(len, lists)) == len(tensors)
    complete = not found.unused and not found.unpaired
    if complete:
        read_state_dict(tensors, {})
    else:
        with pytest.raises(AdapterError):
            read_state_dict(tensors, {})
