"""Steps of servers and of pictures, as those of steps.py."""

from __future__ import annotations

import torch

from tests.ops.cuda.steps import empty, step
from veneer.ops.cuda import mixed_rows
from veneer.ops.mixed_rows import RECORD, MixTiles


def _mixed_rows(inputs: int, columns: int, rows: int, block: int, ranks: int) -> None:
    """Eight adapters, every other row under two of them."""
    mixes: list[tuple[list[tuple[int, float]], list[int]]] = [
        ([(m, 1.0)] if m % 2 else [(m, 1.0), (m - 1, 0.5)], list(range(m, rows, 8))) for m in range(8)
    ]
    tiles = MixTiles.of(mixes, torch.device("cuda"), block)
    x, y = empty(rows, inputs), empty(rows, columns)
    mixed_rows.mixed_rows(x, y, y, tiles, empty(8, RECORD, dtype=torch.int64), ranks, True)


@step("Llama 3.1 8B served, rank 16: 32 tokens, and a prompt of 2,048")
def _served_8b() -> None:
    for rows, block in ((32, 16), (2048, 64)):
        _mixed_rows(4096, 6144, rows, block, 48)
        _mixed_rows(14336, 4096, rows, block, 16)


@step("Llama 3.1 70B served, rank 64: 256 tokens")
def _served_70b() -> None:
    _mixed_rows(8192, 57344, 256, 64, 128)
