"""Every compiled kernel beside its formula in torch, float64 where it can be, on the processor that is to run it.

Run once for a build, in a process of its own (build.py), so that a kernel that ends the process ends that one. Each
check calls its kernel with two threads, on sizes that no vector's length divides, and what it gives is held against the
formula element by element; results are made between two margins that must be as they were afterwards.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CHECKS", "Bench", "Same", "check", "main", "wrong"]

THREADS = 2
BF16 = torch.bfloat16


class Same(NamedTuple):
    """Two results that have to be the same: |got − want| ≤ far + near·|want|, element by element. The defaults leave
    what one rounding to bfloat16 takes, and the sums before it."""

    got: Tensor
    want: Tensor
    near: float = 2**-7
    far: float = 1e-3

    def holds(self) -> bool:
        got, want = self.got.double(), self.want.double()
        return got.shape == want.shape and bool(((got - want).abs() <= self.far + self.near * want.abs()).all())


class Bench:
    """The kernels, numbers for them, and room for what they make."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self._generator = torch.Generator().manual_seed(0)
        self._margins: list[Tensor] = []

    def normal(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype)

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(dtype)

    def room(self, *shape: int, dtype: torch.dtype = BF16, like: Tensor | None = None) -> Tensor:
        """A tensor between margins: of a pattern that no result is likely to have, or with the values of `like`."""
        shape, dtype = (tuple(like.shape), like.dtype) if like is not None else (shape, dtype)
        margin, size = 256, math.prod(shape) * dtype.itemsize
        flat = torch.full((size + 2 * margin,), 0xA5, dtype=torch.uint8)
        self._margins += [flat[:margin], flat[margin + size :]]
        inside = flat[margin : margin + size].view(dtype).view(shape)
        return inside if like is None else inside.copy_(like)

    def kept_margins(self) -> bool:
        return all(bool((m == 0xA5).all()) for m in self._margins)


