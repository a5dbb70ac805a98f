"""Attention: causal over packed rows, and full attention of denoisers.

    varlen_attention, rope_varlen_attention    o = softmax(scale·q·kᵀ + causal)·v inside each row    q: (N, heads, dim)
    with head_norms                    of q̂ = rope(w_q ⊙ q/rms(q)) and k̂ alike, as in Qwen 3 and Gemma 3
    joint_attention                    o = softmax(q̂·k̂ᵀ/√d)·v    q̂ = rope(w_q ⊙ q/rms(q)), k̂ alike; both optional
    cross_attention                    o = softmax(q·kᵀ/√d)·v over other tokens' keys

Packed rows need padding only inside the attention. Queries that share a key head are multiplied together
(grouped-query attention without repeating keys), in blocks that skip the keys after them. With the
compiled tiles (ops/cpu/tiles.c), rows need no padding at all, and only log Σ exp is kept besides qkv and
the output. A denoiser's attention uses the compiled kernel if there is one (half the time of torch's flash
attention on the CPU), which keeps only log Σ exp; otherwise probabilities are kept if they are hardly
larger than q, k and v, or recomputed in backward for some heads at a time. References: torch's
F.scaled_dot_product_attention, row by row for packed rows, and `joint_attention_reference`. This module
does not know about models.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from veneer.compat import TORCH
from veneer.ops.device_transfer import sent
from veneer.ops.dispatch import dispatch
from veneer.ops.norms import rms_norm
from veneer.ops.step_sizes import grouped_rows, key_ranges

# -- rows that lie one after another -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowGroup:
    """Rows attended to together, as `rows` × `length` slots.

    Shorter rows are padded at the end.

    tokens: (real tokens,), their indices in the flat order; slots: row·length + time of each."""

    rows: int
    length: int
    tokens: Tensor
    slots: Tensor

    @property
    def padded(self) -> bool:
        return len(self.tokens) < self.rows * self.length


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Rows with common tokens, each token stored once.

    Answers share their prompt, for example.

    The N tokens are in the order in which the rows first use them. A token depends only on tokens before
    it, so the common part is a prefix, which is computed once.

    places: (Σ lengths,) int64, index among the N tokens of each token of each row.
    firsts: (N,), index of each token's first use among the rows' tokens.
    before: (N,), index of each token's predecessor; undefined for a row's first token."""

    places: Tensor
    firsts: Tensor
    before: Tensor

    @classmethod
    def of(cls, places: Tensor) -> SharedRows:
        each = torch.arange(len(places), device=places.device)
        firsts = torch.full((int(places.max()) + 1,), len(places), device=places.device)
        firsts = firsts.scatter_reduce(0, places, each, "amin")
        return cls(places, firsts, places[firsts - 1])

    def sent(self, device: torch.device) -> SharedRows:
        return SharedRows(*(sent(t, device) for t in (self.places, self.firsts, self.before)))


