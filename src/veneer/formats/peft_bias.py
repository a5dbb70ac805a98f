"""Biases of the base itself that PEFT trains: `bias = "lora_only"` of the target modules, `"all"` of every module.

    model.layers.0.self_attn.q_proj.base_layer.bias (out,)      a module that carries a pair
    model.layers.0.self_attn.k_proj.bias (out,)                 another one; "all" alone writes those

The file holds the new values whole. As a change it is a `replacement` (core/forms.py): Δb = s·(value − b), which needs
the base's own b only where it acts. Knows names, shapes and the configuration's switch.

Of a module that is saved whole "all" writes the bias three times: in the copy, where it counts, and under PEFT's own
two names for the copy and the base's (`….modules_to_save.bias`, `….original_module.bias`), where nothing reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import Delta
from veneer.formats.peft_config import Config

__all__ = ["bias_problems", "bias_switch", "bias_tensors", "trained_biases"]


_WITHIN = re.compile(r"(.+)\.(modules_to_save|original_module)\.((?:.+\.)?bias)")


def trained_biases(
    config: Config,
    copies: dict[str, Tensor],
    rest: dict[str, Tensor],
    pairs: Mapping[str, Pair],
    problems: list[str],
    notes: list[str],
) -> dict[str, Delta]:
    """The changes of biases by name (`….bias`); what is one is taken out of `copies` and `rest` (paths in the file
    without PEFT's prefix). Those inside of a module that is saved whole are part of it."""
    if config.bias == "none":
        return {}
    for path in [p for p in rest if _WITHIN.fullmatch(p)]:
        match = _WITHIN.fullmatch(path)
        assert match is not None
        twin = rest.get(f"{match[1]}.{match[3]}")
        if twin is not None and (match[2] == "original_module" or torch.equal(twin, rest[path])):
            del rest[path]
    saved = [f".{entry}." for entry in config.modules_to_save]
    found: dict[str, Tensor] = {}
    for path in [p for p in copies if p.endswith(".base_layer.bias")]:
        found[path.replace(".base_layer.bias", ".bias")] = copies.pop(path)
    for path in [p for p in rest if p.endswith(".bias") and not any(s in f".{p}" for s in saved)]:
        if config.bias == "all" or path.removesuffix(".bias") in pairs:  # PEFT before 0.7 had no base_layer in the name
            found[path] = rest.pop(path)
    if not found:
        notes.append(f"bias = {config.bias!r}, but there are no biases in the file: it has no effect")
    for path, value in found.items():
        pair = pairs.get(path.removesuffix(".bias"))
        out = None if pair is None or pair.kind not in ("linear", "conv") else pair.B.shape[0]
        if value.ndim != 1 or out not in (None, len(value)):
            problems.append(f"{path} {tuple(value.shape)}: one value for each of {out or 'the'} outputs is expected")
    return {path: Delta("replacement", {"value": value}, tuple(value.shape)) for path, value in found.items()}


def bias_switch(adapter: Adapter) -> str:
    """What `bias` has to be for PEFT to load the adapter's trained biases."""
    owners = {name.removesuffix(".bias") for name, d in adapter.deltas.items() if d.form == "replacement"}
    return "none" if not owners else "lora_only" if owners <= set(adapter.pairs) else "all"


def bias_problems(name: str, delta: Delta) -> list[str]:
    """What keeps a replacement from being one of PEFT's trained biases."""
    if not name.endswith(".bias") or len(delta.shape) != 1:
        return [f"{name}: PEFT trains whole biases, and no other parameter so; merge it into the base"]
    if delta.scale != 1:
        at = f"a trained bias at a strength of {delta.scale:g}"
        return [f"{name}: {at}: PEFT stores its value, which the base's own bias decides; merge it into the base"]
    return []


def bias_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Path -> the new values, as PEFT stores them."""
    out = {}
    for name, delta in adapter.deltas.items():
        if delta.form == "replacement":
            module = name.removesuffix(".bias")
            out[f"{module}.base_layer.bias" if module in adapter.pairs else name] = delta.parts["value"]
    return out
