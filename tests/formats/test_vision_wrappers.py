"""A language model and its vision-language wrapper use different module names.

An adapter of either model can be read for the other, under the base's real names. PEFT does the same for
names from before transformers 4.52."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.attached import attached
from tests.edits import edit_json
from veneer.errors import AdapterError
from veneer.formats import peft

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


FULL = {"layer_types": ["full_attention"] * 2}
LLAMA_4 = {"intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [], "bos_token_id": 1, "eos_token_id": 2}
TOWER = {**VISION, "head_dim": 8}
WRAPPERS: dict[str, tuple[str, str | None, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", "Gemma3", {**FULL, "query_pre_attn_scalar": 8}, VISION, {"mm_tokens_per_image": 4}),
    "gemma4": (
        "Gemma4", "Gemma4", {**FULL, "global_head_dim": 8, "hidden_size_per_layer_input": 0}, TOWER,
        {"audio_config": None},
    ),
    "mistral3": (
        "Mistral3", "Mistral", {"model_type": "mistral"}, {"model_type": "pixtral", **TOWER}, {"spatial_merge_size": 1}
    ),
    "llava": ("Llava", "Llama", {"model_type": "llama"}, {"model_type": "clip_vision_model", **VISION}, {}),
    "qwen2.5-vl": ("Qwen2_5_VL", None, ROPE, QWEN, {}),
    "qwen3-vl": ("Qwen3VL", None, ROPE, {**QWEN, "deepstack_visual_indexes": [], "num_position_embeddings": 16}, {}),
    "qwen3.5": ("Qwen3_5", "Qwen3_5", {**FULL, **ROPE}, {**QWEN, "num_position_embeddings": 16}, {}),
    "llama4": ("Llama4", "Llama4", LLAMA_4, {**VISION, "vision_output_dim": 16}, {}),
}  # fmt: skip
"""Wrapper class, text model class, text and vision configurations, other arguments."""
BOTH = [name for name, (_, text, *_) in WRAPPERS.items() if text]


def whole(name: str) -> nn.Module:
    kind, _, text, vision, more = WRAPPERS[name]
    config = getattr(transformers, f"{kind}Config")(
        text_config=copy.deepcopy(TEXT | text), vision_config=copy.deepcopy(vision), **more
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config).double().eval()


def text(name: str) -> nn.Module:
    """Return the text model as a separate model, with its weights from the wrapper."""
    outer = whole(name)
    net = getattr(transformers, f"{WRAPPERS[name][1]}ForCausalLM")(outer.config.get_text_config()).double().eval()
    inner = dict(outer.named_parameters())
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            stem = key.removeprefix("model.")
            found = [n for n in inner if n.endswith(f"language_model.{stem}") or n.endswith(f"language_model.{key}")]
            found = found or [n for n in inner if n == key]
            found = found or [n for n in inner if n.endswith("language_model.embed_tokens.weight")]  # tied to the head
            parameter.copy_(inner[found[0]])
    return net


def outputs(net: nn.Module) -> torch.Tensor:
    ids = torch.randint(1, 50, (1, 7), generator=torch.Generator().manual_seed(5))
    if type(inner := getattr(net, "base_model", net)).__name__ == "LoraModel":
        inner = inner.model
    if "Llama4ForConditional" in type(inner).__name__:  # the wrapper's forward pass needs images
        net = inner.language_model
    with torch.no_grad():
        return net(input_ids=ids).logits


def made(net: nn.Module, path: Path) -> torch.Tensor:
    from peft import LoraConfig, get_peft_model

    from tests.formats.twins import randomise

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        targets = r".*layers\.\d+\.(self_attn\.(q_proj|v_proj)|(mlp|feed_forward)\.down_proj)"
        if any("vision" in n or "visual" in n for n, _ in net.named_modules()):
            targets = r"(model\.language_model|language_model\.model)\." + targets.removeprefix(".*")
        wrapped = get_peft_model(net, LoraConfig(r=3, target_modules=targets))
        randomise(wrapped)
        wrapped.save_pretrained(str(path))
        return outputs(wrapped.eval())


def ours(net: nn.Module, path: Path) -> torch.Tensor:
    adapter = peft.read_folder(path, net)
    modules = dict(net.named_modules())
    assert adapter.pairs
    assert all(name in modules for name in adapter.pairs)
    with attached(net, adapter):
        return outputs(net)


@pytest.mark.parametrize(("trained", "used"), [(text, whole), (whole, text)], ids=["of text", "of the wrapper"])
@pytest.mark.parametrize("name", BOTH)
def test_vision_wrapper_and_text_model_share_adapters(tmp_path, name, trained, used):
    want = made(trained(name), tmp_path / "a")
    torch.testing.assert_close(ours(used(name), tmp_path / "a"), want, rtol=1e-8, atol=1e-8)


OLD = {
    "gemma3": ("model.language_model.", "language_model.model."),
    "mistral3": ("model.language_model.", "language_model.model."),
    "llava": ("model.language_model.", "language_model.model."),
    "qwen2.5-vl": ("model.language_model.", "model."),
}


@pytest.mark.parametrize("name", OLD)
def test_names_before_transformers_4_52_are_renamed(tmp_path, name):
    want = made(whole(name), tmp_path / "a")
    new, old = OLD[name]
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k.replace(new, old): t for k, t in load_file(path).items()}, path)
    targets = r".*layers\.\d+\.(self_attn\.(q_proj|v_proj)|mlp\.down_proj)"
    edit_json(tmp_path / "a" / "adapter_config.json", target_modules=targets)
    torch.testing.assert_close(ours(whole(name), tmp_path / "a"), want, rtol=1e-8, atol=1e-8)
    assert any(
        "names of another class of the same model" in n for n in peft.load_folder(tmp_path / "a", whole(name)).notes
    )


def test_vision_tower_pairs_are_refused_on_text_models(tmp_path):
    net = whole("gemma3")
    tower = next(n for n, m in net.named_modules() if "vision" in n and n.endswith("q_proj"))
    shapes = {"A": (2, 16), "B": (16, 2)}
    tensors = {f"base_model.model.{tower}.lora_{half}.weight": torch.ones(s) for half, s in shapes.items()}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [tower]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    peft.read_folder(tmp_path / "a", net)
    with pytest.raises(AdapterError, match="no such module"):
        peft.read_folder(tmp_path / "a", text("gemma3"))
