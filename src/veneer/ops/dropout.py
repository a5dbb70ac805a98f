"""Dropout with a mask that is recomputed instead of stored: a hash of seed and position.

    y_i = x_i / (1 − p) if hash(seed, i) ≥ p·2³², else 0

The mask is the same on every device and in every dtype. It is computed in one pass of a compiled kernel, or
by torch's integer operations. The hash is Wellons' lowbias32 of i ⊕ low word of the seed, with the seed's
high word added before the second product, so that the masks of two seeds are not permutations of each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.dispatch import dispatch

_WORD = 0xFFFFFFFF
_CHUNK = 1 << 20  # positions per chunk of the reference; limits the size of its temporary tensors


class Dropout(NamedTuple):
    """Dropout with a fixed mask.

    p: probability that a value is dropped, below 1.
    seed: seed of the mask, below 2⁶²."""

    p: float
    seed: int

    @classmethod
    def sample(cls, p: float, generator: torch.Generator | None = None) -> Dropout:
        """Return a Dropout with a random seed.

        generator: a CPU generator, by default torch's global generator. The generator's state determines the
            mask."""
        return cls(p, int(torch.randint(1 << 62, (), generator=generator, device="cpu").item()))

    def __call__(self, x: Tensor) -> Tensor:
        """Return x with the mask applied.

        Applied to the gradient of the output, the same call returns the gradient of x."""
        x = x.contiguous()
        run = dispatch("dropout", x)
        if run is not None:
            y: Tensor = run(x, self.p, self.seed)
            return y
        y, flat = torch.empty_like(x), x.view(-1)
        for start in range(0, len(flat), _CHUNK):
            part = flat[start : start + _CHUNK]
            y.view(-1)[start : start + _CHUNK] = (part / (1 - self.p)).where(self._mask(start, part), 0)
        return y

    def _mask(self, start: int, part: Tensor) -> Tensor:
        """Return which values of `part` to keep, as booleans.

        start: the position of the first value of `part`."""
        h = torch.arange(start, start + len(part), device=part.device).bitwise_and_(_WORD)
        h ^= self.seed & _WORD
        h = ((h ^ (h >> 16)) * 0x7FEB352D + (self.seed >> 32)) & _WORD
        h = ((h ^ (h >> 15)) * 0x846CA68B) & _WORD
        h ^= h >> 16
        return h >= round(self.p * 2**32)
