"""Steps of servers and of pictures, as those of steps.py."""

from __future__ import annotations

import torch

from tests.ops.cuda.steps import empty, step
from veneer.ops.cuda import mixed_rows, paged, quantised
from veneer.ops.mixed_rows import RECORD, MixTiles
from veneer.ops.quantisation_formats import Blocks4, GgmlBlocks, QuantisationFormat, empty_format
from veneer.ops.sizes import tile_tokens


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


def _paged(heads: int, kv: int, d: int, sequences: int, asked: int, longest: int, cap: float = 0.0) -> None:
    """A layer's attention over pages of 16."""
    places = sequences * longest
    K, V = (empty(places, kv, d) for _ in range(2))
    qkv, at = empty(sequences * asked, (heads + 2 * kv) * d), empty(sequences * asked, dtype=torch.int64)
    cos = empty(longest, d // 2, dtype=torch.float32)
    norm = empty(d) if cap == 0 else None
    paged.turn_and_store(qkv, K, V, cos, cos, norm, norm, 1e-6, at, at)
    tokens = tile_tokens(heads, kv, asked)
    tiles = empty(sequences * -(-asked // tokens), 4, dtype=torch.int64)
    tables = empty(sequences, longest // 16, dtype=torch.int64)
    q = qkv.view(len(qkv), -1, d).narrow(1, 0, heads)
    paged.paged_attention(q, K, V, tiles, tables, longest, tokens, 16, d**-0.5, cap, 0)


@step("Attention of servers: Llama 3.1 8B and 70B, Qwen 3 32B, Gemma 2 27B")
def _attention() -> None:
    for heads, kv, d, cap in ((32, 8, 128, 0.0), (64, 8, 128, 0.0), (32, 16, 128, 50.0)):
        _paged(heads, kv, d, 8, 1, 4096, cap)
        _paged(heads, kv, d, 64, 1, 4096, cap)
        _paged(heads, kv, d, 4, 512, 4096, cap)


@step("Attention of servers: Gemma 3 27B's wide heads")
def _attention_of_gemma() -> None:
    _paged(16, 8, 256, 8, 1, 4096)
    _paged(16, 8, 256, 4, 512, 4096)


@step("Llama 3.1 8B in 4 and 8 bits and in a GGUF file's blocks, 1 to 64 rows")
def _few_rows() -> None:
    meta, width = torch.device("meta"), 4096
    double = empty_format((width, width), "nf4", meta)
    single = Blocks4(
        "nf4",
        (width, width),
        empty(width * width // 2, dtype=torch.uint8),
        empty(width * width // 64, dtype=torch.float32),
    )
    weights: list[QuantisationFormat] = [double, single, empty_format((width, width), "int8", meta)]
    weights += [GgmlBlocks(kind, (width, width), empty(width, width, dtype=torch.uint8)) for kind in quantised.GGML]
    for rows in (16, 32, 64):
        x = empty(rows, width)
        for weight in weights if rows != 32 else weights[:3]:
            quantised.coded_product(x, weight, 0, width, None, x)
    quantised.coded_product(x, double, 0, width, empty(width), x)
