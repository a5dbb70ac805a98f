"""Segments of rows, one per adapter, for runs that are trained together.

    all tokens of a batch      [ run 0 … | run 1 … | … | padding ]      `tokens[i]` rows for run i
    at the model's end         [ run 0 . | run 1 . | … | padding ]      `kept[i]` rows for run i

At the model's end, only the rows whose outputs are needed remain. Each adapter multiplies only its own rows,
so that no value (not even NaN) and no mask of one adapter affects another. Each run samples its dropout masks
from its own generator, in the order of its products and starting at its first row, as if the run were trained
separately.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from veneer.ops.dropout import Dropout


@dataclass(eq=False)
class LoraSegments:
    """The assignment of rows to adapters.

    tokens, kept: number of rows of each adapter, among all tokens and among the tokens whose output is needed
        at the model's end.
    generators: the random generator of each adapter.
    sizes: total number of rows, with padding, for `tokens` and for `kept`. The two sizes must differ, because
        the number of rows in a product shows which of the two applies."""

    tokens: Sequence[int]
    kept: Sequence[int]
    generators: Sequence[torch.Generator]
    sizes: tuple[int, int] = (0, 0)
    _dropouts: dict[int, dict[int, Dropout]] = field(default_factory=dict, repr=False)

    def bounds(self, rows: int) -> list[slice]:
        """Return each adapter's slice of a product with `rows` rows.

        Raises ValueError if `rows` is neither of `sizes`."""
        if rows not in self.sizes:
            raise ValueError(
                f"{rows} rows in a product, and the batch has {self.sizes[0]} tokens, {self.sizes[1]} kept"
            )
        counts = self.tokens if rows == self.sizes[0] else self.kept
        ends = list(itertools.accumulate(counts, initial=0))
        return [slice(first, end) for first, end in itertools.pairwise(ends)]

    def dropouts(self, probabilities: Mapping[int, float]) -> dict[int, Dropout]:
        """Return each segment's `Dropout` for one product.

        probabilities: segment -> dropout probability."""
        if not probabilities:
            return {}
        # A recomputed layer samples the same number again, because torch.utils.checkpoint restores the state
        # of torch's global generator.
        ticket = int(torch.randint(1 << 62, (), device="cpu").item())
        if ticket not in self._dropouts:
            self._dropouts[ticket] = {i: Dropout.sample(p, self.generators[i]) for i, p in probabilities.items()}
        return self._dropouts[ticket]
