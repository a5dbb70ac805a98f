"""The fast paths of a training step: autograd functions that keep little and read memory few times.

    linears      y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ        one product for projections that share x, each with its own pair
    gated_mlp    y = down(act(gate(x)) ⊙ up(x))
    token_nll    −log softmax(h·Wᵀ)[target] of each token, never holding more than a chunk of logits

Each has its slow reference, named in its docstring and compared in tests/ops/test_fused.py; attention, norms and
activations are next door, each in a file of its name. None knows of modules, adapters by name, or models. The frozen
weights never get a gradient. A, B may be float32 beside 16-bit x and W: they are cast for the products, their gradients
come back in float32.
On the CPU in bfloat16 the element-wise parts go through veneer.ops.cpu where those could be compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.activations import gated, gated_backward
from veneer.ops.cpu import compiled
from veneer.ops.dropout import Dropout
from veneer.ops.sizes import LOGITS_CHUNK, SMALL_INPUT

__all__ = [
    "Linears",
    "PairRows",
    "Projection",
    "gated_mlp",
    "joined",
    "linears",
    "token_nll",
]


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

    def __init__(self, linears: Linears, library: compiled.Kernels) -> None:
        pairs = linears.pairs
        self.library, self.count, self.factors = library, len(pairs), [(p.A, p.B) for p in pairs]
        self.table = (compiled.LowRankStruct * len(pairs))(
            *(compiled.LowRankStruct(p.A.data_ptr(), p.B.data_ptr(), p.first, p.last, len(p.A), p.scale) for p in pairs)
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


IGNORED = -100


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
    library = compiled.usable_low_rank(x, y) if x.numel() <= SMALL_INPUT else None
    fits = library is not None and all(
        t.dtype == torch.float32 and t.is_contiguous() and t.device == x.device and not p.first % 16 and not p.last % 16
        for p in linears.pairs
        for t in (p.A, p.B)
    )
    thin = _NativeThin(linears, library) if library is not None and fits else _Thin(linears, x.dtype)
    return _Dropped(thin, linears.dropout) if linears.dropout else thin


def _flat(linears: Linears) -> list[Tensor]:
    return [t for p in linears.pairs for t in (p.A, p.B)]


class _Made(NamedTuple):
    """`y`, and what its backward pass needs: u = x·Aᵀ, `plain`, what the gain multiplied, and the thin factors, which
    small layers pay more to make again than to keep."""

    y: Tensor
    u: Tensor | None = None
    plain: Tensor | None = None
    thin: _AnyThin | None = None


def _forward(x: Tensor, linears: Linears) -> _Made:
    W, b, gain = linears.weight, linears.bias, linears.gain
    if gain is None:
        y = F.linear(x, W, b)
        thin = _thin(linears, x, y) if linears.pairs else None
        return _Made(y, None if thin is None else thin.add(x, y), None, thin)
    if not linears.dropout:
        plain = F.linear(x, W)
        thin = _thin(linears, x, plain)
        u = thin.add(x, plain)
        return _Made(_gained(plain, gain, b), u, plain, thin)
    # PEFT's DoRA with dropout: x·Wᵀ + b + (gain − 1) ⊙ d·Wᵀ + gain ⊙ s·(d·Aᵀ)·Bᵀ, d what dropout leaves of x
    y = F.linear(x, W, b)
    thin = _thin(linears, x, y)
    assert isinstance(thin, _Dropped)
    left = thin.drop(x)
    plain, own = F.linear(left, W), torch.zeros_like(y)
    u = thin.thin.add(left, own)
    y = (plain * (gain - 1)).add_(own * gain).add_(y).to(y.dtype)
    return _Made(y, u, plain.add_(own), thin)


def _input_gradient(
    g: Tensor, weight: Tensor, made: _Made, gain: Tensor | None, need_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """dx, and for the pairs' own gradients that of what they are added to, du = that·s·B, and the gain's."""
    thin, plain = made.thin, made.plain
    if gain is None or plain is None or thin is None:
        dx = g @ weight if need_dx else None
        return dx, g, None if thin is None else thin.through(g, dx), None
    inner, d_gain = _gain_gradient(g, plain, gain)
    if not isinstance(thin, _Dropped):
        dx = inner @ weight if need_dx else None
        return dx, inner, thin.through(inner, dx), d_gain
    dx, back = (g @ weight, (inner - g) @ weight) if need_dx else (None, None)
    du = thin.thin.through(inner, back)
    if dx is not None and back is not None:
        dx.add_(thin.drop(back))
    return dx, inner, du, d_gain


def _gained(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """gain ⊙ y + b, rounded once: gains are near 1, where 16 bits are 1/256 apart."""
    native = _gain_kernel("gained", gain, y, *([] if bias is None else [bias]))
    if native is None:
        out = y * gain
        return (out if bias is None else out.add_(bias)).to(y.dtype)
    made = torch.empty_like(y)
    pointers = y.data_ptr(), gain.data_ptr(), None if bias is None else bias.data_ptr(), made.data_ptr()
    native.gained(*pointers, *y.shape, torch.get_num_threads())
    return made


def _gain_gradient(g: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of what the gain multiplied, y, and of the gain."""
    native = _gain_kernel("gained_backward", gain, g, y)
    if native is None:
        return (g * gain).to(g.dtype), (g.to(gain.dtype) * y).sum(0)
    dy, d_gain = torch.empty_like(g), torch.empty_like(gain)
    pointers = (t.data_ptr() for t in (g, y, gain, dy, d_gain))
    native.gained_backward(*pointers, *g.shape, torch.get_num_threads())
    return dy, d_gain


