"""Quantize rows into ggml's blocks, with the same bits as llama.cpp.

    Q8_0, Q5_0, Q5_1    blocks of 32 values, by the gguf package
    Q4_K, Q5_K          superblocks of 8 × 32 values: x ≈ d·scale·code − dmin·min, scale and min of 6 bits
    Q6_K                superblocks of 16 × 16 values: x ≈ d·scale·(code − 32), scale of 8 bits

The K-quants follow `quantize_row_…_ref` in llama.cpp's ggml/src/ggml-quants.c (without an importance matrix),
which searches the scale of each block with the smallest weighted error. All arithmetic is float32 in the
order of the C code, without fused multiply-add, as compilers translate it for x86-64. One column of an array
is one block, so that numpy adds the values of a block in the C code's order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]
_SUPERBLOCK, _AT_ONCE = 256, 256
"""Values per superblock; superblocks per call, so that the arrays fit in a processor's cache."""
_EPSILON = np.float32(1e-15)
_F = np.float32


def quantize(values: _Array, kind: str) -> _Array:
    """Return rows as ggml's blocks: (rows, columns) float32 -> (rows, bytes per row) uint8.

    `kind`: ggml's name of a type. Raises ValueError if the columns do not fill whole blocks."""
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    if values.shape[-1] % block:
        raise ValueError(f"{values.shape[-1]:,} columns do not fill blocks of {block}")
    flat = np.ascontiguousarray(values, _F).reshape(-1, block)
    if kind in _K_QUANTS:
        at_once, encode = _AT_ONCE, _K_QUANTS[kind]
    else:
        no_sign = _F(0) if kind == "Q5_0" else _F(-0.0)  # ggml's Q5_0 ignores the sign of a block of −0
        at_once, encode = _AT_ONCE * 8, lambda part: gguf.quants.quantize(part + no_sign, type_)
    out = np.empty((len(flat), size), np.uint8)

    def fill(start: int) -> None:
        # A weight's scale can underflow to 0 or overflow float16; ggml then writes 0 or infinity.
        with np.errstate(all="ignore"):
            out[start : start + at_once] = encode(flat[start : start + at_once])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy's loops run outside the interpreter lock
        list(pool.map(fill, range(0, len(flat), at_once)))
    return out.reshape(*values.shape[:-1], -1)


def _nearest(values: _Array, low: int, high: int) -> _Array:
    """Round as ggml's `nearest_int` does, which is exact below 2²², and clamp."""
    codes = (values + _F(12582912)).view(np.int32)  # 1.5·2²³: the sum's last bits are the rounded number
    codes &= 0x7FFFFF
    codes -= 0x400000
    return np.clip(codes, low, high, out=codes)


def _sum(rows: _Array) -> _Array:
    total: _Array = np.add.reduce(rows, axis=0)
    return total


def _columns(flat: _Array, block: int) -> _Array:
    """(superblocks, 256) -> (values of a block, blocks)"""
    return np.ascontiguousarray(flat.reshape(-1, block).T)


def _encode_with_min(top: int, start: float, steps: int) -> Callable[[_Array], _Array]:
    """Return the encoder of Q4_K (`top` 15) or Q5_K (31)."""

    def encode(flat: _Array) -> _Array:
        x = _columns(flat, 32)
        weights = np.sqrt(_sum(x * x) / _F(32)) + np.abs(x)
        scale, low, codes = _scale_and_min(x, weights, top, start, steps)
        scales, mins = scale.reshape(-1, 8), -low.reshape(-1, 8)
        most, deepest = (v.max(1, initial=0) + _F(0) for v in (scales, mins))  # no −0, whose bits differ
        six = [
            np.minimum(63, _nearest(np.where(m > 0, _F(63) / m, _F(0))[:, None] * v, -(1 << 22), 1 << 22).astype("u1"))
            for m, v in ((most, scales), (deepest, mins))
        ]
        halves = np.stack([most / _F(63), deepest / _F(63)], 1).astype(np.float16)
        d, dm = ((halves[:, i, None].astype(_F) * six[i]).reshape(-1) for i in range(2))
        codes = np.where(d == 0, codes, _nearest((x + dm) / d, 0, top)).astype(np.uint8)
        codes = codes.T.reshape(-1, 8, 32)
        sc, mn = six
        packed = [
            sc[:, :4] | sc[:, 4:] >> 4 << 6,
            mn[:, :4] | mn[:, 4:] >> 4 << 6,
            sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4,
        ]
        high = np.packbits(codes >> 4, axis=1, bitorder="little")[:, 0]
        low4 = codes & 15
        nibbles = (low4[:, ::2] | low4[:, 1::2] << 4).reshape(-1, 128)
        return np.concatenate([halves.view(np.uint8), *packed, *([high] if top > 15 else []), nibbles], 1)

    return encode


