"""What can be counted on a base that is loaded: trainable parameters, and the memory that is free.

What a run holds in memory is counted in veneer.plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.core.adapter import LoraSpec
from veneer.core.targets import Target, base_modules, full_modules, matches, token_embeddings

__all__ = ["free_memory", "held_memory", "pair_parameters", "trainable_parameters"]


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


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on the device now: what torch allocated on CUDA, else resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


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
