"""Attention of denoisers, where every token sees every other, as one autograd function that keeps little.

    q̂ = rope(w_q ⊙ q/rms(q))      k̂ = rope(w_k ⊙ k/rms(k))      o = softmax(q̂·k̂ᵀ/√d)·v      (norms, rotation: optional)

Kept for backward: q̂, k̂, v, with norms q and k as they came, and the probabilities where they are hardly more than
these. Else they are made again in backward: in tiles by the compiled kernel where there is one (half the time of
torch's flash attention on the CPU), or some heads at a time. References:
`joint_attention_reference`, and F.scaled_dot_product_attention for `attention`. Knows tensors, not modules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer import kernels

__all__ = ["MOST", "attention", "joint_attention", "joint_attention_reference"]

MOST = 64 << 20
"""Bytes of probabilities that one call of `attention` may keep."""

CHUNK = 8 << 20
"""Bytes of probabilities at one time where `joint_attention` does not keep them; a head that needs more is torch's,
unless there is a kernel, which needs no more for a thousand tokens than for ten."""


def _fits(q: Tensor, keys: int) -> bool:
    """q: (n, heads, S, d). Off the CPU torch's own attention is the fast one."""
    return q.device.type == "cpu" and q.shape[:-1].numel() * keys * q.element_size() <= MOST


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v. q: (n, heads, S, d), k, v: (n, heads, T, d) → (n, heads, S, d)."""
    if not _fits(q, k.shape[2]) or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    n, heads, S, d = q.shape
    flat_q, flat_k, flat_v = (t.reshape(n * heads, -1, d) for t in (q * d**-0.5, k, v))
    p = torch.softmax(torch.bmm(flat_q, flat_k.transpose(1, 2)), -1)
    return torch.bmm(p, flat_v).view(n, heads, S, d)


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


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(torch.bmm(q, k.transpose(1, 2)).mul_(q.shape[-1] ** -0.5), -1)


def _tiled(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor | None:
    """softmax(q·kᵀ/√d)·v into out, all (heads, tokens, d); log Σ exp of the scores (heads, S) float32, or None, and
    nothing done, where there is no kernel for these."""
    native = kernels.attention(q, k, v, out)
    if native is None:
        return None
    heads, S, d = q.shape
    lse = torch.empty(heads, S)
    at = [t.data_ptr() for t in (q, k, v, out, lse)]
    native.attend(*at, heads, S, k.shape[1], d, d**-0.5, torch.get_num_threads())
    return lse


def _tiled_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dot: Tensor, g: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Gradients of `_tiled` into dq, dk, dv. `dot`: (heads, S) float32, the products of out with its gradient g."""
    native = kernels.attention(q, k, v, g, dq, dk, dv)
    assert native is not None
    heads, S, d = q.shape
    at = [t.data_ptr() for t in (q, k, v, lse, dot, g, dq, dk, dv)]
    native.attend_backward(*at, heads, S, k.shape[1], d, d**-0.5, torch.get_num_threads())


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, weight: Tensor | None, eps: float, turn: Tensor | None) -> Tensor:
        n, S, _, heads, d = qkv.shape
        raw = qkv[:, :, :2].permute(2, 0, 3, 1, 4)
        x = raw if weight is None and turn is None else raw.float()
        r = None
        if weight is not None:
            r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(d).add_(eps).rsqrt_()
            x = (x * r).mul_(weight)
        x = x if turn is None else _turned(x.contiguous(), turn)
        q, k = x.to(qkv.dtype).reshape(2, n * heads, S, d).contiguous().unbind(0)
        v = qkv[:, :, 2].transpose(1, 2).reshape(n * heads, S, d).contiguous()
        p = lse = None
        if _keeps(S, d):
            p = _probabilities(q, k)
            out = torch.bmm(p, v)
        else:
            out = torch.empty_like(q)
            lse = _tiled(q, k, v, out)
            for at in [] if lse is not None else _chunks(q):
                torch.bmm(_probabilities(q[at], k[at]), v[at], out=out[at])
        out = out.view(n, heads, S, d).transpose(1, 2).reshape(n, S, heads * d)
        ctx.shape = qkv.shape
        kept = (qkv, None) if weight is not None else (None, v)  # v lies in qkv too
        ctx.save_for_backward(*kept, weight, turn, r, q, k, p, lse, None if lse is None else out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        qkv, v, weight, turn, r, q, k, p, lse, out = ctx.saved_tensors
        n, S, _, heads, d = ctx.shape
        v = qkv[:, :, 2].transpose(1, 2).reshape(n * heads, S, d).contiguous() if v is None else v
        dot = None if out is None else _dot(g, out, heads)
        g = g.view(n, S, heads, d).transpose(1, 2).reshape(n * heads, S, d).contiguous()
        dqkv = g.new_empty(ctx.shape)
        both, dv = q.new_empty(2, *q.shape), torch.empty_like(q)
        if lse is not None and dot is not None:
            _tiled_backward(q, k, v, lse, dot, g, both[0], both[1], dv)
        for at in [] if lse is not None else [slice(None)] if p is not None else _chunks(q):
            seen = p if p is not None else _probabilities(q[at], k[at])
            torch.bmm(seen.transpose(1, 2), g[at], out=dv[at])
            ds = torch._softmax_backward_data(torch.bmm(g[at], v[at].transpose(1, 2)), seen, -1, seen.dtype)
            ds = ds.mul_(d**-0.5)
            torch.bmm(ds, k[at], out=both[0, at])
            torch.bmm(ds.transpose(1, 2), q[at], out=both[1, at])
        dqkv[:, :, 2] = dv.view(n, heads, S, d).transpose(1, 2)
        both = both.view(2, n, heads, S, d)
        if weight is not None or turn is not None:
            dx = both.float()
            dx = dx if turn is None else _turned(dx, turn.conj())
            if weight is not None and r is not None:  # dx = r·(w⊙g − x̂·mean(w⊙g⊙x̂)), x̂ = r·x
                dx = dx.mul_(weight)
                x = qkv[:, :, :2].permute(2, 0, 3, 1, 4) * r
                mean = torch.linalg.vecdot(dx, x).unsqueeze(-1).div_(d)
                dx = dx.addcmul_(x, mean, value=-1).mul_(r)
            both = dx
        dqkv[:, :, :2] = both.permute(1, 3, 0, 2, 4)
        return dqkv, None, None, None


def _dot(g: Tensor, out: Tensor, heads: int) -> Tensor:
    """Σ g·out of every token and head. g, out: (n, S, heads·d) → (n·heads, S) float32."""
    n, S, _ = out.shape
    dot = torch.linalg.vecdot(g.float().view(n, S, heads, -1), out.float().view(n, S, heads, -1))
    return dot.transpose(1, 2).reshape(n * heads, S).contiguous()  # of one row, reshape makes a view


def joint_attention(qkv: Tensor, weight: Tensor | None = None, eps: float = 1e-6, turn: Tensor | None = None) -> Tensor:
    """Attention of tokens over themselves. qkv: (n, S, 3, heads, d) → (n, S, heads·d).

    `weight`: frozen w_q, w_k as (2, 1, 1, S or 1, d) float32, None without norms. `turn`: rotary positions (S, d/2)
    complex64, on neighbouring pairs as FLUX has them; None without."""
    S = qkv.shape[1]
    small = S * S * qkv.element_size() <= CHUNK or kernels.attention(qkv.new_empty(1, qkv.shape[-1])) is not None
    if qkv.device.type != "cpu" or not small:
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
