"""The loop that all parts of the emoji bases are trained with: AdamW, warm-up and cosine, an average of the weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["optimise"]


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
) -> None:
    """Minimises `loss(step, generator)` over the parameters of `parts`, which end as their running average.

    `rates`: part -> share of the learning rate that it gets, 1 where it is not named. The average's decay grows as
    min(average, (1 + k) / (10 + k)). `state`: where everything is kept every `save_every` steps; a run that finds the
    file goes on from it. Losses go to `state` with the suffix .jsonl.
    """
    weights = {f"{p}.{n}": w for p, part in parts.items() for n, w in part.named_parameters() if w.requires_grad}
    # Vectors (norms, biases) and tables are not pulled to zero.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in weights.items():
        decay = weight_decay if weight.ndim >= 2 and "embed" not in name else 0.0
        groups.setdefault(((rates or {}).get(name.partition(".")[0], 1.0), decay), []).append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": w, "weight_decay": decay, "share": share} for (share, decay), w in groups.items()],
        lr=learning_rate, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    mean = {n: w.detach().clone() for n, w in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    first = 0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        first = kept["step"]
        optimizer.load_state_dict(kept["optimizer"])
        generator.set_state(kept["random"])
        mean = kept["mean"]
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(kept["weights"][name])
    total, began = 0.0, time.perf_counter()
    for step in range(first, steps):
        rate = learning_rate * min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        value = loss(step, generator)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
                "step": step + 1, "optimizer": optimizer.state_dict(), "random": generator.get_state(), "mean": mean,
                "weights": {n: w.detach() for n, w in weights.items()},
            }  # fmt: skip
            torch.save(kept, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(mean[name])
