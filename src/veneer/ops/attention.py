"""Attention: causal over packed rows, and full attention in denoisers.

    varlen_attention, rope_varlen_attention    o = softmax(scale·q·kᵀ + causal)·v inside each row    q: (N, heads, dim)
    with head norms                    q̂ = rope(w_q ⊙ q/rms(q)) and k̂ alike, as in Qwen 3 and Gemma 3
    joint_attention                    o = softmax(q̂·k̂ᵀ/√d)·v    q̂ = rope(w_q ⊙ q/rms(q)), k̂ alike; both optional
    cross_attention                    o = softmax(q·kᵀ/√d)·v over other tokens' keys

For packed rows, the compiled kernel (ops/cpu/tiles.c) saves qkv, the output and log Σ exp for backward.
Without the kernel, torch's F.scaled_dot_product_attention runs row by row. For denoisers, the compiled kernel
takes half the time of torch's flash attention on the CPU. For backward, the kernel saves only its inputs, its
output and log Σ exp. Without the kernel, probabilities are saved if they are hardly larger than q, k and v;
otherwise backward recomputes them for a few heads at a time. References: `varlen_attention_reference` and
`joint_attention_reference`. This module does not depend on models.
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
from veneer.ops.products import widened

# -- packed rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Rows that share tokens, for example completions of one prompt.

    Each of the N tokens is stored once, in the order in which the rows first use it. A token depends only on
    the tokens before it, so the shared tokens are a prefix, which is computed once.

    places: (Σ lengths,) int64, for each token of each row, its index among the N tokens.
    firsts: (N,), index of each token's first use among the rows' tokens.
    before: (N,), index of each token's predecessor; undefined for a row's first token."""

    places: Tensor
    firsts: Tensor
    before: Tensor

    @classmethod
    def from_indices(cls, places: Tensor) -> SharedRows:
        each = torch.arange(len(places), device=places.device)
        firsts = torch.full((int(places.max()) + 1,), len(places), device=places.device)
        firsts = firsts.scatter_reduce(0, places, each, "amin")
        return cls(places, firsts, places[firsts - 1])

    def sent(self, device: torch.device) -> SharedRows:
        return SharedRows(*(sent(t, device) for t in (self.places, self.firsts, self.before)))


class RowLayout:
    """The layout of packed rows for attention. N = Σ lengths is the number of tokens.

    idle: number of tokens after the last row that belong to no row. They attend to nothing, and their output
        is zero.
    keep: indices of the tokens whose output is needed at the end of a model, None for all. Layers can use
        `keep` to skip work.
    attended: the layers that have used this layout so far.
    starts: (rows + 1,) on the CPU, start of each row, followed by the end of the last row.
    ends: `starts` as int32 on the tokens' device.
    masks: flex attention's masks, keyed by window.
    shared: set for rows that share tokens. N then counts each shared token once. Only attention, which is
        cheap compared with the products, runs on full rows, with the layout `unshared`."""

    keep: Tensor | None = None

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        idle: int = 0,
        shared: SharedRows | None = None,
    ) -> None:
        self.lengths, self.idle = list(lengths), idle
        self.attended: set[int] = set()
        self.masks: dict[int | None, Any] = {}
        self.device = torch.device(device)
        self.starts = torch.tensor(list(itertools.accumulate(self.lengths, initial=0)), dtype=torch.int64)
        self.ends = sent(self.starts.int(), self.device)
        self.shared = None if shared is None else shared.sent(self.device)
        positions = torch.cat([torch.arange(n) for n in self.lengths])
        positions = positions if shared is None else positions[shared.firsts.cpu()]
        self.positions = sent(torch.cat([positions, torch.zeros(idle, dtype=torch.int64)]), self.device)
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @functools.cached_property
    def unshared(self) -> RowLayout:
        """The layout of the same full rows, with shared tokens repeated in each row."""
        return RowLayout(self.lengths, self.device)

    def tables(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return cos and sin as (N, dim/2).

        position_embeddings: cos and sin as (1, N, dim) with equal halves. The result is cached for all layers
        of a forward that pass the same tables."""
        key = id(position_embeddings[0])
        if key not in self._tables:
            half = position_embeddings[0].shape[-1] // 2
            cos, sin = (t[0, :, :half].contiguous() for t in position_embeddings)
            self._tables[key] = position_embeddings[0], cos, sin  # Keep the tensor alive, so that its id is not reused.
        return self._tables[key][1], self._tables[key][2]


class VarlenSettings(NamedTuple):
    """Settings for attention over packed rows.

    layout: the rows.
    scale: factor of the scores.
    window: number of tokens that a query attends to, including itself (None: all tokens up to itself).
    cap: scores become cap·tanh(score/cap); 0 disables the cap.
    sinks: (heads,), an extra score per head that takes a share of the softmax but adds nothing to the
        output."""

    layout: RowLayout
    scale: float
    window: int | None = None
    cap: float = 0.0
    sinks: Tensor | None = None


class _Tiled(torch.autograd.Function):
    """Autograd function for an implementation of "rope_varlen_attention".

    qkv: (N, heads + 2·kv, dim). cos and sin rotate q and k; None disables the rotation. Saves qkv, the output
    and log Σ exp for backward, but no probabilities."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, kv: int, settings: VarlenSettings
    ) -> Tensor:
        out, lse = run.forward(qkv, cos, sin, kv, settings)
        ctx.save_for_backward(qkv, cos, sin, out, lse)
        ctx.run, ctx.kv, ctx.settings = run, kv, settings
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        qkv, cos, sin, out, lse = ctx.saved_tensors
        d_qkv = ctx.run.backward(grad.contiguous(), out, lse, qkv, cos, sin, ctx.kv, ctx.settings)
        return None, d_qkv, None, None, None, None


