"""The fast paths of a training step: autograd functions that keep little and read memory few times.

    linears      y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ        one product for projections that share x, each with its own pair
    gated_mlp    y = down(act(gate(x)) ⊙ up(x))
    token_nll    −log softmax(h·Wᵀ)[target] of each token, never holding more than a chunk of logits

Each has its slow reference, named in its docstring and compared in tests/core/test_fused.py; attention and norms are
next door in core/attention.py and core/norms.py. None knows of modules, adapters by name, or models. The frozen weights
never get a gradient. A, B may be float32 beside 16-bit x and W: they are cast for the products, their gradients come
back in float32.
On the CPU in bfloat16 the element-wise parts go through veneer.kernels where those could be compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer import kernels
from veneer.core.dropout import Dropout

__all__ = [
    "Linears", "PairRows", "Projection", "gated", "gated_mlp", "geglu", "gelu_tanh", "joined", "linears",
    "token_nll",
]  # fmt: skip


class PairRows(NamedTuple):
    """A pair on rows first…last of a (possibly joined) weight. A: (rank, in), B: (last − first, rank)."""

    first: int
    last: int
    scale: float
    A: Tensor
    B: Tensor


class Linears(NamedTuple):
    """Projections of one x joined into one frozen weight (Σ out, in), with the pairs on their rows. `dropout`: of the x
    that the pairs see, one for all of them, as loralib's MergedLinear has it. `gain`: (Σ out,) float32, what DoRA
    multiplies each output by before the bias."""

    weight: Tensor
    bias: Tensor | None = None
    pairs: tuple[PairRows, ...] = ()
    dropout: float = 0.0
    gain: Tensor | None = None


class Projection(NamedTuple):
    """One frozen linear map with at most one pair. weight: (out, in), bias and gain: (out,), A: (rank, in), B: (out,
    rank). `origin`: A and B as they began, where what they began as is the base's own and is taken off again."""

    weight: Tensor
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    gain: Tensor | None = None
    origin: tuple[Tensor, Tensor] | None = None


def joined(parts: Sequence[Projection], weight: Tensor | None = None) -> Linears:
    """Projections of one x as one product. `weight`: their weights below one another, if they lie so already.

    Raises ValueError for pairs with different dropouts, which cannot share what they see of x."""
    dropouts = sorted({p.dropout for p in parts if p.A is not None}) or [0.0]
    if len(dropouts) > 1:
        raise ValueError(f"pairs with dropouts {dropouts} in one product")
    if weight is None:
        weight = parts[0].weight if len(parts) == 1 else torch.cat([p.weight for p in parts])
    bias = None
    if any(p.bias is not None for p in parts):
        bias = torch.cat([p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts])
    pairs, at = [], 0
    for p in parts:
        end = at + p.weight.shape[0]
        if p.A is not None and p.B is not None:
            A, B = p.A, p.B
            if p.origin is not None:  # in one product, where what is alike in both cancels before it is rounded
                A, B = torch.cat([A, p.origin[0]]), torch.cat([B, -p.origin[1]], 1)
            pairs.append(PairRows(at, end, p.scale, A, B))
        at = end
    gain = None
    if any(p.gain is not None for p in parts):
        ones = torch.ones(1, device=weight.device)
        gain = torch.cat([ones.expand(len(p.weight)) if p.gain is None else p.gain for p in parts])
    return Linears(weight, bias, tuple(pairs), dropouts[0], gain)


