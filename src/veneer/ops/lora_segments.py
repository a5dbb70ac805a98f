"""Row segments of a product, one per adapter, for adapters trained in one pass.

    tokens of a batch     [ run 0 … | run 1 … | … | padding ]      `tokens[i]` of each, one run after another
    at the model's end    [ run 0 . | run 1 . | … | padding ]      `kept[i]` of each: rows whose output is needed

Each adapter multiplies only its own rows, so that no value (not even NaN) and no mask of one adapter affects
another. Each run samples its dropout from its own generator, in the order of its products and counted from
its first row, as if the run were trained separately.
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
    sizes: total rows with padding, of `tokens` and of `kept`. The two must differ, because the number of
        rows tells which of the two a product has."""

    tokens: Sequence[int]
    kept: Sequence[int]
    generators: Sequence[torch.Generator]
    sizes: tuple[int, int] = (0, 0)
    _dropouts: dict[int, dict[int, Dropout]] = field(default_factory=dict, repr=False)

    def bounds(self, rows: int) -> list[slice]:
        """Return each adapter's slice of `rows` rows.

        Raises ValueError if `rows` is neither of `sizes`."""
        if rows not in self.sizes:
            raise ValueError(
                f"{rows} rows in a product, and the batch has {self.sizes[0]} tokens, {self.sizes[1]} kept"
            )
        counts = self.tokens if rows == self.sizes[0] else self.kept
        ends = list(itertools.accumulate(counts, initial=0))
        return [slice(first, end) for first, end in itertools.pairwise(ends)]

    def dropouts(self, probabilities: Mapping[int, float]) -> dict[int, Dropout]:
        """Return the dropout of one product, by segment.

        probabilities: segment -> dropout probability."""
        if not probabilities:
            return {}
        # A recomputed layer samples the same number again, because torch.utils.checkpoint restores its
        # generator.
        ticket = int(torch.randint(1 << 62, (), device="cpu").item())
        if ticket not in self._dropouts:
            self._dropouts[ticket] = {i: Dropout.sample(p, self.generators[i]) for i, p in probabilities.items()}
        return self._dropouts[ticket]
