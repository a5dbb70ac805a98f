"""Attention of rows that lie one after another, causal: o = softmax(cap(scale·q·kᵀ))·v inside each row.

    turned heads    rotary positions in q and k on the way out of [q | k | v], one pass each way; with RMS norms of
                    heads before them (Qwen 3, Gemma 3) the same
    joint heads     the same of a denoiser's q and k, whose positions turn neighbouring pairs
    attend_rows     torch's own varlen_attn (flash attention) where it does what is asked; else the kernels below, which
                    also have what it has not: cap·tanh(score/cap) of Gemma 2, and sinks, a score of each head that
                    takes its share of the softmax and adds nothing (gpt-oss)

The kernels are flash attention (arXiv 2307.08691) with a row's keys from its window on alone: probabilities exist in
tiles, and only log Σ exp is kept. Queries that share a key head read its keys where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.compat import varlen_attention
from veneer.ops.cuda.launch import (
    block_count,
    device_function,
    kernel,
    on_amd,
    product,
    rounded,
    run_kernel,
    tl,
    wide,
)
from veneer.ops.sizes import power_of_2

# -- rotary positions --------------------------------------------------------------------------------------------------


@device_function
def _place(cos, sin, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Some heads of a token a program: (token, heads, places in half a head, which of them there are, cos, sin)."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, HALF)[None]
    c = tl.load(cos + token * half + at, mask=at < half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * half + at, mask=at < half, other=0.0).to(tl.float32)
    return token, head, at, (head < heads) & (at < half), c, s


@kernel
def _turn(x, y, cos, sin, x_token, x_head, y_token, y_head, heads, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    """y₁ = x₁·cos − sign·x₂·sin, y₂ = x₂·cos + sign·x₁·sin: all heads of a token a program."""
    token, head, at, there, c, s = _place(cos, sin, heads, half, HEADS, HALF)
    s = s * sign
    start = x + token * x_token + head * x_head + at
    one = tl.load(start, mask=there, other=0.0).to(tl.float32)
    two = tl.load(start + half, mask=there, other=0.0).to(tl.float32)
    into = y + token * y_token + head * y_head + at
    tl.store(into, rounded(one * c - two * s, y), mask=there)
    tl.store(into + half, rounded(two * c + one * s, y), mask=there)


def _turn_heads(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    n, heads, dim = x.shape
    strides = x.stride(0), x.stride(1), y.stride(0), y.stride(1)
    constants = {"HEADS": power_of_2(heads), "HALF": power_of_2(dim // 2)}
    run_kernel(_turn, (n,), x, y, cos, sin, *strides, heads, dim // 2, sign, **constants)


class TurnedHeads(torch.autograd.Function):
    """q, k and v of qkv (N, heads + 2·kv, dim), q and k turned by cos, sin (N, dim/2)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, kv: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        n, both, dim = qkv.shape[0], qkv.shape[1] - kv, qkv.shape[2]
        turned, values = qkv.new_empty(n, both, dim), qkv.new_empty(n, kv, dim)
        x, v = qkv.split([both, kv], dim=1)
        _turn_heads(x, turned, cos, sin, 1.0)
        values.copy_(v)  # so that nothing keeps what was not turned
        q, k = turned.split([both - kv, kv], dim=1)
        return q, k, values

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        heads, kv = dq.shape[1], dk.shape[1]
        d = dq.new_empty(len(dq), heads + 2 * kv, dq.shape[2])
        into = d.split([heads, kv, kv], dim=1)
        _turn_heads(_lying(dq), into[0], cos, sin, -1.0)
        _turn_heads(_lying(dk), into[1], cos, sin, -1.0)
        into[2].copy_(dv)
        return d, None, None, None