class _Thin:
    """All pairs of a `Linears`, cast and stacked: A (Σ rank, in) and the block-diagonal s·B (Σ out, Σ rank).

    u = x·Aᵀ and du = g·s·B read x and g once for all pairs. What would multiply by the zeros of s·B to no gain goes
    pair by pair (measured on two pairs of 1536 × 16: u·(s·B)ᵀ 0.87 against 0.60 ms, gᵀ·u 1.23 against 0.81)."""

    def __init__(self, linears: Linears, dtype: torch.dtype) -> None:
        pairs = linears.pairs
        self.scales = [p.scale for p in pairs]
        self.dtypes = [(p.A.dtype, p.B.dtype) for p in pairs]
        rows, at = linears.weight.shape[0], 0
        self.blocks: list[tuple[slice, slice]] = []
        for p in pairs:
            self.blocks.append((slice(p.first, p.last), slice(at, at + p.A.shape[0])))
            at += p.A.shape[0]
        if len(pairs) == 1 and pairs[0].last - pairs[0].first == rows:
            self.A, self.sB = pairs[0].A.to(dtype), (pairs[0].B * pairs[0].scale).to(dtype)
            return
        self.A = torch.cat([p.A for p in pairs]).to(dtype)
        self.sB = self.A.new_zeros(rows, at)
        for p, block in zip(pairs, self.blocks, strict=True):
            self.sB[block] = p.B * p.scale

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y += u·(s·B)ᵀ; u."""
        u = x @ self.A.t()
        for rows, columns in self.blocks:
            y[:, rows].addmm_(u[:, columns], self.sB[rows, columns].t())
        return u

    def through(self, g: Tensor, dx: Tensor | None) -> Tensor:
        """dx += du·A, if there is one; du."""
        du = g @ self.sB
        if dx is not None:
            dx.addmm_(du, self.A)
        return du

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        """[dA₁, dB₁, dA₂, …] from the output's gradient g: (N, Σ out) and du = g·s·B: (N, Σ rank)."""
        dA = du.t() @ x
        out = []
        for scale, (of_A, of_B), (rows, columns) in zip(self.scales, self.dtypes, self.blocks, strict=True):
            dB = (u[:, columns].t() @ g[:, rows]).t()
            out += [dA[columns].to(of_A), dB.to(of_B).mul_(scale)]
        return out


