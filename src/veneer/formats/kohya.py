"""Convert adapters to kohya's and ComfyUI's names and fused projections.

    canonical module  --(family.originals, inverted)-->  original module, rows joined, halves swapped  -->
    prefix + name

| tool and family        | denoiser                                          | text encoders                     |
| kohya: SD 1, SD 2      | lora_unet_ + diffusers' name, flat                | lora_te_                          |
| kohya: SDXL            | lora_unet_ + sgm's name, flat                     | lora_te1_ (CLIP-L), lora_te2_ (G) |
| kohya: SD 3            | lora_unet_ + original name, flat                  | as SDXL, and lora_te3_ (T5)       |
| kohya: FLUX.1          | lora_unet_ + BFL's name, flat                     | lora_te1_ (CLIP-L), lora_te3_ (T5)|
| kohya: FLUX.2          | lora_unet_ + BFL's name, flat (musubi-tuner)      | none                              |
| kohya: Qwen-, Z-Image  | lora_unet_ + diffusers' name, flat (musubi-tuner) | none                              |
| both: LoKr, not fused  | lycoris_ + diffusers' name, flat                  | as above                          |
| ComfyUI: all           | diffusion_model. + original name                  | text_encoders.NAME.transformer. + |
|                        |                                                   | transformers' name                |

"flat" means that each dot is replaced with _. ComfyUI's NAME is its own name for the encoder: clip_l, clip_g,
clip_h, t5xxl. This module works on names, rows and tensors, not on files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from veneer.core.adapter import Pair
from veneer.core.forms import Delta
from veneer.errors import AdapterError, nearest
from veneer.formats.comparison import Refusals
from veneer.formats.fused import join_parts, swap_halves
from veneer.formats.module_tensors import ModuleChanges, write_module
from veneer.formats.topology import DENOISERS, Family, ModuleTarget, flat

T = TypeVar("T", bound=Pair | Delta)

LYCORIS = "lycoris_"
"""Prefix of a denoiser's module names in LyCORIS files: flat diffusers names."""


def kohya_tensors(
    by_module: Mapping[str, ModuleChanges], family: Family, to: str, refused: Refusals
) -> tuple[dict[str, Tensor], list[Pair], list[str]]:
    """Return the tensors in layout `to`, the pairs that they store, and notes.

    to: "kohya" or "comfyui".

    Changes that the layout cannot hold are added to `refused` and left out of the result."""
    named = _renamed_changes(by_module, family, to, refused)
    pairs = [changes.pair for changes, _ in named.values() if changes.pair is not None]
    tensors = _suffixed(named, family, to, refused)
    return tensors, pairs, [*_dora_notes(by_module, to), *_rank_notes(named, by_module)]


def _renamed_changes(
    by_module: Mapping[str, ModuleChanges], family: Family, to: str, refused: Refusals
) -> dict[str, tuple[ModuleChanges, tuple[str, ...]]]:
    """Return {name in layout `to`: (changes, canonical modules)}.

    to: "kohya" or "comfyui".

    Adds to `refused` each module that has no name in this layout, and each module whose changes cannot be
    joined into a fused projection."""
    out: dict[str, tuple[ModuleChanges, tuple[str, ...]]] = {}
    denoiser: dict[str, ModuleChanges] = {}
    for module, changes in by_module.items():
        component, _, local_name = module.partition(".")
        if module not in family.modules:
            refused[f"{family.label} has no such module{_hint(module, family)}"].append(module)
        elif component in DENOISERS:
            denoiser[module] = changes
        elif to == "kohya":
            out[family.kohya_encoder(component) + flat(local_name)] = changes, (module,)
        else:
            out[f"text_encoders.{family.comfyui_encoder(component)}.transformer.{local_name}"] = changes, (module,)
    if to == "kohya" and family.diffusers_named:
        out |= {"lora_unet_" + flat(m.partition(".")[2]): (changes, (m,)) for m, changes in denoiser.items()}
        return out
    for name, originals in _originals(denoiser, family, refused).items():
        is_lycoris = name.startswith(LYCORIS)
        out[name if is_lycoris else "lora_unet_" + flat(name) if to == "kohya" else f"diffusion_model.{name}"] = (
            originals
        )
    return out


def _hint(module: str, family: Family) -> str:
    similar = nearest(module, list(family.modules), 1)
    return f", the nearest is {similar[0]}" if similar else ""


def _originals(
    by_module: Mapping[str, ModuleChanges], family: Family, refused: Refusals
) -> dict[str, tuple[ModuleChanges, tuple[str, ...]]]:
    """Return {original name: (the denoiser's changes, canonical modules)}.

    The changes of a fused module's parts are joined. LoKr changes that cannot be joined stay separate, under
    LyCORIS' flat diffusers names. ComfyUI maps these names to rows of the original module."""
    owner: dict[str, str] = {}
    for name, targets in family.originals.items():
        for target in targets:
            owner.setdefault(target.module, name)
    out: dict[str, tuple[ModuleChanges, tuple[str, ...]]] = {}
    for module in by_module:
        if module not in owner:
            refused[f"the original {family.label} has no such module"].append(module)
    for name in sorted({owner[m] for m in by_module if m in owner}):
        targets = family.originals[name]
        parts = [by_module.get(target.module) for target in targets]
        used = tuple(target.module for target, part in zip(targets, parts, strict=True) if part is not None)
        try:
            out[name] = _fused(parts, targets), used
        except AdapterError as error:
            have = {target.module: part for target, part in zip(targets, parts, strict=True) if part is not None}
            if all(_is_lokr(part) for part in have.values()):
                out |= {LYCORIS + flat(m.partition(".")[2]): (part, (m,)) for m, part in have.items()}
                continue
            refused[f"fused into {name} in the original, but {error.what}"] += used
    return out


