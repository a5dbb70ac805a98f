"""Read and write llama.cpp's LoRA files: GGUF files of type `adapter`.

    blk.0.attn_q.weight.lora_a (rank, in), .lora_b (out, rank)      scale = adapter.lora.alpha / rank; 1 if alpha is 0
    token_embd.weight.lora_a (rows, rank), .lora_b (dim, rank)      for embeddings, A is transposed

For its rotary embedding, llama.cpp permutes the rows of Llama's q and k within each head of d rows: row 2i+s
of the file is row s·d/2+i of Hugging Face's weight, s in {0, 1}. The rows of B are permuted too, and this
module reverses the permutation. To do so, it needs the head size, which llama.cpp's converter does not write
(veneer writes the head size as `<arch>.rope.dimension_count`). A file has a single alpha; if the alphas of
the pairs differ, B is scaled to compensate. The Llama (and Mistral), Qwen 2 and 3, and Gemma families are
supported. Magnitudes, deltas and full weights are not supported, because llama.cpp does not apply them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Card, Pair, alpha_of, scale_of
from veneer.errors import AdapterError, bullets, nearest
from veneer.files.gguf import read_gguf_file, write_gguf_file
from veneer.formats.tensors import check_finite

GGUF_ARCHITECTURES: dict[str, bool] = {
    **{"llama": True, "qwen2": False, "qwen3": False, "gemma": False, "gemma2": False, "gemma3": False}
}
"""GGUF architecture -> whether the rows of q and k are permuted. Mistral's architecture is "llama"."""

_MODULES = ["model.embed_tokens", "lm_head"] + [
    f"model.layers.0.{part}"
    for part in (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
]


@dataclass
class GgufAdapter:
    """The contents of a GGUF adapter file.

    `unused`: names of norm tensors, which llama.cpp ignores. `fields`: the fields of the header."""

    adapter: Adapter
    architecture: str
    unused: list[str] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)


def _names(architecture: str) -> dict[str, str]:
    """Return {module: GGUF name} for block 0, from the gguf package's table."""
    import gguf

    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, 1)
    names = {module: table.get_name(module) for module in _MODULES}
    return {module: name for module, name in names.items() if name}


def _to_module(name: str, names: Mapping[str, str]) -> str | None:
    block = re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name)
    base = f"blk.0.{block[2]}" if block else name
    module = next((m for m, n in names.items() if n == base), None)
    return module and (module.replace(".layers.0.", f".layers.{block[1]}.") if block else module)


def _to_name(module: str, names: Mapping[str, str]) -> str | None:
    layer = re.match(r"model\.layers\.(\d{1,6})\.", module)
    name = names.get(f"model.layers.0.{module[layer.end() :]}" if layer else module)
    return name and (name.replace("blk.0.", f"blk.{layer[1]}.") if layer else name)


def _is_permuted(module: str) -> bool:
    return module.endswith((".self_attn.q_proj", ".self_attn.k_proj"))


