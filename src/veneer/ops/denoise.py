"""Attention of denoisers, where every token sees every other, as one autograd function that keeps little; and
`live_conv`, a convolution whose later input channels nothing trained comes before.

    q̂ = rope(w_q ⊙ q/rms(q))      k̂ = rope(w_k ⊙ k/rms(k))      o = softmax(q̂·k̂ᵀ/√d)·v      (norms, rotation: optional)

In tiles by the compiled kernel where there is one (half the time of torch's flash attention on the CPU): it reads and
writes heads where the projections have them, and keeps nothing but log Σ exp. Else through torch's products, where
probabilities are kept if they are hardly more than q, k and v, or made again in backward some heads at a time.
References: `joint_attention_reference`, and F.scaled_dot_product_attention for `attention`. Knows tensors, not modules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from veneer.ops.attention import softmax_backward
from veneer.ops.cpu import compiled

__all__ = ["MOST", "attention", "joint_attention", "joint_attention_reference", "live_conv"]

MOST = 64 << 20
"""Bytes of probabilities that one call of `attention` may keep."""

CHUNK = 8 << 20
"""Bytes of probabilities at one time where `joint_attention` does not keep them; a head that needs more is torch's,
unless there is a kernel, which needs no more for a thousand tokens than for ten."""


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbouring pairs of x, float32 (…, S, d), as complex numbers times turn: (S, d/2)."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _keeps(tokens: int, d: int) -> bool:
    """Whether probabilities are kept for backward: where they are hardly more than q, k and v themselves."""
    return tokens <= 8 * d


def _chunks(q: Tensor) -> list[slice]:
    """Heads that go together so that their probabilities stay small. q: (n·heads, S, d)."""
    step = max(1, CHUNK // (q.shape[1] ** 2 * q.element_size()))
    return [slice(i, i + step) for i in range(0, len(q), step)]


def _scaled(a: Tensor, b: Tensor, by: float, out: Tensor | None = None) -> Tensor:
    """by·a·b of batches of matrices, in one pass."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=by, out=out)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    scores = _scaled(q, k.transpose(1, 2), q.shape[-1] ** -0.5)
    native = compiled.usable("causal_softmax", scores)
    if native is None:
        return torch.softmax(scores, -1)
    keys = scores.shape[-1]  # as queries that are all the last of a causal row, they see every key
    native.causal_softmax(
        scores.data_ptr(), 1, 1, scores.numel() // keys, keys, keys - 1, 0, 0, torch.get_num_threads()
    )
    return scores


def _has_tiles(x: Tensor) -> bool:
    """Whether there is a kernel for heads of this dtype and last dimension."""
    return compiled.usable_attention(x.new_empty(1, x.shape[-1])) is not None


def _apart(x: Tensor) -> Tensor:
    """(n, S, heads, d) → (n·heads, S, d), contiguous: of one row, reshape alone makes a view."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softmax(q·kᵀ/√d)·v of (n, tokens, heads, d) as (n, S, heads·d); log Σ exp of the scores, (n, heads, S) float32,
    if made in tiles; else the probabilities if they are to be kept."""
    n, S, heads, d = q.shape
    native = compiled.usable_attention(q, k, v)
    if native is not None:
        out, lse = q.new_empty(n, S, heads, d), torch.empty(n, heads, S)
        pointers = [t.data_ptr() for t in (q, k, v, out, lse)]
        sizes = (n, heads, S, k.shape[1], d, d**-0.5, torch.get_num_threads())
        native.attend(*pointers, compiled.strides(q, k, v, out), *sizes)
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


