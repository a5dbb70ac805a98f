"""Check a base's config.json; errors name the file, key, value and valid values.

    fields = read_config_json(folder / "config.json")     the file's JSON object, after a check
    check_config(fields, where)                           check a JSON object
    layer_heads(config)                                   the attention heads of each layer of a model

Only the families and denoisers named in this module are checked; others are left to transformers and
diffusers. A null value counts as missing. `check_config` needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from veneer.errors import BaseError, ConfigError

_Fields = Mapping[str, Any]

TEXT_TYPES = (
    "gemma3_text", "llama", "llama4_text", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe",
)  # fmt: skip
"""The `model_type` values of the language models that are checked."""
PLANNED_DENOISERS = {
    "UNet2DConditionModel": "sdxl", "FluxTransformer2DModel": "flux", "Flux2Transformer2DModel": "flux2",
    "SD3Transformer2DModel": "sd3", "ZImageTransformer2DModel": "z-image",
    "QwenImageTransformer2DModel": "qwen-image",
}  # fmt: skip
"""diffusers class -> the denoiser's name in the planner's table.

"sdxl" stands for every U-Net, including SD 1.5's."""

LOADED_BYTES = {"nf4": 0.6, "int8": 1.1}
"""Estimated bytes per weight of a quantized image component.

The estimate includes the quantization constants and the weights that are not quantized."""

_Rule = tuple[Callable[[Any], bool], str]
"""A function that checks a value, and a description of valid values."""

_MOST = (1 << 31) - 1

LLAMA_CPP_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gemma4_text": "gemma4"}
"""transformers' model_type -> llama.cpp's architecture, if the two names differ."""


