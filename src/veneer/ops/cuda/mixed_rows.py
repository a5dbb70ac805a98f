"""Low-rank products of rows that each have a mix of their own (ops/mixed_rows.py), in two launches for a group.

    shrink   u[s, j, i] = A_j·x[rows[i]] over the s-th SHARE of the inputs, j the place in the row's mix, float32
    expand   y[rows[i]] += Σ_j strength_j (s·B_j·Σ_s u[s, j, i] + gain_j ⊙ (own − b))

Shares make work for more programs than there are tiles; their sums are added up in one order, and how many there are
depends on the inputs alone. So a row's bits depend on its batch by the size of its tile at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cuda.launch import block_count, kernel, product, run_kernel, tl, wide
from veneer.ops.mixed_rows import PARTS, RECORD, MixTiles
from veneer.ops.sizes import power_of_2

_SHARE = 1024
"""Inputs of a program."""


@kernel(varying=("count", "longest", "ranks"))
def _shrink(
    x,
    rows,
    tiles,
    starts,
    adapters,
    table,
    u,
    inputs,
    count,
    longest,
    ranks,
    RECORD: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    j = tl.program_id(1)
    parts_r = tl.cdiv(ranks, BLOCK_R)
    share, r0 = tl.program_id(2) // parts_r, tl.program_id(2) % parts_r * BLOCK_R
    mix, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    at = tl.load(starts + mix) + j
    if at < tl.load(starts + mix + 1):
        record = table + tl.load(adapters + at) * RECORD
        rank = tl.load(record + 1)
        if r0 < rank:
            A = tl.multiple_of(tl.load(record).to(tl.pointer_type(x.dtype.element_ty)), 16)
            i = first + tl.arange(0, BLOCK_M)
            r = r0 + tl.arange(0, BLOCK_R)
            row = tl.load(rows + i, mask=i < end, other=0)
            sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k0 in range(share * SHARE, min(share * SHARE + SHARE, inputs), BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                there_x = (i < end)[:, None] & (k < inputs)[None, :]
                there_A = (r < rank)[None, :] & (k < inputs)[:, None]
                xs = tl.load(x + row[:, None] * inputs + k[None, :], mask=there_x, other=0.0)
                a = tl.load(A + r[None, :] * inputs + k[:, None], mask=there_A, other=0.0)
                sums = product(xs, a, WIDE, sums)
            to = u + ((share * longest + j) * count + i)[:, None] * ranks + r[None, :]
            tl.store(to, sums, mask=(i < end)[:, None] & (r < rank)[None, :])


@kernel(varying=("count", "longest", "ranks", "shares"))
def _expand(
    y,
    own,
    rows,
    tiles,
    starts,
    adapters,
    strengths,
    table,
    u,
    columns,
    count,
    longest,
    ranks,
    shares,
    RECORD: tl.constexpr,
    PARTS: tl.constexpr,
    SIXTEENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    mix, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    i = first + tl.arange(0, BLOCK_M)
    c0 = tl.program_id(1) * BLOCK_N
    c = c0 + tl.arange(0, BLOCK_N)
    there = (i < end)[:, None] & (c < columns)[None, :]
    row = tl.load(rows + i, mask=i < end, other=0)
    place = row[:, None] * columns + c[None, :]
    made = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = tl.load(starts + mix)
    for at in range(begin, tl.load(starts + mix + 1)):
        record = table + tl.load(adapters + at) * RECORD
        strength = tl.load(strengths + at)
        for p in tl.static_range(PARTS):
            part = record + 2 + 5 * p
            address, column, size = tl.load(part), tl.load(part + 1), tl.load(part + 2)
            if SIXTEENS:
                column, size = tl.multiple_of(column, 16), tl.multiple_of(size, 16)
            if (address != 0) & (column < c0 + BLOCK_N) & (column + size > c0):
                B = tl.multiple_of(address.to(tl.pointer_type(y.dtype.element_ty)), 16)
                rank_from, rank = tl.load(part + 3), tl.load(part + 4)
                inside = (c >= column) & (c < column + size)
                for r0 in range(0, rank, BLOCK_R):
                    r = r0 + tl.arange(0, BLOCK_R)
                    there_u = (i < end)[:, None] & (r < rank)[None, :]
                    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                    for share in range(shares):
                        of = (
                            u + ((share * longest + at - begin) * count + i)[:, None] * ranks + (rank_from + r)[None, :]
                        )
                        sums += tl.load(of, mask=there_u, other=0.0)
                    b = tl.load(
                        B + r[:, None] * size + (c - column)[None, :],
                        mask=(r < rank)[:, None] & inside[None, :],
                        other=0.0,
                    )
                    made = product((sums * strength).to(y.dtype.element_ty), b, WIDE, made)
        gain = tl.load(record + 2 + 5 * PARTS)
        if gain != 0:
            base = tl.load(own + place, mask=there, other=0.0).to(tl.float32)
            bias = tl.load(record + 3 + 5 * PARTS)
            if bias != 0:
                b = tl.load(bias.to(tl.pointer_type(y.dtype.element_ty)) + c, mask=c < columns, other=0.0)
                base -= b.to(tl.float32)[None, :]
            g = tl.load(gain.to(tl.pointer_type(tl.float32)) + c, mask=c < columns, other=0.0)
            made += strength * g[None, :] * base
    before = tl.load(y + place, mask=there, other=0.0).to(tl.float32)
    tl.store(y + place, before + made, mask=there)


def mixed_rows(x: Tensor, y: Tensor, own: Tensor, tiles: MixTiles, table: Tensor, ranks: int, sixteens: bool) -> None:
    """y (rows, columns) += the low-rank products of x (rows, in), in place. `own`: the base's product, y itself where y
    is no more. `table`: (adapters, RECORD) of this group; `ranks`: the largest rank in it, of all parts together.
    `sixteens`: whether its parts begin and end at multiples of 16 columns, which are then read together."""
    count, inputs, columns = len(tiles.rows), x.shape[1], y.shape[1]
    if not count or not ranks:
        return
    shares = block_count(inputs, _SHARE)
    u = torch.empty(shares, tiles.longest, count, ranks, dtype=torch.float32, device=x.device)
    M, R = tiles.block, min(max(power_of_2(ranks), 16), 64)
    K, N = 128 if R < 64 and x.element_size() < 4 else 64, 128 if M < 64 else 64
    lists = tiles.rows, tiles.tiles, tiles.starts, tiles.adapters
    run_kernel(
        _shrink,
        (len(tiles.tiles), tiles.longest, shares * block_count(ranks, R)),
        x,
        *lists,
        table,
        u,
        inputs,
        count,
        tiles.longest,
        ranks,
        RECORD=RECORD,
        SHARE=_SHARE,
        BLOCK_M=M,
        BLOCK_R=R,
        BLOCK_K=K,
        WIDE=wide(x.dtype),
        num_warps=4,
    )
    run_kernel(
        _expand,
        (len(tiles.tiles), block_count(columns, N)),
        y,
        own,
        *lists,
        tiles.strengths,
        table,
        u,
        columns,
        count,
        tiles.longest,
        ranks,
        shares,
        RECORD=RECORD,
        PARTS=PARTS,
        SIXTEENS=sixteens,
        BLOCK_M=M,
        BLOCK_N=N,
        BLOCK_R=16,
        WIDE=wide(x.dtype),
        num_warps=4,
    )