def _attend_backward(
    g: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, p: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Gradients of `_attend` into dq, dk, dv. g, out: (n, S, heads·d)."""
    n, S, heads, d = q.shape
    g, out = g.unflatten(2, (heads, d)), out.unflatten(2, (heads, d))
    if lse is not None:
        g = g if g.stride(-1) == 1 else g.contiguous()
        native = compiled.usable_attention(g)
        assert native is not None
        tensors = (q, k, v, out, g, dq, dk, dv)
        pointers = [t.data_ptr() for t in (*tensors, lse)]
        sizes = (n, heads, S, k.shape[1], d, d**-0.5, torch.get_num_threads())
        native.attend_backward(*pointers, compiled.strides(*tensors), *sizes)
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
        into.copy_(flat.unflatten(0, (n, heads)).transpose(1, 2))


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> Tensor:
        out, lse, p = _attend(q, k, v, keep)
        ctx.save_for_backward(q, k, v, out, lse, p)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, p = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in (q, k, v)]
        _attend_backward(g, out, q, k, v, lse, p, *gradients)
        return (*gradients, None)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v. q: (n, S, heads, d), k, v: (n, T, heads, d) → (n, S, heads·d).

    Probabilities are kept where all of them take at most MOST, and there is no kernel."""
    n, S, heads, _ = q.shape
    keep = n * S * heads * k.shape[1] * q.element_size() <= MOST
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not (keep or _has_tiles(q)):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
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
            x = x if turn is None else _turned(x.contiguous(), turn)
            both = x.to(qkv.dtype).transpose(2, 3)
            q, k = both.unbind(0)
        out, lse, p = _attend(q, k, v, _keeps(S, d))
        ctx.save_for_backward(qkv, weight, turn, r, both, out, lse, p)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        qkv, weight, turn, r, both, out, lse, p = ctx.saved_tensors
        q, k, v = qkv.unbind(2)
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = dqkv.unbind(2)
        if both is None:
            _attend_backward(g, out, q, k, v, lse, p, dq, dk, dv)
            return dqkv, None, None, None
        q, k = both.unbind(0)
        d_both = torch.empty_like(both)  # of what was normed and turned
        _attend_backward(g, out, q, k, v, lse, p, d_both[0], d_both[1], dv)
        dx = d_both.transpose(2, 3).float()
        dx = dx if turn is None else _turned(dx.contiguous(), turn.conj())
        if weight is not None and r is not None:  # dx = r·(w⊙g − x̂·mean(w⊙g⊙x̂)), x̂ = r·x
            dx = dx.mul_(weight)
            x = qkv[:, :, :2].permute(2, 0, 3, 1, 4) * r
            mean = torch.linalg.vecdot(dx, x).unsqueeze(-1).div_(qkv.shape[-1])
            dx = dx.addcmul_(x, mean, value=-1).mul_(r)
        dqkv[:, :, :2] = dx.permute(1, 3, 0, 2, 4)
        return dqkv, None, None, None


def joint_attention(qkv: Tensor, weight: Tensor | None = None, eps: float = 1e-6, turn: Tensor | None = None) -> Tensor:
    """Attention of tokens over themselves. qkv: (n, S, 3, heads, d) → (n, S, heads·d).

    `weight`: frozen w_q, w_k as (2, 1, 1, S or 1, d) float32, None without norms. `turn`: rotary positions (S, d/2)
    complex64, on neighbouring pairs as FLUX has them; None without."""
    S = qkv.shape[1]
    if qkv.device.type != "cpu" or not (S * S * qkv.element_size() <= CHUNK or _has_tiles(qkv)):
        return joint_attention_reference(qkv, weight, eps, turn)
    out: Tensor = _Joint.apply(qkv, weight, eps, turn)
    return out


def joint_attention_reference(
    qkv: Tensor, weight: Tensor | None = None, eps: float = 1e-6, turn: Tensor | None = None
) -> Tensor:
    """The same line by line through torch's own operations."""
    n, S, _, heads, d = qkv.shape
    x = qkv[:, :, :2].permute(2, 0, 3, 1, 4).float()
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    x = x if turn is None else _turned(x.contiguous(), turn)
    q, k = x.to(qkv.dtype).unbind(0)
    out = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2))
    return out.transpose(1, 2).reshape(n, S, heads * d)


class _LiveConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], live: int
    ) -> Tensor:
        ctx.how = x.shape, weight[:, :live], padding, live
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        shape, weight, padding, live = ctx.how
        dx = g.new_zeros(shape)
        dx[:, :live] = conv2d_input((shape[0], live, *shape[2:]), weight, g, padding=padding)
        return dx, None, None, None, None


def live_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], live: int) -> Tensor:
    """F.conv2d(x, weight, bias, padding=padding) with frozen weights. The gradient of x is right for the first `live`
    of its channels and zero for the others, of which none is wanted: those products are not made."""
    out: Tensor = _LiveConv.apply(x, weight, bias, padding, live)
    return out
