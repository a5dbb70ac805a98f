"""Which rows of a product's input have which adapter, where several are trained in one pass.

    tokens of a batch     [ run 0 … | run 1 … | … | padding ]      `tokens[i]` of each, one run after another
    at the model's end    [ run 0 . | run 1 . | … | padding ]      `kept[i]` of each: those whose output is wanted

Each adapter multiplies its own rows alone, so that nothing of one reaches another: not a value that is no number, and
not a mask. What is dropped is drawn for each run from a generator of its own, in the order of its products and counted
from its first row, as it is where the run is alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from veneer.ops.dropout import Dropout


@dataclass(eq=False)
class LoraSegments:
    """`tokens`, `kept`: rows of each adapter, of all tokens and of those kept at a model's end. `generators`: what each
    draws from. `sizes`: how many rows the one and the other are, padding included, by which they are told apart."""

    tokens: Sequence[int]
    kept: Sequence[int]
    generators: Sequence[torch.Generator]
    sizes: tuple[int, int] = (0, 0)
    _drawn: dict[int, dict[int, Dropout]] = field(default_factory=dict, repr=False)

    def bounds(self, rows: int) -> list[slice]:
        """Where each adapter's lie in so many rows. Raises ValueError where these are neither all nor those kept."""
        if rows not in self.sizes:
            raise ValueError(
                f"{rows} rows in a product, and the batch has {self.sizes[0]} tokens, {self.sizes[1]} kept"
            )
        counts = self.tokens if rows == self.sizes[0] else self.kept
        ends = list(itertools.accumulate(counts, initial=0))
        return [slice(first, end) for first, end in itertools.pairwise(ends)]

    def dropouts(self, shares: Mapping[int, float]) -> dict[int, Dropout]:
        """What a product drops of each span's rows. `shares`: span -> the share that is dropped, for those that
        drop."""
        if not shares:
            return {}
        # A layer that is recomputed draws the same number again, as torch.utils.checkpoint puts its generator back.
        ticket = int(torch.randint(1 << 62, (), device="cpu").item())
        if ticket not in self._drawn:
            self._drawn[ticket] = {i: Dropout.drawn(p, self.generators[i]) for i, p in shares.items()}
        return self._drawn[ticket]
