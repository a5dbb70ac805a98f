"""Activations of a training step that keep what they are given and nothing else.

    gated        act(gate) ⊙ up from [gate | up], and its gradients
    geglu        up ⊙ gelu(gate) from [up | gate]
    gelu_tanh    gelu by tanh

As ops/fused.py has it: on the CPU in bfloat16 they go through veneer.ops.cpu where those could be compiled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.cpu import compiled

__all__ = ["gated", "gated_backward", "geglu", "gelu_tanh"]


def _activate(x: Tensor, act: str) -> Tensor:
    return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def gated(both: Tensor, act: str) -> Tensor:
    """act(gate) ⊙ up from [gate | up]: (N, 2f) → (N, f)."""
    native = compiled.usable("silu_gate", both) if act == "silu" else None
    if native is not None:
        h = both.new_empty(both.shape[0], both.shape[1] // 2)
        native.silu_gate(both.data_ptr(), h.data_ptr(), *h.shape, torch.get_num_threads())
        return h
    gate, up = both.chunk(2, dim=1)
    return _activate(gate, act).mul_(up)


def gated_backward(dh: Tensor, both: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """[d_gate | d_up] and act(gate) ⊙ up again."""
    native = compiled.usable("silu_gate_backward", dh, both) if act == "silu" else None
    d = torch.empty_like(both)
    if native is not None:
        h = torch.empty_like(dh)
        threads = torch.get_num_threads()
        native.silu_gate_backward(dh.data_ptr(), both.data_ptr(), d.data_ptr(), h.data_ptr(), *h.shape, threads)
        return d, h
    gate, up = both.chunk(2, dim=1)
    d_gate, d_up = d.chunk(2, dim=1)
    return d, _gate_gradients(dh, gate, up, d_gate, d_up, act).mul_(up)


def _gate_gradients(dh: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, act: str) -> Tensor:
    """The gradients of act(gate) ⊙ up into d_gate and d_up; act(gate) again."""
    a = _activate(gate, act)
    torch.mul(a, dh, out=d_up)
    if act == "silu":
        d_gate.copy_(torch.ops.aten.silu_backward(dh * up, gate))
    else:
        d_gate.copy_(torch.ops.aten.gelu_backward(dh * up, gate, approximate="tanh" if act == "gelu_tanh" else "none"))
    return a


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        native = compiled.usable("geglu", both)
        if native is None:
            up, gate = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2, dim=-1)
            return _activate(gate, "gelu").mul_(up).to(both.dtype)  # rounded once, as the compiled one is
        h = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
        f = h.shape[-1]
        native.geglu(both.data_ptr(), h.data_ptr(), h.numel() // f, f, torch.get_num_threads())
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        dh = dh.contiguous()
        d = torch.empty_like(both)
        native = compiled.usable("geglu_backward", dh, both)
        if native is None:
            wide = torch.promote_types(both.dtype, torch.float32)
            (up, gate), (d_up, d_gate) = both.to(wide).chunk(2, dim=-1), d.chunk(2, dim=-1)
            _gate_gradients(dh.to(wide), gate, up, d_gate, d_up, "gelu")
            return d
        f = dh.shape[-1]
        native.geglu_backward(dh.data_ptr(), both.data_ptr(), d.data_ptr(), dh.numel() // f, f, torch.get_num_threads())
        return d


def geglu(both: Tensor) -> Tensor:
    """up ⊙ gelu(gate) from [up | gate], as diffusers' GEGLU lays them. (…, 2f) → (…, f). Keeps what it is given."""
    h: Tensor = _Geglu.apply(both.contiguous())
    return h


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        native = compiled.usable("gelu_tanh", x)
        if native is None:
            return F.gelu(x, approximate="tanh")
        y = torch.empty_like(x)
        native.gelu_tanh(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g = g.contiguous()
        native = compiled.usable("gelu_tanh_backward", g, x)
        if native is None:
            out: Tensor = torch.ops.aten.gelu_backward(g, x, approximate="tanh")
            return out
        dx = torch.empty_like(x)
        native.gelu_tanh_backward(g.data_ptr(), x.data_ptr(), dx.data_ptr(), x.numel(), torch.get_num_threads())
        return dx


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh"), keeping x."""
    y: Tensor = _GeluTanh.apply(x.contiguous())
    return y