class HeadNorms(NamedTuple):
    """RMS norms of each head of q and k, applied before rotation.

    weight: (2, dim), the frozen w_q and w_k."""

    weight: Tensor
    eps: float


def rope_varlen_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv: int, settings: VarlenSettings, norms: HeadNorms | None = None
) -> Tensor:
    """Return attention of the heads [q | k | v], with rotary positions in q and k.

    The cap and sinks of `settings` are not supported.

    qkv: (N, heads + 2·kv, dim) → (N, heads, dim).
    cos, sin: (N, dim/2).

    The compiled kernel saves qkv, the output and log Σ exp for backward. Without the kernel, torch's
    attention decides what is saved. With norms, q and k before the norm are saved too. Reference for norms:
    `normed_heads`."""
    layout = settings.layout
    if layout.shared is not None:
        places, unshared = layout.shared.places, settings._replace(layout=layout.unshared)

        def attend(shared_qkv: Tensor) -> Tensor:
            return rope_varlen_attention(shared_qkv, cos[places], sin[places], kv, unshared, norms)

        return _attend_unshared(attend, layout, qkv)
    if norms is not None:
        qkv = normed_heads(qkv, kv, norms)
    run = dispatch("rope_varlen_attention", qkv, cos, sin)
    if run is not None:
        tiled: Tensor = _Tiled.apply(run, qkv, cos, sin, kv, settings)
        return tiled
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv, kv, kv], dim=1)
    run = dispatch("rope", q, k, cos, sin)
    q, k = (rotate(q, cos, sin), rotate(k, cos, sin)) if run is None else run(q, k, cos, sin)
    return varlen_attention(q, k, v, settings)


def normed_heads(qkv: Tensor, kv: int, norms: HeadNorms) -> Tensor:
    """Return [w_q ⊙ q/rms(q) | w_k ⊙ k/rms(k) | v] of [q | k | v] (N, heads + 2·kv, dim)."""
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv, kv, kv], dim=1)
    q, k = (rms_norm(x, w, norms.eps) for x, w in zip((q, k), norms.weight, strict=True))
    return torch.cat([q, k, v], dim=1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, settings: VarlenSettings) -> Tensor:
    """Return causal attention of packed rows, without rotation.

    q: (N, heads, dim), k, v: (N, kv heads, dim) → (N, heads, dim)."""
    layout = settings.layout
    if layout.shared is not None:
        unshared = settings._replace(layout=layout.unshared)
        return _attend_unshared(lambda q, k, v: varlen_attention(q, k, v, unshared), layout, q, k, v)
    run = dispatch("varlen_attention", q, k, v, settings)
    if run is None and not settings.cap and settings.sinks is None and q.device.type == "cpu":
        qkv = torch.cat([q, k, v], 1)
        tiles = dispatch("rope_varlen_attention", qkv, None, None)
        if tiles is not None:
            tiled: Tensor = _Tiled.apply(tiles, qkv, None, None, k.shape[1], settings)
            return tiled
    q, k, v = (t[: len(t) - layout.idle] for t in (q, k, v))
    attended: Tensor = (run or varlen_attention_reference)(q, k, v, settings)
    return F.pad(attended, (0, 0, 0, 0, 0, layout.idle)) if layout.idle else attended