Check = Callable[[Bench], Iterable[Same]]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    def put(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return put


def wrong(library: Any, name: str) -> str:
    """What is wrong with the kernel `name`; "" where nothing is."""
    bench = Bench(library)
    try:
        results = [same.holds() for same in CHECKS[name](bench)]  # all of them: each may write where it should not
    except (MemoryError, IndexError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if not bench.kept_margins():
        return "writes outside of its result"
    return "" if all(results) else "disagrees with torch on this machine"


def main(arguments: list[str]) -> None:
    """PATH SKIPPED…: a line of JSON before and after the check of each kernel that is there."""
    from veneer.ops.cpu import (
        bound,
        selftest_products,  # noqa: F401  # the second puts its checks beside these
    )

    path, *skipped = arguments
    library = bound(path)
    for name in CHECKS:
        if name not in skipped and hasattr(library, name):
            print(json.dumps({"begins": name}), flush=True)
            print(json.dumps({"ended": name, "wrong": wrong(library, name)}), flush=True)


def at(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def gradient(made: Tensor, given: Tensor, g: Tensor) -> Tensor:
    return torch.autograd.grad(made, given, g.double())[0]


# -- a training step ---------------------------------------------------------------------------------------------------


@check("use_threads")
def _use_threads(o: Bench) -> Iterator[Same]:
    """Whether torch and the kernels have one OpenMP."""
    before = torch.get_num_threads()
    o.library.use_threads(3)
    now = torch.get_num_threads()
    o.library.use_threads(before)
    yield Same(torch.tensor([now, torch.get_num_threads()]), torch.tensor([3, before]), 0, 0)


@check("stay")
def _stay(o: Bench) -> Iterator[Same]:
    """Where the calling thread may run; both are let go again."""
    if not hasattr(os, "sched_getaffinity"):  # nothing is done there
        return
    before = sorted(os.sched_getaffinity(0))
    for processors in (before[-1:], before):
        o.library.stay((ctypes.c_int * len(processors))(*processors), len(processors), THREADS)
        yield Same(torch.tensor(sorted(os.sched_getaffinity(0)), dtype=torch.int64), torch.tensor(processors), 0, 0)


@check("meet_asleep")
def _meet_asleep(o: Bench) -> Iterator[Same]:
    before = torch.full((3,), -1, dtype=torch.int32)
    for asleep, was in ((1, before[0:]), (1, before[1:]), (0, before[2:])):
        o.library.meet_asleep(asleep, was.data_ptr())
    yield Same(before[1:], torch.tensor([1, 1], dtype=torch.int32), 0, 0)


@check("rms_norm")
def _rms_norm(o: Bench) -> Iterator[Same]:
    x, w, y = o.normal(7, 74), o.normal(74), o.room(7, 74)
    o.library.rms_norm(*at(x, w, y), 7, 74, 1e-5, THREADS)
    yield Same(y, F.rms_norm(x.double(), (74,), w.double(), 1e-5))


@check("rms_norm_backward")
def _rms_norm_backward(o: Bench) -> Iterator[Same]:
    g, x, w, dx = o.normal(7, 74), o.normal(7, 74), o.normal(74), o.room(7, 74)
    o.library.rms_norm_backward(*at(g, x, w, dx), 7, 74, 1e-5, THREADS)
    xd = x.double().requires_grad_()
    yield Same(dx, gradient(F.rms_norm(xd, (74,), w.double(), 1e-5), xd, g))


def _norm_silu(x: Tensor, shift: Tensor | None, w: Tensor, b: Tensor) -> Tensor:
    x = x if shift is None else x + shift.double()[..., None]
    return F.silu(F.group_norm(x, 3, w.double(), b.double(), 1e-5))


@check("norm_silu")
def _norm_silu_forward(o: Bench) -> Iterator[Same]:
    x, w, b = o.normal(2, 6, 37), o.normal(6), o.normal(6)
    for shift in (None, o.normal(2, 6)):
        y = o.room(2, 6, 37)
        o.library.norm_silu(*at(x, shift, w, b, y), 2, 3, 2, 37, 1e-5, THREADS)
        yield Same(y, _norm_silu(x.double(), shift, w, b))


@check("norm_silu_backward")
def _norm_silu_backward(o: Bench) -> Iterator[Same]:
    g, x, w, b = o.normal(2, 6, 37), o.normal(2, 6, 37), o.normal(6), o.normal(6)
    for shift in (None, o.normal(2, 6)):
        dx, xd = o.room(2, 6, 37), x.double().requires_grad_()
        o.library.norm_silu_backward(*at(g, x, shift, w, b, dx), 2, 3, 2, 37, 1e-5, THREADS)
        yield Same(dx, gradient(_norm_silu(xd, shift, w, b), xd, g))


@check("dropped")
def _dropped(o: Bench) -> Iterator[Same]:
    x, y = o.normal(1003), o.room(1003)
    low, high, least, word = 0x9E3779B9, 0x12345678, 1 << 30, 0xFFFFFFFF
    o.library.dropped(*at(x, y), 1003, low, high, least, 1.25, THREADS)
    h = torch.arange(1003) ^ low
    h = (_times(h ^ h >> 16, 0x7FEB352D) + high) & word
    h = _times(h ^ h >> 15, 0x846CA68B)
    yield Same(y, torch.where((h ^ h >> 16) >= least, x.double() * 1.25, 0.0), far=0)


def _times(h: Tensor, by: int) -> Tensor:
    """h·by modulo 2³² without the overflow of 64 signed bits."""
    low, high = h & 0xFFFF, h >> 16
    return (low * by + ((high * by & 0xFFFF) << 16)) & 0xFFFFFFFF


@check("gained")
def _gained(o: Bench) -> Iterator[Same]:
    x, gain = o.normal(5, 74), o.normal(74, dtype=torch.float32)
    for b in (None, o.normal(74)):
        y = o.room(5, 74)
        o.library.gained(*at(x, gain, b, y), 5, 74, THREADS)
        yield Same(y, x.double() * gain.double() + (0 if b is None else b.double()))


@check("gained_backward")
def _gained_backward(o: Bench) -> Iterator[Same]:
    g, x, gain = o.normal(5, 150), o.normal(5, 150), o.normal(150, dtype=torch.float32)
    dx, d_gain = o.room(5, 150), o.room(150, dtype=torch.float32)
    o.library.gained_backward(*at(g, x, gain, dx, d_gain), 5, 150, THREADS)
    yield Same(dx, g.double() * gain.double())
    yield Same(d_gain, (g.double() * x.double()).sum(0), 1e-5, 1e-5)


def _silu_gate(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def _geglu(both: Tensor) -> Tensor:
    up, gate = both.chunk(2, -1)
    return up * F.gelu(gate)


@check("silu_gate")
def _silu_gate_forward(o: Bench) -> Iterator[Same]:
    both, h = 2 * o.normal(5, 2 * 37), o.room(5, 37)
    o.library.silu_gate(*at(both, h), 5, 37, THREADS)
    yield Same(h, _silu_gate(both.double()))


@check("silu_gate_backward")
def _silu_gate_backward(o: Bench) -> Iterator[Same]:
    dh, both, d, h = o.normal(5, 37), 2 * o.normal(5, 2 * 37), o.room(5, 2 * 37), o.room(5, 37)
    o.library.silu_gate_backward(*at(dh, both, d, h), 5, 37, THREADS)
    wide = both.double().requires_grad_()
    made = _silu_gate(wide)
    yield Same(h, made.detach())
    yield Same(d, gradient(made, wide, dh))


@check("geglu")
def _geglu_forward(o: Bench) -> Iterator[Same]:
    both, h = 2 * o.normal(5, 2 * 37), o.room(5, 37)
    o.library.geglu(*at(both, h), 5, 37, THREADS)
    yield Same(h, _geglu(both.double()))


@check("geglu_backward")
def _geglu_backward(o: Bench) -> Iterator[Same]:
    dh, both, d = o.normal(5, 37), 2 * o.normal(5, 2 * 37), o.room(5, 2 * 37)
    o.library.geglu_backward(*at(dh, both, d), 5, 37, THREADS)
    wide = both.double().requires_grad_()
    yield Same(d, gradient(_geglu(wide), wide, dh))


@check("gelu_tanh")
def _gelu_tanh(o: Bench) -> Iterator[Same]:
    x, y = 3 * o.normal(203), o.room(203)
    o.library.gelu_tanh(*at(x, y), 203, THREADS)
    yield Same(y, F.gelu(x.double(), approximate="tanh"))


@check("gelu_tanh_backward")
def _gelu_tanh_backward(o: Bench) -> Iterator[Same]:
    g, x, dx = o.normal(203), 3 * o.normal(203), o.room(203)
    o.library.gelu_tanh_backward(*at(g, x, dx), 203, THREADS)
    wide = x.double().requires_grad_()
    yield Same(dx, gradient(F.gelu(wide, approximate="tanh"), wide, g))


@dataclass(frozen=True)
class _Heads:
    """Five of six tokens in two rows of four places: 4 query heads of 18, two for each kv head."""

    x: Tensor  # (tokens, heads · dim and some more)
    cos: Tensor
    sin: Tensor
    tokens: Tensor
    slots: Tensor

    LENGTH: ClassVar[int] = 4
    KV: ClassVar[int] = 2
    PER: ClassVar[int] = 2
    DIM: ClassVar[int] = 18

    @classmethod
    def of(cls, o: Bench) -> _Heads:
        angle = 3 * o.normal(6, cls.DIM // 2, dtype=torch.float32)
        x = o.normal(6, cls.KV * cls.PER * cls.DIM + 8)
        return cls(x, angle.cos().bfloat16(), angle.sin().bfloat16(), torch.tensor([4, 0, 1, 3, 2]),
                   torch.tensor([0, 1, 2, 4, 6]))  # fmt: skip

    def call(self, kernel: Any, x: Tensor, turned: bool, ld: int, out: Tensor) -> None:
        tables = at(self.cos, self.sin) if turned else [None, None]
        sizes = (len(self.tokens), self.LENGTH, self.KV, self.PER, self.DIM)
        kernel(x.data_ptr(), ld, *tables, *at(self.tokens, self.slots), *sizes, 1.0 if not turned else 0.5,
               out.data_ptr(), THREADS)  # fmt: skip

    def places(self) -> list[tuple[int, int, int]]:
        return [(t, s // self.LENGTH, s % self.LENGTH) for t, s in zip(self.tokens, self.slots, strict=True)]

    def turn(self, x: Tensor, token: int, sign: int, turned: bool) -> Tensor:
        """(heads, dim) of a token."""
        if not turned:
            return x
        (a, b), c, s = x.chunk(2, -1), self.cos[token].double(), sign * self.sin[token].double()
        return 0.5 * torch.cat([a * c - b * s, b * c + a * s], -1)


@check("gather_heads")
def _gather_heads(o: Bench) -> Iterator[Same]:
    h = _Heads.of(o)
    for turned in (True, False):
        out = o.room(like=torch.zeros(2, h.KV, h.LENGTH, h.PER, h.DIM, dtype=BF16))
        h.call(o.library.gather_heads, h.x, turned, h.x.shape[1], out)
        want = torch.zeros(out.shape, dtype=torch.float64)
        for token, row, time in h.places():
            flat = h.x[token, : h.KV * h.PER * h.DIM].double().view(-1, h.DIM)
            want[row, :, time] = h.turn(flat, token, 1, turned).view(h.KV, h.PER, h.DIM)
        yield Same(out, want)


@check("scatter_heads")
def _scatter_heads(o: Bench) -> Iterator[Same]:
    h, ld = _Heads.of(o), _Heads.KV * _Heads.PER * _Heads.DIM
    g = o.normal(2, h.KV, h.LENGTH, h.PER, h.DIM)
    for turned in (True, False):
        out = o.room(like=torch.zeros(6, ld, dtype=BF16))
        h.call(o.library.scatter_heads, g, turned, ld, out)
        want = torch.zeros(out.shape, dtype=torch.float64)
        for token, row, time in h.places():
            want[token] = h.turn(g[row, :, time].double().reshape(-1, h.DIM), token, -1, turned).flatten()
        yield Same(out, want)


@check("causal_softmax")
def _causal_softmax(o: Bench) -> Iterator[Same]:
    for queries, per, keys, q0, k0, window in ((3, 2, 70, 67, 0, 0), (3, 2, 37, 40, 6, 21), (1, 1, 19, 18, 0, 0)):
        scores = 2 * o.normal(2, queries * per, keys)
        got = o.room(like=scores)
        o.library.causal_softmax(got.data_ptr(), 2, queries, per, keys, q0, k0, window, THREADS)
        back = (q0 + torch.arange(queries).repeat_interleave(per))[:, None] - (k0 + torch.arange(keys))
        seen = (back >= 0) & (back < window) if window else back >= 0
        yield Same(got, scores.double().masked_fill(~seen, -torch.inf).softmax(-1), far=1e-5)


@check("softmax_backward")
def _softmax_backward(o: Bench) -> Iterator[Same]:
    p, dp = o.normal(5, 75).float().softmax(1).bfloat16(), o.normal(5, 75)
    got, wide = o.room(like=dp), p.double()
    o.library.softmax_backward(*at(p, got), 5, 75, THREADS)
    yield Same(got, wide * (dp.double() - (wide * dp.double()).sum(1, keepdim=True)), far=1e-5)


@check("token_nll")
def _token_nll(o: Bench) -> Iterator[Same]:
    logits, targets = 3 * o.normal(6, 75), torch.tensor([0, 74, -100, 33, 7, 74])
    wide = logits.double().requires_grad_()
    want = F.cross_entropy(wide, targets, reduction="none")
    (slope,) = torch.autograd.grad(want.sum(), wide)
    for gradient, after in ((0, logits), (1, slope)):
        got, nll = o.room(like=logits), o.room(6, dtype=torch.float32)
        o.library.token_nll(*at(got, targets, nll), 6, 75, gradient, THREADS)
        yield Same(nll, want.detach(), 1e-5, 1e-5)
        yield Same(got, after, far=1e-5)


# -- codes -------------------------------------------------------------------------------------------------------------


@check("blocks4_dense")
def _blocks4_dense(o: Bench) -> Iterator[Same]:
    table, map8 = o.normal(16, dtype=torch.float32), o.normal(256, dtype=torch.float32)
    packed, absmax = o.whole(0, 256, 192, dtype=torch.uint8), o.normal(6, dtype=torch.float32).abs()
    codes, absmax2 = o.whole(0, 256, 6, dtype=torch.uint8), o.normal(3, dtype=torch.float32).abs()
    flat = torch.stack([packed >> 4, packed & 15], 1).flatten().int()
    for dtype in (BF16, torch.float32):
        for doubly in (False, True):
            largest = map8[codes.int()] * absmax2.repeat_interleave(2) + 0.25 if doubly else absmax
            want = table[flat] * largest.repeat_interleave(64)
            constants = at(absmax2, codes, map8) if doubly else at(absmax, None, None)
            for first, count in ((0, 384), (10, 150), (65, 63), (128, 131)):
                out = o.room(count, dtype=dtype)
                o.library.blocks4_dense(
                    packed.data_ptr(), *constants, 0.25, table.data_ptr(), first, count, 64, 2, out.data_ptr(),
                    int(dtype == torch.float32), THREADS,
                )  # fmt: skip
                yield Same(out, want[first : first + count].to(dtype), 0, 0)


@check("blocks4_quantise")
def _blocks4_quantise(o: Bench) -> Iterator[Same]:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).int()
    bounds = o.normal(15, dtype=torch.float32).mul_(0.5).sort().values
    for dtype in (BF16, torch.float32):
        x = o.normal(203, dtype=dtype)
        packed, absmax = o.room(102, dtype=torch.uint8), o.room(4, dtype=torch.float32)
        o.library.blocks4_quantise(
            x.data_ptr(), int(dtype == torch.float32), *at(bounds, order), 203, 64, *at(packed, absmax), THREADS
        )
        blocks = F.pad(x.float(), (0, 53)).view(4, 64)
        most = blocks.abs().amax(1)
        codes = order[torch.bucketize((blocks * (1.0 / most)[:, None]).flatten()[:203], bounds)]
        got = torch.stack([packed >> 4, packed & 15], 1).flatten()[:203]
        yield Same(got, codes, 0, 0)
        yield Same(absmax, most, 0, 0)


@check("ggml_dense")
def _ggml_dense(o: Bench) -> Iterator[Same]:
    for kind, size in ((2, 18), (3, 20), (6, 22), (7, 24), (8, 34), (12, 144), (13, 176), (14, 210)):
        raw = o.whole(0, 256, 5, size, dtype=torch.uint8)
        scales = [slice(208, 210)] if kind == 14 else [slice(0, 2)]
        scales += [slice(2, 4)] if kind in (3, 7, 12, 13) else []
        for each in scales:  # halves that are numbers
            raw[:, each] = o.normal(5, 1, dtype=torch.float16).view(torch.uint8)
        want = _ggml(kind, raw.int(), *(raw[:, s].contiguous().view(torch.float16).float() for s in scales))
        for dtype in (BF16, torch.float32):
            out = o.room(*want.shape, dtype=dtype)
            o.library.ggml_dense(
                kind, raw.data_ptr(), raw.numel(), out.data_ptr(), int(dtype == torch.float32), THREADS
            )
            yield Same(out, want.to(dtype), 1e-6, 0)


def _ggml(kind: int, b: Tensor, d: Tensor, m: Tensor | float = 0.0) -> Tensor:
    """The blocks of one of ggml's types as numbers: b (blocks, bytes), d and m (blocks, 1) the scales of a block."""
    n = len(b)
    if kind == 8:
        return d * b[:, 2:].to(torch.uint8).view(torch.int8).float()
    if kind < 8:
        start = 2 if kind in (2, 6) else 4
        five = kind >= 6
        q = b[:, start + 4 * five :]
        codes = torch.cat([q & 15, q >> 4], 1)
        if five:
            bits = torch.arange(32)
            codes = codes | ((b[:, start : start + 4][:, bits // 8] >> bits % 8) & 1) << 4
        return d * (codes - (16 if five else 8)).float() if kind in (2, 6) else d * codes.float() + m
    if kind == 14:
        low, high = b[:, :128].view(n, 2, 2, 32), b[:, 128:192].view(n, 2, 1, 32)
        four = torch.cat([low & 15, low >> 4], 2)
        two = high >> torch.tensor([0, 2, 4, 6]).view(1, 1, 4, 1) & 3
        scales = b[:, 192:208].to(torch.uint8).view(torch.int8).float().repeat_interleave(16, 1)
        return (d * scales) * ((four | two << 4).view(n, 256) - 32).float()
    q = b[:, 4:16]
    scale = torch.cat([q[:, :4] & 63, q[:, 8:] & 15 | (q[:, :4] >> 6) << 4], 1)
    least = torch.cat([q[:, 4:8] & 63, q[:, 8:] >> 4 | (q[:, 4:8] >> 6) << 4], 1)
    codes = b[:, 48 if kind == 13 else 16 :].view(n, 4, 1, 32)
    codes = torch.cat([codes & 15, codes >> 4], 2).view(n, 8, 32)
    if kind == 13:
        codes = codes | (b[:, 16:48].view(n, 1, 32) >> torch.arange(8).view(1, 8, 1) & 1) << 4
    return ((d * scale.float())[..., None] * codes.float() - (m * least.float())[..., None]).view(n, 256)


@check("rows8_dense")
def _rows8_dense(o: Bench) -> Iterator[Same]:
    codes, scale = o.whole(-127, 128, 5, 37, dtype=torch.int8), o.normal(5, dtype=torch.float32).abs()
    for dtype in (BF16, torch.float32):
        out = o.room(5, 37, dtype=dtype)
        o.library.rows8_dense(*at(codes, scale), 5, 37, out.data_ptr(), int(dtype == torch.float32), THREADS)
        yield Same(out, (codes.float() * scale[:, None] * 7.874015718698502e-3).to(dtype), 0, 0)