def _scale_and_min(x: _Array, weights: _Array, top: int, start: float, steps: int) -> tuple[_Array, _Array, _Array]:
    """Return each block's scale, minimum and codes; `make_qkx2_quants` of ggml."""
    low, high = np.minimum(x.min(0), 0), x.max(0)
    flat = high == low
    sum_w, sum_x = _sum(weights), _sum(weights * x)
    inverse = _F(top) / (high - low)
    scale = _F(1) / inverse
    codes = _nearest(inverse * (x - low), 0, top).astype(_F)
    error = _sum(weights * np.square(scale * codes + low - x))
    for step in range(steps + 1):
        inverse = (_F(start) + _F(0.1) * _F(step) + _F(top)) / (high - low)
        tried = _nearest(inverse * (x - low), 0, top).astype(_F)
        weighted = weights * tried
        sum_l, sum_l2, sum_xl = _sum(weighted), _sum(weighted * tried), _sum(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = new_low > 0
        new_scale, new_low = np.where(positive, sum_xl / sum_l2, new_scale), np.where(positive, _F(0), new_low)
        new_error = _sum(weights * np.square(new_scale * tried + new_low - x))
        better = (determinant > 0) & (new_error < error) & ~flat
        error, scale, low = (
            np.where(better, a, b) for a, b in ((new_error, error), (new_scale, scale), (new_low, low))
        )
        np.copyto(codes, tried, where=better)
    return np.where(flat, _F(0), scale), low, np.where(flat, _F(0), codes)


def _encode_symmetric(flat: _Array) -> _Array:
    """Return Q6_K's superblocks."""
    x = _columns(flat, 16)
    scale, codes = _symmetric_scale(x)
    scales = scale.reshape(-1, 16)
    most = np.take_along_axis(scales, np.nan_to_num(np.abs(scales)).argmax(1)[:, None], 1)
    inverse = _F(-128) / most
    d = (_F(1) / inverse).astype(np.float16)
    eight = _nearest(inverse * scales, -(1 << 22), 127).astype(np.int8)
    steps = (d.astype(_F) * eight).reshape(-1)
    codes = np.where(steps == 0, codes, _nearest(x / steps, -32, 31) + 32).astype(np.uint8)
    codes = codes.T.reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    nibbles = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    pairs = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    out = np.concatenate([nibbles, pairs, eight.view(np.uint8), d.view(np.uint8)], 1)
    out[~(np.abs(most[:, 0]) >= _EPSILON)] = 0
    return out


def _symmetric_scale(x: _Array) -> tuple[_Array, _Array]:
    """Return each block's scale and codes (0 to 63); `make_qx_quants` of ggml with weights x²."""
    peak = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    zero = np.abs(peak) < _EPSILON
    weights = x * x
    weighted_x = weights * x
    scale = best = np.zeros_like(peak)
    codes = np.zeros_like(x)
    for step in (0, *range(-9, 0), *range(1, 10)):
        tried = _nearest(-(_F(32) + _F(0.1) * _F(step)) / peak * x, -32, 31).astype(_F)
        sum_lx, sum_l2 = _sum(weighted_x * tried), _sum(weights * tried * tried)
        if step == 0:
            better = np.ones_like(zero)
            ratio = np.where(sum_l2 != 0, sum_lx / sum_l2, _F(0))
        else:
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
            ratio = sum_lx / sum_l2
        scale, best = np.where(better, ratio, scale), np.where(better, ratio * sum_lx, best)
        np.copyto(codes, tried, where=better)
    return np.where(zero, _F(0), scale), np.where(zero, _F(0), codes + 32)


_K_QUANTS: dict[str, Callable[[_Array], _Array]] = {
    "Q4_K": _encode_with_min(15, -1.0, 20),
    "Q5_K": _encode_with_min(31, -0.5, 15),
    "Q6_K": _encode_symmetric,
}