def _attend_unshared(attend: Callable[..., Tensor], layout: RowLayout, *parts: Tensor) -> Tensor:
    """Run attend(parts) on full rows: the shared tokens are repeated in each row.

    The output of a shared token is taken from its first row. The full rows exist only during the call, and
    backward recomputes them."""
    shared = layout.shared
    assert shared is not None

    def attend_unshared(*stored: Tensor) -> Tensor:
        out: Tensor = _IndexSelect.apply(attend(*(_IndexSelect.apply(x, shared.places) for x in stored)), shared.firsts)
        return out

    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        result: Tensor = torch.utils.checkpoint.checkpoint(
            attend_unshared, *parts, use_reentrant=False, preserve_rng_state=False
        )
    else:
        result = attend_unshared(*parts)
    return F.pad(result, (0, 0, 0, 0, 0, layout.idle)) if layout.idle else result


class _IndexSelect(torch.autograd.Function):
    """x[at], where an index can occur several times; gradients are summed in float32."""

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


def varlen_attention_reference(q: Tensor, k: Tensor, v: Tensor, settings: VarlenSettings) -> Tensor:
    """Compute `varlen_attention` with torch, one row at a time, without idle tokens."""
    dtype = q.dtype
    q, k, v = widened(q, k, v)
    rows = [t.transpose(0, 1).split(settings.layout.lengths, 1) for t in (q, k, v)]
    out = [_attend_row(a, b, c, settings) for a, b, c in zip(*rows, strict=True)]
    return torch.cat(out, 1).transpose(0, 1).to(dtype)


