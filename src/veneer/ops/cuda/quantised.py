"""Frozen weights out of 4 and 8 bits and out of a GGUF file's blocks: dequantised, a weight a lane; and multiplied by a
few rows out of their codes, tile by tile, so that a weight is read in its codes alone.

Each product and sum of dequantising in float32 is rounded by itself (enable_fp_fusion=False), so that values are the
reference's bits, in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cuda.launch import block_count, device_function, kernel, product, rounded, run_kernel, tl, wide
from veneer.ops.quantisation_formats import (
    Blocks4,
    GgmlBlocks,
    QuantisationFormat,
    Rows8,
    dynamic_map,
    four_bit_values,
)
from veneer.ops.sizes import power_of_2
from veneer.ops.transfer import made_up

_BLOCK = 1024


@device_function
def _scale_of_block(absmax, absmax2, mean, map8, block, there, NESTED: tl.constexpr, DOUBLE: tl.constexpr):
    """What the weights of these blocks of 4 bits are multiplied by."""
    if DOUBLE:
        code = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        scale = tl.load(map8 + code) * tl.load(absmax2 + block // NESTED, mask=there, other=0.0) + tl.load(mean)
    else:
        scale = tl.load(absmax + block, mask=there, other=0.0)
    return scale


@kernel
def _blocks4(
    packed,
    absmax,
    absmax2,
    mean,
    map8,
    table,
    out,
    start,
    count,
    SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = table[code]·absmax of weights start … start + count; absmax = map8[absmax]·absmax2 + mean where DOUBLE.
    SIZE: weights that have one absmax, NESTED: absmax that have one absmax2."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    at = start + place
    both = tl.load(packed + at // 2, mask=there, other=0).to(tl.int32)
    value = tl.load(table + tl.where(at % 2 == 0, both >> 4, both & 15))
    by = _scale_of_block(absmax, absmax2, mean, map8, at // SIZE, there, NESTED, DOUBLE)
    tl.store(out + place, rounded(value * by, out), mask=there)


def dequantise_blocks4(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    mean: Tensor | None,
    map8: Tensor,
    table: Tensor,
    start: int,
    count: int,
    block: int,
    nested: int,
    out: Tensor,
) -> None:
    double = absmax2 is not None and mean is not None
    given = packed, absmax, absmax2, mean, map8, table, out, start, count
    constants = {"SIZE": block, "NESTED": nested, "DOUBLE": double, "BLOCK": _BLOCK}
    run_kernel(_blocks4, (block_count(count, _BLOCK),), *given, **constants, enable_fp_fusion=False)


@kernel
def _rows8(codes, absmax, out, n, width, BLOCK: tl.constexpr):
    """out = code·absmax·(1/127)"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    code = tl.load(codes + at, mask=there, other=0).to(tl.float32)
    by = tl.load(absmax + at // width, mask=there, other=0.0)
    tl.store(out + at, rounded(code * by * 7.874015718698502e-3, out), mask=there)


def dequantise_rows8(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    n = codes.numel()
    run_kernel(
        _rows8, (block_count(n, _BLOCK),), codes, absmax, out, n, codes.shape[1], BLOCK=_BLOCK, enable_fp_fusion=False
    )


# -- blocks of a GGUF file ---------------------------------------------------------------------------------------------

_SIZES = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
"""ggml's name -> (weights, bytes) of a block."""

GGML = tuple(_SIZES)


@device_function
def _byte(at, there):
    return tl.load(at, mask=there, other=0).to(tl.int32)


@device_function
def _half(at, there):
    """A float16 that may lie at an odd place."""
    bits = _byte(at, there) | (_byte(at + 1, there) << 8)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@device_function
def _signed(byte):
    return byte - ((byte >> 7) << 8)


@device_function
def _scale_min(scales, j, there):
    """The scale and the minimum of sub-block j of Q4_K and Q5_K, 6 bits each, of twelve bytes."""
    late = j >= 4
    low = _byte(scales + j + 4, there & late)
    scale = tl.where(
        late, (low & 15) | ((_byte(scales + j - 4, there & late) >> 6) << 4), _byte(scales + j, there) & 63
    )
    early = _byte(scales + j + 4, there & (j < 4)) & 63
    least = tl.where(late, (low >> 4) | ((_byte(scales + j, there) >> 6) << 4), early)
    return scale.to(tl.float32), least.to(tl.float32)


@device_function
def _ggml_value(b, e, there, TYPE: tl.constexpr):
    """Weight e of the block at b, of each type what gguf-py's `quants` has."""
    if TYPE == "Q8_0":
        value = _signed(_byte(b + 2 + e, there)).to(tl.float32) * _half(b, there)
    elif TYPE == "Q4_0":
        q = (_byte(b + 2 + e % 16, there) >> (e // 16 * 4)) & 15
        value = _half(b, there) * (q - 8).to(tl.float32)
    elif TYPE == "Q4_1":
        q = (_byte(b + 4 + e % 16, there) >> (e // 16 * 4)) & 15
        value = _half(b, there) * q.to(tl.float32) + _half(b + 2, there)
    elif TYPE == "Q5_0":
        q = (_byte(b + 6 + e % 16, there) >> (e // 16 * 4)) & 15
        q |= ((_byte(b + 2 + e // 8, there) >> (e % 8)) & 1) << 4
        value = _half(b, there) * (q - 16).to(tl.float32)
    elif TYPE == "Q5_1":
        q = (_byte(b + 8 + e % 16, there) >> (e // 16 * 4)) & 15
        q |= ((_byte(b + 4 + e // 8, there) >> (e % 8)) & 1) << 4
        value = _half(b, there) * q.to(tl.float32) + _half(b + 2, there)
    elif TYPE == "Q2_K":
        q = (_byte(b + 16 + e // 128 * 32 + e % 32, there) >> (e % 128 // 32 * 2)) & 3
        both = _byte(b + e // 16, there)
        scale = _half(b + 80, there) * (both & 15).to(tl.float32)
        value = scale * q.to(tl.float32) - _half(b + 82, there) * (both >> 4).to(tl.float32)
    elif TYPE == "Q3_K":
        q = (_byte(b + 32 + e // 128 * 32 + e % 32, there) >> (e % 128 // 32 * 2)) & 3
        q -= (1 - ((_byte(b + e % 32, there) >> (e // 32)) & 1)) * 4
        j = e // 16
        scale = (_byte(b + 96 + j % 8, there) >> (j // 8 * 4)) & 15
        scale |= ((_byte(b + 104 + j % 4, there) >> (j // 4 * 2)) & 3) << 4
        value = _half(b + 108, there) * (scale - 32).to(tl.float32) * q.to(tl.float32)
    elif TYPE == "Q4_K":
        q = (_byte(b + 16 + e // 64 * 32 + e % 32, there) >> (e // 32 % 2 * 4)) & 15
        scale, least = _scale_min(b + 4, e // 32, there)
        value = _half(b, there) * scale * q.to(tl.float32) - _half(b + 2, there) * least
    elif TYPE == "Q5_K":
        q = (_byte(b + 48 + e // 64 * 32 + e % 32, there) >> (e // 32 % 2 * 4)) & 15
        q |= ((_byte(b + 16 + e % 32, there) >> (e // 32)) & 1) << 4
        scale, least = _scale_min(b + 4, e // 32, there)
        value = _half(b, there) * scale * q.to(tl.float32) - _half(b + 2, there) * least
    else:
        tl.static_assert(TYPE == "Q6_K")
        q = (_byte(b + e // 128 * 64 + e % 64, there) >> (e % 128 // 64 * 4)) & 15
        q |= ((_byte(b + 128 + e // 128 * 32 + e % 32, there) >> (e % 128 // 32 * 2)) & 3) << 4
        scale = _half(b + 208, there) * _signed(_byte(b + 192 + e // 16, there)).to(tl.float32)
        value = scale * (q - 32).to(tl.float32)
    return value


@kernel
def _ggml(raw, out, n, TYPE: tl.constexpr, WEIGHTS: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    value = _ggml_value(raw + at // WEIGHTS * BYTES, (at % WEIGHTS).to(tl.int32), there, TYPE)
    tl.store(out + at, rounded(value, out), mask=there)


def dequantise_ggml(raw: Tensor, kind: str, out: Tensor) -> None:
    n, (weights, bytes_) = out.numel(), _SIZES[kind]
    constants = {"TYPE": kind, "WEIGHTS": weights, "BYTES": bytes_, "BLOCK": _BLOCK}
    run_kernel(_ggml, (block_count(n, _BLOCK),), raw, out, n, **constants, enable_fp_fusion=False)


# -- a few rows by a weight in codes -----------------------------------------------------------------------------------

FEW_ROWS = 64
"""Rows of x up to which codes are multiplied as they are.

A weight of 16 bits that is dequantised for a product is written and read again: 4.5 bytes a weight of nf4 beside the
0.52 of its code and constants (int8: 5 beside 1, Q4_K: 4.56 beside 0.56), whatever shares it. 64 rows are one tile of
the product, which decodes each weight once, as dequantising does; every 64 more would decode all of them again."""
_GROUP = 64
"""Weights of 4 bits that are scaled together: no block of theirs is smaller."""


@kernel(varying=("count",))
def _few_blocks4(
    x,
    sums,
    packed,
    absmax,
    absmax2,
    mean,
    map8,
    table,
    first,
    count,
    outputs,
    half,
    share,
    SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """sums[s, m, n] = Σ x[m, k]·W[first + n, k] over the s-th share of the inputs, 2·share of 2·half of them.

    A byte's halves are weights of even and odd columns: two products, each with its half of x."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    group, byte = tl.arange(0, GROUPS), tl.arange(0, 32)
    pair, parity = tl.arange(0, GROUPS * 32), tl.arange(0, 2)
    row = (first + n).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = tl.program_id(1) * share
    for b0 in range(begin, min(begin + share, half), GROUPS * 32):
        at = row * half + b0 + group[None] * 32  # of bytes: (BLOCK_N, GROUPS)
        there = (n < outputs)[:, None] & (b0 + group * 32 < half)[None]
        by = _scale_of_block(absmax, absmax2, mean, map8, at * 2 // SIZE, there, NESTED, DOUBLE)
        both = tl.load(packed + at[:, :, None] + byte[None, None], mask=there[:, :, None], other=0).to(tl.int32)
        even = rounded(tl.load(table + (both >> 4)) * by[:, :, None], x)
        odd = rounded(tl.load(table + (both & 15)) * by[:, :, None], x)
        of = x + m[:, None, None] * (2 * half) + (2 * (b0 + pair)[None, :, None] + parity[None, None])
        given = (m < count)[:, None, None] & (b0 + pair < half)[None, :, None]
        left, right = tl.split(tl.load(of, mask=given & (parity < 2)[None, None], other=0.0))
        total = product(tl.reshape(even, [BLOCK_N, GROUPS * 32]), tl.trans(left), WIDE, total)
        total = product(tl.reshape(odd, [BLOCK_N, GROUPS * 32]), tl.trans(right), WIDE, total)
    to = sums + (tl.program_id(1) * count + m).to(tl.int64)[None] * outputs + n[:, None]
    tl.store(to, total, mask=(n < outputs)[:, None] & (m < count)[None])


@kernel(varying=("count",))
def _few_codes(
    x,
    sums,
    raw,
    absmax,
    count,
    outputs,
    inputs,
    share,
    TYPE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same of int8, whose codes are multiplied exactly and the sum by the row's scale, and of a GGUF file's blocks.
    raw, absmax: of the rows that are multiplied by."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row = n.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = tl.program_id(1) * share
    for k0 in range(begin, min(begin + share, inputs), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        there = (n < outputs)[:, None] & (k < inputs)[None]
        if TYPE == "int8":
            w = tl.load(raw + row * inputs + k[None], mask=there, other=0).to(x.dtype.element_ty)
        else:
            blocks = raw + row * (inputs // WEIGHTS * BYTES) + (k // WEIGHTS * BYTES)[None]
            w = rounded(_ggml_value(blocks, (k % WEIGHTS)[None], there, TYPE), x)
        xs = tl.load(x + m[None] * inputs + k[:, None], mask=(k < inputs)[:, None] & (m < count)[None], other=0.0)
        total = product(w, xs, WIDE, total)
    if TYPE == "int8":
        total = total * (tl.load(absmax + n, mask=n < outputs, other=0.0) * 7.874015718698502e-3)[:, None]
    to = sums + (tl.program_id(1) * count + m).to(tl.int64)[None] * outputs + n[:, None]
    tl.store(to, total, mask=(n < outputs)[:, None] & (m < count)[None])


@kernel(varying=("shares",))
def _shares_added(sums, bias, y, n, outputs, y_row, shares, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """y = Σ_s sums[s] + b, the shares in their order. sums: (shares, rows, outputs), n = rows·outputs."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    total = tl.zeros((BLOCK,), tl.float32)
    for share in range(shares):
        total += tl.load(sums + share * n + at, mask=there, other=0.0)
    column = at % outputs
    if BIASED:
        total += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at // outputs * y_row + column, rounded(total, y), mask=there)


def takes_codes(stored: QuantisationFormat) -> bool:
    """Whether `coded_product` multiplies by a weight that is kept so."""
    if isinstance(stored, Blocks4):
        return stored.shape[-1] % _GROUP == 0 == stored.block % _GROUP
    return isinstance(stored, Rows8) or (isinstance(stored, GgmlBlocks) and stored.kind in GGML)


def coded_product(x: Tensor, stored: QuantisationFormat, first: int, last: int, bias: Tensor | None, y: Tensor) -> None:
    """y = x·Wᵀ + b of rows first … last of a weight. x: (rows, columns) in order, up to FEW_ROWS of them; y: (rows,
    last − first), whose rows may lie apart.

    The inputs are cut into shares so that a narrow weight is work for 256 programs; a row's bits depend on the weight's
    shape and on the size of its tile (16, 32 or 64) alone."""
    (count, inputs), outputs = x.shape, last - first
    M, N = max(16, power_of_2(count)), 64
    tiles = block_count(outputs, N)
    parts = max(1, min(256 // tiles, inputs // 1024))
    share = block_count(inputs, 256 * parts) * 256  # whole steps of every kernel
    parts = block_count(inputs, share)
    sums = torch.empty(parts, count, outputs, dtype=torch.float32, device=x.device)
    tile = {"WIDE": wide(x.dtype), "BLOCK_M": M, "BLOCK_N": N, "enable_fp_fusion": False}
    if isinstance(stored, Blocks4):
        map8, table = _tables(stored, x.device)
        double = stored.absmax2 is not None and stored.mean is not None
        run_kernel(
            _few_blocks4,
            (tiles, parts),
            x,
            sums,
            stored.packed,
            stored.absmax,
            stored.absmax2,
            stored.mean,
            map8,
            table,
            first,
            count,
            outputs,
            inputs // 2,
            share // 2,
            SIZE=stored.block,
            NESTED=stored.nested,
            DOUBLE=double,
            GROUPS=2 if M < 64 else 1,
            num_warps=4 if M < 64 else 8,
            **tile,
        )
    else:
        assert isinstance(stored, Rows8 | GgmlBlocks)
        if isinstance(stored, Rows8):
            raw, absmax, kind, (weights, bytes_) = stored.codes, stored.absmax[first:last], "int8", (1, 1)
        else:
            raw, absmax, kind, (weights, bytes_) = stored.raw, None, stored.kind, _SIZES[stored.kind]
        run_kernel(
            _few_codes,
            (tiles, parts),
            x,
            sums,
            raw[first:last],
            absmax,
            count,
            outputs,
            inputs,
            share,
            TYPE=kind,
            WEIGHTS=weights,
            BYTES=bytes_,
            BLOCK_K=128 if kind == "int8" else 32,
            num_warps=4 if kind == "int8" else 8,
            **tile,
        )
    n = count * outputs
    settings = {"BIASED": bias is not None, "BLOCK": _BLOCK}
    run_kernel(_shares_added, (block_count(n, _BLOCK),), sums, bias, y, n, outputs, y.stride(0), parts, **settings)


def _tables(stored: Blocks4, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 8-bit map and the sixteen values; made-up ones are not kept for anyone else."""
    if made_up(stored.packed):
        return torch.empty(256, device=device), torch.empty(16, device=device)
    return dynamic_map(device), four_bit_values(stored.kind, device)
