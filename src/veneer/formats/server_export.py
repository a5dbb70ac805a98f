"""Convert adapters for servers that support only one rank and scale.

    B' = s·B padded to (out, r)    A' = A padded to (r, in)    alpha = r = the largest rank, so that alpha/r = 1

s·B keeps B's dtype if this is exact (s is a power of two), and is converted to float32 otherwise. Changes
that the loader of vLLM or llama.cpp does not support are refused, each with a workaround.

vLLM (`vllm/lora`) reads lora_A, lora_B, lora_embedding_A and lora_embedding_B; it does not support DoRA,
biases and modules_to_save. Before 0.32, vLLM reads a single alpha and r, and ignores the patterns.

This module uses pairs, not files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.formats.comparison import Refusals
from veneer.formats.module_tensors import ModuleChanges
from veneer.formats.names import component_of

MAX_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""
_MAX_VLLM_VOCABULARY = 258_048
MERGE = "merge it into the base"


def refuse_unservable(adapter: Adapter, by_module: Mapping[str, ModuleChanges], server: str, refused: Refusals) -> None:
    """Add to `refused` what `server` ("vLLM" or "llama.cpp") does not support."""
    for module, changes in by_module.items():
        if component_of(module):
            refused[f"{server} serves language models, but this adapter is for an image model"].append(module)
        for parameter, delta in changes.deltas.items():
            refused[f"{server} does not support a {delta.form} change of the {parameter}; {MERGE}"].append(module)
        if changes.full:
            refused[f"{server} does not load full copies of modules; {MERGE}"].append(module)
        if changes.pair is not None:
            _refuse_pair(module, changes.pair, server, refused)
    for module in adapter.token_rows:
        refused[f"{server} does not support separately trained token rows; {MERGE}"].append(module)


def _refuse_pair(module: str, pair: Pair, server: str, refused: Refusals) -> None:
    kind = module.rpartition(".")[2]
    if pair.magnitude is not None:
        refused[f"{server} does not support DoRA; {MERGE}"].append(module)
    if pair.kind == "conv":
        refused[f"{server} does not support pairs of convolutions; {MERGE}"].append(module)
    if pair.kind == "experts":
        refused[f"{server} lays out the experts' parameters in its own way; {MERGE}"].append(module)
    if server != "vLLM":
        return
    if pair.kind == "embedding" and kind != "embed_tokens":
        refused[f"vLLM supports an embedding only if its name is embed_tokens; {MERGE}"].append(module)
    if kind in ("embed_tokens", "lm_head"):
        rows = pair.A.shape[1] if pair.kind == "embedding" else pair.B.shape[0]
        if rows > _MAX_VLLM_VOCABULARY:
            refused[f"vLLM takes at most {_MAX_VLLM_VOCABULARY:,} rows here; {MERGE}"].append(module)
    if pair.rank > MAX_VLLM_RANKS[-1]:
        refused[f"vLLM supports ranks up to {MAX_VLLM_RANKS[-1]}; run `veneer adapter resize` first"].append(module)


def folded(adapter: Adapter) -> Adapter:
    """Return an adapter with the same ΔW, in which all pairs have scale 1 and one rank.

    The rank is the largest in `adapter`. Supports linear and embedding pairs."""
    rank = max((p.rank for p in adapter.pairs.values()), default=0)
    pairs = {}
    for name, pair in adapter.pairs.items():
        A, B = pair.A, _times(pair.B, pair.scale)
        if more := rank - pair.rank:
            A = torch.cat([A, A.new_zeros(more, A.shape[1])])
            B = torch.cat([B, B.new_zeros(B.shape[0], more)], dim=1)
        pairs[name] = Pair(A, B, 1.0, pair.kind)
    return replace(adapter, pairs=pairs, rslora=False, card=replace(adapter.card, rank=rank, alpha=float(rank)))


def _times(B: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return B
    wide = B.double() * scale
    narrow = wide.to(B.dtype)
    return narrow if torch.equal(narrow.double(), wide) else wide.to(torch.float32)


def vllm_notes(adapter: Adapter) -> list[str]:
    """Return the vLLM options that a folded adapter needs."""
    rank = next(p.rank for p in adapter.pairs.values())
    need = next(n for n in MAX_VLLM_RANKS if n >= rank)
    return [f"rank {rank}: start vLLM with --enable-lora --max-lora-rank {need} or more (its default is 16)"]
