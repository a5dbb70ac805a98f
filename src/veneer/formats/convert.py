"""An adapter written in another tool's layout: exactly, or not at all.

| to        | written                                    | names                   | cannot hold                   |
| peft      | folder for one component, or a text model  | the model's own         | what formats/peft.py refuses  |
| kohya     | one .safetensors, lora_down, lora_up,      | formats/write_names.py  | embeddings, whole new weights |
|           | alpha; LyCORIS' names for the other forms  |                         |                               |
| comfyui   | one .safetensors, lora_A, lora_B, alpha    | formats/write_names.py  | gains, DoRA of the outputs    |
| diffusers | one .safetensors, scales in metadata       | diffusers', canonical   | formats/write_diffusers.py    |
| vllm      | PEFT folder of one rank, scale 1           | the model's own         | DoRA, deltas, full copies     |
| gguf      | one llama.cpp LoRA                         | llama.cpp's             | the same                      |

Fused projections are joined at the same rank where their parts share A, block-diagonally elsewhere, with zero rows for
a part that nothing changes. What is written is read back and compared by ΔW (formats/write_check.py) before it reaches
the disk. All that cannot be expressed is one AdapterError: every module, why, and the nearest way.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair, alpha_of
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.container import atomic_write, check_finite, encode_tensors
from veneer.formats.file_hashes import Hashes, hashes, sealed
from veneer.formats.leaves import Leaf, write_leaf
from veneer.formats.metadata import family_of, metadata_of, pack_configs
from veneer.formats.names import choose_family
from veneer.formats.topology import Family, families
from veneer.formats.write_check import differences, relative_error
from veneer.formats.write_diffusers import diffusers_tensors
from veneer.formats.write_folded import folded, refuse_unservable, vllm_notes
from veneer.formats.write_names import Refusals, component_of, foreign_leaves, leaves_of

__all__ = ["DTYPES", "TARGETS", "Encoded", "Written", "encode", "write"]

TARGETS = ("peft", "kohya", "diffusers", "comfyui", "gguf", "vllm")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

FOLDERS = ("peft", "vllm")
PIPELINES = ("kohya", "diffusers", "comfyui")


@dataclass(frozen=True)
class Encoded:
    """A layout, before it is a file. `config`: PEFT's, {} for the others. `notes`: what its reader should know."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """What was written. `digest`: the adapter's, as anyone reading it gets it. `files`: name -> "sha256:…".

    `hashes`: of the one file, as A1111 and CivitAI show them; None for a folder. `ranks`: rank -> how many modules."""

    path: Path
    to: str
    family: str | None
    digest: str
    files: dict[str, str]
    hashes: Hashes | None
    ranks: dict[int, int]
    notes: list[str]


def encode(
    adapter: Adapter,
    to: str,
    *,
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> Encoded:
    """The tensors, metadata and configuration of `adapter` as `to`, one of TARGETS, has it; checked by reading them.

    `family`: of the image model, by its name in `topology.families()`; by default the one that has all the modules.
    `metadata`: goes over what is written from the card. `dtype`, one of DTYPES: every tensor is rounded to it first.
    Raises one AdapterError that lists every module which `to` cannot express, with the reason and the nearest way."""
    return _encode(adapter, to, family, metadata or {}, dtype, "adapter").encoded


def write(
    adapter: Adapter,
    out: str | Path,
    to: str,
    *,
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> Written:
    """Write `adapter` to `out` as `encode` has it: a folder for peft and vllm, one file for the others.

    Whole or not at all, and equal adapters give equal bytes. Raises as `encode`, and ResourceError for a full disk."""
    path = Path(out)
    if to not in FOLDERS and path.is_dir():
        raise AdapterError(f"{to} is one file, and there is a folder of this name", where=str(path))
    name = path.name.removesuffix(".safetensors").removesuffix(".gguf")
    done = _encode(adapter, to, family, metadata or {}, dtype, name)
    ranks = dict(sorted(Counter(p.rank for p in done.pairs).items()))
    if to in FOLDERS:
        folder = peft.write(done.adapter, path)
        notes = [*done.encoded.notes, *folder.notes]
        return Written(path, to, done.family, folder.digest, folder.files, None, ranks, notes)
    atomic_write(path, encode_tensors(done.encoded.tensors, done.encoded.metadata))
    found = hashes(path)
    files = {path.name: f"sha256:{found.sha256}"}
    return Written(path, to, done.family, done.back.digest(), files, found, ranks, done.encoded.notes)


@dataclass(frozen=True)
class _Done:
    """`adapter` in the shape in which it was written, under its names; `back` as read back; `pairs` of the layout."""

    encoded: Encoded
    adapter: Adapter
    back: Adapter
    family: str | None
    pairs: list[Pair]


def _encode(
    adapter: Adapter, to: str, family: str | None, metadata: Mapping[str, str], dtype: str | None, name: str
) -> _Done:
    if to not in TARGETS:
        raise AdapterError(f"there is no layout {to!r}", fix=", ".join(TARGETS))
    meant, notes = _rounded(adapter.collapsed().mapped(lambda t: t.detach().cpu()), dtype)
    check_finite(dict(meant.tensors()))
    if not any(True for _ in meant.tensors()):
        raise AdapterError("the adapter is empty")
    if to in PIPELINES:
        return _for_pipelines(meant, to, _family(meant, family, to), metadata, name, notes)
    refused: Refusals = defaultdict(list)
    leaves = leaves_of(meant)
    if to == "peft":
        shaped = _one_component(meant, refused)
    else:
        refuse_unservable(meant, leaves, {"vllm": "vLLM", "gguf": "llama.cpp"}[to], refused)
        shaped = meant if refused else folded(meant)
    _raise(refused, to)
    config, tensors = peft.encode(shaped, base_name=shaped.card.base)
    back = peft.interpret(config, tensors).adapter
    _compare(shaped if to == "peft" else meant, back, to)
    if to == "vllm":
        notes += vllm_notes(shaped)
    return _Done(Encoded(tensors, {"format": "pt"}, config, notes), shaped, back, family, list(shaped.pairs.values()))


def _rounded(adapter: Adapter, dtype: str | None) -> tuple[Adapter, list[str]]:
    """The adapter in `dtype`, and how far that moved it."""
    if dtype is None:
        return adapter, []
    if dtype not in DTYPES:
        raise AdapterError(f"there is no dtype {dtype!r} here", fix=", ".join(DTYPES))
    out = adapter.mapped(lambda t: t.to(DTYPES[dtype]) if t.is_floating_point() else t)
    worst = max((relative_error(p, out.pairs[n]) for n, p in adapter.pairs.items()), default=0.0)
    return out, [f"rounded to {dtype}: ΔW moves by up to {worst:.2g} of itself"] if worst else []


def _raise(refused: Refusals, to: str) -> None:
    """One error with every module that is in the way, by reason."""
    if not refused:
        return
    lines = []
    for reason, modules in refused.items():
        names = sorted(set(modules))
        lines.append(f"  - {reason} ({len(names)}):")
        lines += [f"      {name}" for name in names]
    count = len({m for modules in refused.values() for m in modules})
    raise AdapterError(f"{to} cannot hold this adapter exactly; {count} module(s) are in the way:\n" + "\n".join(lines))


def _compare(meant: Adapter, back: Adapter, to: str) -> None:
    if (back.pairs or back.deltas) and (problems := differences(meant, back)):
        shown = "\n".join(f"  - {p}" for p in problems)
        raise AdapterError(f"written as {to}, the adapter would not come back the same; nothing was written:\n{shown}")


def _one_component(adapter: Adapter, refused: Refusals) -> Adapter:
    """The adapter under the names that its model itself has: without the component."""
    parts = {component_of(m) for m in leaves_of(adapter)}
    parts |= {component_of(m) for m in (*adapter.token_rows, *adapter.new_tokens)}
    if parts == {""}:
        return adapter
    if len(parts) > 1:
        for module in leaves_of(adapter):
            refused["a PEFT folder is of one model, and this has several; --to diffusers"].append(module)
        return adapter
    part = parts.pop() + "."
    renamed: dict[str, Any] = {
        what: {name.removeprefix(part): value for name, value in getattr(adapter, what).items()}
        for what in ("pairs", "modules", "token_rows", "deltas", "new_tokens")
    }
    return replace(adapter, **renamed)


def _family(adapter: Adapter, name: str | None, to: str) -> Family:
    """The family given, or the one that the adapter's modules, their widths and its card tell."""
    known = families()
    if name is not None:
        if name not in known:
            raise AdapterError(f"there is no family {name!r}", fix=", ".join(known))
        return known[name]
    modules = [*leaves_of(adapter), *adapter.token_rows, *adapter.new_tokens]
    if not any(component_of(m) for m in modules):
        raise AdapterError(
            f"{to} is for adapters of image models, and no module here begins with unet, transformer or text_encoder",
            fix="--to peft, vllm or gguf",
        )
    claim = family_of({key: str(adapter.card.extra.get(own, "")) for key, own in _CLAIMS.items()})
    chosen = choose_family({m: _inputs(adapter, m) for m in modules}, claim).family
    if chosen is None:
        raise AdapterError("no known image model has any of these modules", where=", ".join(modules[:3]))
    return chosen


