"""An adapter for servers that know one rank and one scale: every scale folded into B, ranks padded with zeros.

    B' = s·B padded to (out, r)    A' = A padded to (r, in)    alpha = r = the largest rank, so that alpha/r = 1

s·B stays in B's dtype where that is exact (s a power of two), and becomes float32 elsewhere. Refused, each with the way
out, is what vLLM's loader or llama.cpp's has no place for. Source: `vllm/lora`, whose parser knows lora_A, lora_B and
lora_embedding_A, _B, reads one alpha and one r, and wants no DoRA, no bias, no modules_to_save. Knows pairs; no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.formats.leaves import Leaf
from veneer.formats.write_names import Refusals, component_of

__all__ = ["MAX_VLLM_RANKS", "folded", "refuse_unservable", "vllm_notes"]

MAX_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""
MAX_VLLM_VOCABULARY = 258_048
MERGE = "merge it into the base"


def refuse_unservable(adapter: Adapter, leaves: Mapping[str, Leaf], server: str, refused: Refusals) -> None:
    """Put into `refused` what `server`, "vLLM" or "llama.cpp", cannot hold."""
    for module, leaf in leaves.items():
        if component_of(module):
            refused[f"{server} serves language models, and this is of an image model; --to diffusers"].append(module)
        for parameter, delta in leaf.deltas.items():
            refused[f"{server} knows no {delta.form} change of the {parameter}; {MERGE}"].append(module)
        if leaf.full:
            refused[f"{server} loads no full copies of modules; {MERGE}"].append(module)
        if leaf.pair is not None:
            _refuse_pair(module, leaf.pair, server, refused)
    for module in adapter.token_rows:
        refused[f"{server} knows no rows of tokens trained alone; {MERGE}"].append(module)
    for module in adapter.new_tokens:
        refused[f"{server} adds no tokens; {MERGE}"].append(module)


def _refuse_pair(module: str, pair: Pair, server: str, refused: Refusals) -> None:
    leaf = module.rpartition(".")[2]
    if pair.magnitude is not None:
        refused[f"{server} knows no DoRA; {MERGE}"].append(module)
    if pair.kind == "conv":
        refused[f"{server} knows no pair of a convolution; {MERGE}"].append(module)
    if pair.kind == "experts":
        refused[f"{server} lays out the experts' parameters in its own way; {MERGE}"].append(module)
    if server != "vLLM":
        return
    if pair.kind == "embedding" and leaf != "embed_tokens":
        refused[f"vLLM knows an embedding only by the name embed_tokens; {MERGE}"].append(module)
    if leaf in ("embed_tokens", "lm_head"):
        rows = pair.A.shape[1] if pair.kind == "embedding" else pair.B.shape[0]
        if rows > MAX_VLLM_VOCABULARY:
            refused[f"vLLM takes at most {MAX_VLLM_VOCABULARY:,} rows here; {MERGE}"].append(module)
    if pair.rank > MAX_VLLM_RANKS[-1]:
        refused[f"vLLM takes ranks up to {MAX_VLLM_RANKS[-1]}; `veneer adapter resize` first"].append(module)


def folded(adapter: Adapter) -> Adapter:
    """The same ΔW with every scale 1 and every rank the largest one. Of linears and embeddings."""
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
    same = wide.to(B.dtype)
    return same if torch.equal(same.double(), wide) else wide.to(torch.float32)


def vllm_notes(adapter: Adapter) -> list[str]:
    """What vLLM's command line needs for a folded adapter."""
    rank = next(p.rank for p in adapter.pairs.values())
    need = next(n for n in MAX_VLLM_RANKS if n >= rank)
    return [f"rank {rank}: start vLLM with --enable-lora --max-lora-rank {need} or more (its default is 16)"]
