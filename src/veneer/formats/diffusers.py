"""Write an adapter in diffusers' LoRA format, if diffusers loads it correctly.

    key = component.name_in_its_class.lora_A.weight, .lora_B.weight, .lora_magnitude_vector, .lora_B.bias
    metadata["lora_adapter_metadata"] = {"unet.r": 16, "unet.lora_alpha": 8, "unet.alpha_pattern": {…}, …}

The JSON contains ranks and scales in the form of PEFT's LoraConfig, for each component. diffusers 0.34 and
later read this JSON; older versions read only the tensors and use scale 1. diffusers 0.42 treats other
contents as follows:

| content                                  | diffusers                                                                |
| dora_scale, LoHa, LoKr, diff, diff_b, …  | dropped, with at most a warning; or an error                             |
| DoRA of the outputs                      | correct if every module of the component has it (one switch: use_dora)   |
| a bias change with the pair's scale      | correct if every module of the component has one (one switch: lora_bias) |
| text_encoder_2 of FLUX.1, any T5         | dropped                                                                  |
| a text encoder without attention pairs   | an error                                                                 |
| FLUX.1's norm_q, norm_k, norm_added_…    | loaded as full replacement weights, by name                              |

Module names are diffusers' names, which are the canonical names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import Delta
from veneer.formats.comparison import Refusals
from veneer.formats.module_tensors import ModuleChanges
from veneer.formats.names import component_of
from veneer.formats.peft import PREFIX, encode_folder
from veneer.formats.topology import Family

LOADABLE: dict[str, tuple[str, ...]] = {
    "sd15": ("unet", "text_encoder"),
    "sd2": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "sd3-large": ("transformer", "text_encoder", "text_encoder_2"),
    "flux1": ("transformer", "text_encoder"),
}
"""Family -> components into which the family's pipeline loads an adapter. The pipelines of other families load
an adapter only into the transformer."""

_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
_ELSEWHERE = "merge it into the base"


def diffusers_tensors(
    by_module: Mapping[str, ModuleChanges], family: Family, refused: Refusals
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors, and the PEFT settings of each component.

    Changes that the format cannot hold are added to `refused`; the result is then incomplete."""
    parts: dict[str, dict[str, ModuleChanges]] = defaultdict(dict)
    tensors: dict[str, Tensor] = {}
    for module, changes in by_module.items():
        component = component_of(module)
        if not component:
            refused["its name begins with no component (unet, transformer, text_encoder …)"].append(module)
        elif module not in family.modules:
            refused[f"{family.label} has no such module"].append(module)
        elif component not in LOADABLE.get(family.name, ("transformer",)):
            refused[f"diffusers loads nothing into the {component} of {family.label}"].append(module)
        elif _is_norm(module, changes, family):
            tensors[f"{module}.weight"] = changes.full["weight"]
        else:
            parts[component][module] = changes
    configs: dict[str, dict[str, Any]] = {}
    for component, changes_in_part in parts.items():
        if _is_expressible(changes_in_part, component, refused):
            names = [m for m in family.modules if m.startswith(f"{component}.")]
            encoded, configs[component] = _component(changes_in_part, component, names)
            tensors |= encoded
    return tensors, configs


def _is_norm(module: str, changes: ModuleChanges, family: Family) -> bool:
    named_norm = family.name == "flux1" and module.rpartition(".")[2] in _NORMS
    return named_norm and set(changes.full) == {"weight"} and changes.pair is None and not changes.deltas


