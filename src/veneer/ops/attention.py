"""Causal attention over rows that lie one after another, without padding in anything but the attention itself.

    o = softmax(scale·q·kᵀ + causal)·v    inside each row; no row sees another    q: (N, heads, dim)  k, v: (N, kv, dim)

Queries that share a key head are multiplied together (grouped-query attention without repeating keys), in blocks that
leave out the keys after them. The reference is torch's own F.scaled_dot_product_attention, row by row
(tests/ops/test_attention.py). Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.compat import TORCH
from veneer.ops.cpu import compiled
from veneer.ops.sizes import grouped_rows, key_ranges

__all__ = ["RowLayout", "attention", "rotary_attention", "rotate", "softmax_backward"]


@dataclass(frozen=True)
class _Group:
    """Rows attended to together, as `rows` × `length` places, shorter rows padded at their end.

    tokens: (real tokens,) their places in the flat order; slots: row·length + time of each."""

    rows: int
    length: int
    tokens: Tensor
    slots: Tensor

    @property
    def padded(self) -> bool:
        return len(self.tokens) < self.rows * self.length


class RowLayout:
    """How rows of the given lengths, lying one after another in N = Σ lengths tokens, are attended to.

    Rows of similar length go through together (a row is at most `waste` shorter than its group's longest); padding at a
    row's end is harmless under causality, since no real token looks at a later one, and its output is dropped.
    `step`: a group's length is rounded up to a multiple of it: rows of many lengths then make products of few shapes.
    `keep`: the tokens whose output is wanted at the end of a model, None for all; for whoever can use it.
    `attended`: which layers went by it so far."""

    keep: Tensor | None = None

    def __init__(
        self, lengths: Sequence[int], device: torch.device | str = "cpu", waste: float = 0.25, step: int = 1
    ) -> None:
        self.lengths = list(lengths)
        self.attended: set[int] = set()
        starts = [0]
        for n in self.lengths:
            starts.append(starts[-1] + n)
        self.total = starts[-1]
        self.positions = torch.cat([torch.arange(n, device=device) for n in self.lengths])
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None
        self.groups: list[_Group] = []
        for length, taken in grouped_rows(self.lengths, waste=waste, step=step):
            tokens = torch.cat([torch.arange(starts[i], starts[i + 1], device=device) for i in taken])
            slots = torch.cat(
                [torch.arange(self.lengths[i], device=device) + at * length for at, i in enumerate(taken)]
            )
            self.groups.append(_Group(len(taken), length, tokens, slots))

    def tables(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin of (1, N, dim) whose halves are equal, as (N, dim/2); made once for all layers of a forward."""
        if self._tables is None or self._tables[0] is not position_embeddings[0]:
            half = position_embeddings[0].shape[-1] // 2
            cos, sin = (t[0, :, :half].contiguous() for t in position_embeddings)
            self._tables = position_embeddings[0], cos, sin
        return self._tables[1], self._tables[2]


def _gather(x: Tensor, group: _Group, kv: int, scale: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """(N, heads, dim) → (rows·kv, length·heads/kv, dim), turned by +θ and scaled; padding is zero.

    Time-major, so that a block of queries is a contiguous range of rows of the product."""
    heads, dim = x.shape[1], x.shape[2]
    per = heads // kv
    shape = (group.rows * kv, group.length * per, dim)
    native = _native("gather_heads", x, cos, sin)
    if native is not None:
        out = x.new_zeros(shape) if group.padded else x.new_empty(shape)
        _heads(native.gather_heads, x, x, cos, sin, group, kv, scale, out)
        return out
    if cos is not None and sin is not None:
        x = _rotated(x, cos, sin, 1.0)
    out = x.new_zeros(group.rows * group.length, heads, dim)
    out[group.slots] = x[group.tokens] * scale
    return out.view(group.rows, group.length, kv, per, dim).transpose(1, 2).reshape(shape)


def _scatter(
    g: Tensor, out: Tensor, group: _Group, kv: int, scale: float, cos: Tensor | None = None, sin: Tensor | None = None
) -> None:
    """The transpose of `_gather`, into the group's tokens of out: (N, heads, dim)."""
    heads, dim = out.shape[1], out.shape[2]
    native = _native("scatter_heads", out, cos, sin)
    if native is not None:
        _heads(native.scatter_heads, g, out, cos, sin, group, kv, scale, out)
        return
    flat = g.view(group.rows, kv, group.length, heads // kv, dim).transpose(1, 2).reshape(-1, heads, dim)
    part = flat[group.slots] * scale
    if cos is not None and sin is not None:
        part = _rotated(part, cos[group.tokens], sin[group.tokens], -1.0)
    out[group.tokens] = part


def _native(kernel: str, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Any:
    """The kernels, if they have this one, x is bfloat16 with contiguous heads (its tokens may be strided) and the
    tables are contiguous."""
    tables = [t for t in (cos, sin) if t is not None]
    heads_lie_flat = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.dtype == torch.bfloat16
    return compiled.usable(kernel, *tables, x[:1].contiguous()) if heads_lie_flat and x.device.type == "cpu" else None


def _heads(
    kernel: Any,
    x: Tensor,
    flat: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    group: _Group,
    kv: int,
    scale: float,
    out: Tensor,
) -> None:
    """Call gather_heads or scatter_heads; `flat` is whichever of x and out has the shape (N, heads, dim)."""
    heads, dim = flat.shape[1], flat.shape[2]
    kernel(
        x.data_ptr(),
        flat.stride(0),
        None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(),
        group.tokens.data_ptr(),
        group.slots.data_ptr(),
        len(group.tokens),
        group.length,
        kv,
        heads // kv,
        dim,
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _softmax_(scores: Tensor, per: int, q0: int, q1: int, k0: int, window: int | None) -> Tensor:
    """Softmax over those of the keys k0 … q1 that each of the queries q0 … q1 may see.

    scores: (b, (q1−q0)·per, q1−k0), spent."""
    native = compiled.usable("causal_softmax", scores)
    if native is not None:
        native.causal_softmax(
            scores.data_ptr(), scores.shape[0], q1 - q0, per, q1 - k0, q0, k0, window or 0, torch.get_num_threads()
        )
        return scores
    view = scores.view(-1, q1 - q0, per, q1 - k0)
    q = torch.arange(q0, q1, device=scores.device)[:, None, None]
    k = torch.arange(k0, q1, device=scores.device)
    hidden = k > q if window is None else (k > q) | (k <= q - window)
    return torch.softmax(view.masked_fill_(hidden, -math.inf), -1).view_as(scores)


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """p ⊙ (dp − Σ p⊙dp); dp is spent."""
    native = compiled.usable("softmax_backward", p, dp)
    if native is not None:
        rows = p.shape[0] * p.shape[1]
        native.softmax_backward(p.data_ptr(), dp.data_ptr(), rows, p.shape[2], torch.get_num_threads())
        return dp
    out: Tensor = TORCH("torch._softmax_backward_data")(dp, p, -1, p.dtype)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, group: _Group, per: int, window: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Output and probabilities of one group in the gathered layout."""
    out = torch.empty_like(q)
    probs = []
    for q0, q1, k0 in key_ranges(group.length, window):
        part = slice(q0 * per, q1 * per)
        p = _softmax_(q[:, part] @ k[:, k0:q1].transpose(1, 2), per, q0, q1, k0, window)
        torch.bmm(p, v[:, k0:q1], out=out[:, part])
        probs.append(p)
    return out, probs


def _attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, probs: list[Tensor], group: _Group, per: int, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (q0, q1, k0), p in zip(key_ranges(group.length, window), probs, strict=True):
        part = slice(q0 * per, q1 * per)
        dv[:, k0:q1].baddbmm_(p.transpose(1, 2), g[:, part])
        ds = softmax_backward(p, g[:, part] @ v[:, k0:q1].transpose(1, 2))
        torch.bmm(ds, k[:, k0:q1], out=dq[:, part])
        dk[:, k0:q1].baddbmm_(ds.transpose(1, 2), q[:, part])
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    """qkv: (N, heads + 2·kv, dim), the three kinds of heads side by side; cos, sin turn q and k, None leaves them."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        kv: int,
        layout: RowLayout,
        scale: float,
        window: int | None,
    ) -> Tensor:
        heads = qkv.shape[1] - 2 * kv
        q, k, v = qkv.split([heads, kv, kv], dim=1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        saved: list[Tensor] = []
        for group in layout.groups:
            qg = _gather(q, group, kv, scale, cos, sin)
            kg = _gather(k, group, kv, 1.0, cos, sin)
            vg = _gather(v, group, kv, 1.0, None, None)
            og, probs = _attend(qg, kg, vg, group, heads // kv, window)
            _scatter(og, out, group, kv, 1.0)
            saved += [qg, kg, vg, *probs]
        ctx.save_for_backward(cos, sin, *saved)
        ctx.kv, ctx.layout, ctx.scale, ctx.window, ctx.heads = kv, layout, scale, window, heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kv, heads = ctx.kv, ctx.heads
        cos, sin, *saved = ctx.saved_tensors
        grad = grad.contiguous()
        d_qkv = grad.new_empty(grad.shape[0], heads + 2 * kv, grad.shape[2])
        dq, dk, dv = d_qkv.split([heads, kv, kv], dim=1)
        for group in ctx.layout.groups:
            blocks = len(key_ranges(group.length, ctx.window))
            (qg, kg, vg, *probs), saved = saved[: 3 + blocks], saved[3 + blocks :]
            g = _gather(grad, group, kv, 1.0, None, None)
            dqg, dkg, dvg = _attend_backward(g, qg, kg, vg, probs, group, heads // kv, ctx.window)
            _scatter(dqg, dq, group, kv, ctx.scale, cos, sin)
            _scatter(dkg, dk, group, kv, 1.0, cos, sin)
            _scatter(dvg, dv, group, kv, 1.0)
        return d_qkv, None, None, None, None, None, None


def _sdpa(qkv: Tensor, kv: int, layout: RowLayout, scale: float, window: int | None) -> Tensor:
    """The same through torch's fused attention, which is the fast one on a GPU (flash attention for 16-bit heads)."""
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


def rotary_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv: int, layout: RowLayout, scale: float, window: int | None = None
) -> Tensor:
    """Attention of [q | k | v] heads with rotary positions in q and k. qkv: (N, heads + 2·kv, dim) → (N, heads, dim).

    cos, sin: (N, dim/2). `window`: a query sees itself and the window − 1 tokens before it; None: all before it.
    Keeps the turned q, k, v and the probabilities in their dtype; off the CPU it is torch's fused attention."""
    if qkv.device.type != "cpu":
        q, k, v = qkv.split([qkv.shape[1] - 2 * kv, kv, kv], dim=1)
        turned = torch.cat([_rotated(q, cos, sin, 1.0), _rotated(k, cos, sin, 1.0), v], dim=1)
        return _sdpa(turned, kv, layout, scale, window)
    out: Tensor = _Attention.apply(qkv, cos, sin, kv, layout, scale, window)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float, window: int | None = None) -> Tensor:
    """The same without rotation. q: (N, heads, dim), k, v: (N, kv heads, dim) → (N, heads, dim)."""
    qkv = torch.cat([q, k, v], 1)
    if qkv.device.type != "cpu":
        return _sdpa(qkv, k.shape[1], layout, scale, window)
    out: Tensor = _Attention.apply(qkv, None, None, k.shape[1], layout, scale, window)
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = cos.shape[-1]
    x1, x2 = x[..., :half], x[..., half:]
    c, s = cos[:, None], sin[:, None] * sign
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in halves (arXiv 2104.09864 as Llama lays it out). x: (N, heads, dim), cos, sin: (N, dim/2).

    y₁ = x₁·cos − x₂·sin, y₂ = x₂·cos + x₁·sin. The reference for what `rotary_attention` does on the way."""
    return _rotated(x, cos, sin, 1.0)