def _attend_row(q: Tensor, k: Tensor, v: Tensor, settings: VarlenSettings) -> Tensor:
    """Return causal attention of one row.

    q: (heads, n, dim), k, v: (kv heads, n, dim)."""
    _, scale, window, cap, sinks = settings
    heads, n, _ = q.shape
    position = torch.arange(n, device=q.device)
    distance = position[:, None] - position
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if not cap and sinks is None:
        mask = None if window is None or window >= n else visible
        grouped = heads != len(k)
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )[0]
    k, v = (t.repeat_interleave(heads // len(t), 0) for t in (k, v))
    scores = (q @ k.transpose(1, 2)) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, n, 1)], -1)
    return torch.softmax(scores, -1)[..., :n] @ v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to the halves of x (arXiv 2104.09864, Llama's layout).

    x: (N, heads, dim), cos, sin: (N, dim/2). y₁ = x₁·cos − x₂·sin, y₂ = x₂·cos + x₁·sin. This is the
        reference for the rotation inside `rope_varlen_attention`."""
    x1, x2 = x.split(cos.shape[-1], -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


# -- denoisers ---------------------------------------------------------------------------------------------------------

KEPT_BYTES = 64 << 20
"""Maximum bytes of probabilities that one call of `cross_attention` saves for backward."""

KEPT_TOKENS = 8
"""Factor that limits when `joint_attention` saves probabilities for backward.

They are saved for at most KEPT_TOKENS · d tokens, where d is the head size. Probabilities are then hardly
larger than q, k and v."""

CHUNK_BYTES = 8 << 20
"""Maximum bytes of probabilities that `joint_attention` computes at a time.

If a head needs more and the compiled kernel is not available, torch's attention is used. The kernel's memory
does not grow with the number of tokens."""


def _rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Multiply each pair of neighboring values of x, as a complex number, by `turn`.

    x: (…, S, d) float32, turn: (S, d/2) complex64."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _chunks(q: Tensor) -> list[slice]:
    """Split the heads into slices with at most CHUNK_BYTES of probabilities each.

    q: (n·heads, S, d)."""
    step = max(1, CHUNK_BYTES // (q.shape[1] ** 2 * q.element_size()))
    return [slice(i, i + step) for i in range(0, len(q), step)]


def _scaled(a: Tensor, b: Tensor, by: float, out: Tensor | None = None) -> Tensor:
    """Return by·a·b for batches of matrices, in one pass."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=by, out=out)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    scores = _scaled(q, k.transpose(1, 2), q.shape[-1] ** -0.5)
    run = dispatch("causal_softmax", scores)
    if run is None:
        return torch.softmax(scores, -1)
    keys = scores.shape[-1]  # Every query is the last token of its row, so it attends to every key.
    out: Tensor = run(scores, 1, 1, scores.numel() // keys, keys, keys - 1, 0, 0)
    return out


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """Return p ⊙ (dp − Σ p⊙dp); overwrites dp."""
    run = dispatch("softmax_backward", p, dp)
    out: Tensor = TORCH("torch._softmax_backward_data")(dp, p, -1, p.dtype) if run is None else run(p, dp)
    return out


def _has_tiles(x: Tensor) -> bool:
    """Return whether a compiled attention kernel supports this dtype and head size."""
    return dispatch("attend", x.new_empty(1, x.shape[-1])) is not None


def _separate_heads(x: Tensor) -> Tensor:
    """Return (n, S, heads, d) as contiguous (n·heads, S, d); a view if S is 1."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()


def _attend_all(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (softmax(q·kᵀ/√d)·v, log Σ exp or None, probabilities or None).

    q, k, v: (n, tokens, heads, d). The first result: (n, S, heads·d).

    The compiled kernel returns log Σ exp of the scores, (n, heads, S) float32. Without the kernel, `keep`
    determines whether the probabilities are returned."""
    n, S = q.shape[:2]
    run = dispatch("attend", q, k, v)
    if run is not None:
        out, lse = run(q, k, v)
        return out.view(n, S, -1), lse, None
    p, dtype = None, q.dtype
    q, k, v = widened(*(_separate_heads(t) for t in (q, k, v)))
    if keep:
        p = _probabilities(q, k)
        out = torch.bmm(p, v)
        p = p.to(dtype)
    else:
        out = torch.empty_like(q)
        for at in _chunks(q):
            torch.bmm(_probabilities(q[at], k[at]), v[at], out=out[at])
    return out.to(dtype).unflatten(0, (n, -1)).transpose(1, 2).flatten(2), None, p


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
    """Write the gradients of `_attend_all` to dq, dk and dv.

    g, out: (n, S, heads·d), the gradient of the output and the output."""
    n, _, heads, d = q.shape
    g, out = g.unflatten(2, (heads, d)), out.unflatten(2, (heads, d))
    if lse is not None:
        g = g if g.stride(-1) == 1 else g.contiguous()
        run = dispatch("attend_backward", g)
        assert run is not None
        run(g, out, q, k, v, lse, dq, dk, dv)
        return
    of_q, of_k, of_v = dq, dk, dv
    q, k, v, g, dq, dk, dv = widened(*(_separate_heads(t) for t in (q, k, v, g, dq, dk, dv)))
    for at in [slice(None)] if p is not None else _chunks(q):
        probabilities = p.to(q.dtype) if p is not None else _probabilities(q[at], k[at])
        torch.bmm(probabilities.transpose(1, 2), g[at], out=dv[at])
        ds = softmax_backward(probabilities, torch.bmm(g[at], v[at].transpose(1, 2)))
        _scaled(ds, k[at], d**-0.5, out=dq[at])
        _scaled(ds.transpose(1, 2), q[at], d**-0.5, out=dk[at])
    for into, flat in ((of_q, dq), (of_k, dk), (of_v, dv)):
        if into.data_ptr() != flat.data_ptr():  # for one token, `flat` is a view of `into`
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
    """Return softmax(q·kᵀ/√d)·v: (n, S, heads·d).

    q: (n, S, heads, d), k, v: (n, T, heads, d).

    Without a compiled kernel, probabilities are saved for backward if they take at most KEPT_BYTES."""
    n, S, heads, _ = q.shape
    keep = n * S * heads * k.shape[1] * q.element_size() <= KEPT_BYTES
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not (keep or _has_tiles(q)):
        return _full_attention(q, k, v)
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
        d_both = torch.empty_like(both)  # gradient of the normalized and rotated heads
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
    """Return self-attention of the tokens: (n, S, heads·d).

    qkv: (n, S, 3, heads, d).
    weight: (2, 1, 1, S or 1, d) float32, the frozen w_q and w_k; None without norms.
    turn: (S, d/2) complex64, rotary positions for neighboring pairs as in FLUX; None without rotation."""
    S = qkv.shape[1]
    if qkv.device.type != "cpu" or not (S * S * qkv.element_size() <= CHUNK_BYTES or _has_tiles(qkv)):
        return joint_attention_reference(qkv, weight, eps, turn)
    out: Tensor = _Joint.apply(qkv, weight, eps, turn)
    return out


def joint_attention_reference(
    qkv: Tensor, weight: Tensor | None = None, eps: float = 1e-6, turn: Tensor | None = None
) -> Tensor:
    """Compute `joint_attention` with torch operations."""
    q, k, v = qkv.unbind(2)
    if weight is not None or turn is not None:
        x = qkv[:, :, :2].permute(2, 0, 3, 1, 4).float()
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        x = x if turn is None else _rotate_pairs(x.contiguous(), turn)
        q, k = x.to(qkv.dtype).transpose(2, 3).unbind(0)
    return _full_attention(q, k, v)


def _full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v, computed with torch in the given dtype.

    q, k, v: (n, tokens, heads, d) → (n, S, heads·d)."""
    dtype = q.dtype
    q, k, v = widened(*(t.transpose(1, 2) for t in (q, k, v)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(dtype)
