"""What a run holds in memory and on disk, by formula: good to about a third, to refuse what clearly does not fit.

    trained      (4 weights + 4 gradient + 8 moments) bytes for each trainable parameter, float32 under AdamW
    activations  tokens · layers · (12·hidden + 4·mlp + 2·heads·longest row) · bytes of the base's dtype,
                 with checkpointing one layer of that, and tokens · layers · hidden
    logits       2 · 4 · vocabulary · 1024, the chunk of trained positions whose softmax is in memory
    working      0.5 GB for torch and its buffers

The weights of the base are in memory already when this is asked, so they are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.core.adapter import LoraSpec
from veneer.core.targets import Target, base_modules, full_modules, matches, token_embeddings

__all__ = ["Estimate", "free_memory", "memory", "pair_parameters", "trainable_parameters"]

_WORKING = 500_000_000
_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Estimate:
    """Bytes beyond the loaded base. `plain`: all activations kept. `checkpointed`: recomputed in the backward pass."""

    trained: int
    activations: int
    checkpointed_activations: int
    rest: int

    @property
    def plain(self) -> int:
        return self.trained + self.activations + self.rest

    @property
    def checkpointed(self) -> int:
        return self.trained + self.checkpointed_activations + self.rest


def memory(model: nn.Module, *, trainable: int, tokens: int, longest: int) -> Estimate:
    """For micro-batches of `tokens` tokens whose longest row has `longest`, and `trainable` parameters."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def size(name: str, default: int) -> int:
        value = getattr(config, name, None)
        return default if value is None else int(value)

    hidden, layers = size("hidden_size", 1), size("num_hidden_layers", 1)
    mlp = size("intermediate_size", 4 * hidden)
    active = size("num_experts_per_tok", 0)
    if active:
        mlp = active * size("moe_intermediate_size", mlp) + size("shared_expert_intermediate_size", 0)
    each = 12 * hidden + 4 * mlp + 2 * size("num_attention_heads", 1) * longest
    bytes_each = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
    layer = tokens * each * bytes_each
    vocabulary = size("vocab_size", 1)
    return Estimate(
        trained=16 * trainable,
        activations=layers * layer,
        checkpointed_activations=layer + layers * tokens * hidden * bytes_each,
        rest=_WORKING + 8 * vocabulary * min(tokens, _LOGIT_ROWS),
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device: what is free, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        return free if limit == "max" else min(free, int(limit) - used + cached)
    except (OSError, ValueError, StopIteration):
        return free


def pair_parameters(model: nn.Module, target: Target, spec: LoraSpec) -> int:
    """Parameters of the pair that `spec` puts on `target`: A, B, and DoRA's magnitude."""
    module = dict(base_modules(model))[target.module_name]
    rank = next((r for p, r in spec.rank_pattern.items() if matches(p, target.name)), spec.rank)
    if target.kind == "experts":
        shape = getattr(module, target.parameter or "").shape
        return int(shape[0] * rank * (shape[1] + shape[2]))
    weight: Any = getattr(module, "weight", None)
    if target.kind == "conv":
        return int(rank * weight[0].numel() + weight.shape[0] * rank) + spec.dora * int(weight.shape[0])
    if hasattr(module, "in_features"):  # quantised weights have a shape of their own
        rows, columns = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    else:
        rows, columns = (int(n) for n in weight.shape)
    return rank * (rows + columns) + spec.dora * rows


def trainable_parameters(model: nn.Module, targets: list[Target], spec: LoraSpec) -> tuple[int, int]:
    """(in pairs, in full modules and token rows)."""
    modules = dict(base_modules(model))
    pairs = sum(pair_parameters(model, t, spec) for t in targets)
    whole = sum(p.numel() for name in full_modules(model, spec) for p in modules[name].parameters())
    for name, ids in token_embeddings(model, spec).items():
        weight: Any = modules[name].weight
        whole += len(ids) * int(weight.shape[1])
    return pairs, whole
