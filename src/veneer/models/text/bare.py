"""A language model without weights: of its config alone, on any device, "meta" or a made-up one too, and how it runs.

model = bare_text(config, dtype=torch.bfloat16, quantise="nf4", device="cuda")      as load_text would leave it
how = twin(config, dtype)                 what `fast` does with a small model of the same config, tried for real
with fast(model, like=how): …             the same on the one that has no values to try it with
groups = tied_weights(folder)             groups of parameters of a model folder that share one weight
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veneer.errors import BaseError, ConfigError, lacks_memory
from veneer.files.safetensors import strict_json
from veneer.files.weights import tensor_table
from veneer.models.loading import loading
from veneer.models.quantise import loop_over_experts, put_empty_codes
from veneer.models.swap import FastReport
from veneer.models.text.fast import fast

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def config_of(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config of a config.json's fields: of the language part, where the model sees pictures too. Raises
    ConfigError for a family that transformers does not know, and for fields that it refuses."""
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = dict(fields)
    kind = fields.pop("model_type", None)
    fields.pop("quantization_config", None)
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"transformers knows no model family {kind!r}", where="model_type")
    try:
        return AutoConfig.for_model(kind, **fields).get_text_config()
    except Exception as error:  # of any kind: huggingface-hub checks fields by classes of its own
        why = " ".join(str(error).split())
        raise ConfigError(f"transformers makes no configuration of this: {why}", where=f"a {kind} model") from error


def bare_text(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: str = "meta",
    quantise: str | None = None,
    buffers: bool = False,
) -> Any:
    """The causal language model of `config`, frozen, in eval mode, with weights that were never read.

    `quantise`: the linear weights are in codes, doubly quantised, as `load_text` would make them. `buffers`: buffers
    have their values, on the CPU, though the weights are on the meta device."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    made_on = init_empty_weights(include_buffers=False) if buffers else torch.device(device)
    with loading(), no_init_weights():
        with made_on:
            model = _built(config, dtype)
        model.tie_weights()
        if quantise:
            put_empty_codes(model, quantise, dtype, torch.device(device))
    if quantise:
        loop_over_experts(model, torch.device(device))
    return model.eval().requires_grad_(False)


def _built(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """transformers' model of a config. Raises ConfigError where it makes none of these fields."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # any type of error: each class parses its own fields
        if lacks_memory(error):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"transformers cannot build a model from this configuration: {why:.300}",
            where=f"a {config.model_type} model",
            fix="take the base's own config.json again",
        ) from error


def tied_weights(folder: Path) -> list[list[str]]:
    """Return groups of parameters that share one weight in the transformers model saved in `folder`.

    The model's class decides, even if config.json has no `tie_word_embeddings`; the model is built without weights.
    Returns [] for a folder without a transformers config.json. If transformers does not know the family and only one
    stored matrix has a row for every token, this matrix counts as shared with the head unless config.json says
    otherwise."""
    import transformers

    file = folder / "config.json"
    fields = strict_json(file.read_bytes(), where=str(file)) if file.is_file() else {}
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind is None:
        return []
    if kind not in transformers.CONFIG_MAPPING:
        rows = [
            t.name for t in tensor_table(folder) if t.shape[:1] == (fields.get("vocab_size"),) and len(t.shape) == 2
        ]
        return [rows] if len(rows) == 1 and fields.get("tie_word_embeddings", True) else []
    named = next(iter(fields.get("architectures") or ()), "")
    built = getattr(transformers, str(named), None) or transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with loading(), torch.device("meta"):
            model = built._from_config(config) if hasattr(built, "_from_config") else built.from_config(config)
    except Exception as error:  # any type of error: each class parses its own fields
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise BaseError(
            f"transformers cannot build a model from this configuration: {why:.300}", where=str(file)
        ) from error
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def twin(config: PreTrainedConfig, dtype: torch.dtype) -> FastReport:
    """What `fast` swaps on a small model of this config, and what it leaves and why."""
    with fast(small_text(config, dtype)) as how:
        return how


def small_text(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A small model of this config with random weights on the CPU, to find out by trying how the large one runs.

    Small: few and narrow layers and experts, one of each kind; the rest of the config is the base's own."""
    small = type(config).from_dict({**config.to_dict(), **_small(config)})
    with torch.random.fork_rng(devices=[]), loading():
        torch.manual_seed(0)
        model: Any = _built(small, dtype).eval().requires_grad_(False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and "norm" in name:  # 1 + w fits no 16 bits for weights that were trained
                    parameter.normal_(1.0, 0.3)
    return model


_NARROW = {
    "hidden_size": 64, "intermediate_size": 48, "intermediate_size_mlp": 48, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 160, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160, "num_local_experts": 4,
    "num_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_NARROW_LAYER = {"head_dim": 32, "num_key_value_heads": 1}
"""Values of layers that differ from the other layers (`per_layer_config`)."""
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that make `config` small."""
    own = config.to_dict()
    out: dict[str, Any] = {k: v for k, v in _NARROW.items() if own.get(k)}
    if own.get("num_key_value_heads") == own.get("num_attention_heads"):
        out["num_key_value_heads"] = out["num_attention_heads"]
    for key in ("num_experts_per_tok", "top_k_experts"):
        if isinstance(own.get(key), int):
            out[key] = min(own[key], 2)
    kinds = [own[k] for k in _PER_LAYER if isinstance(own.get(k), list)]
    # layers up to the last one that is the first of its kind
    seen = list(zip(*kinds, strict=False)) if kinds else []
    layers = max((seen.index(kind) + 1 for kind in set(seen)), default=2)
    layers = max(2, layers, own.get("decoder_sparse_step") or 1, own.get("interleave_moe_layer_step") or 1)
    chosen = list(range(min(layers, config.num_hidden_layers)))
    if own.get("num_kv_shared_layers"):  # add a second copy of the layers that shares the first copy's keys and values
        out["num_kv_shared_layers"] = len(chosen)
        chosen *= 2
    out["num_hidden_layers"] = len(chosen)
    for key in _PER_LAYER:
        if isinstance(own.get(key), list):
            out[key] = [own[key][i] for i in chosen]
    if overrides := {int(i): values for i, values in (own.get("per_layer_config") or {}).items()}:
        out["per_layer_config"] = {
            at: {k: _NARROW_LAYER.get(k, v) for k, v in overrides[i].items()}
            for at, i in enumerate(chosen)
            if i in overrides
        }
    if isinstance(own.get("moe_layers"), list):
        out["moe_layers"] = [i for i in own["moe_layers"] if i < out["num_hidden_layers"]]
    return out
