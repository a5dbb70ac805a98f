"""Norms, in float32. RMS norm: a row a program. Group norm with silu: a group has more values than a program has
registers, so each chunk of it leaves its mean and its Σ (x − mean)², and whoever norms a chunk puts those of its group
together (Chan, Golub, LeVeque 1979: no difference of large sums).
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cuda.launch import block_count, device_function, kernel, rounded, run_kernel, tl
from veneer.ops.sizes import power_of_2


@kernel
def _rms_norm(x, weight, y, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    there = at < width
    v = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row + at, rounded(v * r * w, y), mask=there)


@kernel
def _rms_norm_backward(g, x, weight, dx, width, eps, BLOCK: tl.constexpr):
    """dx = r·w⊙g − x·r³·mean(w⊙g⊙x)"""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    there = at < width
    v = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    gw = tl.load(g + row + at, mask=there, other=0.0).to(tl.float32)
    gw *= tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    mean = tl.sum(gw * v, 0) / width
    tl.store(dx + row + at, rounded(r * (gw - v * (r * r * mean)), dx), mask=there)


def _warps(width: int) -> int:
    return min(max(power_of_2(width) // 512, 1), 16)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width if width else 0
    run_kernel(_rms_norm, (rows,), x, weight, y, width, eps, BLOCK=power_of_2(width), num_warps=_warps(width))
    return y


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dx, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width if width else 0
    run_kernel(
        _rms_norm_backward, (rows,), g, x, weight, dx, width, eps, BLOCK=power_of_2(width), num_warps=_warps(width)
    )
    return dx


# -- group norm with silu ----------------------------------------------------------------------------------------------


@device_function
def _chunk(x, shift, group, size, places, per, SHIFTED: tl.constexpr, BLOCK: tl.constexpr):
    """(places in the group, which of them there are, x + shift there, channel of each in the group)."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    v = tl.load(x + group * size + at, mask=there, other=0.0).to(tl.float32)
    channel = at // places
    if SHIFTED:
        v += tl.load(shift + group * per + channel, mask=there, other=0.0).to(tl.float32)
    return at, there, v, channel