def _is_expressible(by_module: Mapping[str, ModuleChanges], component: str, refused: Refusals) -> bool:
    """Return whether PEFT's settings can express the changes of a component.

    Adds reasons to `refused`."""
    refused_before = sum(map(len, refused.values()))
    for module, changes in by_module.items():
        for parameter, delta in changes.deltas.items():
            if not _is_lora_bias(changes, parameter, delta):
                refused[f"diffusers drops a {delta.form} change of the {parameter}; {_ELSEWHERE}"].append(module)
        if changes.full:
            refused["diffusers drops full replacement weights; merge the adapter into the base"].append(module)
        if changes.pair is not None and changes.pair.kind not in ("linear", "conv"):
            refused[f"diffusers loads no pair of kind {changes.pair.kind}; merge it into the base"].append(module)
        if changes.pair is not None and changes.pair.magnitude is not None and changes.pair.magnitude.ndim > 1:
            refused[f"PEFT, and therefore diffusers, does not support a magnitude of the inputs; {_ELSEWHERE}"].append(
                module
            )
    pairs = {m: changes for m, changes in by_module.items() if changes.pair is not None}
    with_dora = {m for m, changes in pairs.items() if changes.pair is not None and changes.pair.magnitude is not None}
    if with_dora and with_dora != set(pairs):
        problem = f"DoRA is one switch for the entire {component}, and this module has no magnitude"
        refused[f"{problem}; {_ELSEWHERE}"] += sorted(set(pairs) - with_dora)
    biased = {m for m, changes in pairs.items() if "bias" in changes.deltas}
    if biased and biased != set(pairs):
        problem = f"lora_bias is one switch for the entire {component}, and this module's bias does not change"
        refused[f"{problem}; {_ELSEWHERE}"] += sorted(set(pairs) - biased)
    if biased and with_dora:
        refused[f"PEFT allows no bias change with DoRA; {_ELSEWHERE}"] += sorted(biased)
    if component.startswith("text_encoder") and pairs and not any(m.endswith(_ATTENTION) for m in pairs):
        problem = f"diffusers fails on a {component} without pairs in its attention"
        refused[f"{problem}; {_ELSEWHERE}"] += sorted(pairs)
    return sum(map(len, refused.values())) == refused_before


def _is_lora_bias(changes: ModuleChanges, parameter: str, delta: Delta) -> bool:
    pair = changes.pair
    return parameter == "bias" and pair is not None and delta.form == "dense" and delta.scale == pair.scale


def _component(
    by_module: Mapping[str, ModuleChanges], component: str, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a component's tensors and settings, as in a PEFT folder.

    names: all modules of the component, so that target_modules matches exactly the adapter's modules.

    transformers' CLIP text models no longer have the prefix `text_model.`, which adapter files still use;
    diffusers removes the prefix if necessary. Rank and alpha patterns without the prefix, and without a
    leading `^`, match both forms. A text encoder's magnitude must be stored with `.weight`, like the
    parameter in the model; otherwise transformers ignores the magnitude without a warning."""
    lead = f"{component}.text_model." if component.startswith("text_encoder") else f"{component}."
    pairs: dict[str, Pair] = {}
    deltas: dict[str, Delta] = {}
    full: dict[str, str] = {}

    def short(module: str) -> str:
        return module.removeprefix(lead).removeprefix(f"{component}.")

    for module, changes in by_module.items():
        full[name := short(module)] = module
        if changes.pair is not None:
            pairs[name] = changes.pair
        deltas |= {f"{name}.{parameter}": delta for parameter, delta in changes.deltas.items()}
    config, tensors = encode_folder(Adapter(pairs, deltas=deltas), base=[short(m) for m in names])
    settings = {key: config[key] for key in _SETTINGS}
    if config.get("lora_bias"):
        settings["lora_bias"] = True
    if component.startswith("text_encoder"):
        for key in ("rank_pattern", "alpha_pattern"):
            settings[key] = {pattern.removeprefix("^"): value for pattern, value in settings[key].items()}
    out = {}
    for key, tensor in tensors.items():
        name, dot, suffix = key.removeprefix(PREFIX).partition(".lora_")
        if suffix == "magnitude_vector" and component.startswith("text_encoder"):
            suffix = "magnitude_vector.weight"
        out[full[name] + dot + suffix] = tensor
    return out, settings
