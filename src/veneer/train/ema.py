"""An exponential moving average of the trained parameters, which lies nearer the minimum than any one step.

    E_n = d_n·E_{n−1} + (1 − d_n)·P_n          d_1 = 0,  d_n = min(decay, n / (9 + n))

The schedule of diffusers' EMAModel: early steps, which are far from the end, are soon forgotten. Kept in float32 beside
the parameters, and in every checkpoint under `NAME@ema`. Knows tensors by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """`averages`: of each parameter, by its name with `@ema`; they start as the parameters are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.averages: dict[str, Tensor] = {f"{n}@ema": p.detach().clone() for n, p in parameters.items()}

    def decay_at(self, step: int) -> float:
        """d for the average after optimizer step `step`, counted from 1."""
        return 0.0 if step <= 1 else min(self.decay, step / (9 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters as they are after `step`."""
        keep = self.decay_at(step)
        for average, parameter in zip(self.averages.values(), self.parameters.values(), strict=True):
            average.sub_((1.0 - keep) * (average - parameter))

    @torch.no_grad()
    def put(self) -> None:
        """Makes the averages the parameters."""
        for average, parameter in zip(self.averages.values(), self.parameters.values(), strict=True):
            parameter.copy_(average)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The averages in the place of the parameters for the length of a with-block, then the same bits again."""
        trained = [p.detach().clone() for p in self.parameters.values()]
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters.values(), trained, strict=True):
                    parameter.copy_(value)
