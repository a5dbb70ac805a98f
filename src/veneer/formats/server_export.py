"""Convert adapters for servers with one rank and scale: fold scales, pad ranks.

    B' = s·B padded to (out, r)    A' = A padded to (r, in)    alpha = r = the largest rank, so that alpha/r = 1

s·B stays in B's dtype if this is exact (s a power of two), and becomes float32 otherwise. Contents that the
loader of vLLM, TGI or llama.cpp cannot hold are refused, each with a workaround.

vLLM (`vllm/lora`): reads lora_A, lora_B, lora_embedding_A, _B; no DoRA, no bias, no modules_to_save. Before
0.32 it reads one alpha and one r and drops the patterns.

TGI (`server/text_generation_server/adapters/lora.py`, January 2026), without any message to the client:
    - a kind of module (q_proj, …) that any layer lacks is dropped in all layers: the others get pairs of zeros here;
    - after the first kind, `config.r` is the rank padded for its kernels (at least 8, then multiples of 16), and
      every later kind is scaled by alpha over the padded rank: the rank written here is unchanged by the padding;
    - patterns are dropped, and so are lm_head, embeddings, DoRA's magnitudes, biases and full copies.
Uses pairs; no files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.errors import AdapterError, counted
from veneer.formats.comparison import Refusals
from veneer.formats.module_tensors import ModuleChanges
from veneer.formats.names import component_of

MAX_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""
_MAX_VLLM_VOCABULARY = 258_048
TGI_RANK = 16
"""TGI pads ranks to multiples of this.

A multiple is unchanged on up to rank/8 GPUs."""
_TGI_MODULE = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.((gate|up|down)_proj|c_fc|c_proj))"
)
MERGE = "merge it into the base"


def refuse_unservable(adapter: Adapter, by_module: Mapping[str, ModuleChanges], server: str, refused: Refusals) -> None:
    """Add to `refused` what `server` ("vLLM", "TGI" or "llama.cpp") cannot hold."""
    for module, changes in by_module.items():
        if component_of(module):
            refused[f"{server} serves language models, and this is of an image model"].append(module)
        for parameter, delta in changes.deltas.items():
            refused[f"{server} does not support a {delta.form} change of the {parameter}; {MERGE}"].append(module)
        if changes.full:
            refused[f"{server} loads no full copies of modules; {MERGE}"].append(module)
        if changes.pair is not None:
            _refuse_pair(module, changes.pair, server, refused)
    for module in adapter.token_rows:
        refused[f"{server} does not support separately trained token rows; {MERGE}"].append(module)


def _refuse_pair(module: str, pair: Pair, server: str, refused: Refusals) -> None:
    kind = module.rpartition(".")[2]
    if pair.magnitude is not None:
        refused[f"{server} does not support DoRA; {MERGE}"].append(module)
    if pair.kind == "conv":
        refused[f"{server} does not support a pair of a convolution; {MERGE}"].append(module)
    if pair.kind == "experts":
        refused[f"{server} lays out the experts' parameters in its own way; {MERGE}"].append(module)
    if server == "TGI" and pair.kind == "linear" and not _TGI_MODULE.fullmatch(module):
        refused[f"TGI drops a pair of any but the decoder layers' q, k, v, o, gate, up and down; {MERGE}"].append(
            module
        )
    if server == "TGI" and pair.kind == "embedding":
        refused[f"TGI does not support a pair of an embedding; {MERGE}"].append(module)
    if server != "vLLM":
        return
    if pair.kind == "embedding" and kind != "embed_tokens":
        refused[f"vLLM knows an embedding only by the name embed_tokens; {MERGE}"].append(module)
    if kind in ("embed_tokens", "lm_head"):
        rows = pair.A.shape[1] if pair.kind == "embedding" else pair.B.shape[0]
        if rows > _MAX_VLLM_VOCABULARY:
            refused[f"vLLM takes at most {_MAX_VLLM_VOCABULARY:,} rows here; {MERGE}"].append(module)
    if pair.rank > MAX_VLLM_RANKS[-1]:
        refused[f"vLLM takes ranks up to {MAX_VLLM_RANKS[-1]}; `veneer adapter resize` first"].append(module)


def folded(adapter: Adapter, multiple: int = 1) -> Adapter:
    """Return the same ΔW with every scale 1 and one rank.

    The rank is the largest one, rounded up to a `multiple`. For linears and embeddings."""
    rank = max((p.rank for p in adapter.pairs.values()), default=0)
    rank += -rank % multiple
    pairs = {}
    for name, pair in adapter.pairs.items():
        A, B = pair.A, _times(pair.B, pair.scale)
        if more := rank - pair.rank:
            A = torch.cat([A, A.new_zeros(more, A.shape[1])])
            B = torch.cat([B, B.new_zeros(B.shape[0], more)], dim=1)
        pairs[name] = Pair(A, B, 1.0, pair.kind)
    return replace(adapter, pairs=pairs, rslora=False, card=replace(adapter.card, rank=rank, alpha=float(rank)))


def in_every_layer(adapter: Adapter, layers: int) -> tuple[Adapter, int]:
    """Add pairs of zeros so that each kind of module has a pair in all layers.

    Returns (adapter, number of added pairs). For modules that TGI supports. `layers`: the base's number of
    layers. Raises AdapterError for a layer that the base does not have, and if the widths of a missing pair
    are unknown because layers differ (Gemma 4)."""
    kinds: dict[str, dict[int, str]] = defaultdict(dict)
    for name in adapter.pairs:
        match = _TGI_MODULE.fullmatch(name)
        assert match is not None, name
        kinds[match[2]][int(match["layer"])] = name
    beyond = sorted(n for by_layer in kinds.values() for i, n in by_layer.items() if i >= layers)
    if beyond:
        raise AdapterError(f"the base has {layers} layers, and the adapter has {', '.join(beyond[:3])}")
    pairs = dict(adapter.pairs)
    for kind, by_layer in kinds.items():
        like = adapter.pairs[next(iter(by_layer.values()))]
        missing = sorted(set(range(layers)) - set(by_layer))
        widths = {(adapter.pairs[n].A.shape[1], adapter.pairs[n].B.shape[0]) for n in by_layer.values()}
        if missing and len(widths) > 1:
            raise AdapterError(
                f"TGI drops {kind} in every layer if one layer lacks it, and a pair of zeros for layer {missing[0]} "
                "has no known size: this base's layers have different widths",
                fix=f"train {kind} in every layer, or {MERGE}",
            )
        for layer in missing:
            pairs[f"model.layers.{layer}.{kind}"] = replace(like, A=like.A * 0, B=like.B * 0)
    return replace(adapter, pairs=pairs), len(pairs) - len(adapter.pairs)


def tgi_notes(adapter: Adapter, filled: int) -> list[str]:
    """Return notes on an adapter folded for TGI."""
    rank = next(p.rank for p in adapter.pairs.values())
    notes = [f"rank {rank}: TGI scales it right on up to {rank // 8} GPUs"]
    if filled:
        notes.append(f"{counted(filled, 'pair')} of zeros: TGI drops a kind of module that any layer lacks")
    return notes


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
