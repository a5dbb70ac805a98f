"""Gated MLPs and activations that save only their inputs for backward.

    gated_mlp    y = down(act(gate(x)) ⊙ up(x))
    gated        act(gate) ⊙ up from [gate | up], and its gradients
    swiglu       silu(gate) ⊙ up from [gate | up]
    geglu        up ⊙ gelu(gate) from [up | gate]
    gelu_tanh    tanh approximation of gelu

The reference of each function is the same formula in torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.dispatch import dispatch
from veneer.ops.linear import (
    LinearMap,
    LinearOutput,
    linear_backward,
    linear_forward,
    low_rank_gradients,
    low_rank_tensors,
    scale_outputs,
)


def _activate(x: Tensor, act: str) -> Tensor:
    return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def gated(both: Tensor, act: str) -> Tensor:
    """Return act(gate) ⊙ up from [gate | up]: (N, 2f) → (N, f)."""
    run = dispatch(f"{act}_gate", both)
    if run is not None:
        h: Tensor = run(both)
        return h
    gate, up = both.chunk(2, dim=1)
    return _activate(gate, act).mul_(up)


def _gated_backward(dh: Tensor, both: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Return the gradients [d_gate | d_up], and the recomputed act(gate) ⊙ up."""
    run = dispatch(f"{act}_gate_backward", dh, both)
    if run is not None:
        gradients: tuple[Tensor, Tensor] = run(dh, both)
        return gradients
    d = torch.empty_like(both)
    gate, up = both.chunk(2, dim=1)
    d_gate, d_up = d.chunk(2, dim=1)
    return d, _gate_gradients(dh, gate, up, d_gate, d_up, act).mul_(up)


def _gate_gradients(dh: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, act: str) -> Tensor:
    """Write the gradients of act(gate) ⊙ up to d_gate and d_up; return act(gate)."""
    a = _activate(gate, act)
    torch.mul(a, dh, out=d_up)
    if act == "silu":
        d_gate.copy_(torch.ops.aten.silu_backward(dh * up, gate))
    else:
        d_gate.copy_(torch.ops.aten.gelu_backward(dh * up, gate, approximate="tanh" if act == "gelu_tanh" else "none"))
    return a


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return gated(both, "silu")

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        return _gated_backward(dh.contiguous(), both, "silu")[0]


def swiglu(both: Tensor) -> Tensor:
    """Return silu(gate) ⊙ up from [gate | up], (…, 2f) → (…, f).

    Saves only its input for backward."""
    h: Tensor = _Swiglu.apply(both.reshape(-1, both.shape[-1]).contiguous())
    return h.view(*both.shape[:-1], h.shape[-1])


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        run = dispatch("geglu", both)
        if run is None:
            up, gate = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2, dim=-1)
            return _activate(gate, "gelu").mul_(up).to(both.dtype)  # rounded once, as in the compiled kernel
        h: Tensor = run(both)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        dh = dh.contiguous()
        run = dispatch("geglu_backward", dh, both)
        d: Tensor = torch.empty_like(both) if run is None else run(dh, both)
        if run is None:
            wide = torch.promote_types(both.dtype, torch.float32)
            (up, gate), (d_up, d_gate) = both.to(wide).chunk(2, dim=-1), d.chunk(2, dim=-1)
            _gate_gradients(dh.to(wide), gate, up, d_gate, d_up, "gelu")
        return d


def geglu(both: Tensor) -> Tensor:
    """Return up ⊙ gelu(gate) from [up | gate] (diffusers' order), (…, 2f) → (…, f).

    Saves only its input for backward."""
    h: Tensor = _Geglu.apply(both.contiguous())
    return h


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        run = dispatch("gelu_tanh", x)
        y: Tensor = F.gelu(x, approximate="tanh") if run is None else run(x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g = g.contiguous()
        run = dispatch("gelu_tanh_backward", g, x)
        dx: Tensor = torch.ops.aten.gelu_backward(g, x, approximate="tanh") if run is None else run(g, x)
        return dx


def gelu_tanh(x: Tensor) -> Tensor:
    """Return F.gelu(x, approximate="tanh"), saving only x for backward."""
    y: Tensor = _GeluTanh.apply(x.contiguous())
    return y


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: LinearMap,
        down: LinearMap,
        act: str,
        scale: Tensor | None,
        scale_down: Tensor | None,
        *flat: Tensor,
    ) -> Tensor:
        first = linear_forward(x, gate_up)
        second = linear_forward(gated(first.y, act), down)
        # With a DoRA scale and no dropout, `plain`, the scale and the bias suffice to recompute [gate | up].
        again = scale is not None and not gate_up.dropout
        both = None if again else first.y
        ctx.save_for_backward(x, both, first.u, first.plain, scale, second.u, second.plain, scale_down, *flat)
        ctx.products, ctx.copies = (first.products, second.products), (gate_up.copies, down.copies)
        ctx.weights, ctx.bias, ctx.act = (gate_up.weight, down.weight), gate_up.bias, act
        return second.y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, both, u, plain, scale, u_down, plain_down, scale_down, *_ = ctx.saved_tensors
        first = LinearOutput(g, u, plain, ctx.products[0], ctx.copies[0])
        two = LinearOutput(g, u_down, plain_down, ctx.products[1], ctx.copies[1])
        dh, inner, du, d_scale_down = linear_backward(g.contiguous(), ctx.weights[1], two, scale_down, True)
        assert dh is not None
        d_both, h = _gated_backward(dh, scale_outputs(plain, scale, ctx.bias) if both is None else both, ctx.act)
        down_pairs = low_rank_gradients(two, inner, h, du)
        del h, dh, inner
        dx, inner, du, d_scale = linear_backward(d_both, ctx.weights[0], first, scale, ctx.needs_input_grad[0])
        return (dx, None, None, None, d_scale, d_scale_down, *low_rank_gradients(first, inner, x, du), *down_pairs)


def gated_mlp(x: Tensor, gate_up: LinearMap, down: LinearMap, act: str = "silu") -> Tensor:
    """Return y = down(act(gate(x)) ⊙ up(x)), x: (…, d) → (…, d).

    act: "silu", "gelu" or "gelu_tanh".
    gate_up: [gate; up] concatenated by rows.

    Saves x, gate(x) and up(x) for backward, which recomputes act(gate(x)) ⊙ up(x). Reference: the same
    formula with `linear`."""
    low_rank = (*low_rank_tensors(gate_up), *low_rank_tensors(down))
    inputs = (gate_up, down, act, gate_up.dora_scale, down.dora_scale, *low_rank)
    y: Tensor = _GatedMlp.apply(x.reshape(-1, x.shape[-1]), *inputs)
    return y.view(*x.shape[:-1], y.shape[-1])
