"""The config fields that decide what a model computes, with their default values.

    python -m veneer.models.architecture > architecture.json && mv architecture.json src/veneer/models/

A fingerprint omits fields that have their default value. The defaults of transformers and diffusers change
between versions, so architecture.json records the defaults, by model type for transformers and by class for
diffusers. Existing rows never change, because adapters store fingerprints computed with these rows. The
command only adds rows for new types.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Fields that do not shape the model: provenance, storage, generation, heads for other tasks, training.
NOT_SHAPE = {
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_model_name_or_path", "_name_or_path",
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "keys_to_ignore_at_inference", "label2id", "language", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("architecture.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table


def default_fields(kind: str, installed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default field values of a model type or a diffusers class.

    `installed`: the installed library's defaults, used for fields and types that the table does not
    contain."""
    return _merge_fields(installed, _table().get(kind, {}))


def _merge_fields(installed: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    out = {**installed, **written}
    for name, value in written.items():
        base_value = installed.get(name)
        if isinstance(value, dict) and "model_type" in value and isinstance(base_value, Mapping):  # a nested config
            out[name] = _merge_fields(base_value, value)
    return out


def _named_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a fingerprint includes, as JSON values."""
    return {name: plain_value(value) for name, value in fields.items() if name not in NOT_SHAPE}


def plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): plain_value(v) for k, v in value.items() if str(k) not in NOT_SHAPE}
    if isinstance(value, list | tuple):
        return [plain_value(v) for v in value]
    if isinstance(value, float):
        rounded = float(f"{value:.6g}")
        return int(rounded) if rounded.is_integer() else rounded
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _rows() -> dict[str, dict[str, Any]]:
    """Return the table plus rows for new types of the installed libraries."""
    import diffusers
    import transformers

    from veneer.models.image.families import FAMILIES

    rows = dict(_table())
    encoders = ("CLIPTextConfig", "T5Config", "Mistral3Config", "Qwen2_5_VLConfig", "Qwen3Config")
    for cls in [*transformers.MODEL_FOR_CAUSAL_LM_MAPPING, *(getattr(transformers, name) for name in encoders)]:
        try:
            rows.setdefault(cls.model_type, _named_fields(cls().to_dict()))
        except Exception as error:  # Some configs cannot be created without arguments, so they have no defaults.
            print(f"{cls.__name__}: {type(error).__name__}", file=sys.stderr)
    parts = {family.classname for family in FAMILIES.values()}
    for name in sorted(parts | {"AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage"}):
        signature = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
        rows.setdefault(name, _named_fields({p.name: p.default for p in signature if p.default is not p.empty}))
    return rows


if __name__ == "__main__":
    print("{")
    print(",\n".join(f"{json.dumps(kind)}: {json.dumps(row, sort_keys=True)}" for kind, row in sorted(_rows().items())))
    print("}")