@kernel
def _norm_turn(
    x,
    y,
    weight,
    cos,
    sin,
    x_token,
    x_head,
    y_token,
    y_head,
    heads,
    queries,
    half,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """y = turned(w ⊙ x/rms(x)), w the first row of weight: (2, 2·half) for the first `queries` heads, else the second.
    Some heads of a token a program."""
    token, head, at, there, c, s = _place(cos, sin, heads, half, HEADS, HALF)
    start = x + token * x_token + head * x_head + at
    one = tl.load(start, mask=there, other=0.0).to(tl.float32)
    two = tl.load(start + half, mask=there, other=0.0).to(tl.float32)
    own = weight + tl.where(head < queries, 0, 2 * half) + at
    r = tl.rsqrt(tl.sum(one * one + two * two, 1) / (2 * half) + eps)[:, None]
    one = one * r * tl.load(own, mask=there, other=0.0).to(tl.float32)
    two = two * r * tl.load(own + half, mask=there, other=0.0).to(tl.float32)
    into = y + token * y_token + head * y_head + at
    tl.store(into, rounded(one * c - two * s, y), mask=there)
    tl.store(into + half, rounded(two * c + one * s, y), mask=there)


@kernel
def _norm_turn_backward(
    g,
    x,
    dx,
    weight,
    cos,
    sin,
    g_token,
    g_head,
    x_token,
    x_head,
    heads,
    half,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """dx = r·a − x·r³·mean(a⊙x), a = w ⊙ (g turned back). weight: (2·half,); dx lies as x does."""
    token, head, at, there, c, s = _place(cos, sin, heads, half, HEADS, HALF)
    given = g + token * g_token + head * g_head + at
    one = tl.load(given, mask=there, other=0.0).to(tl.float32)
    two = tl.load(given + half, mask=there, other=0.0).to(tl.float32)
    a = (one * c + two * s) * tl.load(weight + at, mask=at < half, other=0.0).to(tl.float32)
    b = (two * c - one * s) * tl.load(weight + half + at, mask=at < half, other=0.0).to(tl.float32)
    start = token * x_token + head * x_head + at
    one = tl.load(x + start, mask=there, other=0.0).to(tl.float32)
    two = tl.load(x + start + half, mask=there, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(one * one + two * two, 1) / (2 * half) + eps)[:, None]
    by = tl.sum(a * one + b * two, 1)[:, None] / (2 * half) * r * r
    tl.store(dx + start, rounded(r * (a - one * by), dx), mask=there)
    tl.store(dx + start + half, rounded(r * (b - two * by), dx), mask=there)


def _head_blocks(heads: int, dim: int) -> tuple[int, int]:
    """Blocks of heads, and heads of one: up to 2,048 values a program, which four warps hold in registers."""
    block = min(power_of_2(heads), max(1, 2048 // power_of_2(dim)))
    return block_count(heads, block), block


class NormedTurnedHeads(torch.autograd.Function):
    """As TurnedHeads, of q and k under RMS norms of each head: weight (2, dim), frozen. Keeps qkv, of which v is a
    view."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, kv: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.contiguous()  # its gradient lies as it does
        ctx.save_for_backward(qkv, weight, cos, sin)
        ctx.eps = eps
        n, both, dim = qkv.shape[0], qkv.shape[1] - kv, qkv.shape[2]
        turned = qkv.new_empty(n, both, dim)
        blocks, block = _head_blocks(both, dim)
        strides = qkv.stride(0), qkv.stride(1), turned.stride(0), turned.stride(1)
        sizes = both, both - kv, dim // 2, float(eps)
        constants = {"HEADS": block, "HALF": power_of_2(dim // 2)}
        run_kernel(_norm_turn, (n, blocks), qkv, turned, weight, cos, sin, *strides, *sizes, **constants)
        q, k = turned.split([both - kv, kv], dim=1)
        return q, k, qkv[:, both:]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
        qkv, weight, cos, sin = ctx.saved_tensors
        n, dim, parts = len(dq), dq.shape[2], [dq.shape[1], dk.shape[1], dk.shape[1]]
        d = torch.empty_like(qkv)
        into, x = d.split(parts, dim=1), qkv.split(parts, dim=1)
        for at, g in enumerate((_lying(dq), _lying(dk))):
            blocks, block = _head_blocks(parts[at], dim)
            constants = {"HEADS": block, "HALF": power_of_2(dim // 2)}
            strides = g.stride(0), g.stride(1), x[at].stride(0), x[at].stride(1)
            given = g, x[at], into[at], weight[at], cos, sin, *strides, parts[at], dim // 2, float(ctx.eps)
            run_kernel(_norm_turn_backward, (n, blocks), *given, **constants)
        into[2].copy_(dv)
        return d, None, None, None, None, None


def _lying(x: Tensor) -> Tensor:
    """x where a head's values lie one after another."""
    return x if x.stride(-1) == 1 else x.contiguous()


# -- heads of denoisers ------------------------------------------------------------------------------------------------


@kernel
def _norm_pairs(
    x,
    y,
    weight,
    turn,
    tokens,
    heads,
    dim,
    w_kind,
    w_token,
    eps,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    """y = turned(w ⊙ x/rms(x)) of some heads of q and k of a token. x: (rows·tokens, 3·heads, dim), y: (…, 2·heads,
    dim), turn: (tokens, dim/2, 2) cos and sin."""
    token = tl.program_id(0).to(tl.int64)
    place = token % tokens
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, D)[None]
    there = (head < 2 * heads) & (at < dim)
    v = tl.load(x + (token * 3 * heads + head) * dim + at, mask=there, other=0.0).to(tl.float32)
    if NORMED:
        own = weight + tl.where(head < heads, 0, w_kind) + place * w_token + at
        r = tl.rsqrt(tl.sum(v * v, 1) / dim + eps)[:, None]
        v = v * r * tl.load(own, mask=there, other=0.0)
    if TURNED:
        v = _turned_pairs(v, turn + place * dim, dim, 1.0, HEADS, D)
    tl.store(y + (token * 2 * heads + head) * dim + at, rounded(v, y), mask=there)


@device_function
def _turned_pairs(v, turn, dim, sign, HEADS: tl.constexpr, D: tl.constexpr):
    """Neighbouring pairs (a, b) as (a·cos − sign·b·sin, b·cos + sign·a·sin). v: (HEADS, D)."""
    pair = tl.arange(0, D // 2)[None]
    c = tl.load(turn + 2 * pair, mask=2 * pair < dim, other=0.0)
    s = tl.load(turn + 2 * pair + 1, mask=2 * pair < dim, other=0.0) * sign
    a, b = tl.split(tl.reshape(v, [HEADS, D // 2, 2]))
    return tl.reshape(tl.join(a * c - b * s, b * c + a * s), [HEADS, D])


@kernel
def _norm_pairs_backward(
    g,
    x,
    dx,
    weight,
    turn,
    g_row,
    g_token,
    g_head,
    tokens,
    heads,
    dim,
    w_token,
    eps,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    """dx = r·a − x·r³·mean(a⊙x), a = w ⊙ (g turned back), of some heads of one kind. x, dx: where the kind begins."""
    token = tl.program_id(0).to(tl.int64)
    place = token % tokens
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, D)[None]
    there = (head < heads) & (at < dim)
    given = g + token // tokens * g_row + place * g_token + head * g_head + at
    a = tl.load(given, mask=there, other=0.0).to(tl.float32)
    if TURNED:
        a = _turned_pairs(a, turn + place * dim, dim, -1.0, HEADS, D)
    start = (token * 3 * heads + head) * dim + at
    if NORMED:
        a *= tl.load(weight + place * w_token + at, mask=at < dim, other=0.0)
        v = tl.load(x + start, mask=there, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(v * v, 1) / dim + eps)[:, None]
        a = r * (a - v * (tl.sum(a * v, 1)[:, None] / dim * r * r))
    tl.store(dx + start, rounded(a, dx), mask=there)


class JointHeads(torch.autograd.Function):
    """q, k, v (n, S, heads, d) of qkv (n, S, 3, heads, d), q and k normed by `weight`, (2, 1, 1, S or 1, d) float32 and
    frozen, and turned by `turn`, (S, d/2) complex64; either may be None. Keeps qkv, of which v is a view."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weight: Tensor | None, eps: float, turn: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, S, _, heads, d = qkv.shape
        angles = None if turn is None else torch.view_as_real(turn)
        ctx.save_for_backward(qkv, weight, angles)
        ctx.eps = eps
        both = qkv.new_empty(n, S, 2, heads, d)
        blocks, constants = _pair_blocks(2 * heads, weight, turn, d)
        kind, token = (0, 0) if weight is None else _weight_strides(weight)
        sizes = S, heads, d, kind, token, float(eps)
        run_kernel(_norm_pairs, (n * S, blocks), qkv, both, weight, angles, *sizes, **constants)
        q, k = both.unbind(2)
        return q, k, qkv[:, :, 2]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
        qkv, weight, angles = ctx.saved_tensors
        n, S, _, heads, d = qkv.shape
        dqkv = torch.empty_like(qkv)
        blocks, constants = _pair_blocks(heads, weight, angles, d)
        for kind, g in enumerate((_lying(dq), _lying(dk))):
            own, token = (None, 0) if weight is None else (weight[kind], _weight_strides(weight)[1])
            strides = g.stride(0), g.stride(1), g.stride(2)
            given = g, qkv[:, :, kind], dqkv[:, :, kind], own, angles
            sizes = *strides, S, heads, d, token, float(ctx.eps)
            run_kernel(_norm_pairs_backward, (n * S, blocks), *given, *sizes, **constants)
        dqkv[:, :, 2].copy_(dv)
        return dqkv, None, None, None


def _pair_blocks(heads: int, weight: Tensor | None, turn: Tensor | None, dim: int) -> tuple[int, dict[str, Any]]:
    blocks, block = _head_blocks(heads, dim)
    flags = {"NORMED": weight is not None, "TURNED": turn is not None}
    return blocks, {**flags, "HEADS": block, "D": max(2, power_of_2(dim))}


def _weight_strides(weight: Tensor) -> tuple[int, int]:
    """From w_q to w_k, and from token to token."""
    return weight.stride(0), weight.stride(3) if weight.shape[3] > 1 else 0


# -- attention ---------------------------------------------------------------------------------------------------------


@device_function
def _scores(q, k, query, key, length, scale, cap, window, CAP: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr):
    """(cap(scale·q·kᵀ), −∞ where a query does not see a key; tanh of the capped)."""
    s = product(q, tl.trans(k), WIDE) * scale
    t = s
    if CAP:
        t = 2.0 * tl.sigmoid(2.0 * s / cap) - 1.0
        s = cap * t
    seen = (key[None] <= query[:, None]) & (query[:, None] < length)
    if WINDOW:
        seen = seen & (query[:, None] - key[None] < window)
    return tl.where(seen, s, -float("inf")), t


@kernel
def _attend(
    q,
    k,
    v,
    out,
    lse,
    starts,
    sinks,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    total,
    heads,
    per,
    dim,
    scale,
    cap,
    window,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries of one head and row a program. out: (total, heads, dim), lse: (heads, total)."""
    head = tl.program_id(0) % heads
    begin = tl.load(starts + tl.program_id(0) // heads)
    length = tl.load(starts + tl.program_id(0) // heads + 1) - begin
    first = tl.program_id(1) * QUERIES
    if first >= length:
        return
    at = tl.arange(0, D)
    query = first + tl.arange(0, QUERIES)
    token = (begin + query).to(tl.int64)
    there = (query < length)[:, None] & (at < dim)[None]
    qs = tl.load(q + token[:, None] * q_token + head * q_head + at[None], mask=there, other=0.0)
    most = tl.full([QUERIES], -float("inf"), tl.float32)
    total_exp = tl.zeros([QUERIES], tl.float32)
    if SINKS:
        most = tl.zeros([QUERIES], tl.float32) + tl.load(sinks + head).to(tl.float32)
        total_exp += 1.0
    o = tl.zeros([QUERIES, D], tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    for start in range(low, tl.minimum(first + QUERIES, length), KEYS):
        key = start + tl.arange(0, KEYS)
        place = (begin + key).to(tl.int64)[:, None]
        known = (key < length)[:, None] & (at < dim)[None]
        ks = tl.load(k + place * k_token + head // per * k_head + at[None], mask=known, other=0.0)
        vs = tl.load(v + place * v_token + head // per * v_head + at[None], mask=known, other=0.0)
        s, _ = _scores(qs, ks, query, key, length, scale, cap, window, CAP, WINDOW, WIDE)
        higher = tl.maximum(most, tl.max(s, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # of a query that has seen no key yet
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(most - base)
        total_exp = total_exp * shrink + tl.sum(p, 1)
        o = product(rounded(p, v), vs, WIDE, o * shrink[:, None])
        most = higher
    o = o / tl.where(total_exp == 0.0, 1.0, total_exp)[:, None]
    tl.store(out + (token[:, None] * heads + head) * dim + at[None], rounded(o, out), mask=there)
    tl.store(lse + head * total + token, most + tl.log(tl.where(total_exp == 0.0, 1.0, total_exp)), mask=query < length)


@kernel
def _attend_of_q(
    g,
    out,
    q,
    k,
    v,
    lse,
    delta,
    dq,
    starts,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    total,
    heads,
    per,
    dim,
    scale,
    cap,
    window,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradient of a block of queries, and delta = Σ g ⊙ out of each: (heads, total). g, out, dq: (total, heads,
    dim)."""
    head = tl.program_id(0) % heads
    begin = tl.load(starts + tl.program_id(0) // heads)
    length = tl.load(starts + tl.program_id(0) // heads + 1) - begin
    first = tl.program_id(1) * QUERIES
    if first >= length:
        return
    at = tl.arange(0, D)
    query = first + tl.arange(0, QUERIES)
    token = (begin + query).to(tl.int64)
    there = (query < length)[:, None] & (at < dim)[None]
    flat = (token[:, None] * heads + head) * dim + at[None]
    qs = tl.load(q + token[:, None] * q_token + head * q_head + at[None], mask=there, other=0.0)
    gs = tl.load(g + flat, mask=there, other=0.0)
    own = tl.load(out + flat, mask=there, other=0.0).to(tl.float32)
    inner = tl.sum(gs.to(tl.float32) * own, 1)
    tl.store(delta + head * total + token, inner, mask=query < length)
    logs = tl.load(lse + head * total + token, mask=query < length, other=0.0)
    d = tl.zeros([QUERIES, D], tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    for start in range(low, tl.minimum(first + QUERIES, length), KEYS):
        key = start + tl.arange(0, KEYS)
        place = (begin + key).to(tl.int64)[:, None]
        known = (key < length)[:, None] & (at < dim)[None]
        ks = tl.load(k + place * k_token + head // per * k_head + at[None], mask=known, other=0.0)
        vs = tl.load(v + place * v_token + head // per * v_head + at[None], mask=known, other=0.0)
        s, t = _scores(qs, ks, query, key, length, scale, cap, window, CAP, WINDOW, WIDE)
        ds = tl.exp(s - logs[:, None]) * (product(gs, tl.trans(vs), WIDE) - inner[:, None])
        if CAP:
            ds *= 1.0 - t * t
        d = product(rounded(ds, k), ks, WIDE, d)
    tl.store(dq + flat, rounded(d * scale, dq), mask=there)


@kernel
def _attend_of_kv(
    g,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    starts,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    total,
    heads,
    per,
    dim,
    scale,
    cap,
    window,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of a block of keys and values of one key head, from all queries that see them. dk, dv: (total, kv,
    dim)."""
    kv = heads // per
    head = tl.program_id(0) % kv
    begin = tl.load(starts + tl.program_id(0) // kv)
    length = tl.load(starts + tl.program_id(0) // kv + 1) - begin
    first = tl.program_id(1) * KEYS
    if first >= length:
        return
    at = tl.arange(0, D)
    key = first + tl.arange(0, KEYS)
    token = (begin + key).to(tl.int64)
    known = (key < length)[:, None] & (at < dim)[None]
    ks = tl.load(k + token[:, None] * k_token + head * k_head + at[None], mask=known, other=0.0)
    vs = tl.load(v + token[:, None] * v_token + head * v_head + at[None], mask=known, other=0.0)
    of_k = tl.zeros([KEYS, D], tl.float32)
    of_v = tl.zeros([KEYS, D], tl.float32)
    high = length
    if WINDOW:
        high = tl.minimum(length, first + KEYS + window - 1)
    low = first // QUERIES * QUERIES
    steps = (high - low + QUERIES - 1) // QUERIES
    for step in range(0, steps * per):
        own = head * per + step // steps
        query = low + step % steps * QUERIES + tl.arange(0, QUERIES)
        place = (begin + query).to(tl.int64)
        there = (query < length)[:, None] & (at < dim)[None]
        qs = tl.load(q + place[:, None] * q_token + own * q_head + at[None], mask=there, other=0.0)
        gs = tl.load(g + (place[:, None] * heads + own) * dim + at[None], mask=there, other=0.0)
        logs = tl.load(lse + own * total + place, mask=query < length, other=0.0)
        inner = tl.load(delta + own * total + place, mask=query < length, other=0.0)
        s, t = _scores(qs, ks, query, key, length, scale, cap, window, CAP, WINDOW, WIDE)
        p = tl.exp(s - logs[:, None])
        of_v = product(tl.trans(rounded(p, g)), gs, WIDE, of_v)
        ds = p * (product(gs, tl.trans(vs), WIDE) - inner[:, None])
        if CAP:
            ds *= 1.0 - t * t
        of_k = product(tl.trans(rounded(ds, q)), qs, WIDE, of_k)
    flat = (token[:, None] * kv + head) * dim + at[None]
    tl.store(dk + flat, rounded(of_k * scale, dk), mask=known)
    tl.store(dv + flat, rounded(of_v, dv), mask=known)


def _tiles(dim: int, backward: bool = False) -> dict[str, int]:
    """Queries and keys of a block, and the warps that work on it, so that all of it stays in registers.

    maxnreg: a thread may have all the registers that there are for one. Left to itself the assembler takes 128 of them
    where a second block then fits beside the first, and puts the few values that are too many in memory. AMD's have 512
    for a thread of four warps of 64, which the backward pass of wide heads needs; eight warps are left 256."""
    if backward and dim > 64 and on_amd():
        return {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1}
    if dim <= 64:
        most = {"KEYS": 32, "num_warps": 8} if backward else {"KEYS": 64, "num_warps": 4}
        return {"QUERIES": 64, **most, "num_stages": 2, "maxnreg": 255}
    if dim <= 128:
        return {"QUERIES": 32 if backward else 64, "KEYS": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 255}
    return {"QUERIES": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 255}


class ScoredAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        starts: Tensor,
        longest: int,
        scale: float,
        window: int | None,
        cap: float,
    ) -> Tensor:
        q, k, v = (_lying(t) for t in (q, k, v))
        total, heads, dim = q.shape
        out = q.new_empty(total, heads, dim)
        lse = torch.empty(heads, total, dtype=torch.float32, device=q.device)
        sizes, constants = _sizes(q, k, v, scale, window, cap)
        tiles = _tiles(dim)
        grid = (len(starts) - 1) * heads, block_count(longest, tiles["QUERIES"])
        given = q, k, v, out, lse, starts, sinks
        run_kernel(_attend, grid, *given, *sizes, **constants, SINKS=sinks is not None, **tiles)
        ctx.save_for_backward(q, k, v, sinks, starts, out, lse)
        ctx.how = longest, scale, window, cap
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, starts, out, lse = ctx.saved_tensors
        longest, *how = ctx.how
        g = g.contiguous()
        total, heads, dim = q.shape
        kv, rows = k.shape[1], len(starts) - 1
        dq, delta = q.new_empty(total, heads, dim), torch.empty_like(lse)
        dk, dv = k.new_empty(total, kv, dim), v.new_empty(total, kv, dim)
        sizes, constants = _sizes(q, k, v, *how)
        tiles = _tiles(dim, backward=True)
        grid = rows * heads, block_count(longest, tiles["QUERIES"])
        run_kernel(_attend_of_q, grid, g, out, q, k, v, lse, delta, dq, starts, *sizes, **constants, **tiles)
        grid = rows * kv, block_count(longest, tiles["KEYS"])
        run_kernel(_attend_of_kv, grid, g, q, k, v, lse, delta, dk, dv, starts, *sizes, **constants, **tiles)
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:  # a sink's share of the softmax adds nothing: −p·Σ g⊙o
            d_sinks = -((sinks.float()[:, None] - lse).exp() * delta).sum(1).to(sinks.dtype)
        return dq, dk, dv, d_sinks, None, None, None, None, None


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    total, heads, dim = q.shape
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)
    sizes = *strides, total, heads, heads // k.shape[1], dim, float(scale), float(cap), window or 0
    constants = {"CAP": cap > 0, "WINDOW": window is not None, "WIDE": wide(q.dtype), "D": max(16, power_of_2(dim))}
    return sizes, constants


def _scored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """By the kernels of this file. q: (N, heads, dim), k, v: (N, kv heads, dim) → (N, heads, dim).

    starts: (rows + 1,) int32, where each row begins, and N. `longest`: of the rows. `cap`: 0 for none. sinks:
    (heads,)."""
    out: Tensor = ScoredAttention.apply(q, k, v, sinks, starts, longest, scale, window, cap)
    return out


def _takes_varlen(q: Tensor) -> bool:
    """Flash attention: 16 bits, heads of up to 256 in multiples of 8; of cards what `launch.takes` wants as well."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] <= 256 and q.shape[2] % 8 == 0
    return fits and q.device.type == "cuda" and varlen_attention() is not None


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    cap: float,
    sinks: Tensor | None,
) -> Tensor:
    """As `_scored_attention`, by torch's where it does what is asked."""
    if cap or sinks is not None or not _takes_varlen(q):
        return _scored_attention(q, k, v, starts, longest, scale, window, cap, sinks)
    back = -1 if window is None else window - 1
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = varlen_attention()(
        q, k, v, starts, starts, longest, longest, scale=scale, window_size=(back, 0), enable_gqa=grouped
    )
    return out
