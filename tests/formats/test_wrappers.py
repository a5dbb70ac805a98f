"""A language model by itself and inside a vision-language one have other names for the same modules: read onto the
base's real ones, both ways, and as PEFT does for names of before transformers 4.52."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.core.attach import attach
from veneer.errors import AdapterError
from veneer.formats import peft

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def _gemma3():
    own = {**TEXT, "query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2}
    return transformers.Gemma3Config(text_config=own, vision_config=VISION, mm_tokens_per_image=4)


def _gemma4():
    own = {**TEXT, "layer_types": ["full_attention"] * 2, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
    return transformers.Gemma4Config(text_config=own, vision_config={**VISION, "head_dim": 8}, audio_config=None)


def _mistral3():
    own = {"model_type": "mistral", **TEXT}
    vision = {"model_type": "pixtral", **VISION, "head_dim": 8}
    return transformers.Mistral3Config(text_config=own, vision_config=vision, spatial_merge_size=1)


def _llava():
    own, vision = {"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", **VISION}
    return transformers.LlavaConfig(text_config=own, vision_config=vision)


def _qwen25():
    return transformers.Qwen2_5_VLConfig(text_config={**TEXT, **ROPE}, vision_config=QWEN)


def _qwen3():
    vision = {**QWEN, "deepstack_visual_indexes": [], "num_position_embeddings": 16}
    return transformers.Qwen3VLConfig(text_config={**TEXT, **ROPE}, vision_config=vision)


def _qwen35():
    own = {**TEXT, "layer_types": ["full_attention"] * 2, **ROPE}
    return transformers.Qwen3_5Config(text_config=own, vision_config={**QWEN, "num_position_embeddings": 16})


def _llama4():
    own = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": []}
    own |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.Llama4Config(text_config=own, vision_config={**VISION, "vision_output_dim": 16})


WRAPPERS = {
    "gemma3": (_gemma3, "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
    "gemma4": (_gemma4, "Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    "mistral3": (_mistral3, "Mistral3ForConditionalGeneration", "MistralForCausalLM"),
    "llava": (_llava, "LlavaForConditionalGeneration", "LlamaForCausalLM"),
    "qwen2.5-vl": (_qwen25, "Qwen2_5_VLForConditionalGeneration", None),
    "qwen3-vl": (_qwen3, "Qwen3VLForConditionalGeneration", None),
    "qwen3.5": (_qwen35, "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    "llama4": (_llama4, "Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
}
BOTH = [name for name, (_, _, text) in WRAPPERS.items() if text]


def whole(name: str) -> nn.Module:
    make, kind, _ = WRAPPERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return getattr(transformers, kind)(make()).double().eval()


def text(name: str) -> nn.Module:
    """The text model alone, with the weights that it has inside the other."""
    make, _, kind = WRAPPERS[name]
    outer = whole(name)
    net = getattr(transformers, kind)(make().get_text_config()).double().eval()
    inner = dict(outer.named_parameters())
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            stem = key.removeprefix("model.")
            found = [n for n in inner if n.endswith(f"language_model.{stem}") or n.endswith(f"language_model.{key}")]
            found = found or [n for n in inner if n == key]
            found = found or [n for n in inner if n.endswith("language_model.embed_tokens.weight")]  # a tied head
            parameter.copy_(inner[found[0]])
    return net


def outputs(net: nn.Module) -> torch.Tensor:
    ids = torch.randint(1, 50, (1, 7), generator=torch.Generator().manual_seed(5))
    if type(inner := getattr(net, "base_model", net)).__name__ == "LoraModel":
        inner = inner.model
    if "Llama4ForConditional" in type(inner).__name__:  # this one's forward asks for pictures
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
    with attach(net) as attachment:
        attachment.add("a", adapter)
        attachment.use("a")
        return outputs(net)


@pytest.mark.parametrize("name", BOTH)
def test_an_adapter_of_the_text_model_acts_inside_the_wrapper(tmp_path, name):
    want = made(text(name), tmp_path / "a")
    torch.testing.assert_close(ours(whole(name), tmp_path / "a"), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", BOTH)
def test_an_adapter_of_the_wrappers_text_acts_on_the_text_model(tmp_path, name):
    want = made(whole(name), tmp_path / "a")
    torch.testing.assert_close(ours(text(name), tmp_path / "a"), want, rtol=1e-8, atol=1e-8)


OLD = {
    "gemma3": ("model.language_model.", "language_model.model."),
    "mistral3": ("model.language_model.", "language_model.model."),
    "llava": ("model.language_model.", "language_model.model."),
    "qwen2.5-vl": ("model.language_model.", "model."),
}


@pytest.mark.parametrize("name", OLD)
def test_names_of_before_transformers_4_52_are_the_ones_of_today(tmp_path, name):
    want = made(whole(name), tmp_path / "a")
    new, old = OLD[name]
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k.replace(new, old): t for k, t in load_file(path).items()}, path)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["target_modules"] = r".*layers\.\d+\.(self_attn\.(q_proj|v_proj)|mlp\.down_proj)"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(ours(whole(name), tmp_path / "a"), want, rtol=1e-8, atol=1e-8)
    assert any(
        "names of another class of the same model" in n for n in peft.load_folder(tmp_path / "a", whole(name)).notes
    )


def test_pairs_of_the_vision_tower_are_refused_on_the_text_model_with_their_names(tmp_path):
    net = whole("gemma3")
    tower = next(n for n, m in net.named_modules() if "vision" in n and n.endswith("q_proj"))
    tensors = {
        f"base_model.model.{n}.lora_{half}.weight": torch.ones(2, size) if half == "A" else torch.ones(size, 2)
        for n, size in ((tower, 16),)
        for half in "AB"
    }
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [tower]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    peft.read_folder(tmp_path / "a", net)
    with pytest.raises(AdapterError, match="no such module"):
        peft.read_folder(tmp_path / "a", text("gemma3"))
