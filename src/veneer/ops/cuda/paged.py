"""Attention over keys and values in pages (serve/forward/paged.py), and what a step puts there.

    out[t] = softmax(scale·q[t]·Kᵀ)·V over the positions of t's own sequence up to its own, the last `window` of them

A program has a tile of a sequence's tokens with all query heads of one key head, and reads the keys that these may see
page by page, once. Few programs with many keys are cut along the keys: each part gives its own softmax and the log of
its sum, and a second kernel joins them in order.

torch.nn.attention.varlen has block tables too, but flash attention takes them in pages of 256, has no cap on scores,
and none of it runs without a GPU; this one takes pages of any size and is checked like every kernel here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cuda.launch import block_count, kernel, product, run_kernel, tl, wide
from veneer.ops.sizes import power_of_2

_SPAN, _ENOUGH = 512, 256  # keys of a part; programs that need no parts


@kernel(varying=("table_width", "count", "span"))
def _paged_attention(
    q,
    K,
    V,
    out,
    sums,
    tiles,
    tables,
    q_stride,
    table_width,
    count,
    span,
    kv,
    heads,
    scale,
    cap,
    window,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    head, part = tl.program_id(1), tl.program_id(2)
    sequence, first, tokens, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    m = tl.arange(0, BLOCK_M)
    t, g = m // BLOCK_G, m % BLOCK_G
    d = tl.arange(0, BLOCK_D)
    asked = (t < tokens) & (g < GROUP)
    h = head * GROUP + g
    own = tl.load(
        q + (first + t)[:, None] * q_stride + (h * D)[:, None] + d[None, :],
        mask=asked[:, None] & (d < D)[None, :],
        other=0.0,
    )
    at = position + t
    low = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    low, high = tl.maximum(low, part * span), tl.minimum(position + tokens, (part + 1) * span)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    made = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n0 in range(low, high, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        there = n < high
        page = tl.load(tables + sequence * table_width + n // PAGE, mask=there, other=0)
        place = ((page * PAGE + n % PAGE) * kv + head) * D
        k = tl.load(K + place[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        scores = product(own, k, WIDE) * scale
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
        seen = there[None, :] & (n[None, :] <= at[:, None]) & (n[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(scores - anchor[:, None])
        less = tl.exp(most - anchor)
        total = total * less + tl.sum(p, 1)
        v = tl.load(V + place[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        made = product(p.to(V.dtype.element_ty), v, WIDE, made * less[:, None])
        most = higher
    total = tl.where(total > 0, total, 1.0)
    made = made / total[:, None]
    row = (part * count + first + t) * heads + h
    tl.store(out + row[:, None] * D + d[None, :], made, mask=asked[:, None] & (d < D)[None, :])
    if not WHOLE:
        tl.store(sums + row, most + tl.log(total), mask=asked)


@kernel(varying=("count", "parts"))
def _join_parts(part, sums, out, count, parts, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """out = Σ exp(sums)·part / Σ exp(sums) over the parts of the keys; a part without a key has sums −∞."""
    row = tl.program_id(0).to(tl.int64)
    step = count.to(tl.int64) * heads
    d = tl.arange(0, BLOCK_D)
    most = float("-inf")
    for i in range(parts):
        most = tl.maximum(most, tl.load(sums + i * step + row))
    made = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    for i in range(parts):
        share = tl.exp(tl.load(sums + i * step + row) - most)
        total += share
        made += share * tl.load(part + (i * step + row) * D + d, mask=d < D, other=0.0)
    tl.store(out + row * D + d, made / total, mask=d < D)


def paged_attention(
    q: Tensor,
    K: Tensor,
    V: Tensor,
    tiles: Tensor,
    tables: Tensor,
    longest: int,
    tokens: int,
    page: int,
    scale: float,
    cap: float,
    window: int,
) -> Tensor:
    """q (rows, heads, d), its rows may be apart; K, V (places, kv, d) -> (rows, heads, d). `tiles` (·, 4): sequence,
    first row, tokens (at most `tokens`), position of the first; `tables` (sequences, ·) of pages. `longest`: keys of
    any. `cap` 0: none; `window` 0: all."""
    count, heads, d = q.shape
    kv = K.shape[1]
    group, D = heads // kv, max(power_of_2(d), 16)
    block = max(16, power_of_2(group) * tokens)
    programs = len(tiles) * kv
    parts = 1 if programs >= _ENOUGH else block_count(longest, _SPAN)
    out = torch.empty(count, heads, d, dtype=q.dtype, device=q.device)
    if not count:
        return out
    part, sums, span = out, out, longest
    if parts > 1:
        part = torch.empty(parts, count, heads, d, dtype=torch.float32, device=q.device)
        sums = torch.full((parts, count, heads), -torch.inf, dtype=torch.float32, device=q.device)
        span = _SPAN
    large = block > 16, D * q.element_size() > 256  # what takes registers
    N = 64 >> sum(large)
    run_kernel(
        _paged_attention,
        (len(tiles), kv, parts),
        q,
        K,
        V,
        part,
        sums,
        tiles,
        tables,
        q.stride(0),
        tables.shape[1],
        count,
        span,
        kv,
        heads,
        scale,
        cap or 1.0,
        window or 2**31 - 1,
        PAGE=page,
        D=d,
        BLOCK_D=D,
        GROUP=group,
        BLOCK_G=power_of_2(group),
        BLOCK_M=block,
        BLOCK_N=N,
        CAPPED=cap > 0,
        WHOLE=parts == 1,
        WIDE=wide(q.dtype),
        num_warps=8 if block > 16 and D > 128 else 4,
        num_stages=2,
    )
    if parts > 1:
        run_kernel(_join_parts, (count * heads,), part, sums, out, count, parts, heads, D=d, BLOCK_D=D, num_warps=1)
    return out


@kernel
def _turn_and_store(
    qkv,
    K,
    V,
    cos,
    sin,
    q_norm,
    k_norm,
    positions,
    slots,
    heads,
    kv,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = qkv + (row * (heads + 2 * kv) + head) * D
    j = tl.arange(0, HALF)
    there = j < D // 2
    a = tl.load(x + j, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + D // 2 + j, mask=there, other=0.0).to(tl.float32)
    slot = tl.load(slots + row)
    if head < heads + kv:
        if NORMED:
            r = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
            weight = k_norm if head >= heads else q_norm
            a *= r * tl.load(weight + j, mask=there, other=0.0).to(tl.float32)
            b *= r * tl.load(weight + D // 2 + j, mask=there, other=0.0).to(tl.float32)
        at = tl.load(positions + row) * (D // 2) + j
        c, s = tl.load(cos + at, mask=there, other=0.0), tl.load(sin + at, mask=there, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    if head < heads:
        tl.store(x + j, a, mask=there)
        tl.store(x + D // 2 + j, b, mask=there)
    elif head < heads + kv:
        to = K + (slot * kv + head - heads) * D + j
        tl.store(to, a, mask=there)
        tl.store(to + D // 2, b, mask=there)
    else:
        to = V + (slot * kv + head - heads - kv) * D + j
        tl.store(to, a, mask=there)
        tl.store(to + D // 2, b, mask=there)


def turn_and_store(
    qkv: Tensor,
    K: Tensor,
    V: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    slots: Tensor,
) -> None:
    """qkv (rows, (heads + 2 kv)·d): queries normed, if there is a norm, and turned in place; keys the same into K, and
    values into V, (places, kv, d), at `slots`. cos, sin: (positions, d/2) float32."""
    kv, d = K.shape[1], K.shape[2]
    heads = qkv.shape[1] // d - 2 * kv
    run_kernel(
        _turn_and_store,
        (len(qkv), heads + 2 * kv),
        qkv,
        K,
        V,
        cos,
        sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        positions,
        slots,
        heads,
        kv,
        eps,
        D=d,
        HALF=power_of_2(d // 2),
        NORMED=q_norm is not None,
        num_warps=1,
    )
