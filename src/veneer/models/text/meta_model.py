"""Build language models from their configuration, without weights.

# a model on the meta device, with the same modules as load_text
model = meta_text_model(config, dtype=torch.bfloat16, quantize="nf4")

# groups of parameter names that share a weight
groups = tied_weights(folder)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veneer.errors import BaseError
from veneer.files.safetensors import strict_json
from veneer.files.weights import tensor_table
from veneer.models.loading import build_errors, loading
from veneer.models.quantize import loop_over_experts, put_empty_codes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def meta_text_model(config: PreTrainedConfig, *, dtype: torch.dtype, quantize: str = "") -> Any:
    """Build the frozen language model of `config` in eval mode, without weights.

    The parameters are on the meta device. The buffers are on the CPU and have their values. `quantize`:
    format of the linear weights. 4-bit weights are doubly quantized as in `load_text`."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    meta = torch.device("meta")
    with loading(), no_init_weights():
        with init_empty_weights(include_buffers=False):
            model = _build_model(config, dtype)
        model.tie_weights()
        if quantize:
            put_empty_codes(model, quantize, dtype, meta)
    if quantize:
        loop_over_experts(model, meta)
    return model.eval().requires_grad_(False)


def _build_model(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Return a new transformers model for a config.

    Raises ConfigError if transformers rejects the config."""
    from transformers import AutoModelForCausalLM

    where, fix = f"a {config.model_type} model", "take the base's own config.json again"
    with build_errors("transformers cannot build a model", where=where, fix=fix):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tied_weights(folder: Path) -> list[list[str]]:
    """Return groups of parameter names that share one weight.

    folder: a saved transformers model. The model class determines the groups, even if config.json has no
    `tie_word_embeddings`; the model is built without weights. Returns [] for a folder without a transformers
    config.json. If transformers does not know the model family and exactly one stored matrix has one row per
    token, that matrix counts as tied to the head, unless config.json says otherwise."""
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
    except Exception as error:  # Each model class parses its own fields and can raise any exception type.
        why = " ".join(f"{type(error).__name__}: {error}".split())
        message = f"transformers cannot build a model from this configuration: {why:.300}"
        raise BaseError(message, where=str(file)) from error
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def text_families() -> frozenset[str]:
    """Return the `model_type` of every causal language model in transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def meta_text(fields: Mapping[str, Any]) -> Any:
    """Build a causal language model on the meta device from a config.json's fields.

    Errors from transformers are not caught."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = dict(fields)
    with loading(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[settings.pop("model_type")](**settings))
