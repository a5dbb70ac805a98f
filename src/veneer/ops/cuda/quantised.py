"""Frozen weights out of 4 and 8 bits and out of a GGUF file's blocks: a weight a lane.

Each product and sum in float32 is rounded by itself (enable_fp_fusion=False), so that values are the reference's bits.
"""

from __future__ import annotations

from torch import Tensor

from veneer.ops.cuda.launch import block_count, device_function, kernel, rounded, run_kernel, tl

_BLOCK = 1024


@kernel
def _blocks4(
    packed, absmax, absmax2, mean, map8, table, out, start, count,
    SIZE: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = table[code]·absmax of weights start … start + count; absmax = map8[absmax]·absmax2 + mean where DOUBLE.
    SIZE: weights that have one absmax, NESTED: absmax that have one absmax2."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    at = start + place
    both = tl.load(packed + at // 2, mask=there, other=0).to(tl.int32)
    value = tl.load(table + tl.where(at % 2 == 0, both >> 4, both & 15))
    block = at // SIZE
    if DOUBLE:
        code = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        by = tl.load(map8 + code) * tl.load(absmax2 + block // NESTED, mask=there, other=0.0) + tl.load(mean)
    else:
        by = tl.load(absmax + block, mask=there, other=0.0)
    tl.store(out + place, rounded(value * by, out), mask=there)


def dequantise_blocks4(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, mean: Tensor | None, map8: Tensor, table: Tensor,
    start: int, count: int, block: int, nested: int, out: Tensor,
) -> None:  # fmt: skip
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
    )  # fmt: skip


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


@kernel
def _ggml(raw, out, n, TYPE: tl.constexpr, WEIGHTS: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr):
    """Of each type what gguf-py's `quants` has, weight e of the block b."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    e = (at % WEIGHTS).to(tl.int32)
    b = raw + at // WEIGHTS * BYTES
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
    tl.store(out + at, rounded(value, out), mask=there)


def dequantise_ggml(raw: Tensor, kind: str, out: Tensor) -> None:
    n, (weights, bytes_) = out.numel(), _SIZES[kind]
    constants = {"TYPE": kind, "WEIGHTS": weights, "BYTES": bytes_, "BLOCK": _BLOCK}
    run_kernel(_ggml, (block_count(n, _BLOCK),), raw, out, n, **constants, enable_fp_fusion=False)
