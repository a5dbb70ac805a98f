"""Translate mlx-lm and Tinker folders to equivalent PEFT folders.

| tool   | a pair on module X                                                             | scale                 |
| mlx-lm | X.lora_a (in, r), X.lora_b (r, out); DoRA's magnitude X.m (out,)               | lora_parameters.scale |
|        | experts: X.switch_mlp.up_proj.lora_a (E, r, in), lora_b (E, out, r)            |                       |
| Tinker | PEFT's keys, except for some module names (`_TINKER`); 3-d expert tensors      | lora_alpha / r        |
|        | (formats/moe.py)                                                               |                       |

Since 2024-09, mlx-lm's `scale` is the whole scale. Before, the scale was scale·alpha/r; a configuration with
`lora_layers` and `alpha` is therefore ambiguous. Tinker splits Qwen 3.5's `in_proj_qkv` into q, k and v; this
module joins the three pairs block-diagonally. This module works on configurations and tensors, and does not
access files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterError
from veneer.formats import peft_config as cfg

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_OWN = re.compile(r"model\.unembed_tokens")
_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.experts\.w[123]")
"""Module names that identify a Tinker file."""
_TINKER = (
    (_OWN, "lm_head"),
    (re.compile(r"(model\.layers\.\d+)\.attn\.([qkvo]_proj)"), r"\1.self_attn.\2"),  # gpt-oss
)
"""Patterns of Tinker's module names, and their replacements in transformers."""
_CUT = re.compile(r"(.+\.linear_attn\.in_proj_)([qkv])")


@dataclass(frozen=True)
class TranslatedFolder:
    """A configuration and tensors in PEFT's layout, translated from another tool's folder.

    `format`: "mlx" or "tinker"."""

    format: str
    reason: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def translated(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TranslatedFolder | None:
    """Translate an mlx-lm or Tinker folder to PEFT's layout; return None for other folders.

    Raises AdapterError if PEFT's layout cannot express the folder."""
    pairs = any(key.endswith((".lora_a", ".lora_b")) for key in tensors)
    if pairs or "fine_tune_type" in config:
        return _from_mlx(config, tensors)
    modules = {key: _tinker_module(key) for key in tensors if key.startswith(_PREFIX) and ".lora_" in key}
    is_tinker = any(_OWN.fullmatch(module) or _CUT.fullmatch(module) for module in modules.values())
    is_tinker |= any(_EXPERTS.fullmatch(module) and tensors[key].ndim == 3 for key, module in modules.items())
    is_plain = "peft_type" not in config and {"r", "lora_alpha"} <= set(config) and modules.keys() == tensors.keys()
    return _from_tinker(config, tensors) if tensors and (is_tinker or is_plain) else None


# -- mlx-lm ------------------------------------------------------------------------------------------------------------


def _from_mlx(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TranslatedFolder:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"mlx-lm's fine_tune_type is {str(kind)[:20]!r}: full weights instead of an adapter's pairs")
    out: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part not in ("lora_a", "lora_b", "m") or not module:
            problems.append(f"{key} {tuple(tensor.shape)}: not a tensor of mlx-lm's LoRA")
        elif module.rpartition(".")[2] in _EMBEDDINGS:
            problems.append(f"{key}: a pair on an embedding; mlx-lm also applies it to a tied head, but PEFT does not")
        elif part == "m":
            out[f"{_PREFIX}{module}.lora_magnitude_vector"] = tensor
        else:
            name = f"{_PREFIX}{module.replace('.switch_mlp.', '.experts.')}.lora_{part[-1].upper()}.weight"
            out[name] = tensor.t().contiguous() if tensor.ndim == 2 else tensor
    rank, scale, dropout = _mlx_numbers(config, problems)
    if problems:
        raise AdapterError("mlx-lm's folder cannot be read:\n" + "\n".join(f"  - {p}" for p in problems))
    settings = {
        "base_model_name_or_path": config.get("model"),
        "lora_alpha": cfg.exact_alpha(scale, rank),
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "peft_version": None,
        "r": rank,
        "target_modules": _targets(out),
        "task_type": "CAUSAL_LM",
        "use_dora": kind == "dora",
    }
    return TranslatedFolder("mlx", f"mlx-lm's layout: lora_a, lora_b, scale {scale:g}", settings, out)


def _mlx_numbers(config: Mapping[str, Any], problems: list[str]) -> tuple[int, float, float]:
    """Return rank, scale and dropout of mlx-lm's configuration."""
    parameters = config.get("lora_parameters")
    numbers: Mapping[str, Any] = parameters if isinstance(parameters, dict) else {}
    rank, scale, dropout = numbers.get("rank"), numbers.get("scale"), numbers.get("dropout", 0.0)
    if type(rank) is not int or rank < 1:
        problems.append(f"lora_parameters.rank = {str(rank)[:20]}: expected an integer of at least 1")
        rank = 1
    for name, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            problems.append(f"lora_parameters.{name} = {str(value)[:20]}: a number is expected")
    if problems:
        return rank, 1.0, 0.0
    if "lora_layers" in config and numbers.get("alpha", rank) != rank:
        problems.append(
            f"lora_parameters has scale {scale:g} and alpha {numbers['alpha']}: mlx-lm before 2024-09 scaled by "
            f"scale·alpha/rank, later versions by scale only. Remove alpha, and set `scale` to the scale that was used"
        )
    return rank, float(scale), float(dropout)  # type: ignore[arg-type]


# -- Tinker ------------------------------------------------------------------------------------------------------------


def _tinker_module(key: str) -> str:
    return key.removeprefix(_PREFIX).rpartition(".lora_")[0]


def _renamed(module: str) -> str:
    """Return transformers' name for a module in a Tinker file."""
    for pattern, new in _TINKER:
        if pattern.fullmatch(module):
            return pattern.sub(new, module)
    return module


def _from_tinker(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TranslatedFolder:
    out: dict[str, Tensor] = {}
    cut: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, half = _tinker_module(key), key.rpartition(".lora_")[2]
        if not module or not tensor.numel():  # empty placeholders for projections that the base does not have
            if module and tensor.numel() == 0:
                continue
            out[key] = tensor
        elif match := _CUT.fullmatch(module):
            cut[match[1]][f"{match[2]}{half[:1]}"] = tensor
        else:
            out[f"{_PREFIX}{_renamed(module)}.lora_{half}"] = tensor
    settings = {**config, "peft_type": "LORA"}
    for start, parts in cut.items():
        if sorted(parts) != ["kA", "kB", "qA", "qB", "vA", "vB"] or any(t.ndim != 2 for t in parts.values()):
            raise AdapterError(f"{start}q, _k and _v are one projection of the base, but the file has {sorted(parts)}")
        import torch

        out[f"{_PREFIX}{start}qkv.lora_A.weight"] = torch.cat([parts[f"{n}A"] for n in "qkv"])
        out[f"{_PREFIX}{start}qkv.lora_B.weight"] = torch.block_diag(*[parts[f"{n}B"] for n in "qkv"])
    if cut:
        for pattern, setting in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = config.get(pattern)
            if isinstance(number := config.get(setting), int | float):
                settings[pattern] = {**(patterns if isinstance(patterns, dict) else {}), "in_proj_qkv": 3 * number}
    settings["target_modules"] = _targets(out)
    return TranslatedFolder("tinker", "module names of Tinker's archives", settings, out)


def _targets(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the modules that have 2-d pairs; 3-d experts are not modules of the base."""
    return sorted({_tinker_module(key) for key, t in tensors.items() if ".lora_" in key and t.ndim == 2})