def read_gguf(path: str | Path, *, head_dim: int | None = None) -> GgufAdapter:
    """Return the adapter in a GGUF file, under Hugging Face names.

    head_dim: the base's head size, needed for Llama's q and k if the file does not contain the head size.

    Raises one AdapterError listing unpaired, misshapen or unknown tensors, another AdapterError for NaN or
    infinity, and all errors of `read_gguf_file`."""
    file = read_gguf_file(path)
    where = file.where
    texts = {key: value for key, value in file.fields.items() if isinstance(value, str)}
    architecture = texts.get("general.architecture", "")
    if texts.get("general.type") != "adapter" or texts.get("adapter.type") != "lora":
        kinds = f"general.type = {texts.get('general.type')!r}, adapter.type = {texts.get('adapter.type')!r}"
        raise AdapterError(f"the GGUF file is not a LoRA adapter: {kinds}", where=where)
    if architecture not in GGUF_ARCHITECTURES:
        similar = nearest(architecture, GGUF_ARCHITECTURES)
        problem = f"adapters of the architecture {architecture!r} cannot be read from GGUF"
        fix = f"known: {', '.join(GGUF_ARCHITECTURES)}" + (f"; nearest: {similar[0]}" if similar else "")
        raise AdapterError(problem, where=where, fix=fix)
    problems: list[str] = []
    if "adapter.alora.invocation_tokens" in file.fields:
        problems.append("an activated LoRA, which acts from certain tokens on (adapter.alora.invocation_tokens)")
    alpha = file.fields.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not abs(alpha) < float("inf"):
        problems.append(f"adapter.lora.alpha = {alpha!r}: a finite number is expected")
        alpha = 0.0
    stated = file.fields.get(f"{architecture}.rope.dimension_count")
    head_dim = head_dim or (stated if isinstance(stated, int) and stated > 0 else None)
    names = _names(architecture)
    halves: dict[str, dict[str, Tensor]] = {}
    unused = []
    for key, entry in sorted(file.entries.items()):
        base, _, half = key.rpartition(".weight.lora_")
        module = _to_module(base, names)
        if half in ("a", "b") and module and len(entry.shape) == 2:
            halves.setdefault(module, {})[half] = file.tensor(key)
        elif key.endswith("_norm.weight"):
            unused.append(key)
        else:
            problems.append(f"{key} {entry.shape}: not a lora_a or lora_b matrix of a known module")
    check_finite({f"{m}.lora_{half}": t for m, two in halves.items() for half, t in two.items()}, where=where)
    pairs = {}
    for module, two in sorted(halves.items()):
        shapes = ", ".join(f"lora_{half} {tuple(t.shape)}" for half, t in sorted(two.items()))
        embedding = module == "model.embed_tokens"
        A, B = two.get("a"), two.get("b")
        if A is None or B is None:
            problems.append(f"{module}: {shapes} without its other half")
            continue
        A = A.t() if embedding else A
        if not 0 < A.shape[0] == B.shape[1]:
            problems.append(f"{module}: {shapes} do not fit together")
            continue
        if GGUF_ARCHITECTURES[architecture] and _is_permuted(module):
            if not head_dim:
                problems.append(f"{module}: its rows are in llama.cpp's order, and the file lacks the size of a head")
                continue
            if head_dim % 2 or B.shape[0] % head_dim:
                problems.append(f"{module}: {B.shape[0]:,} rows are not a multiple of the head size {head_dim:,}")
                continue
            B = B.reshape(-1, head_dim // 2, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
        scale = scale_of(alpha, A.shape[0]) if alpha else 1.0
        pairs[module] = Pair(A, B, scale, "embedding" if embedding else "linear")
    if not pairs and not problems:
        problems.append("no pairs")
    if problems:
        heads = any("size of a head" in p for p in problems)
        problem = f"the GGUF adapter cannot be read as it is ({len(problems)} problem(s)):\n{bullets(problems)}"
        raise AdapterError(problem, where=where, fix="pass the base that the adapter was made for" if heads else None)
    extra = {"title": texts["general.name"]} if texts.get("general.name") else {}
    base_name = texts.get("general.base_model.0.repo_url") or texts.get("general.base_model.0.name", "")
    rank = Counter(p.rank for p in pairs.values()).most_common(1)[0][0]
    card = Card(base_name, rank=rank, alpha=alpha, extra=extra)
    return GgufAdapter(Adapter(pairs=pairs, card=card), architecture, unused, file.fields)


def write_gguf(
    adapter: Adapter, path: str | Path, *, architecture: str, head_dim: int | None = None, name: str = ""
) -> list[str]:
    """Write an adapter as a llama.cpp LoRA file, and return notes on what was changed.

    The format is that of llama.cpp's convert_lora_to_gguf. float32, float16 and bfloat16 tensors keep their
    dtype; other tensors are converted to float32. Raises one AdapterError listing everything that the format
    cannot hold: magnitudes, deltas, full modules, token rows, pairs of kinds other than linear and embedding,
    and modules without a GGUF name."""
    if architecture not in GGUF_ARCHITECTURES:
        raise AdapterError(
            f"cannot write GGUF for the architecture {architecture!r}", fix=f"known: {', '.join(GGUF_ARCHITECTURES)}"
        )
    names = _names(architecture)
    permuted, problems = GGUF_ARCHITECTURES[architecture], []
    pairs = {module: pair.collapsed() for module, pair in sorted(adapter.pairs.items())}
    for module, pair in pairs.items():
        want = "embedding" if module == "model.embed_tokens" else "linear"
        if _to_name(module, names) is None:
            problems.append(f"{module}: GGUF has no name for this module in {architecture}")
        if pair.kind != want:
            problems.append(f"{module}: a pair of kind {pair.kind}, A {tuple(pair.A.shape)}")
        elif pair.magnitude is not None:
            problems.append(f"{module}: DoRA's magnitude {tuple(pair.magnitude.shape)}")
        elif permuted and _is_permuted(module) and (not head_dim or head_dim % 2 or pair.B.shape[0] % head_dim):
            problems.append(f"{module}: {pair.B.shape[0]:,} rows, and heads of {head_dim or 'an unknown size'}")
    problems += [f"{m}: a full module" for m in sorted(adapter.modules)]
    problems += [f"{m}: token rows" for m in sorted(adapter.token_rows)]
    problems += [f"{m}: a {d.form} change {tuple(d.shape)}" for m, d in sorted(adapter.deltas.items())]
    if problems or not pairs:
        problem = f"llama.cpp's adapter format cannot hold:\n{bullets(problems or ['an adapter without pairs'], None)}"
        raise AdapterError(problem, where=str(path), fix="merge the adapter into the base and convert the result")
    alphas = {module: alpha_of(pair.scale, pair.rank) for module, pair in pairs.items()}
    common = Counter(a for a in alphas.values() if a).most_common(1)
    alpha = float(torch.tensor(common[0][0] if common else 1.0, dtype=torch.float32))
    tensors: dict[str, Tensor] = {}
    notes = []
    for module, pair in pairs.items():
        A, B = _storable(pair.A), _storable(pair.B)
        if alphas[module] != alpha:
            B = (B.double() * (alphas[module] / alpha)).float()
            notes.append(f"{module}: alpha {alphas[module]:g} is folded into B, because the file's alpha is {alpha:g}")
        if permuted and _is_permuted(module):
            assert head_dim is not None
            # Convert Hugging Face's row order to llama.cpp's.
            B = B.reshape(-1, 2, head_dim // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
        gguf_name = _to_name(module, names)
        tensors[f"{gguf_name}.weight.lora_a"] = A.t() if pair.kind == "embedding" else A
        tensors[f"{gguf_name}.weight.lora_b"] = B
    fields: dict[str, str | float | int] = {"general.architecture": architecture, "general.type": "adapter"}
    fields |= {"adapter.type": "lora", "adapter.lora.alpha": alpha}
    if name:
        fields["general.name"] = name
    if head_dim:
        fields[f"{architecture}.rope.dimension_count"] = head_dim
    write_gguf_file(path, fields, tensors)
    return notes


def _storable(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float16, torch.bfloat16) else t.float()
