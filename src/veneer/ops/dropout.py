"""Dropout whose mask is made again instead of kept: it is a function of a seed and the place in x.

    y_i = x_i / (1 − p) where hash(seed, i) ≥ p·2³², else 0

On the CPU in bfloat16 one pass of a compiled kernel; elsewhere torch's generator with that seed draws the mask, another
one. A step uses one of the two throughout, for what decides is x's dtype and device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.choice import chosen


class Dropout(NamedTuple):
    """`p`: share of values dropped, below 1. `seed`: below 2⁶²."""

    p: float
    seed: int

    @classmethod
    def drawn(cls, p: float) -> Dropout:
        """With a seed from torch's own generator of the CPU: who fixes or keeps its state fixes the mask."""
        return cls(p, int(torch.randint(1 << 62, ()).item()))

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor of x's shape. The gradient of x is what this makes of the gradient of y."""
        x = x.contiguous()
        run = chosen("dropout", x)
        if run is not None:
            y: Tensor = run(x, self.p, self.seed)
            return y
        generator = torch.Generator(x.device).manual_seed(self.seed)
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator)
        return kept.mul_(x).div_(1 - self.p)