@device_function
def _moments(parts, group, size, chunks, eps, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """(mean, 1/√(variance + ε)) of a group."""
    at = tl.arange(0, CHUNKS)
    there = at < chunks
    start = parts + (group * chunks + at) * 2
    count = tl.where(there, tl.minimum(size - at * BLOCK, BLOCK), 0).to(tl.float32)
    means = tl.load(start, mask=there, other=0.0)
    mean = tl.sum(count * means, 0) / size
    apart = tl.load(start + 1, mask=there, other=0.0) + count * (means - mean) * (means - mean)
    return mean, tl.rsqrt(tl.sum(apart, 0) / size + eps)


@device_function
def _slopes(
    g,
    x,
    shift,
    weight,
    bias,
    parts,
    group,
    size,
    places,
    per,
    groups,
    chunks,
    eps,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """(places in the group, which of them there are, x̂, a, 1/√(variance + ε)): a = w ⊙ silu'(z) ⊙ g, z = w ⊙ x̂ + b."""
    at, there, v, channel = _chunk(x, shift, group, size, places, per, SHIFTED, BLOCK)
    mean, r = _moments(parts, group, size, chunks, eps, BLOCK, CHUNKS)
    gs = tl.load(g + group * size + at, mask=there, other=0.0).to(tl.float32)
    of_group = group % groups * per
    w = tl.load(weight + of_group + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(bias + of_group + channel, mask=there, other=0.0).to(tl.float32)
    normed = tl.where(there, (v - mean) * r, 0.0)
    z = normed * w + b
    s = tl.sigmoid(z)
    return at, there, normed, gs * w * s * (1.0 + z * (1.0 - s)), r


@kernel
def _group_parts(x, shift, parts, size, places, per, chunks, SHIFTED: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk of a group a program: its mean, and Σ (x − mean)²."""
    group = tl.program_id(0).to(tl.int64)
    _, there, v, _ = _chunk(x, shift, group, size, places, per, SHIFTED, BLOCK)
    mean = tl.sum(v, 0) / tl.minimum(size - tl.program_id(1) * BLOCK, BLOCK)
    apart = tl.where(there, v - mean, 0.0)
    into = parts + (group * chunks + tl.program_id(1)) * 2
    tl.store(into, mean)
    tl.store(into + 1, tl.sum(apart * apart, 0))


@kernel
def _norm_silu(
    x,
    shift,
    weight,
    bias,
    parts,
    y,
    size,
    places,
    per,
    groups,
    chunks,
    eps,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    at, there, v, channel = _chunk(x, shift, group, size, places, per, SHIFTED, BLOCK)
    mean, r = _moments(parts, group, size, chunks, eps, BLOCK, CHUNKS)
    of_group = group % groups * per
    w = tl.load(weight + of_group + channel, mask=there, other=0.0).to(tl.float32)
    z = (v - mean) * r * w + tl.load(bias + of_group + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(y + group * size + at, rounded(z * tl.sigmoid(z), y), mask=there)


@kernel
def _norm_silu_sums(
    g,
    x,
    shift,
    weight,
    bias,
    parts,
    sums,
    size,
    places,
    per,
    groups,
    chunks,
    eps,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Σ a and Σ a ⊙ x̂ of a chunk."""
    group = tl.program_id(0).to(tl.int64)
    _, _, normed, a, _ = _slopes(
        g, x, shift, weight, bias, parts, group, size, places, per, groups, chunks, eps, SHIFTED, BLOCK, CHUNKS
    )
    into = sums + (group * chunks + tl.program_id(1)) * 2
    tl.store(into, tl.sum(a, 0))
    tl.store(into + 1, tl.sum(a * normed, 0))


@kernel
def _norm_silu_backward(
    g,
    x,
    shift,
    weight,
    bias,
    parts,
    sums,
    dx,
    size,
    places,
    per,
    groups,
    chunks,
    eps,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """dx = r·(a − mean(a) − x̂·mean(a ⊙ x̂))"""
    group = tl.program_id(0).to(tl.int64)
    at, there, normed, a, r = _slopes(
        g, x, shift, weight, bias, parts, group, size, places, per, groups, chunks, eps, SHIFTED, BLOCK, CHUNKS
    )
    part = tl.arange(0, CHUNKS)
    start = sums + (group * chunks + part) * 2
    plain = tl.sum(tl.load(start, mask=part < chunks, other=0.0), 0) / size
    along = tl.sum(tl.load(start + 1, mask=part < chunks, other=0.0), 0) / size
    tl.store(dx + group * size + at, rounded(r * (a - plain - normed * along), dx), mask=there)


CHUNK = 4096
"""Values of a group that a program norms: 16 a thread of 8 warps."""


class NormSilu:
    """silu of a group norm of x + shift, and its gradient, as `ops.norms.norm_silu` asks for them."""

    @staticmethod
    def forward(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        y = torch.empty_like(x)
        grid, parts, sizes, constants = _grouped(x, shift, groups)
        run_kernel(_norm_silu, grid, x, shift, weight, bias, parts, y, *sizes, float(eps), **constants)
        return y

    @staticmethod
    def backward(
        g: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        dx = torch.empty_like(x)
        grid, parts, sizes, constants = _grouped(x, shift, groups)
        given = g, x, shift, weight, bias, parts, torch.empty_like(parts)
        run_kernel(_norm_silu_sums, grid, *given, *sizes, float(eps), **constants)
        run_kernel(_norm_silu_backward, grid, *given, dx, *sizes, float(eps), **constants)
        return dx


def _grouped(
    x: Tensor, shift: Tensor | None, groups: int
) -> tuple[tuple[int, int], Tensor, tuple[int, int, int, int, int], dict[str, int]]:
    """(groups of all pictures, chunks of each), what `_moments` reads, made, (values of a group, of a channel, channels
    of a group, groups of a picture, chunks), and constants."""
    n, channels = x.shape[:2]
    places, per = x.numel() // max(n * channels, 1), channels // groups
    size, chunks = places * per, block_count(places * per, CHUNK)
    parts = torch.empty(n * groups, chunks, 2, dtype=torch.float32, device=x.device)
    constants = {"SHIFTED": shift is not None, "BLOCK": CHUNK, "num_warps": 8}
    run_kernel(_group_parts, (n * groups, chunks), x, shift, parts, size, places, per, chunks, **constants)
    return (n * groups, chunks), parts, (size, places, per, groups, chunks), {**constants, "CHUNKS": power_of_2(chunks)}