class _NativeThin:
    """The same in three compiled calls, which cast and stack for themselves; u and du have ranks padded to 16. On the
    few hundred tokens of a small picture dispatch of a dozen operations takes several times as long as they do."""

    def __init__(self, linears: Linears, library: ctypes.CDLL) -> None:
        pairs = linears.pairs
        self.library, self.count, self.factors = library, len(pairs), [(p.A, p.B) for p in pairs]
        self.table = (kernels.Pair * len(pairs))(
            *(kernels.Pair(p.A.data_ptr(), p.B.data_ptr(), p.first, p.last, len(p.A), p.scale) for p in pairs)
        )
        self.ranks = sum(-(-len(p.A) // 16) * 16 for p in pairs)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        u = x.new_empty(len(x), self.ranks)
        sizes = len(x), x.shape[1], y.shape[1], torch.get_num_threads()
        self.library.thin_add(self.table, self.count, x.data_ptr(), y.data_ptr(), u.data_ptr(), *sizes)
        return u

    def through(self, g: Tensor, dx: Tensor | None) -> Tensor:
        du = g.new_empty(len(g), self.ranks)
        pointers = g.data_ptr(), du.data_ptr(), None if dx is None else dx.data_ptr()
        sizes = len(g), self.factors[0][0].shape[1], g.shape[1], torch.get_num_threads()
        self.library.thin_through(self.table, self.count, *pointers, *sizes)
        return du

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        out = [torch.empty_like(t) for pair in self.factors for t in pair]
        dA, dB = ((ctypes.c_void_p * self.count)(*(t.data_ptr() for t in out[which::2])) for which in (0, 1))
        pointers = g.data_ptr(), x.data_ptr(), u.data_ptr(), du.data_ptr(), dA, dB
        sizes = len(g), x.shape[1], g.shape[1], torch.get_num_threads()
        self.library.thin_gradients(self.table, self.count, *pointers, *sizes)
        return out


SMALL = 1 << 18
"""Elements of x up to which thin products are worth compiled calls (1,024 × 80: 0.37 ms instead of 0.61 for three pairs
of rank 16; 4,096 × 640: 16.7 instead of 14.9)."""


class _Dropped:
    """Thin products that see x with some of its values dropped: the same ones in forward and backward."""

    def __init__(self, thin: _Thin | _NativeThin, p: float) -> None:
        self.thin, self.drop = thin, Dropout.drawn(p)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.thin.add(self.drop(x), y)

    def through(self, g: Tensor, dx: Tensor | None) -> Tensor:
        back = None if dx is None else torch.zeros_like(dx)
        du = self.thin.through(g, back)
        if dx is not None and back is not None:
            dx.add_(self.drop(back))
        return du

    def gradients(self, g: Tensor, x: Tensor, u: Tensor, du: Tensor) -> list[Tensor]:
        return self.thin.gradients(g, self.drop(x), u, du)


_AnyThin = _Thin | _NativeThin | _Dropped


def _thin(linears: Linears, x: Tensor, y: Tensor) -> _AnyThin:
    library = kernels.thin(x, y) if x.numel() <= SMALL else None
    fits = library is not None and all(
        t.dtype == torch.float32 and t.is_contiguous() and t.device == x.device and not p.first % 16 and not p.last % 16
        for p in linears.pairs
        for t in (p.A, p.B)
    )
    thin = _NativeThin(linears, library) if library is not None and fits else _Thin(linears, x.dtype)
    return _Dropped(thin, linears.dropout) if linears.dropout else thin


def _flat(linears: Linears) -> list[Tensor]:
    return [t for p in linears.pairs for t in (p.A, p.B)]


def _forward(x: Tensor, linears: Linears) -> tuple[Tensor, Tensor | None, _AnyThin | None]:
    """y before gain and its bias, and for backward u = x·Aᵀ and the thin factors, which small layers pay more to make
    again than to keep."""
    y = F.linear(x, linears.weight, linears.bias if linears.gain is None else None)
    if not linears.pairs:
        return y, None, None
    thin = _thin(linears, x, y)
    return y, thin.add(x, y), thin


def _gained(y: Tensor, linears: Linears) -> Tensor:
    """gain ⊙ y + b, rounded once: gains are near 1, where 16 bits are 1/256 apart."""
    gain, bias = linears.gain, linears.bias
    if gain is None:
        return y
    native = _gain_kernel(gain, y) if bias is None else _gain_kernel(gain, y, bias)
    if native is None:
        out = y * gain
        return (out if bias is None else out.add_(bias)).to(y.dtype)
    made = torch.empty_like(y)
    pointers = y.data_ptr(), gain.data_ptr(), None if bias is None else bias.data_ptr(), made.data_ptr()
    native.gained(*pointers, *y.shape, torch.get_num_threads())
    return made


def _gain_kernel(gain: Tensor, *tensors: Tensor) -> ctypes.CDLL | None:
    fits = gain.dtype == torch.float32 and gain.is_contiguous() and gain.device.type == "cpu"
    return kernels.usable(*tensors) if fits else None


def _gain_gradient(g: Tensor, y: Tensor | None, gain: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of what the gain multiplied, y, and of the gain."""
    if gain is None or y is None:
        return g, None
    native = _gain_kernel(gain, g, y)
    if native is None:
        return (g * gain).to(g.dtype), (g.to(gain.dtype) * y).sum(0)
    dy, d_gain = torch.empty_like(g), torch.empty_like(gain)
    pointers = (t.data_ptr() for t in (g, y, gain, dy, d_gain))
    native.gained_backward(*pointers, *g.shape, torch.get_num_threads())
    return dy, d_gain


def _input_gradient(
    g: Tensor, weight: Tensor, thin: _AnyThin | None, need_dx: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and du = g·s·B for the pairs' own gradients."""
    dx = g @ weight if need_dx else None
    return dx, None if thin is None else thin.through(g, dx)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: Linears, gain: Tensor | None, *flat: Tensor) -> Tensor:
        y, u, ctx.thin = _forward(x, joined)
        # A and B too: autograd then notices if they change before backward
        ctx.save_for_backward(x, u, None if gain is None else y, gain, *flat)
        ctx.weight = joined.weight
        return _gained(y, joined)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, u, y, gain, *_ = ctx.saved_tensors
        g, d_gain = _gain_gradient(g.contiguous(), y, gain)
        thin = ctx.thin
        dx, du = _input_gradient(g, ctx.weight, thin, ctx.needs_input_grad[0])
        pairs = thin.gradients(g, x, u, du) if thin is not None and du is not None else []
        return (dx, None, d_gain, *pairs)


def linears(x: Tensor, joined: Linears) -> Tensor:
    """y = x·Wᵀ + b, plus s·(x·Aᵀ)·Bᵀ on each pair's columns of y; with a gain, all but b times it.
    x: (…, in) → (…, Σ out).

    Keeps x and the thin x·Aᵀ, and where there is a gain what it multiplies. Reference: F.linear(x, W, b) with
    s·F.linear(F.linear(x, A), B) added to its columns, for a dropout of what the pairs see with Dropout's own mask."""
    y: Tensor = _Linears.apply(x.reshape(-1, x.shape[-1]), joined, joined.gain, *_flat(joined))
    return y.view(*x.shape[:-1], y.shape[-1])  # outside of the Function: callers may write into what they get


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Linears, down: Linears, act: str, gain: Tensor | None, gain_down: Tensor | None,
        *flat: Tensor,
    ) -> Tensor:  # fmt: skip
        both, u, ctx.thin = _forward(x, gate_up)
        y, u_down, ctx.thin_down = _forward(gated(_gained(both, gate_up), act), down)
        ctx.save_for_backward(x, both, u, u_down, None if gain_down is None else y, gain, gain_down, *flat)
        ctx.gate_up, ctx.down, ctx.act = gate_up._replace(gain=None), down.weight, act
        return _gained(y, down)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, plain, u, u_down, y, gain, gain_down, *_ = ctx.saved_tensors
        g, d_gain_down = _gain_gradient(g.contiguous(), y, gain_down)
        thin = ctx.thin_down
        dh, du = _input_gradient(g, ctx.down, thin, True)
        assert dh is not None
        both = _gained(plain, ctx.gate_up._replace(gain=gain))
        d_both, h = _gated_backward(dh, both, ctx.act)
        down_pairs = thin.gradients(g, h, u_down, du) if thin is not None and du is not None else []
        del h, dh, both
        d_both, d_gain = _gain_gradient(d_both, plain, gain)
        thin = ctx.thin
        dx, du = _input_gradient(d_both, ctx.gate_up.weight, thin, ctx.needs_input_grad[0])
        pairs = thin.gradients(d_both, x, u, du) if thin is not None and du is not None else []
        return (dx, None, None, None, d_gain, d_gain_down, *pairs, *down_pairs)


def _activate(x: Tensor, act: str) -> Tensor:
    return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def gated(both: Tensor, act: str) -> Tensor:
    """act(gate) ⊙ up from [gate | up]: (N, 2f) → (N, f)."""
    native = kernels.usable(both) if act == "silu" else None
    if native is not None:
        h = both.new_empty(both.shape[0], both.shape[1] // 2)
        native.silu_gate(both.data_ptr(), h.data_ptr(), *h.shape, torch.get_num_threads())
        return h
    gate, up = both.chunk(2, dim=1)
    return _activate(gate, act).mul_(up)


def _gated_backward(dh: Tensor, both: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """[d_gate | d_up] and act(gate) ⊙ up again."""
    native = kernels.usable(dh, both) if act == "silu" else None
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


def gated_mlp(x: Tensor, gate_up: Linears, down: Linears, act: str = "silu") -> Tensor:
    """y = down(act(gate(x)) ⊙ up(x)); act: "silu", "gelu" or "gelu_tanh". x: (…, d) → (…, d).

    `gate_up` is [gate; up] joined by rows. Keeps x, gate(x) and up(x); their product is made again in backward.
    Reference: the same line with `linears`."""
    given = gate_up, down, act, gate_up.gain, down.gain, *_flat(gate_up), *_flat(down)
    y: Tensor = _GatedMlp.apply(x.reshape(-1, x.shape[-1]), *given)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        native = kernels.usable(both)
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
        native = kernels.usable(dh, both)
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
        native = kernels.usable(x)
        if native is None:
            return F.gelu(x, approximate="tanh")
        y = torch.empty_like(x)
        native.gelu_tanh(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g = g.contiguous()
        native = kernels.usable(g, x)
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


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logits = hidden[part] @ weight.t()
            nll[part] = _row_nll_(logits, targets[part], grad is not None)
            if grad is not None:
                torch.mm(logits, weight, out=grad[part])
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return grad * g.to(grad.dtype)[:, None], None, None, None


def _row_nll_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """−log softmax at the targets, at least float32; with `gradient`, logits become softmax − onehot in place."""
    native = kernels.usable(logits)
    if native is not None:
        nll = torch.empty(len(logits), dtype=torch.float32)
        targets = targets.contiguous()
        pointers = (t.data_ptr() for t in (logits, targets, nll))
        native.token_nll(*pointers, *logits.shape, int(gradient), torch.get_num_threads())
        return nll
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    y = targets[:, None]
    nll = torch.logsumexp(wide, 1, keepdim=True) - wide.gather(1, y)
    if gradient:
        # the target's p − 1 comes from the wide value: rounding p near 1 to 16 bits first would lose all of it
        logits.copy_(torch.softmax(wide, 1).scatter_(1, y, torch.expm1(-nll)))
    return nll[:, 0]


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
    """−log softmax(hidden_i·Wᵀ)[target_i] of each i, (M,) float32. hidden: (M, d), weight: (vocabulary, d) frozen.

    The gradient is made in the forward pass, chunk by chunk, so that no more than chunk × vocabulary logits exist: that
    of token i is a row of its own, which the backward pass only has to scale by what it is given for i.
    Reference: F.cross_entropy((hidden @ W.T).float(), targets, reduction="none")."""
    out: Tensor = _TokenNll.apply(hidden, weight, targets, chunk)
    return out
