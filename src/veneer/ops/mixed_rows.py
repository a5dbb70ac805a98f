"""Which rows of a step have which mix of adapters, as a kernel is told: rows of one mix together, in tiles.

    y[i] += Σ over the mix of row i:  strength · s·B·(A·x[i]) + strength · gain ⊙ (own[i] − b)

The op "mixed_rows" does it for a whole group of projections in one pass over y, a rank for each adapter, DoRA's gain
(g − 1, see serve/forward/lowrank.py, whose `Segments.add_reference` is its reference) with it. An adapter is a record
of addresses in a table; a row adds up its adapters in the order of its mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.ops.transfer import put_numbers, sent

PARTS = 3
RECORD = 2 + 5 * PARTS + 2
"""Numbers of a record: A's address (0 where the adapter has nothing here) and rank; PARTS times B's address (0: no
part), its first column in y, columns, first row in A, rank; the addresses of gain (columns of y, float32) and bias, or
0. A: (rank, in), B: (rank, columns), contiguous, in x's dtype."""


@dataclass(frozen=True, eq=False)
class MixTiles:
    """`rows`: (n,) the rows that have a mix, mix after mix. `tiles`: (tiles, 3) mix, first and end in `rows`, at most
    `block` of them. `starts`: (mixes + 1,) of each mix in `adapters`, which are places in a table of records, and
    `strengths`, float32. `longest`: adapters of the longest mix."""

    rows: Tensor
    tiles: Tensor
    starts: Tensor
    adapters: Tensor
    strengths: Tensor
    longest: int
    block: int

    @classmethod
    def of(
        cls, mixes: Sequence[tuple[Sequence[tuple[int, float]], Sequence[int]]], device: torch.device, block: int
    ) -> MixTiles:
        """`mixes`: of each its (adapter, strength)s and its rows."""
        *lists, strengths = mix_lists(mixes, block)
        put = put_numbers(device, *lists)
        longest = max((len(mix) for mix, _ in mixes), default=0)
        own_strengths = sent(torch.tensor(strengths, dtype=torch.float32), device)
        return cls(put[0], put[1].view(-1, 3), put[2], put[3], own_strengths, longest, block)


def mix_lists(
    mixes: Sequence[tuple[Sequence[tuple[int, float]], Sequence[int]]], block: int
) -> tuple[list[int], list[int], list[int], list[int], list[float]]:
    """The numbers of `MixTiles`, one after another: rows, tiles, starts, adapters, strengths."""
    rows: list[int] = []
    tiles: list[int] = []
    starts, adapters, strengths = [0], [], []
    for m, (mix, own) in enumerate(mixes):
        for at in range(0, len(own), block):
            tiles += [m, len(rows) + at, len(rows) + min(at + block, len(own))]
        rows += own
        adapters += [adapter for adapter, _ in mix]
        strengths += [strength for _, strength in mix]
        starts.append(len(adapters))
    return rows, tiles, starts, adapters, strengths