def _gain_kernel(kernel: str, gain: Tensor, *tensors: Tensor) -> compiled.Kernels | None:
    fits = gain.dtype == torch.float32 and gain.is_contiguous() and gain.device.type == "cpu"
    return compiled.usable(kernel, *tensors) if fits else None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: Linears, gain: Tensor | None, *flat: Tensor) -> Tensor:
        made = _forward(x, joined)
        # A and B too: autograd then notices if they change before backward
        ctx.save_for_backward(x, made.u, made.plain, gain, *flat)
        ctx.thin, ctx.weight = made.thin, joined.weight
        return made.y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, u, plain, gain, *_ = ctx.saved_tensors
        made, g = _Made(g, u, plain, ctx.thin), g.contiguous()
        dx, inner, du, d_gain = _input_gradient(g, ctx.weight, made, gain, ctx.needs_input_grad[0])
        return (dx, None, d_gain, *_pair_gradients(made, inner, x, du))


def _pair_gradients(made: _Made, g: Tensor, x: Tensor, du: Tensor | None) -> list[Tensor]:
    if made.thin is None or made.u is None or du is None:
        return []
    return made.thin.gradients(g, x, made.u, du)


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
        one = _forward(x, gate_up)
        two = _forward(gated(one.y, act), down)
        again = gain is not None and not gate_up.dropout  # [gate | up] is then a gain and a bias away from `plain`
        both = None if again else one.y
        ctx.save_for_backward(x, both, one.u, one.plain, gain, two.u, two.plain, gain_down, *flat)
        ctx.thin, ctx.weights, ctx.bias, ctx.act = (
            (one.thin, two.thin),
            (gate_up.weight, down.weight),
            gate_up.bias,
            act,
        )
        return two.y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, both, u, plain, gain, u_down, plain_down, gain_down, *_ = ctx.saved_tensors
        one, two = _Made(g, u, plain, ctx.thin[0]), _Made(g, u_down, plain_down, ctx.thin[1])
        dh, inner, du, d_gain_down = _input_gradient(g.contiguous(), ctx.weights[1], two, gain_down, True)
        assert dh is not None
        d_both, h = gated_backward(dh, _gained(plain, gain, ctx.bias) if both is None else both, ctx.act)
        down_pairs = _pair_gradients(two, inner, h, du)
        del h, dh, inner
        dx, inner, du, d_gain = _input_gradient(d_both, ctx.weights[0], one, gain, ctx.needs_input_grad[0])
        return (dx, None, None, None, d_gain, d_gain_down, *_pair_gradients(one, inner, x, du), *down_pairs)


def gated_mlp(x: Tensor, gate_up: Linears, down: Linears, act: str = "silu") -> Tensor:
    """y = down(act(gate(x)) ⊙ up(x)); act: "silu", "gelu" or "gelu_tanh". x: (…, d) → (…, d).

    `gate_up` is [gate; up] joined by rows. Keeps x, gate(x) and up(x); their product is made again in backward.
    Reference: the same line with `linears`."""
    given = gate_up, down, act, gate_up.gain, down.gain, *_flat(gate_up), *_flat(down)
    y: Tensor = _GatedMlp.apply(x.reshape(-1, x.shape[-1]), *given)
    return y.view(*x.shape[:-1], y.shape[-1])


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
    """−log softmax at the targets, at least float32; with `gradient`, logits become softmax − onehot in place. A target
    of −100 is none, as for F.cross_entropy: 0, and no gradient. Raises IndexError for any other that is no token."""
    targets = targets.to(torch.int64).contiguous()
    native = compiled.usable("token_nll", logits)
    if native is not None:
        nll = torch.empty(len(logits), dtype=torch.float32)
        pointers = (t.data_ptr() for t in (logits, targets, nll))
        native.token_nll(*pointers, *logits.shape, int(gradient), torch.get_num_threads())
        return nll
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = targets == IGNORED
    y = targets.masked_fill(ignored, 0)[:, None]
    if y.device.type == "cpu" and bool(((y < 0) | (y >= logits.shape[1])).any()):  # a GPU says so itself, later
        raise IndexError("token_nll: a target is no token of the vocabulary")
    nll = torch.logsumexp(wide, 1, keepdim=True) - wide.gather(1, y)
    if gradient:
        # the target's p − 1 comes from the wide value: rounding p near 1 to 16 bits first would lose all of it
        slope = torch.softmax(wide, 1).scatter_(1, y, torch.expm1(-nll))
        logits.copy_(slope.masked_fill_(ignored[:, None], 0))
    return nll[:, 0].masked_fill_(ignored, 0)


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = LOGITS_CHUNK) -> Tensor:
    """−log softmax(hidden_i·Wᵀ)[target_i] of each i, (M,) float32. hidden: (M, d), weight: (vocabulary, d) frozen.

    A target of −100 is none: 0, and no gradient. Raises IndexError for any other that is no token (on a GPU, an error
    of its own). The gradient is made in the forward pass, chunk by chunk, so that no more than chunk × vocabulary
    logits exist: that of token i is a row of its own, which the backward pass only has to scale by what it is given
    for i. Reference: F.cross_entropy((hidden @ W.T).float(), targets, reduction="none")."""
    out: Tensor = _TokenNll.apply(hidden, weight, targets, chunk)
    return out