class RowLayout:
    """How packed rows of the given lengths, N = Σ lengths tokens, are attended to.

    Rows of similar length are grouped (a row is at most `waste` shorter than its group's longest). Padding
    at a row's end is harmless under causality, because no real token sees later ones, and its output is
    dropped.

    step: a group's length is rounded up to a multiple of this, so that rows of many lengths use few
    product shapes.
    idle: tokens after the rows that belong to no row: they attend to nothing, and their output is zero.
    keep: tokens whose output is needed at the end of a model, None for all; optional for layers to use.
    attended: the layers that have used this layout so far.
    starts: (rows + 1,), start of each row, and the end, on the CPU; `ends`: the same as int32 on the
        tokens' device.
    groups: the row groups, computed when an implementation needs them.
    masks: of flex attention, by window.
    shared: rows with common tokens. N then counts each token once; only attention, which is cheap next to
        the products, has each row in full: `whole` is the layout of the full rows."""

    keep: Tensor | None = None

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        waste: float = 0.25,
        step: int = 1,
        idle: int = 0,
        shared: SharedRows | None = None,
    ) -> None:
        self.lengths, self.idle = list(lengths), idle
        self.attended: set[int] = set()
        self.masks: dict[int | None, Any] = {}
        self.device, self._waste, self._step = torch.device(device), waste, step
        self.starts = torch.tensor(list(itertools.accumulate(self.lengths, initial=0)), dtype=torch.int64)
        self.ends = sent(self.starts.int(), self.device)
        self.shared = None if shared is None else shared.sent(self.device)
        positions = torch.cat([torch.arange(n) for n in self.lengths])
        positions = positions if shared is None else positions[shared.firsts.cpu()]
        self.positions = sent(torch.cat([positions, torch.zeros(idle, dtype=torch.int64)]), self.device)
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @functools.cached_property
    def groups(self) -> list[RowGroup]:
        out, starts = [], self.starts.tolist()
        for length, taken in grouped_rows(self.lengths, waste=self._waste, step=self._step):
            tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in taken])
            slots = torch.cat([torch.arange(self.lengths[i]) + at * length for at, i in enumerate(taken)])
            out.append(RowGroup(len(taken), length, sent(tokens, self.device), sent(slots, self.device)))
        return out

    @functools.cached_property
    def whole(self) -> RowLayout:
        """The layout of every row in full, packed."""
        return RowLayout(self.lengths, self.device, self._waste, self._step)

    def tables(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return cos and sin of (1, N, dim) with equal halves, as (N, dim/2).

        Computed once for all layers of a forward with the same tables."""
        key = id(position_embeddings[0])
        if key not in self._tables:
            half = position_embeddings[0].shape[-1] // 2
            cos, sin = (t[0, :, :half].contiguous() for t in position_embeddings)
            self._tables[key] = position_embeddings[0], cos, sin  # held, so that its id is not reused
        return self._tables[key][1], self._tables[key][2]


def _gather(x: Tensor, group: RowGroup, kv: int, scale: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Gather (N, heads, dim) as (rows·kv, length·heads/kv, dim), rotated by +θ.

    And multiplied by `scale`.

    Padding is zero. Time-major, so that a block of queries is a contiguous range of rows of the product."""
    heads, dim = x.shape[1], x.shape[2]
    per = heads // kv
    shape = (group.rows * kv, group.length * per, dim)
    run = dispatch("gather_heads", x, cos, sin)
    if run is not None:
        out = x.new_zeros(shape) if group.padded else x.new_empty(shape)
        run(x, cos, sin, group, kv, scale, out)
        return out
    if cos is not None and sin is not None:
        x = _rotated(x, cos, sin, 1.0)
    out = x.new_zeros(group.rows * group.length, heads, dim)
    out[group.slots] = x[group.tokens] * scale
    return out.view(group.rows, group.length, kv, per, dim).transpose(1, 2).reshape(shape)


def _scatter(
    g: Tensor, out: Tensor, group: RowGroup, kv: int, scale: float, cos: Tensor | None = None, sin: Tensor | None = None
) -> None:
    """Apply the transpose of `_gather`, into out: (N, heads, dim).

    Only the group's tokens are written."""
    heads, dim = out.shape[1], out.shape[2]
    run = dispatch("scatter_heads", out, cos, sin)
    if run is not None:
        run(g, cos, sin, group, kv, scale, out)
        return
    flat = g.view(group.rows, kv, group.length, heads // kv, dim).transpose(1, 2).reshape(-1, heads, dim)
    part = flat[group.slots] * scale
    if cos is not None and sin is not None:
        part = _rotated(part, cos[group.tokens], sin[group.tokens], -1.0)
    out[group.tokens] = part


def _softmax_(scores: Tensor, per: int, q0: int, q1: int, k0: int, window: int | None) -> Tensor:
    """Apply softmax over the visible keys k0 … q1 of each query q0 … q1.

    scores: (b, (q1−q0)·per, q1−k0), overwritten."""
    run = dispatch("causal_softmax", scores)
    if run is not None:
        out: Tensor = run(scores, scores.shape[0], q1 - q0, per, q1 - k0, q0, k0, window or 0)
        return out
    view = scores.view(-1, q1 - q0, per, q1 - k0)
    q = torch.arange(q0, q1, device=scores.device)[:, None, None]
    k = torch.arange(k0, q1, device=scores.device)
    hidden = k > q if window is None else (k > q) | (k <= q - window)
    return torch.softmax(view.masked_fill_(hidden, -math.inf), -1).view_as(scores)


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """Return p ⊙ (dp − Σ p⊙dp); dp is overwritten."""
    run = dispatch("softmax_backward", p, dp)
    out: Tensor = TORCH("torch._softmax_backward_data")(dp, p, -1, p.dtype) if run is None else run(p, dp)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, group: RowGroup, per: int, window: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Return output and probabilities of one group in the gathered layout."""
    out = torch.empty_like(q)
    probs = []
    for q0, q1, k0 in key_ranges(group.length, window):
        part = slice(q0 * per, q1 * per)
        p = _softmax_(q[:, part] @ k[:, k0:q1].transpose(1, 2), per, q0, q1, k0, window)
        torch.bmm(p, v[:, k0:q1], out=out[:, part])
        probs.append(p)
    return out, probs


def _attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, probs: list[Tensor], group: RowGroup, per: int, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (q0, q1, k0), p in zip(key_ranges(group.length, window), probs, strict=True):
        part = slice(q0 * per, q1 * per)
        dv[:, k0:q1].baddbmm_(p.transpose(1, 2), g[:, part])
        ds = softmax_backward(p, g[:, part] @ v[:, k0:q1].transpose(1, 2))
        torch.bmm(ds, k[:, k0:q1], out=dq[:, part])
        dk[:, k0:q1].baddbmm_(ds.transpose(1, 2), q[:, part])
    return dq, dk, dv


class VarlenSettings(NamedTuple):
    """Settings of packed-row attention.

    kv: number of key heads.
    layout: the rows.
    scale: the factor of scores.
    window: how many tokens a query sees, including itself (None: all)."""

    kv: int
    layout: RowLayout
    scale: float
    window: int | None


class _Attention(torch.autograd.Function):
    """Attention of qkv: (N, heads + 2·kv, dim), the heads of q, k and v concatenated.

    cos, sin rotate q and k; None leaves them unrotated."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, settings: VarlenSettings) -> Tensor:
        kv, layout, scale, window = settings
        heads = qkv.shape[1] - 2 * kv
        q, k, v = qkv.split([heads, kv, kv], dim=1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out[len(out) - layout.idle :] = 0
        saved: list[Tensor] = []
        for group in layout.groups:
            qg = _gather(q, group, kv, scale, cos, sin)
            kg = _gather(k, group, kv, 1.0, cos, sin)
            vg = _gather(v, group, kv, 1.0, None, None)
            og, probs = _attend(qg, kg, vg, group, heads // kv, window)
            _scatter(og, out, group, kv, 1.0)
            saved += [qg, kg, vg, *probs]
        ctx.save_for_backward(cos, sin, *saved)
        ctx.settings, ctx.heads = settings, heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (kv, layout, scale, window), heads = ctx.settings, ctx.heads
        cos, sin, *saved = ctx.saved_tensors
        grad = grad.contiguous()
        d_qkv = grad.new_empty(grad.shape[0], heads + 2 * kv, grad.shape[2])
        d_qkv[len(d_qkv) - layout.idle :] = 0
        dq, dk, dv = d_qkv.split([heads, kv, kv], dim=1)
        for group in layout.groups:
            blocks = len(key_ranges(group.length, window))
            (qg, kg, vg, *probs), saved = saved[: 3 + blocks], saved[3 + blocks :]
            g = _gather(grad, group, kv, 1.0, None, None)
            dqg, dkg, dvg = _attend_backward(g, qg, kg, vg, probs, group, heads // kv, window)
            _scatter(dqg, dq, group, kv, scale, cos, sin)
            _scatter(dkg, dk, group, kv, 1.0, cos, sin)
            _scatter(dvg, dv, group, kv, 1.0)
        return d_qkv, None, None, None


class _Tiled(torch.autograd.Function):
    """The same by an implementation of "rope_varlen_attention".

    Keeps qkv, the output and log Σ exp; no probabilities."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, settings: VarlenSettings
    ) -> Tensor:
        out, lse = run.forward(qkv, cos, sin, settings)
        ctx.save_for_backward(qkv, cos, sin, out, lse)
        ctx.run, ctx.settings = run, settings
        made: Tensor = out
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        qkv, cos, sin, out, lse = ctx.saved_tensors
        d_qkv = ctx.run.backward(grad.contiguous(), out, lse, qkv, cos, sin, ctx.settings)
        return None, d_qkv, None, None, None


def _rows(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, settings: VarlenSettings) -> Tensor:
    run = dispatch("rope_varlen_attention", qkv, cos, sin)
    if run is not None:
        tiled: Tensor = _Tiled.apply(run, qkv, cos, sin, settings)
        return tiled
    out: Tensor = _Attention.apply(qkv, cos, sin, settings)
    return out


def sdpa_varlen_attention(qkv: Tensor, kv: int, layout: RowLayout, scale: float, window: int | None) -> Tensor:
    """Run `varlen_attention` of [q | k | v] heads through torch's fused attention.

    (N, heads + 2·kv, dim) → (N, heads, dim). Fast on a GPU (flash attention for 16-bit heads); torch
    selects its kernel per device."""
    heads, dim = qkv.shape[1] - 2 * kv, qkv.shape[2]
    out = qkv.new_zeros(len(qkv), heads, dim)
    for group in layout.groups:
        places = qkv.new_zeros(group.rows * group.length, heads + 2 * kv, dim)
        places = places.index_copy(0, group.slots, qkv[group.tokens]).view(group.rows, group.length, -1, dim)
        q, k, v = places.transpose(1, 2).split([heads, kv, kv], dim=1)
        seen = None
        if window is not None and window < group.length:
            place = torch.arange(group.length, device=qkv.device)
            back = place[:, None] - place[None]
            seen = (back >= 0) & (back < window)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=heads != kv
        )
        flat = o.transpose(1, 2).reshape(group.rows * group.length, heads, dim)
        out = out.index_copy(0, group.tokens, flat[group.slots])
    return out


class HeadNorms(NamedTuple):
    """RMS norms of each head of q and k before rotation.

    weight: w_q, w_k, frozen, as (2, dim)."""

    weight: Tensor
    eps: float


def rope_varlen_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: int,
    layout: RowLayout,
    scale: float,
    window: int | None = None,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Return attention of [q | k | v] heads with rotary positions in q and k.

    qkv: (N, heads + 2·kv, dim) → (N, heads, dim).
    cos, sin: (N, dim/2).
    window: a query sees itself and the window − 1 tokens before it; None: all tokens before it.

    Keeps the rotated q, k, v and the probabilities in their dtype, or with tiles qkv, the output and log Σ
    exp; on a GPU, what flash attention keeps. With norms, also keeps q and k before the norm. Reference
    for norms: `normed_heads`."""
    if layout.shared is not None:
        places = layout.shared.places

        def attend(own: Tensor) -> Tensor:
            return rope_varlen_attention(own, cos[places], sin[places], kv, layout.whole, scale, window, norms)

        return _each_whole(attend, layout, qkv)
    if norms is not None:
        qkv = normed_heads(qkv, kv, norms)
    if qkv.device.type != "cpu":
        q, k, v = qkv.split([qkv.shape[1] - 2 * kv, kv, kv], dim=1)
        run = dispatch("rope", q, k, cos, sin)
        q, k = (rotate(q, cos, sin), rotate(k, cos, sin)) if run is None else run(q, k, cos, sin)
        return varlen_attention(q, k, v, layout, scale, window)
    return _rows(qkv, cos, sin, VarlenSettings(kv, layout, scale, window))


def normed_heads(qkv: Tensor, kv: int, norms: HeadNorms) -> Tensor:
    """Return [w_q ⊙ q/rms(q) | w_k ⊙ k/rms(k) | v] of [q | k | v].

    (N, heads + 2·kv, dim)."""
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv, kv, kv], dim=1)
    q, k = (rms_norm(x, w, norms.eps) for x, w in zip((q, k), norms.weight, strict=True))
    return torch.cat([q, k, v], dim=1)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: RowLayout,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return causal attention of packed rows, without rotation.

    q: (N, heads, dim), k, v: (N, kv heads, dim) → (N, heads, dim).
    cap: scores become cap·tanh(score/cap); 0 leaves them unchanged.
    sinks: (heads,), a score per head that takes its share of the softmax and adds nothing.

    Without a kernel, cap and sinks run `varlen_attention_reference`."""
    if layout.shared is not None:

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return varlen_attention(q, k, v, layout.whole, scale, window, cap, sinks)

        return _each_whole(attend, layout, q, k, v)
    run = dispatch("varlen_attention", q, k, v, cap, sinks)
    if run is not None:
        parts = (t[: len(t) - layout.idle] for t in (q, k, v))
        attended: Tensor = run(*parts, layout, scale, window, cap, sinks)
        return F.pad(attended, (0, 0, 0, 0, 0, layout.idle)) if layout.idle else attended
    if cap or sinks is not None:
        return varlen_attention_reference(q, k, v, layout, scale, window, cap, sinks)
    qkv = torch.cat([q, k, v], 1)
    if qkv.device.type != "cpu":
        return sdpa_varlen_attention(qkv, k.shape[1], layout, scale, window)
    return _rows(qkv, None, None, VarlenSettings(k.shape[1], layout, scale, window))


def _each_whole(attend: Callable[..., Tensor], layout: RowLayout, *parts: Tensor) -> Tensor:
    """Run attend(parts) on rows that share tokens, laid out in full.

    A shared token is part of each of its rows; its output is the one in the first row. Rows are laid out
    in full during the call only, and again in backward."""
    shared = layout.shared
    assert shared is not None

    def whole(*own: Tensor) -> Tensor:
        out: Tensor = _Taken.apply(attend(*(_Taken.apply(x, shared.places) for x in own)), shared.firsts)
        return out

    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        made: Tensor = torch.utils.checkpoint.checkpoint(whole, *parts, use_reentrant=False, preserve_rng_state=False)
    else:
        made = whole(*parts)
    return F.pad(made, (0, 0, 0, 0, 0, layout.idle)) if layout.idle else made


class _Taken(torch.autograd.Function):
    """x[at] with rows taken any number of times; gradients are summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.count = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        added = grad.new_zeros(ctx.count, grad[0].numel(), dtype=wide).index_add_(0, at, grad.flatten(1).to(wide))
        return added.to(grad.dtype).view(ctx.count, *grad.shape[1:]), None


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: RowLayout,
    scale: float,
    window: int | None,
    cap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Compute `varlen_attention` directly, one row at a time."""
    per, out = q.shape[1] // k.shape[1], [q.new_zeros(layout.idle, *q.shape[1:])]
    lengths = [*layout.lengths, layout.idle]
    rows = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    for one, keys, values in list(rows)[:-1][::-1]:
        keys, values = (t.repeat_interleave(per, 1).transpose(0, 1) for t in (keys, values))
        scores = (one.transpose(0, 1) @ keys.transpose(1, 2)) * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        place = torch.arange(len(one), device=q.device)
        back = place[:, None] - place
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, len(one), 1)], -1)
        p = torch.softmax(scores, -1)[..., : len(one)]
        out.insert(0, (p @ values).transpose(0, 1))
    return torch.cat(out)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = cos.shape[-1]
    x1, x2 = x[..., :half], x[..., half:]
    c, s = cos[:, None], sin[:, None] * sign
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by rotary positions in halves (arXiv 2104.09864, in Llama's layout).

    x: (N, heads, dim), cos, sin: (N, dim/2). y₁ = x₁·cos − x₂·sin, y₂ = x₂·cos + x₁·sin. The reference for
        the rotation inside `rope_varlen_attention`."""
    return _rotated(x, cos, sin, 1.0)


# -- denoisers ---------------------------------------------------------------------------------------------------------

KEPT_BYTES = 64 << 20
"""Bytes of probabilities that one call of `cross_attention` can keep."""

KEPT_TOKENS = 8
"""Tokens per value of a head up to which `joint_attention` keeps probabilities for backward: they are then
hardly larger than q, k and v."""

CHUNK_BYTES = 8 << 20
"""Bytes of probabilities at a time if `joint_attention` does not keep them. A head that needs more uses
torch's attention, unless there is a kernel, which needs no more for a thousand tokens than for ten."""


def _rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Multiply neighboring pairs of x as complex numbers by `turn`.

    x: (…, S, d) float32, turn: (S, d/2)."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _chunks(q: Tensor) -> list[slice]:
    """Return slices of heads whose probabilities stay small. q: (n·heads, S, d)."""
    step = max(1, CHUNK_BYTES // (q.shape[1] ** 2 * q.element_size()))
    return [slice(i, i + step) for i in range(0, len(q), step)]


def _scaled(a: Tensor, b: Tensor, by: float, out: Tensor | None = None) -> Tensor:
    """Return by·a·b of batches of matrices, in one pass."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=by, out=out)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    scores = _scaled(q, k.transpose(1, 2), q.shape[-1] ** -0.5)
    run = dispatch("causal_softmax", scores)
    if run is None:
        return torch.softmax(scores, -1)
    keys = scores.shape[-1]  # treated as queries at the end of a causal row, which see every key
    out: Tensor = run(scores, 1, 1, scores.numel() // keys, keys, keys - 1, 0, 0)
    return out


def _has_tiles(x: Tensor) -> bool:
    """Return whether there is a kernel for heads of this dtype and last dimension."""
    return dispatch("attend", x.new_empty(1, x.shape[-1])) is not None


def _apart(x: Tensor) -> Tensor:
    """Return (n, S, heads, d) as (n·heads, S, d), contiguous; a view if S is 1."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()


def _attend_all(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return softmax(q·kᵀ/√d)·v of (n, tokens, heads, d), as (n, S, heads·d).

    Also log Σ exp of the scores, (n, heads, S) float32, if computed in tiles; otherwise the probabilities,
    if `keep`."""
    n, S = q.shape[:2]
    run = dispatch("attend", q, k, v)
    if run is not None:
        out, lse = run(q, k, v)
        return out.view(n, S, -1), lse, None
    p = None
    q, k, v = (_apart(t) for t in (q, k, v))
    if keep:
        p = _probabilities(q, k)
        out = torch.bmm(p, v)
    else:
        out = torch.empty_like(q)
        for at in _chunks(q):
            torch.bmm(_probabilities(q[at], k[at]), v[at], out=out[at])
    return out.unflatten(0, (n, -1)).transpose(1, 2).flatten(2), None, p


def _attend_all_backward(
    g: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None,
    p: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients of `_attend_all` to dq, dk, dv. g, out: (n, S, heads·d)."""
    n, _, heads, d = q.shape
    g, out = g.unflatten(2, (heads, d)), out.unflatten(2, (heads, d))
    if lse is not None:
        g = g if g.stride(-1) == 1 else g.contiguous()
        run = dispatch("attend_backward", g)
        assert run is not None
        run(g, out, q, k, v, lse, dq, dk, dv)
        return
    of_q, of_k, of_v = dq, dk, dv
    q, k, v, g, dq, dk, dv = (_apart(t) for t in (q, k, v, g, dq, dk, dv))
    for at in [slice(None)] if p is not None else _chunks(q):
        seen = p if p is not None else _probabilities(q[at], k[at])
        torch.bmm(seen.transpose(1, 2), g[at], out=dv[at])
        ds = softmax_backward(seen, torch.bmm(g[at], v[at].transpose(1, 2)))
        _scaled(ds, k[at], d**-0.5, out=dq[at])
        _scaled(ds.transpose(1, 2), q[at], d**-0.5, out=dk[at])
    for into, flat in ((of_q, dq), (of_k, dk), (of_v, dv)):
        if into.data_ptr() != flat.data_ptr():  # for one token, `_apart` returns a view
            into.copy_(flat.unflatten(0, (n, heads)).transpose(1, 2))


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> Tensor:
        out, lse, p = _attend_all(q, k, v, keep)
        ctx.save_for_backward(q, k, v, out, lse, p)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, p = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in (q, k, v)]
        _attend_all_backward(g, out, q, k, v, lse, p, *gradients)
        return (*gradients, None)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v. q: (n, S, heads, d), k, v: (n, T, heads, d).

    The result is (n, S, heads·d). Probabilities are kept if all of them take at most KEPT_BYTES and there
    is no kernel."""
    n, S, heads, _ = q.shape
    keep = n * S * heads * k.shape[1] * q.element_size() <= KEPT_BYTES
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not (keep or _has_tiles(q)):
        return _over_all(q, k, v)
    out: Tensor = _Cross.apply(q, k, v, keep)
    return out


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, weight: Tensor | None, eps: float, turn: Tensor | None) -> Tensor:
        S, d = qkv.shape[1], qkv.shape[4]
        q, k, v = qkv.unbind(2)
        both = r = None
        if weight is not None or turn is not None:
            x = qkv[:, :, :2].permute(2, 0, 3, 1, 4).float()
            if weight is not None:
                r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(d).add_(eps).rsqrt_()
                x = (x * r).mul_(weight)
            x = x if turn is None else _rotate_pairs(x.contiguous(), turn)
            both = x.to(qkv.dtype).transpose(2, 3)
            q, k = both.unbind(0)
        out, lse, p = _attend_all(q, k, v, keep=KEPT_TOKENS * d >= S)
        ctx.save_for_backward(qkv, weight, turn, r, both, out, lse, p)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        qkv, weight, turn, r, both, out, lse, p = ctx.saved_tensors
        q, k, v = qkv.unbind(2)
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = dqkv.unbind(2)
        if both is None:
            _attend_all_backward(g, out, q, k, v, lse, p, dq, dk, dv)
            return dqkv, None, None, None
        q, k = both.unbind(0)
        d_both = torch.empty_like(both)  # gradient of the normed and rotated heads
        _attend_all_backward(g, out, q, k, v, lse, p, d_both[0], d_both[1], dv)
        dx = d_both.transpose(2, 3).float()
        dx = dx if turn is None else _rotate_pairs(dx.contiguous(), turn.conj())
        if weight is not None and r is not None:  # dx = r·(w⊙g − x̂·mean(w⊙g⊙x̂)), x̂ = r·x
            dx = dx.mul_(weight)
            x = qkv[:, :, :2].permute(2, 0, 3, 1, 4) * r
            mean = torch.linalg.vecdot(dx, x).unsqueeze(-1).div_(qkv.shape[-1])
            dx = dx.addcmul_(x, mean, value=-1).mul_(r)
        dqkv[:, :, :2] = dx.permute(1, 3, 0, 2, 4)
        return dqkv, None, None, None


def joint_attention(qkv: Tensor, weight: Tensor | None = None, eps: float = 1e-6, turn: Tensor | None = None) -> Tensor:
    """Return attention of tokens over themselves. qkv: (n, S, 3, heads, d).

    The result is (n, S, heads·d).
    weight: frozen w_q, w_k as (2, 1, 1, S or 1, d) float32, None without norms.
    turn: rotary positions (S, d/2) complex64, on neighboring pairs as in FLUX; None without rotation."""
    S = qkv.shape[1]
    if qkv.device.type != "cpu" or not (S * S * qkv.element_size() <= CHUNK_BYTES or _has_tiles(qkv)):
        return joint_attention_reference(qkv, weight, eps, turn)
    out: Tensor = _Joint.apply(qkv, weight, eps, turn)
    return out


def joint_attention_reference(
    qkv: Tensor, weight: Tensor | None = None, eps: float = 1e-6, turn: Tensor | None = None
) -> Tensor:
    """Compute `joint_attention` directly, with torch's operations."""
    q, k, v = qkv.unbind(2)
    if weight is not None or turn is not None:
        x = qkv[:, :, :2].permute(2, 0, 3, 1, 4).float()
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        x = x if turn is None else _rotate_pairs(x.contiguous(), turn)
        q, k = x.to(qkv.dtype).transpose(2, 3).unbind(0)
    return _over_all(q, k, v)


def _over_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v by torch, in the given dtype.

    (n, tokens, heads, d) → (n, S, heads·d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
