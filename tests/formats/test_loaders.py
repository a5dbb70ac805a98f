"""Written files use the names that the target's loader looks for."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, FalconConfig, GPT2Config, MptConfig, PretrainedConfig

from tests.families import VOCAB, build
from tests.formats.image_adapters import pair_for
from tests.formats.twins import linear_pairs, our_outputs, outputs, peft_folder, peft_outputs
from veneer.adapters import mix as mixing
from veneer.core.adapter import Adapter, Pair
from veneer.errors import AdapterError
from veneer.formats import convert
from veneer.formats.loaders import unreachable
from veneer.formats.read import read
from veneer.formats.topology import families

BASES: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "gpt2": (GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32), ["c_attn", "c_fc"]),
    "falcon": (
        FalconConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        ["query_key_value", "dense_4h_to_h"],
    ),
    "bloom": (BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2), ["query_key_value"]),
    "mpt": (MptConfig(vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=2, max_seq_len=32), ["Wqkv", "up_proj"]),
}


def base(name: str) -> torch.nn.Module:
    return build(BASES[name][0]).double().eval()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("made", ["peft", "vllm", "mix", "resize"])
def test_peft_loads_text_adapters_named_transformer(tmp_path, name, made):
    want = peft_folder(base(name), tmp_path / "in", target_modules=BASES[name][1], r=4, lora_alpha=6)
    assert (want - outputs(base(name))).abs().max() > 0.005
    if made in ("peft", "vllm"):
        convert.write(read(tmp_path / "in").adapter, tmp_path / "out", made)
    elif made == "mix":
        mixing.mix_adapters([str(tmp_path / "in")], tmp_path / "out")
    else:
        mixing.resize(str(tmp_path / "in"), tmp_path / "out", rank=4)
    torch.testing.assert_close(peft_outputs(base(name), tmp_path / "out"), want, rtol=1e-5, atol=1e-5)
    ours = our_outputs(net := base(name), read(tmp_path / "out", base=net).adapter)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_language_models_are_not_image_models(tmp_path, to):
    adapter = linear_pairs(["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"])
    with pytest.raises(AdapterError, match="image models"):
        convert.encode(adapter, to)


def test_lost_name_level_is_refused_before_writing(tmp_path, monkeypatch):
    """veneer's reader accepts both spellings, so only the check of PEFT's own rule finds the lost level."""
    adapter = linear_pairs(["transformer.h.0.attn.c_attn"])
    monkeypatch.setattr(convert, "component_of", lambda name: "transformer")  # pretend that the component is a denoiser
    with pytest.raises(AdapterError, match=r"transformer\.h\.0\.attn\.c_attn: PEFT would find no tensors for it"):
        convert.write(adapter, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


IMAGE = {
    "sd15": [
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ],
    "sdxl": ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "text_encoder_2.text_projection"],
    "flux1": ["transformer.transformer_blocks.0.attn.to_q", "text_encoder.text_model.encoder.layers.0.mlp.fc1"],
    "sd3": ["transformer.transformer_blocks.0.attn.to_q", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"],
}  # fmt: skip
LEVELS = {
    "kohya": lambda key: key.replace("lora_unet_", "lora_unet_model_"),
    "comfyui": lambda key: key.replace("diffusion_model.", "model."),
    "diffusers": lambda key: key.partition(".")[2],
}


@pytest.mark.parametrize("family", IMAGE)
@pytest.mark.parametrize("to", LEVELS)
def test_image_names_are_checked_against_loaders(family, to):
    modules = IMAGE[family] if to != "diffusers" else IMAGE[family][:1]
    known = families()[family]
    pairs: dict[str, Pair] = {m: pair_for(known, m, rank=2) for m in modules}
    keys = list(convert.encode(Adapter(pairs), to, family=family).tensors)
    assert unreachable(modules, keys, to, known) == []
    assert any("would find no tensors for it" in p for p in unreachable(modules, map(LEVELS[to], keys), to, known))
    assert any("reads no such module" in p for p in unreachable(modules, map(LEVELS[to], keys), to, known))
