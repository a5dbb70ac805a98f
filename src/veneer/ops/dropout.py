"""Dropout whose mask is made again instead of kept: it is a function of a seed and the place in x.

    y_i = x_i / (1 − p) where hash(seed, i) ≥ p·2³², else 0

On the CPU in bfloat16 one pass of a compiled kernel; elsewhere torch's generator with that seed draws the mask, another
one. A step uses one of the two throughout, for what decides is x's dtype and device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.cpu import compiled

__all__ = ["Dropout"]


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
        native = compiled.usable("dropped", x)
        if native is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator)
            return kept.mul_(x).div_(1 - self.p)
        y = torch.empty_like(x)
        least = round(self.p * 2**32)
        words = self.seed & 0xFFFFFFFF, self.seed >> 32
        native.dropped(
            x.data_ptr(), y.data_ptr(), x.numel(), *words, least, 1 / (1 - self.p), torch.get_num_threads()
        )  # fmt: skip
        return y