def _is_size(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _size(most: int = _MOST, least: int = 1) -> _Rule:
    return partial(_is_size, least=least, most=most), f"an integer from {least:,} to {most:,}"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list(accepts: Callable[[Any], bool], expected: str, *, empty: bool = True) -> _Rule:
    return lambda v: isinstance(v, list | tuple) and all(map(accepts, v)) and (empty or bool(v)), expected


_is_number: Callable[[Any], bool] = _size(least=0)[0]
_ACTIVATIONS = ("hidden_act", "hidden_activation")
_ROTARY = ("rope_scaling", "rope_parameters")
_RULES: dict[_Rule, tuple[str, ...]] = {
    _size(): (
        "hidden_size", "intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "num_local_experts", "num_experts", "num_experts_per_tok",
        "max_position_embeddings", "sliding_window", "sliding_window_pattern", "decoder_sparse_step",
        "interleave_moe_layer_step", "joint_attention_dim", "pooled_projection_dim", "in_channels", "n_heads",
        "cross_attention_dim", "projection_class_embeddings_input_dim", "addition_time_embed_dim", "vae_scale",
        "timestep_guidance_channels", "picture", "text_tokens", "caption_projection_dim", "pos_embed_max_size",
        "dim", "cap_feat_dim", "patch_size", "out_channels",
    ),
    _size(10_000): (
        "num_hidden_layers", "num_layers", "num_single_layers", "layers_per_block", "n_layers", "n_refiner_layers",
    ),
    _size(least=0): ("vae",),
    (lambda value: isinstance(value, bool), "true or false"): (
        "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "guidance_embeds",
    ),
    (_is_positive, "a number above 0"): ("rope_theta", "rms_norm_eps", "rope_local_base_freq", "mlp_ratio"),
    (_is_text, "the name of an activation, such as silu"): _ACTIVATIONS,
    _list(_is_number, "a list of layer numbers, such as [0, 4]"): (
        "mlp_only_layers", "moe_layers", "no_rope_layers", "dual_attention_layers",
    ),
    _list(_is_text, "a list of full_attention, sliding_attention, chunked_attention"): ("layer_types",),
    (lambda value: isinstance(value, Mapping) and all(_is_size(n, 0, 1 << 50) for n in value.values()),
     "an object whose values are parameter counts"): ("encoders",),
}  # fmt: skip
_OWN_HEAD_DIM = ("gemma3_text", "qwen3", "qwen3_moe")
"""Families whose config class has a default head size."""
_WIDTHS = _list(_size()[0], "a width for each level, such as [320, 640, 1280]", empty=False)
_LEVELS = {
    "transformer_layers_per_block": (_is_number, "[1, 2, 10]"),
    "attention_head_dim": (_is_number, "[5, 10, 20]"),
    "down_block_types": (_is_text, '["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]'),
}
"""U-Net fields with one value per level -> (check of one value, example)."""


def read_config_json(file: Path) -> dict[str, Any]:
    """Read and check a config.json, and return its JSON object.

    Raises BaseError if the file cannot be read, ConfigError for an invalid value."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"the config of this base cannot be read as JSON: {error}", where=str(file)) from None
    if not isinstance(fields, dict):
        raise BaseError("the config of this base is not a JSON object", where=str(file))
    check_config(fields, str(file))
    return fields


def check_config(fields: _Fields, where: str) -> None:
    """Raise ConfigError for the first invalid value.

    `where`: the file or base name that the error reports."""
    if (inner := _text_part(fields)) is not None:
        check_config(inner, f"{where}: text_config")
        return
    kind = fields.get("model_type") or PLANNED_DENOISERS.get(str(fields.get("_class_name")))
    check = _Check({key: value for key, value in fields.items() if value is not None}, where)
    if kind not in TEXT_TYPES and kind not in PLANNED_DENOISERS.values():
        return
    for rule, keys in _RULES.items():
        for key in keys:
            check.check(key, rule)
    (check.text if kind in TEXT_TYPES else check.denoiser)(str(kind))


def layer_heads(config: Any) -> list[tuple[int, int, int]]:
    """Return (attention heads, key-value heads, head size) for each layer.

    `config`: the transformers config of a language model. Layers can differ: in Gemma 4, full attention has
    wider heads."""
    heads_of_layers = []
    for layer in config.per_layer_config:
        heads = getattr(layer, "num_attention_heads", None) or 1
        kv = getattr(layer, "num_key_value_heads", None) or heads
        size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        heads_of_layers.append((int(heads), int(kv), int(size)))
    return heads_of_layers


def _text_part(fields: _Fields) -> dict[str, Any] | None:
    """Return the language model's part of a multimodal config; None for other configs."""
    inner = fields.get("text_config")
    if not isinstance(inner, Mapping):
        return None
    return {**inner, "model_type": inner.get("model_type") or f"{fields.get('model_type')}_text", "text_config": None}


class _Check:
    def __init__(self, fields: _Fields, where: str) -> None:
        self.fields, self.where = fields, where

    def text(self, kind: str) -> None:
        get = self.fields.get
        for key in _ROTARY:
            self.rotary(key, get(key))
        layers, kinds = get("num_hidden_layers"), get("layer_types")
        if kinds is not None and layers is not None and len(kinds) != layers:
            self.refuse(
                "layer_types", f"a layer type for each of num_hidden_layers = {layers} layers, not {len(kinds)}"
            )
        heads, groups, hidden = get("num_attention_heads"), get("num_key_value_heads"), get("hidden_size")
        if heads is not None and groups is not None and heads % groups:
            self.refuse("num_key_value_heads", f"a number that divides num_attention_heads = {heads}")
        has_head_dim = get("head_dim") is not None or kind in _OWN_HEAD_DIM
        if heads is not None and hidden is not None and not has_head_dim and hidden % heads:
            self.refuse("num_attention_heads", f"a number that divides hidden_size = {hidden}, or a head_dim")
        experts = get("num_local_experts", get("num_experts"))
        if experts is not None and get("num_experts_per_tok", 1) > experts:
            self.refuse("num_experts_per_tok", f"at most the number of experts, {experts}")

    def denoiser(self, kind: str) -> None:
        get = self.fields.get
        if kind != "sdxl":
            self.check("attention_head_dim", _size())
            return
        if "model_type" not in self.fields and get("addition_embed_type") not in ("text_time", None):
            fix = "--base sdxl, flux.1-dev, or another name listed by `veneer plan --list`"
            raise ConfigError("only SD1.5's and SDXL's U-Nets can be planned", where=self.where, fix=fix)
        self.check("block_out_channels", _WIDTHS)
        widths = get("block_out_channels")
        for key, (accepts, example) in _LEVELS.items():
            if isinstance(get(key), int) and key != "down_block_types":  # SD 1.5 gives one value for all levels.
                self.check(key, _size())
                continue
            self.check(key, _list(accepts, f"a value for each level, such as {example}", empty=False))
            if widths is not None and key in self.fields and len(self.fields[key]) != len(widths):
                self.refuse(key, f"a value for each of the {len(widths)} widths of block_out_channels")

    def check(self, key: str, rule: _Rule) -> None:
        if key in self.fields and not rule[0](self.fields[key]):
            self.refuse(key, rule[1])

    def rotary(self, key: str, settings: Any, *, layers: bool = True) -> None:
        """Check rotary settings; with `layers`, also the settings for each layer type."""
        if settings is None:
            return
        if not isinstance(settings, Mapping):
            self.refuse(key, 'an object, such as {"rope_type": "linear", "factor": 2.0}, or null')
        for name in ("rope_type", "type"):
            if not isinstance(settings.get(name) or "", str):
                self.refuse(key, f"a name as its {name}, such as linear")
        if (factor := settings.get("factor")) is not None and not _is_positive(factor):
            self.refuse(f"{key}.factor", "a number above 0", factor)
        for each in settings.values() if layers else ():
            if isinstance(each, Mapping):
                self.rotary(key, each, layers=False)

    def refuse(self, key: str, expected: str, value: Any = None) -> None:
        text = json.dumps(self.fields[key] if value is None else value, ensure_ascii=False, default=str)
        text = text if len(text) <= 60 else text[:60] + "…"
        fix = "correct the file, or download the base's config.json again"
        raise ConfigError(f"{key} is {text}, not {expected}", where=f"{self.where}: {key}", fix=fix)
