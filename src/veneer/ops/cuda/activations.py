"""Gates and activations, DoRA's gain, dropout: a place a lane, in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cuda.launch import block_count, device_function, kernel, rounded, run_kernel, tl
from veneer.ops.sizes import power_of_2

_SILU, _GELU, _GELU_TANH = 0, 1, 2
_ACTS = {"silu": _SILU, "gelu": _GELU, "gelu_tanh": _GELU_TANH}


@device_function
def _activated(z, ACT: tl.constexpr):
    """act(z), ACT as in _ACTS. gelu by tanh is z·σ(2u), u = √(2/π)·(z + 0.044715·z³)."""
    if ACT == 0:
        return z * tl.sigmoid(z)
    if ACT == 1:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@device_function
def _slope(z, ACT: tl.constexpr):
    """act'(z)"""
    if ACT == 0:
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    if ACT == 1:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return s + z * s * (1.0 - s) * (1.5957691216057308 + 0.2140644488178103 * z * z)


# -- gates -------------------------------------------------------------------------------------------------------------


@kernel
def _gate(both, h, width, gate, up, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """h = act(both[:, gate …]) ⊙ both[:, up …], `width` columns each."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    start = both + row * 2 * width + at
    z = tl.load(start + gate, mask=there, other=0.0).to(tl.float32)
    u = tl.load(start + up, mask=there, other=0.0).to(tl.float32)
    tl.store(h + row * width + at, rounded(_activated(z, ACT) * u, h), mask=there)


@kernel
def _gate_backward(dh, both, d, h, width, gate, up, ACT: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of `_gate` into d as `both` is laid; h again where AGAIN."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    places = row * 2 * width + at
    z = tl.load(both + places + gate, mask=there, other=0.0).to(tl.float32)
    u = tl.load(both + places + up, mask=there, other=0.0).to(tl.float32)
    g = tl.load(dh + row * width + at, mask=there, other=0.0).to(tl.float32)
    a = _activated(z, ACT)
    tl.store(d + places + up, rounded(g * a, d), mask=there)
    tl.store(d + places + gate, rounded(g * u * _slope(z, ACT), d), mask=there)
    if AGAIN:
        tl.store(h + row * width + at, rounded(a * u, h), mask=there)


_GATE_BLOCK = 1024


def gate_forward(both: Tensor, act: str, up_first: bool = False) -> Tensor:
    """act(gate) ⊙ up from [gate | up], or with `up_first` from [up | gate]. (…, 2f) → (…, f)."""
    width = both.shape[-1] // 2
    h = both.new_empty(*both.shape[:-1], width)
    grid = h.numel() // max(width, 1), block_count(width, _GATE_BLOCK)
    gate, up = (width, 0) if up_first else (0, width)
    run_kernel(_gate, grid, both, h, width, gate, up, ACT=_ACTS[act], BLOCK=_GATE_BLOCK)
    return h


def gate_backward(dh: Tensor, both: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """[d_gate | d_up], and act(gate) ⊙ up again."""
    d, h = torch.empty_like(both), torch.empty_like(dh)
    _launch_gate_backward(dh, both, d, h, act, False)
    return d, h


def geglu_backward(dh: Tensor, both: Tensor) -> Tensor:
    """[d_up | d_gate]"""
    d = torch.empty_like(both)
    _launch_gate_backward(dh, both, d, None, "gelu", True)
    return d


def _launch_gate_backward(dh: Tensor, both: Tensor, d: Tensor, h: Tensor | None, act: str, up_first: bool) -> None:
    width = dh.shape[-1]
    grid = dh.numel() // max(width, 1), block_count(width, _GATE_BLOCK)
    gate, up = (width, 0) if up_first else (0, width)
    constants = {"ACT": _ACTS[act], "AGAIN": h is not None, "BLOCK": _GATE_BLOCK}
    run_kernel(_gate_backward, grid, dh, both, d, h, width, gate, up, **constants)


# -- one place after another -------------------------------------------------------------------------------------------

_BLOCK = 1024


@kernel
def _gelu_tanh(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(y + at, rounded(_activated(z, 2), y), mask=at < n)


@kernel
def _gelu_tanh_backward(g, x, dx, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    slope = _slope(z, 2) * tl.load(g + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(dx + at, rounded(slope, dx), mask=at < n)


def gelu_tanh_forward(x: Tensor) -> Tensor:
    y, n = torch.empty_like(x), x.numel()
    run_kernel(_gelu_tanh, (block_count(n, _BLOCK),), x, y, n, BLOCK=_BLOCK)
    return y


def gelu_tanh_backward(g: Tensor, x: Tensor) -> Tensor:
    dx, n = torch.empty_like(x), x.numel()
    run_kernel(_gelu_tanh_backward, (block_count(n, _BLOCK),), g, x, dx, n, BLOCK=_BLOCK)
    return dx


@kernel(varying=("low", "high", "least"))
def _dropped(x, y, n, low, high, least, scale, BLOCK: tl.constexpr):
    """y = x·scale where hash(seed, place) ≥ least, else 0: ops/dropout.py has the hash. low, high, least: the bits of
    32-bit numbers without a sign."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = at.to(tl.uint32) ^ low.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D + high.to(tl.uint32)
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    v = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * scale
    tl.store(y + at, rounded(tl.where(h >= least.to(tl.uint32), v, 0.0), y), mask=at < n)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    y, n = torch.empty_like(x), x.numel()
    words = [w - (w >> 31 << 32) for w in (seed & 0xFFFFFFFF, seed >> 32, round(p * 2**32))]  # the same 32 bits, signed
    run_kernel(_dropped, (block_count(n, _BLOCK),), x, y, n, *words, 1 / (1 - p), BLOCK=_BLOCK)
    return y


# -- gains -------------------------------------------------------------------------------------------------------------


@kernel
def _gained(y, gain, bias, out, n, width, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = at % width
    v = tl.load(y + at, mask=at < n, other=0.0).to(tl.float32) * tl.load(gain + column)
    if BIASED:
        v += tl.load(bias + column).to(tl.float32)
    tl.store(out + at, rounded(v, out), mask=at < n)


@kernel
def _gained_backward(g, y, gain, dy, sums, rows, width, share, BLOCK: tl.constexpr):
    """dy = gain ⊙ g, and of this program's `share` of the rows Σ g ⊙ y into its row of sums."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    by = tl.load(gain + column, mask=there, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(part * share, tl.minimum(part * share + share, rows)):
        at = tl.cast(row, tl.int64) * width + column
        v = tl.load(g + at, mask=there, other=0.0).to(tl.float32)
        total += v * tl.load(y + at, mask=there, other=0.0).to(tl.float32)
        tl.store(dy + at, rounded(v * by, dy), mask=there)
    tl.store(sums + part * width + column, total, mask=there)


def gain(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    out, n = torch.empty_like(y), y.numel()
    constants = {"BIASED": bias is not None, "BLOCK": _BLOCK}
    run_kernel(_gained, (block_count(n, _BLOCK),), y, gain, bias, out, n, y.shape[-1], **constants)
    return out


def gain_backward(g: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = g.shape
    share, block = 64, min(256, power_of_2(width))
    dy, sums = torch.empty_like(g), gain.new_empty(block_count(rows, share), width)
    grid = len(sums), block_count(width, block)
    run_kernel(_gained_backward, grid, g, y, gain, dy, sums, rows, width, share, BLOCK=block)
    return dy, sums.sum(0)
