"""The loop that all parts of the catalogue bases are trained with: warm-up and cosine, an average of the weights.

AdamW for everything, or Muon (https://kellerjordan.github.io/posts/muon) for what is a matrix inside the network: its
update is the momentum with all singular values set to one, scaled to the size of AdamW's, so one rate serves both.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NOT_INSIDE = re.compile(r"^\w+\.(conv_in|conv_out|proj_out|norm_out|text_projection|shared)\b|attention_bias")


def optimise(
    parts: dict[str, nn.Module],
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    state: Path,
    weight_decay: float = 0.01,
    warmup: int = 100,
    average: float = 0.999,
    seed: int = 0,
    save_every: int = 250,
    rates: dict[str, float] | None = None,
    muon: bool = False,
) -> None:
    """Minimises `loss(step, generator)` over the parameters of `parts`, which end as their running average.

    `rates`: part -> share of the learning rate that it gets, 1 where it is not named. `muon`: matrices and kernels of
    convolutions learn by Muon; tables, vectors and the first and last layer by AdamW. The average's decay grows as
    min(average, (1 + k) / (10 + k)). `state`: where everything is kept every `save_every` steps; a run that finds the
    file goes on from it. Losses go to `state` with the suffix .jsonl.
    """
    weights = {f"{p}.{n}": w for p, part in parts.items() for n, w in part.named_parameters() if w.requires_grad}
    # Vectors (norms, biases) and tables are not pulled to zero.
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    views: list[tuple[nn.Parameter, nn.Parameter]] = []
    for name, weight in weights.items():
        decay = weight_decay if weight.ndim >= 2 and "embed" not in name else 0.0
        turned = muon and decay > 0 and not _NOT_INSIDE.search(name)
        if turned:
            views.append((nn.Parameter(_matrix(weight.data, weight)), weight))
        share = (rates or {}).get(name.partition(".")[0], 1.0)
        groups.setdefault((share, decay, turned), []).append(views[-1][0] if turned else weight)

    def chosen(turned: bool) -> list[dict[str, Any]]:
        return [{"params": w, "weight_decay": d, "share": s} for (s, d, t), w in groups.items() if t == turned]

    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(chosen(False), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    ]
    if views:
        optimizers.append(torch.optim.Muon(chosen(True), lr=learning_rate, adjust_lr_fn="match_rms_adamw"))
    mean = {n: w.detach().clone() for n, w in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    first = 0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        first = kept["step"]
        for optimizer, was in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(was)
        generator.set_state(kept["random"])
        mean = kept["mean"]
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(kept["weights"][name])
    total, began = 0.0, time.perf_counter()
    for step in range(first, steps):
        rate = learning_rate * min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
        value = loss(step, generator)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        for view, weight in views:
            view.grad = None if weight.grad is None else _matrix(weight.grad, weight)
        for optimizer in optimizers:
            optimizer.step()
        for weight in weights.values():
            weight.grad = None
        decay = min(average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.values()), [w.data for w in weights.values()], 1 - decay)
        total += value.item()
        if not math.isfinite(total):
            raise RuntimeError(f"the loss of step {step + 1} is not finite")
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "loss": total / 50, "seconds": (time.perf_counter() - began) / 50}
            print(json.dumps(line), flush=True)
            with open(state.with_suffix(".jsonl"), "a") as log:
                log.write(json.dumps(line) + "\n")
            total, began = 0.0, time.perf_counter()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            kept = {
                "step": step + 1, "optimizers": [o.state_dict() for o in optimizers], "mean": mean,
                "random": generator.get_state(),
                "weights": {n: w.detach() for n, w in weights.items()},
            }  # fmt: skip
            torch.save(kept, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(mean[name])


def _matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """A weight as (out, everything else), without a copy, or its gradient in the same order."""
    if weight.ndim == 4 and not weight.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels last
    return tensor.reshape(len(tensor), -1)
