"""Attention of denoisers, where every token sees every other, as one autograd function that keeps little.

    q̂ = rope(w_q ⊙ q/rms(q))      k̂ = rope(w_k ⊙ k/rms(k))      o = softmax(q̂·k̂ᵀ/√d)·v      (norms, rotation: optional)

Kept for backward: q̂, k̂, v and the probabilities, and with norms q and k as they came, in their dtype. torch's flash
attention on the CPU keeps no probabilities, and its backward is five times its forward at the few hundred tokens of a
small picture; above `MOST` bytes of probabilities it is used all the same. References: `joint_attention_reference`, and
F.scaled_dot_product_attention for `attention`. Knows tensors, not modules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MOST", "attention", "joint_attention", "joint_attention_reference"]

MOST = 64 << 20
"""Bytes of probabilities that one call may keep."""


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
        q, k = x.to(qkv.dtype).reshape(2, n * heads, S, d).unbind(0)
        v = qkv[:, :, 2].transpose(1, 2).reshape(n * heads, S, d)
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(d**-0.5)
        p = torch.softmax(scores, -1)
        out = torch.bmm(p, v).view(n, heads, S, d).transpose(1, 2)
        ctx.shape = qkv.shape
        kept = (qkv, None) if weight is not None else (None, v)  # v lies in qkv too
        ctx.save_for_backward(*kept, weight, turn, r, q, k, p)
        return out.reshape(n, S, heads * d)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        qkv, v, weight, turn, r, q, k, p = ctx.saved_tensors
        n, S, _, heads, d = ctx.shape
        v = qkv[:, :, 2].transpose(1, 2).reshape(n * heads, S, d) if v is None else v
        g = g.view(n, S, heads, d).transpose(1, 2).reshape(n * heads, S, d)
        dqkv = g.new_empty(ctx.shape)
        dqkv[:, :, 2] = torch.bmm(p.transpose(1, 2), g).view(n, heads, S, d).transpose(1, 2)
        ds = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype).mul_(d**-0.5)
        both = torch.stack([torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)]).view(2, n, heads, S, d)
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


def joint_attention(qkv: Tensor, weight: Tensor | None = None, eps: float = 1e-6, turn: Tensor | None = None) -> Tensor:
    """Attention of tokens over themselves. qkv: (n, S, 3, heads, d) → (n, S, heads·d).

    `weight`: frozen w_q, w_k as (2, 1, 1, S or 1, d) float32, None without norms. `turn`: rotary positions (S, d/2)
    complex64, on neighbouring pairs as FLUX has them; None without."""
    n, S, _, heads, _d = qkv.shape
    if not _fits(qkv.new_empty(0).expand(n, heads, S, 0), S):
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
