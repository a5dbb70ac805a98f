"""Converted files: names, fused rows, scales, refusals and bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.formats.image_adapters import IN, UNIT, by_hand, pair_for, random_adapter, same_changes
from veneer.core.adapter import Adapter, Card
from veneer.errors import AdapterError, ConfigError
from veneer.files.hashes import verify_hashes
from veneer.files.safetensors import read_header, read_tensors
from veneer.formats.convert import TARGETS, encode, write
from veneer.formats.read import read
from veneer.formats.topology import families

SDXL, FLUX, SD15 = (families()[n] for n in ("sdxl", "flux1", "sd15"))
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
BLOCK = "transformer.transformer_blocks.0"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"

NAMES = [
    ("sd15", f"unet.{TO_Q.replace('blocks.1.attn1', 'blocks.0.attn1')}", "kohya",
     "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
    ("sd15", f"unet.{TO_Q.replace('blocks.1.attn1', 'blocks.0.attn1')}", "comfyui",
     "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
    ("sdxl", f"unet.{TO_Q}", "kohya", "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"),
    ("sdxl", f"unet.{TO_Q}", "comfyui", "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q"),
    ("sdxl", f"unet.{TO_Q}", "diffusers", f"unet.{TO_Q}"),
    ("sdxl", "unet.up_blocks.0.upsamplers.0.conv", "kohya", "lora_unet_output_blocks_2_2_conv"),
    ("sdxl", "unet.mid_block.resnets.1.time_emb_proj", "kohya", "lora_unet_middle_block_2_emb_layers_1"),
    ("sdxl", "unet.add_embedding.linear_1", "comfyui", "diffusion_model.label_emb.0.0"),
    ("sdxl", "text_encoder_2.text_projection", "kohya", "lora_te2_text_projection"),
    ("sdxl", f"text_encoder.{CLIP}", "kohya", f"lora_te1_{CLIP.replace('.', '_')}"),
    ("sdxl", f"text_encoder_2.{CLIP}", "kohya", f"lora_te2_{CLIP.replace('.', '_')}"),
    ("sdxl", f"text_encoder.{CLIP}", "comfyui", f"text_encoders.clip_l.transformer.{CLIP}"),
    ("sdxl", f"text_encoder_2.{CLIP}", "comfyui", f"text_encoders.clip_g.transformer.{CLIP}"),
    ("flux1", f"{BLOCK}.ff_context.net.2", "kohya", "lora_unet_double_blocks_0_txt_mlp_2"),
    ("flux1", "transformer.time_text_embed.guidance_embedder.linear_2", "kohya", "lora_unet_guidance_in_out_layer"),
    ("flux1", "transformer.single_transformer_blocks.3.proj_out", "comfyui", "diffusion_model.single_blocks.3.linear2"),
    ("flux1", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "kohya",
     "lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
    ("flux1", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "comfyui",
     "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
    ("flux2", "transformer.single_transformer_blocks.1.attn.to_qkv_mlp_proj", "kohya",
     "lora_unet_single_blocks_1_linear1"),
    ("sd3", f"{BLOCK}.attn.to_out.0", "kohya", "lora_unet_joint_blocks_0_x_block_attn_proj"),
    ("qwen-image", f"{BLOCK}.attn.add_q_proj", "kohya", "lora_unet_transformer_blocks_0_attn_add_q_proj"),
    ("qwen-image", f"{BLOCK}.attn.add_q_proj", "comfyui", "diffusion_model.transformer_blocks.0.attn.add_q_proj"),
    ("z-image", "transformer.layers.0.attention.to_q", "kohya", "lora_unet_layers_0_attention_to_q"),
    ("z-image", "transformer.layers.0.attention.to_out.0", "comfyui", "diffusion_model.layers.0.attention.out"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "module", "to", "name"), NAMES)
def test_names(family, module, to, name):
    pair = pair_for(families()[family], module, rank=3, scale=0.5)
    out = encode(Adapter({module: pair}), to, family=family).tensors
    down, up = ("lora_down", "lora_up") if to == "kohya" else ("lora_A", "lora_B")
    extra = set() if to == "diffusers" else {f"{name}.alpha"}
    assert set(out) == {f"{name}.{down}.weight", f"{name}.{up}.weight", *extra}
    assert torch.equal(out[f"{name}.{down}.weight"], pair.A)
    assert torch.equal(out[f"{name}.{up}.weight"], pair.B)
    for key in extra:
        assert out[key].item() == 1.5


# -- fused projections -----------------------------------------------------------------------------------------------

QKV = [f"{BLOCK}.attn.to_{p}" for p in "qkv"]
LINEAR1 = [f"transformer.single_transformer_blocks.0.{p}" for p in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]


def test_parts_sharing_A_join_at_the_same_rank():
    adapter = Adapter({m: pair_for(FLUX, m, 2, 0.5, shared="A") for m in QKV})
    out = encode(adapter, "kohya").tensors
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert out[f"{name}.alpha"].item() == 1.0
    assert torch.equal(out[f"{name}.lora_down.weight"], adapter.pairs[QKV[0]].A)
    assert torch.equal(out[f"{name}.lora_up.weight"], torch.cat([adapter.pairs[m].B for m in QKV]))
    assert not encode(adapter, "kohya").notes


def test_parts_with_separate_a_join_block_diagonally():
    """linear1 fuses q, k, v and the feed-forward, which is 4 times as wide.

    The ranks of the parts add up, and their different scales are applied to B."""
    scales = dict(zip(LINEAR1, (0.5, 1.0, 2.0, 0.25), strict=True))
    adapter = Adapter({m: pair_for(FLUX, m, 1 + i, scales[m]) for i, m in enumerate(LINEAR1)})
    encoded = encode(adapter, "kohya")
    down, up, alpha = (
        encoded.tensors[f"lora_unet_single_blocks_0_linear1.{s}"]
        for s in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    assert down.shape == (1 + 2 + 3 + 4, IN)
    assert up.shape == (7 * UNIT, 10)
    whole = (alpha.item() / 10) * up.double() @ down.double()
    rows = [slice(0, UNIT), slice(UNIT, 2 * UNIT), slice(2 * UNIT, 3 * UNIT), slice(3 * UNIT, None)]
    for module, own in zip(LINEAR1, rows, strict=True):
        torch.testing.assert_close(whole[own], by_hand(adapter.pairs[module]), rtol=1e-7, atol=1e-7)
    assert torch.count_nonzero(up) == UNIT * (1 + 2 + 3) + 4 * UNIT * 4
    assert encoded.notes == ["1 fused projections join parts with separate A: the ranks add up, and the file grows"]


def test_joined_qkv_is_not_read_as_split_qkv(tmp_path):
    """Here, q, k and v have rank 4 and scale 1/3, and are joined to rank 12 with alpha 4.

    With split_qkv, sd-scripts would write the same tensors for q, k and v with scale 1."""
    adapter = Adapter({m: pair_for(FLUX, m, 4, 1 / 3) for m in QKV})
    adapter.pairs["transformer.x_embedder"] = pair_for(FLUX, "transformer.x_embedder", 4, 1.0)
    out = tmp_path / "it.safetensors"
    write(adapter, out, "kohya")
    tensors, metadata = read_tensors(out)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"].item() == 4
    assert metadata["ss_network_args"] == '{"split_qkv": "False"}'
    same_changes(read(out).adapter, adapter)


def test_unchanged_part_is_written_as_zero_rows():
    adapter = Adapter({QKV[1]: pair_for(FLUX, QKV[1], 3)})
    out = encode(adapter, "comfyui", family="flux1").tensors
    up = out["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"]
    assert up.shape == (3 * UNIT, 3)
    assert torch.equal(up[UNIT : 2 * UNIT], adapter.pairs[QKV[1]].B)
    assert not up[:UNIT].any()
    assert not up[2 * UNIT :].any()


def test_final_layer_swaps_its_halves():
    module = "transformer.norm_out.linear"
    pair = pair_for(FLUX, module)
    up = encode(Adapter({module: pair}), "kohya", family="flux1").tensors[
        "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"
    ]
    assert torch.equal(up, torch.cat([pair.B[UNIT:], pair.B[:UNIT]]))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
def test_bytes_are_reproducible_and_hashes_valid(to, tmp_path):
    adapter = random_adapter(SDXL, lambda m: m.startswith("unet."))
    adapter.card = Card(trigger_words=["sks dog"], licence="MIT")
    one, two = (write(adapter, tmp_path / d / "it.safetensors", to) for d in "ab" if (tmp_path / d).mkdir() is None)
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.files == two.files
    assert one.hashes.autov3 == read_header(one.path).metadata["sshs_model_hash"][:12]
    assert all(check.holds for check in verify_hashes(one.path))
    metadata = read_header(one.path).metadata
    assert metadata["modelspec.trigger_phrase"] == "sks dog"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    back = read(one.path)
    assert back.family == "sdxl"
    assert back.adapter.digest() == one.digest
    assert back.adapter.card.trigger_words == ["sks dog"]
    assert back.adapter.card.licence == "MIT"


@pytest.mark.parametrize(("family", "count"), [(SDXL, 722 + 72 + 192), (FLUX, 494 + 72)])
def test_round_trip_through_diffusers_restores_the_bytes(family, count, tmp_path):
    """Converts kohya -> diffusers -> kohya.

    Covers all attention modules of SDXL and its text encoders, and all linears in FLUX.1's blocks and its
    CLIP. Parts of a fused projection share one A, as in a file that was fused from the start."""
    shared = {p.module: name for name, places in family.originals.items() if len(places) > 1 for p in places}
    where = r"attentions|self_attn|mlp|transformer_blocks"
    modules = [m for m, k in family.modules.items() if k == "linear" and re.search(where, m)]
    assert len(modules) == count
    adapter = Adapter({m: pair_for(family, m, 1, 0.5, shared.get(m, "")) for m in modules})
    first, between, last = (tmp_path / f"{n}.safetensors" for n in ("a", "b", "c"))
    write(adapter, first, "kohya")
    write(read(first).adapter, between, "diffusers")
    write(read(between).adapter, last, "kohya")
    ours, theirs = read_tensors(first)[0], read_tensors(last)[0]
    assert len(ours) == 3 * (count - sum(len(p) - 1 for p in family.originals.values()))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[k]) for k, t in ours.items())
    assert read_header(first).metadata["sshs_model_hash"] == read_header(last).metadata["sshs_model_hash"]


def test_rounding_error_is_reported_and_matches_the_file(tmp_path):
    adapter = random_adapter(SD15, lambda m: m.startswith("unet."))
    written = write(adapter, tmp_path / "it.safetensors", "kohya", family="sd15", dtype="bfloat16")
    assert re.search(r"rounded to bfloat16: ΔW moves by up to 0\.00\d+", written.notes[0])
    same_changes(read(written.path).adapter, adapter.mapped(lambda t: t.bfloat16()))
    with pytest.raises(ConfigError, match="no dtype 'int8'"):
        encode(adapter, "kohya", dtype="int8")
    huge = adapter.mapped(lambda t: t * 1e6)
    with pytest.raises(AdapterError, match="infinity"):
        encode(huge, "kohya", family="sd15", dtype="float16")


def test_failed_conversion_leaves_no_files(tmp_path, monkeypatch):
    adapter = random_adapter(SD15, lambda m: m.startswith("unet."))
    monkeypatch.setattr("veneer.formats.convert.differences", lambda *_: ["unet.conv_in: lost"])
    for to in TARGETS[:4]:
        with pytest.raises(AdapterError, match="would not come back the same"):
            write(adapter, tmp_path / ("it" if to == "peft" else "it.safetensors"), to, family="sd15")
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    ("to", "name", "why"),
    [
        ("kohya", "it", r"called …\.safetensors"),
        ("diffusers", "it.pt", r"called …\.safetensors"),
        ("gguf", "it.safetensors", r"called …\.gguf"),
        ("peft", "it.safetensors", "a file's name"),
        ("comfyui", "folder.safetensors", "a folder of this name"),
    ],
)
def test_a_file_name_that_contradicts_the_layout_is_refused(to, name, why, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(AdapterError, match=why):
        write(random_adapter(SD15, lambda m: m.startswith("unet.")), tmp_path / name, to, family="sd15")


def test_split_and_rejoin_restores_ranks_and_bytes(tmp_path):
    adapter = Adapter({m: pair_for(FLUX, m, 2, 1.0) for m in [*LINEAR1, *QKV[:2]]})
    first, between, last = (tmp_path / f"{n}.safetensors" for n in ("a", "b", "c"))
    write(adapter, first, "kohya", family="flux1")
    assert {p.rank for p in read(first).adapter.pairs.values()} == {8, 4}
    written = write(read(first).adapter, between, "diffusers")
    assert written.ranks == {1: 1, 2: 6}  # to_v is unchanged, so its pair is zero and has rank 1
    same_changes(read(between).adapter, adapter)
    write(read(between).adapter, last, "kohya")
    ours, theirs = read_tensors(first)[0], read_tensors(last)[0]
    linear1 = "lora_unet_single_blocks_0_linear1"
    assert all(torch.equal(t, theirs[k]) for k, t in ours.items() if k.startswith(linear1))
    same_changes(read(last).adapter, adapter)