def _is_lokr(changes: ModuleChanges) -> bool:
    return changes.pair is None and not changes.full and [d.form for d in changes.deltas.values()] == ["kronecker"]


def _fused(parts: Sequence[ModuleChanges | None], targets: Sequence[ModuleTarget]) -> ModuleChanges:
    """Return the changes of a fused module, joined from the changes of its parts.

    An unchanged part becomes zero rows."""
    have = [p for p in parts if p is not None]
    if len(targets) == 1 and targets[0].part is None and not targets[0].swap:
        return have[0]
    changes = ModuleChanges()
    if any(p.pair for p in have):
        changes.pair = _joined([p.pair if p else None for p in parts], targets)
    for parameter in sorted({d for p in have for d in p.deltas}):
        changes.deltas[parameter] = _joined([p.deltas.get(parameter) if p else None for p in parts], targets)
    for parameter in sorted({f for p in have for f in p.full}):
        values = [p.full.get(parameter) if p else None for p in parts]
        if any(v is None for v in values):
            raise AdapterError(f"only some of its parts have a full replacement {parameter}")
        joined = _joined([None if v is None else Delta("dense", {"value": v}, tuple(v.shape)) for v in values], targets)
        changes.full[parameter] = joined.parts["value"]
    return changes


def _joined(items: Sequence[T | None], targets: Sequence[ModuleTarget]) -> T:
    units = None
    for item, target in zip(items, targets, strict=True):
        if item is not None and target.part is not None and (row_count := _rows(item)) is not None:
            units = row_count // (target.part[1] - target.part[0])
            break
    items = [swap_halves(i) if i is not None and p.swap else i for i, p in zip(items, targets, strict=True)]
    if len(items) == 1 and items[0] is not None:
        return items[0]
    rows = None
    if units is not None:
        rows = [units * (p.part[1] - p.part[0]) for p in targets if p.part is not None]
    elif any(i is None for i in items):
        raise AdapterError("only some of its parts are changed, and the change is a gain on the inputs")
    return join_parts(items, rows)


def _rows(item: Pair | Delta) -> int | None:
    if isinstance(item, Pair):
        return item.B.shape[0]
    if item.form == "gain":
        return len(item.parts["value"]) if item.parts["value"].ndim == 1 else None
    return item.shape[0]


def _suffixed(
    named: Mapping[str, tuple[ModuleChanges, tuple[str, ...]]], family: Family, to: str, refused: Refusals
) -> dict[str, Tensor]:
    """Return the tensors of the renamed changes, by tensor name.

    ComfyUI's layout is kohya's with PEFT's suffixes lora_A and lora_B."""
    out: dict[str, Tensor] = {}
    for name, (changes, modules) in named.items():
        for reason in _unread(name, changes, family, to):
            refused[reason] += modules
        if to == "comfyui" and changes.pair is not None and changes.pair.kind == "embedding":
            # ComfyUI adds up·down to the stored weight, but an embedding's pair changes the transposed weight.
            changes = replace(changes, pair=Pair(changes.pair.B.t(), changes.pair.A.t(), changes.pair.scale))
        try:
            parts = write_module(changes)
        except AdapterError as error:
            for line in error.what.splitlines()[1:]:
                refused[f"there are no tensors for {line.removeprefix('  - ')}; merge it into the base"] += modules
            continue
        for suffix, tensor in parts.items():
            suffix = _COMFY.get(suffix, suffix) if to == "comfyui" else suffix
            out[f"{name}.{suffix}"] = tensor.contiguous()
    return out


_COMFY = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def _unread(name: str, changes: ModuleChanges, family: Family, to: str) -> list[str]:
    """Return a message for each kind of change that readers of `to` ignore or misread."""
    out = []
    if changes.full and (to == "kohya" or set(changes.full) != {"weight"}):
        out.append("it cannot express full replacement weights; subtract the base's weights, or merge the adapter")
    if to == "kohya":
        return out
    present = [h for h in (changes.pair, changes.deltas.get("weight")) if h is not None]
    if any(h.magnitude is not None and h.magnitude.ndim == 1 for h in present):
        out.append("ComfyUI divides DoRA's outputs by ‖W‖ and not by ‖W + ΔW‖; merge it into the base")
    if any(delta.form == "gain" for delta in changes.deltas.values()):
        out.append("ComfyUI does not support (IA)³; merge it into the base")
    if family.name.startswith("flux") and name.endswith(("query_norm", "key_norm")):
        out.append("ComfyUI patches only parameters named weight, and this one is named scale")
    return out


def _rank_notes(
    named: Mapping[str, tuple[ModuleChanges, tuple[str, ...]]], by_module: Mapping[str, ModuleChanges]
) -> list[str]:
    ranks = {
        name: max((p.rank for m in modules if (p := by_module[m].pair)), default=0)
        for name, (_, modules) in named.items()
    }
    grown = [n for n, (changes, _) in named.items() if changes.pair is not None and changes.pair.rank > ranks[n]]
    if not grown:
        return []
    return [f"{len(grown)} fused projections join parts with separate A: the ranks add up, and the file grows"]


def _dora_notes(by_module: Mapping[str, ModuleChanges], to: str) -> list[str]:
    count = sum(
        any(h is not None and h.magnitude is not None for h in (changes.pair, changes.deltas.get("weight")))
        for changes in by_module.values()
    )
    if not count or to != "kohya":
        return []
    return [
        f"{count} module(s) with DoRA: LyCORIS reads dora_scale correctly; A1111 and InvokeAI apply it along the "
        "inputs; Forge and ComfyUI divide a dora_scale of the outputs by ‖W‖; diffusers drops it"
    ]
