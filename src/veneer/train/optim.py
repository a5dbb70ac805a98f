"""Optimizers by name, learning rate schedules, and moving averages of parameters.

    lr(step, group) = learning_rate · (loraplus_ratio if the group contains B else 1) · factor(step)

LoRA+ (arXiv 2402.12354): the learning rate of B is `loraplus_ratio` times the learning rate of A. A schedule
is a pure function of the step, so a resumed run needs only the step number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}
"""Name in the configuration -> torch class."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    name: str = "adamw",
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    loraplus_ratio: float = 1.0,
    eps: float = 1e-8,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer over named parameters, with up to four groups per learning rate.

    `rates`: prefix of a parameter's name -> learning rate of these parameters, instead of `learning_rate`.
    Parameters whose name ends in `.B` use `loraplus_ratio` times their rate. Vectors (DoRA's magnitude,
    biases) have no weight decay. Each group has `base_lr`, which the loop multiplies by the schedule's
    factor."""
    options: dict[str, Any] = {"lr": learning_rate}
    if name in ("adamw", "adam"):
        options |= {"betas": tuple(betas), "eps": eps}
    if name != "adafactor":
        options["fused"] = True
    members: dict[tuple[float, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for key, parameter in parameters.items():
        rate = next((values for start, values in (rates or {}).items() if key.startswith(start)), learning_rate)
        faster = loraplus_ratio != 1.0 and key.rsplit(".", 1)[-1] == "B"
        decays = weight_decay > 0 and parameter.ndim >= 2
        # The minus puts the highest rate first, because the rate of the first group is displayed.
        members.setdefault((-rate, faster, decays), []).append((key, parameter))
    groups = []
    for (rate, faster, decays), named in sorted(members.items(), key=lambda item: item[0]):
        names, params = map(list, zip(*named, strict=True))
        lr = -rate * (loraplus_ratio if faster else 1.0)
        decay = weight_decay if decays else 0.0
        groups.append({"params": params, "names": names, "lr": lr, "base_lr": lr, "weight_decay": decay})
    optimizer: torch.optim.Optimizer = _OPTIMIZERS[name](groups, **options)
    return optimizer


@dataclass(frozen=True)
class Schedule:
    """The learning rate factor as a function of the step.

    The factor rises linearly over `warmup` steps. Then it is constant, or falls toward `floor` until `steps`.
    Step numbers start at 1. With s = step, w = warmup, n = steps:

        warm-up s/w while s ≤ w; then with t = (s − w − 1)/(n − w) in [0, 1):
        constant 1, linear 1 − t·(1 − floor), cosine floor + (1 − floor)·(1 + cos πt)/2

    The first step after the warm-up has the full rate, and no step has rate zero."""

    name: str
    steps: int
    warmup: int = 0
    floor: float = 0.0

    @classmethod
    def create(cls, name: str, steps: int, warmup: float = 0.0, floor: float = 0.0) -> Schedule:
        """Return a schedule with the given total number of steps.

        warmup: a value below 1 is a share of `steps`, rounded up; other values are a number of steps, at most
        `steps`."""
        in_steps = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
        return cls(name, steps, min(in_steps, steps), floor)

    def factor(self, step: int) -> float:
        """Return the factor for optimizer step `step`, counted from 1."""
        if step <= self.warmup:
            return step / self.warmup
        if self.name == "constant":
            return 1.0
        t = min(1.0, (step - self.warmup - 1) / max(1, self.steps - self.warmup))
        if self.name == "linear":
            return 1.0 - t * (1.0 - self.floor)
        return self.floor + (1.0 - self.floor) * (1.0 + math.cos(math.pi * t)) / 2.0

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of every group for `step`, and return the rate of the first group."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return float(optimizer.param_groups[0]["lr"])


class Ema:
    """An exponential moving average of the parameters.

        E_n = d_n·E_{n−1} + (1 − d_n)·P_n          d_1 = 0,  d_n = min(decay, n / (9 + n))

    The average is usually nearer to the minimum than the parameters after any single step. The decay schedule
    is that of diffusers' EMAModel, in which early steps quickly lose weight. `averages`: float32 averages,
    keyed by the parameter's name plus `@ema`; the initial averages are copies of the parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.averages: dict[str, Tensor] = {f"{n}@ema": p.detach().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages with the parameters after optimizer step n = `step`, counted from 1."""
        keep = 0.0 if step <= 1 else min(self.decay, step / (9 + step))
        for average, parameter in zip(self.averages.values(), self.parameters.values(), strict=True):
            average.sub_((1.0 - keep) * (average - parameter))

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the averages into the parameters."""
        for average, parameter in zip(self.averages.values(), self.parameters.values(), strict=True):
            parameter.copy_(average)

    @contextmanager
    def using_averages(self) -> Iterator[None]:
        """Replace the parameters with the averages inside the context.

        The parameters are restored bit for bit afterwards."""
        trained = [p.detach().clone() for p in self.parameters.values()]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters.values(), trained, strict=True):
                    parameter.copy_(value)