_CLAIMS = {"modelspec.architecture": "architecture", "ss_base_model_version": "base_version"}


def _inputs(adapter: Adapter, module: str) -> int | None:
    pair = adapter.pairs.get(module)
    return None if pair is None else pair.A.shape[1]


def _read_back(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    return Adapter()  # TODO read


def _for_pipelines(
    meant: Adapter, to: str, family: Family, metadata: Mapping[str, str], name: str, notes: list[str]
) -> _Done:
    """kohya, comfyui, diffusers: one safetensors file with the card in its metadata."""
    refused: Refusals = defaultdict(list)
    leaves = leaves_of(meant)
    for module in (*meant.token_rows, *meant.new_tokens):
        refused["learned words and rows of embeddings have no place in such a file; --to peft"].append(module)
    extra: dict[str, str] = {}
    if to == "diffusers":
        tensors, configs = diffusers_tensors(leaves, family, refused)
        if configs:
            extra["lora_adapter_metadata"] = pack_configs(configs)
        pairs = list(meant.pairs.values())
    else:
        named = foreign_leaves(leaves, family, to, refused)
        pairs = [leaf.pair for leaf, _ in named.values() if leaf.pair is not None]
        tensors = _suffixed(named, family, to, refused)
        notes = [*notes, *_dora_notes(leaves, to)]
    _raise(refused, to)
    card = replace(meant.card, kind=meant.card.kind or "image")
    ranks = {p.rank for p in pairs}
    alphas = {alpha_of(p.scale, p.rank) for p in pairs}
    card = replace(card, rank=ranks.pop() if len(ranks) == 1 else 0, alpha=alphas.pop() if len(alphas) == 1 else 0.0)
    described = metadata_of(card, family=family.name, name=name) | extra
    if any(d.form in ("hadamard", "kronecker", "gain") for d in meant.deltas.values()):
        described["ss_network_module"] = "lycoris.kohya"
    described = sealed(tensors, described | dict(metadata))
    back = _read_back(tensors, described)
    _compare(meant, back, to)
    return _Done(Encoded(tensors, described, {}, notes), meant, back, family.name, pairs)


def _suffixed(
    named: Mapping[str, tuple[Leaf, tuple[str, ...]]], family: Family, to: str, refused: Refusals
) -> dict[str, Tensor]:
    """The tensors of foreign leaves; ComfyUI's are kohya's under PEFT's two names."""
    out: dict[str, Tensor] = {}
    for name, (leaf, modules) in named.items():
        for reason in _unread(name, leaf, family, to):
            refused[reason] += modules
        try:
            parts = write_leaf(leaf, "kohya")
        except AdapterError as error:
            for line in error.what.splitlines()[1:]:
                refused[f"there are no tensors for {line.strip()}; merge it into the base"] += modules
            continue
        for suffix, tensor in parts.items():
            suffix = _COMFY.get(suffix, suffix) if to == "comfyui" else suffix
            out[f"{name}.{suffix}"] = tensor.contiguous()
    return out


_COMFY = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def _unread(name: str, leaf: Leaf, family: Family, to: str) -> list[str]:
    """What has tensors that readers of `to` ignore or take for something else."""
    out = []
    if leaf.full and (to == "kohya" or set(leaf.full) != {"weight"}):
        out.append("whole new weights are no part of it; subtract the base's, or merge it into the base")
    if to == "kohya":
        return out
    held = [h for h in (leaf.pair, leaf.deltas.get("weight")) if h is not None]
    if any(h.magnitude is not None and h.magnitude.ndim == 1 for h in held):
        out.append("ComfyUI divides DoRA's outputs by ‖W‖ and not by ‖W + ΔW‖; merge it into the base, or --to kohya")
    if any(delta.form == "gain" for delta in leaf.deltas.values()):
        out.append("ComfyUI knows no (IA)³; merge it into the base, or --to kohya")
    if family.name.startswith("flux") and name.endswith(("query_norm", "key_norm")):
        out.append("ComfyUI's patches reach parameters called weight, and this one is called scale; --to kohya")
    return out


def _dora_notes(leaves: Mapping[str, Leaf], to: str) -> list[str]:
    count = sum(
        any(h is not None and h.magnitude is not None for h in (leaf.pair, leaf.deltas.get("weight")))
        for leaf in leaves.values()
    )
    if not count or to != "kohya":
        return []
    return [
        f"{count} module(s) with DoRA: LyCORIS reads dora_scale as it is meant; A1111 and InvokeAI take it along the "
        "inputs, Forge and ComfyUI divide one of the outputs by ‖W‖, diffusers drops it"
    ]
