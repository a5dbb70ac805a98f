"""Every compiled kernel beside its formula in torch, float64 where it can be, on the processor that is to run it.

Run once for a build, in a process of its own (build.py), so that a kernel that ends the process ends that one. Each
check calls its kernel with two threads, on sizes that no vector's length divides, and what it gives is held against the
formula element by element; results are made between two margins that must be as they were afterwards.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.cpu.compiled import Kernels, bound, low_rank_structs, strides
from veneer.ops.lowrank import LowRank

_THREADS = 2
_BF16 = torch.bfloat16


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

    def __init__(self, library: Kernels) -> None:
        self.library = library
        self._generator = torch.Generator().manual_seed(0)
        self._margins: list[Tensor] = []

    def normal(self, *shape: int, dtype: torch.dtype = _BF16) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype)

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(dtype)

    def room(self, *shape: int, dtype: torch.dtype = _BF16, like: Tensor | None = None) -> Tensor:
        """A tensor between margins: of a pattern that no result is likely to have, or with the values of `like`."""
        shape, dtype = (tuple(like.shape), like.dtype) if like is not None else (shape, dtype)
        margin, size = 256, math.prod(shape) * dtype.itemsize
        flat = torch.full((size + 2 * margin,), 0xA5, dtype=torch.uint8)
        self._margins += [flat[:margin], flat[margin + size :]]
        inside = flat[margin : margin + size].view(dtype).view(shape)
        return inside if like is None else inside.copy_(like)

    def kept_margins(self) -> bool:
        return all(bool((m == 0xA5).all()) for m in self._margins)


_Check = Callable[[Bench], Iterable[Same]]
CHECKS: dict[str, _Check] = {}


def _kernel_check(name: str) -> Callable[[_Check], _Check]:
    def put(function: _Check) -> _Check:
        CHECKS[name] = function
        return function

    return put


def wrong(library: Kernels, name: str) -> str:
    """What is wrong with the kernel `name`; "" where nothing is."""
    bench = Bench(library)
    try:
        results = [same.holds() for same in CHECKS[name](bench)]  # all of them: each may write where it should not
    except (MemoryError, IndexError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if not bench.kept_margins():
        return "writes outside of its result"
    return "" if all(results) else "disagrees with torch on this machine"


def run_checks(arguments: list[str]) -> None:
    """PATH SKIPPED…: a line of JSON before and after the check of each kernel that is there."""
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


@_kernel_check("use_threads")
def _use_threads(bench: Bench) -> Iterator[Same]:
    """Whether torch and the kernels have one OpenMP."""
    before = torch.get_num_threads()
    bench.library.use_threads(3)
    now = torch.get_num_threads()
    bench.library.use_threads(before)
    yield Same(torch.tensor([now, torch.get_num_threads()]), torch.tensor([3, before]), 0, 0)


@_kernel_check("stay")
def _stay(bench: Bench) -> Iterator[Same]:
    """Where the calling thread may run; both are let go again."""
    if not hasattr(os, "sched_getaffinity"):  # nothing is done there
        return
    before = sorted(os.sched_getaffinity(0))
    for processors in (before[-1:], before):
        bench.library.stay((ctypes.c_int * len(processors))(*processors), len(processors), _THREADS)
        yield Same(torch.tensor(sorted(os.sched_getaffinity(0)), dtype=torch.int64), torch.tensor(processors), 0, 0)


@_kernel_check("meet_asleep")
def _meet_asleep(bench: Bench) -> Iterator[Same]:
    before = torch.full((3,), -1, dtype=torch.int32)
    for asleep, was in ((1, before[0:]), (1, before[1:]), (0, before[2:])):
        bench.library.meet_asleep(asleep, was.data_ptr())
    yield Same(before[1:], torch.tensor([1, 1], dtype=torch.int32), 0, 0)


@_kernel_check("rms_norm")
def _rms_norm(bench: Bench) -> Iterator[Same]:
    x, w, y = bench.normal(7, 74), bench.normal(74), bench.room(7, 74)
    bench.library.rms_norm(*at(x, w, y), 7, 74, 1e-5, _THREADS)
    yield Same(y, F.rms_norm(x.double(), (74,), w.double(), 1e-5))


@_kernel_check("rms_norm_backward")
def _rms_norm_backward(bench: Bench) -> Iterator[Same]:
    g, x, w, dx = bench.normal(7, 74), bench.normal(7, 74), bench.normal(74), bench.room(7, 74)
    bench.library.rms_norm_backward(*at(g, x, w, dx), 7, 74, 1e-5, _THREADS)
    xd = x.double().requires_grad_()
    yield Same(dx, gradient(F.rms_norm(xd, (74,), w.double(), 1e-5), xd, g))


def _norm_silu(x: Tensor, shift: Tensor | None, w: Tensor, b: Tensor) -> Tensor:
    x = x if shift is None else x + shift.double()[..., None]
    return F.silu(F.group_norm(x, 3, w.double(), b.double(), 1e-5))


@_kernel_check("norm_silu")
def _norm_silu_forward(bench: Bench) -> Iterator[Same]:
    x, w, b = bench.normal(2, 6, 37), bench.normal(6), bench.normal(6)
    for shift in (None, bench.normal(2, 6)):
        y = bench.room(2, 6, 37)
        bench.library.norm_silu(*at(x, shift, w, b, y), 2, 3, 2, 37, 1e-5, _THREADS)
        yield Same(y, _norm_silu(x.double(), shift, w, b))


@_kernel_check("norm_silu_backward")
def _norm_silu_backward(bench: Bench) -> Iterator[Same]:
    g, x, w, b = bench.normal(2, 6, 37), bench.normal(2, 6, 37), bench.normal(6), bench.normal(6)
    for shift in (None, bench.normal(2, 6)):
        dx, xd = bench.room(2, 6, 37), x.double().requires_grad_()
        bench.library.norm_silu_backward(*at(g, x, shift, w, b, dx), 2, 3, 2, 37, 1e-5, _THREADS)
        yield Same(dx, gradient(_norm_silu(xd, shift, w, b), xd, g))


@_kernel_check("dropped")
def _dropped(bench: Bench) -> Iterator[Same]:
    x, y = bench.normal(1003), bench.room(1003)
    low, high, least, word = 0x9E3779B9, 0x12345678, 1 << 30, 0xFFFFFFFF
    bench.library.dropped(*at(x, y), 1003, low, high, least, 1.25, _THREADS)
    h = torch.arange(1003) ^ low
    h = (_times(h ^ h >> 16, 0x7FEB352D) + high) & word
    h = _times(h ^ h >> 15, 0x846CA68B)
    yield Same(y, torch.where((h ^ h >> 16) >= least, x.double() * 1.25, 0.0), far=0)


def _times(h: Tensor, by: int) -> Tensor:
    """h·by modulo 2³² without the overflow of 64 signed bits."""
    low, high = h & 0xFFFF, h >> 16
    return (low * by + ((high * by & 0xFFFF) << 16)) & 0xFFFFFFFF


@_kernel_check("gained")
def _gained(bench: Bench) -> Iterator[Same]:
    x, gain = bench.normal(5, 74), bench.normal(74, dtype=torch.float32)
    for b in (None, bench.normal(74)):
        y = bench.room(5, 74)
        bench.library.gained(*at(x, gain, b, y), 5, 74, _THREADS)
        yield Same(y, x.double() * gain.double() + (0 if b is None else b.double()))


@_kernel_check("gained_backward")
def _gained_backward(bench: Bench) -> Iterator[Same]:
    g, x, gain = bench.normal(5, 150), bench.normal(5, 150), bench.normal(150, dtype=torch.float32)
    dx, d_gain = bench.room(5, 150), bench.room(150, dtype=torch.float32)
    bench.library.gained_backward(*at(g, x, gain, dx, d_gain), 5, 150, _THREADS)
    yield Same(dx, g.double() * gain.double())
    yield Same(d_gain, (g.double() * x.double()).sum(0), 1e-5, 1e-5)


def _silu_gate(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def _geglu(both: Tensor) -> Tensor:
    up, gate = both.chunk(2, -1)
    return up * F.gelu(gate)


@_kernel_check("silu_gate")
def _silu_gate_forward(bench: Bench) -> Iterator[Same]:
    both, h = 2 * bench.normal(5, 2 * 37), bench.room(5, 37)
    bench.library.silu_gate(*at(both, h), 5, 37, _THREADS)
    yield Same(h, _silu_gate(both.double()))


@_kernel_check("silu_gate_backward")
def _silu_gate_backward(bench: Bench) -> Iterator[Same]:
    dh, both, d, h = bench.normal(5, 37), 2 * bench.normal(5, 2 * 37), bench.room(5, 2 * 37), bench.room(5, 37)
    bench.library.silu_gate_backward(*at(dh, both, d, h), 5, 37, _THREADS)
    wide = both.double().requires_grad_()
    made = _silu_gate(wide)
    yield Same(h, made.detach())
    yield Same(d, gradient(made, wide, dh))


@_kernel_check("geglu")
def _geglu_forward(bench: Bench) -> Iterator[Same]:
    both, h = 2 * bench.normal(5, 2 * 37), bench.room(5, 37)
    bench.library.geglu(*at(both, h), 5, 37, _THREADS)
    yield Same(h, _geglu(both.double()))


@_kernel_check("geglu_backward")
def _geglu_backward(bench: Bench) -> Iterator[Same]:
    dh, both, d = bench.normal(5, 37), 2 * bench.normal(5, 2 * 37), bench.room(5, 2 * 37)
    bench.library.geglu_backward(*at(dh, both, d), 5, 37, _THREADS)
    wide = both.double().requires_grad_()
    yield Same(d, gradient(_geglu(wide), wide, dh))


@_kernel_check("gelu_tanh")
def _gelu_tanh(bench: Bench) -> Iterator[Same]:
    x, y = 3 * bench.normal(203), bench.room(203)
    bench.library.gelu_tanh(*at(x, y), 203, _THREADS)
    yield Same(y, F.gelu(x.double(), approximate="tanh"))


@_kernel_check("gelu_tanh_backward")
def _gelu_tanh_backward(bench: Bench) -> Iterator[Same]:
    g, x, dx = bench.normal(203), 3 * bench.normal(203), bench.room(203)
    bench.library.gelu_tanh_backward(*at(g, x, dx), 203, _THREADS)
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
    def of(cls, bench: Bench) -> _Heads:
        angle = 3 * bench.normal(6, cls.DIM // 2, dtype=torch.float32)
        x = bench.normal(6, cls.KV * cls.PER * cls.DIM + 8)
        return cls(
            x,
            angle.cos().bfloat16(),
            angle.sin().bfloat16(),
            torch.tensor([4, 0, 1, 3, 2]),
            torch.tensor([0, 1, 2, 4, 6]),
        )

    def call(self, kernel: Any, x: Tensor, turned: bool, ld: int, out: Tensor) -> None:
        tables = at(self.cos, self.sin) if turned else [None, None]
        sizes = (len(self.tokens), self.LENGTH, self.KV, self.PER, self.DIM)
        kernel(
            x.data_ptr(),
            ld,
            *tables,
            *at(self.tokens, self.slots),
            *sizes,
            1.0 if not turned else 0.5,
            out.data_ptr(),
            _THREADS,
        )

    def places(self) -> list[tuple[int, int, int]]:
        return [(t, s // self.LENGTH, s % self.LENGTH) for t, s in zip(self.tokens, self.slots, strict=True)]

    def turn(self, x: Tensor, token: int, sign: int, turned: bool) -> Tensor:
        """(heads, dim) of a token."""
        if not turned:
            return x
        (a, b), c, s = x.chunk(2, -1), self.cos[token].double(), sign * self.sin[token].double()
        return 0.5 * torch.cat([a * c - b * s, b * c + a * s], -1)


@_kernel_check("gather_heads")
def _gather_heads(bench: Bench) -> Iterator[Same]:
    h = _Heads.of(bench)
    for turned in (True, False):
        out = bench.room(like=torch.zeros(2, h.KV, h.LENGTH, h.PER, h.DIM, dtype=_BF16))
        h.call(bench.library.gather_heads, h.x, turned, h.x.shape[1], out)
        want = torch.zeros(out.shape, dtype=torch.float64)
        for token, row, time in h.places():
            flat = h.x[token, : h.KV * h.PER * h.DIM].double().view(-1, h.DIM)
            want[row, :, time] = h.turn(flat, token, 1, turned).view(h.KV, h.PER, h.DIM)
        yield Same(out, want)


@_kernel_check("scatter_heads")
def _scatter_heads(bench: Bench) -> Iterator[Same]:
    h, ld = _Heads.of(bench), _Heads.KV * _Heads.PER * _Heads.DIM
    g = bench.normal(2, h.KV, h.LENGTH, h.PER, h.DIM)
    for turned in (True, False):
        out = bench.room(like=torch.zeros(6, ld, dtype=_BF16))
        h.call(bench.library.scatter_heads, g, turned, ld, out)
        want = torch.zeros(out.shape, dtype=torch.float64)
        for token, row, time in h.places():
            want[token] = h.turn(g[row, :, time].double().reshape(-1, h.DIM), token, -1, turned).flatten()
        yield Same(out, want)


@_kernel_check("causal_softmax")
def _causal_softmax(bench: Bench) -> Iterator[Same]:
    for queries, per, keys, q0, k0, window in ((3, 2, 70, 67, 0, 0), (3, 2, 37, 40, 6, 21), (1, 1, 19, 18, 0, 0)):
        scores = 2 * bench.normal(2, queries * per, keys)
        got = bench.room(like=scores)
        bench.library.causal_softmax(got.data_ptr(), 2, queries, per, keys, q0, k0, window, _THREADS)
        back = (q0 + torch.arange(queries).repeat_interleave(per))[:, None] - (k0 + torch.arange(keys))
        seen = (back >= 0) & (back < window) if window else back >= 0
        yield Same(got, scores.double().masked_fill(~seen, -torch.inf).softmax(-1), far=1e-5)


@_kernel_check("softmax_backward")
def _softmax_backward(bench: Bench) -> Iterator[Same]:
    p, dp = bench.normal(5, 75).float().softmax(1).bfloat16(), bench.normal(5, 75)
    got, wide = bench.room(like=dp), p.double()
    bench.library.softmax_backward(*at(p, got), 5, 75, _THREADS)
    yield Same(got, wide * (dp.double() - (wide * dp.double()).sum(1, keepdim=True)), far=1e-5)


@_kernel_check("token_nll")
def _token_nll(bench: Bench) -> Iterator[Same]:
    targets = torch.tensor([0, 2074, -100, 1033, 7, 2074])
    for dtype, near, far in ((_BF16, 2**-7, 1e-5), (torch.float32, 1e-5, 1e-7)):
        logits = 3 * bench.normal(6, 2075, dtype=dtype)
        logits[3, 1033] = 40
        wide = logits.double().requires_grad_()
        want = F.cross_entropy(wide, targets, reduction="none")
        best = wide.argmax(1) == targets
        (slope,) = torch.autograd.grad(want.sum(), wide)
        for gradient, after in ((0, logits), (1, slope)):
            got, nll = bench.room(like=logits), bench.room(6, dtype=torch.float32)
            right = bench.room(6, dtype=torch.uint8)
            half = int(dtype == _BF16)
            bench.library.token_nll(got.data_ptr(), half, *at(targets, nll, right), 6, 2075, gradient, _THREADS)
            yield Same(nll, want.detach(), 1e-5, 1e-5)
            yield Same(right.float(), best.float(), 0.0, 0.0)
            yield Same(got, after, near, far)


# -- quantised weights -------------------------------------------------------------------------------------------------


@_kernel_check("blocks4_dense")
def _blocks4_dense(bench: Bench) -> Iterator[Same]:
    table, map8 = bench.normal(16, dtype=torch.float32), bench.normal(256, dtype=torch.float32)
    packed, absmax = bench.whole(0, 256, 192, dtype=torch.uint8), bench.normal(6, dtype=torch.float32).abs()
    codes, absmax2 = bench.whole(0, 256, 6, dtype=torch.uint8), bench.normal(3, dtype=torch.float32).abs()
    flat = torch.stack([packed >> 4, packed & 15], 1).flatten().int()
    for dtype in (_BF16, torch.float32):
        for doubly in (False, True):
            largest = map8[codes.int()] * absmax2.repeat_interleave(2) + 0.25 if doubly else absmax
            want = table[flat] * largest.repeat_interleave(64)
            constants = at(absmax2, codes, map8) if doubly else at(absmax, None, None)
            for first, count in ((0, 384), (10, 150), (65, 63), (128, 131)):
                out = bench.room(count, dtype=dtype)
                bench.library.blocks4_dense(
                    packed.data_ptr(),
                    *constants,
                    0.25,
                    table.data_ptr(),
                    first,
                    count,
                    64,
                    2,
                    out.data_ptr(),
                    int(dtype == torch.float32),
                    _THREADS,
                )
                yield Same(out, want[first : first + count].to(dtype), 0, 0)


@_kernel_check("blocks4_quantise")
def _blocks4_quantise(bench: Bench) -> Iterator[Same]:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).int()
    bounds = bench.normal(15, dtype=torch.float32).mul_(0.5).sort().values
    for dtype in (_BF16, torch.float32):
        x = bench.normal(203, dtype=dtype)
        packed, absmax = bench.room(102, dtype=torch.uint8), bench.room(4, dtype=torch.float32)
        bench.library.blocks4_quantise(
            x.data_ptr(), int(dtype == torch.float32), *at(bounds, order), 203, 64, *at(packed, absmax), _THREADS
        )
        blocks = F.pad(x.float(), (0, 53)).view(4, 64)
        most = blocks.abs().amax(1)
        codes = order[torch.bucketize((blocks * (1.0 / most)[:, None]).flatten()[:203], bounds)]
        got = torch.stack([packed >> 4, packed & 15], 1).flatten()[:203]
        yield Same(got, codes, 0, 0)
        yield Same(absmax, most, 0, 0)


@_kernel_check("ggml_dense")
def _ggml_dense(bench: Bench) -> Iterator[Same]:
    for kind, size in ((2, 18), (3, 20), (6, 22), (7, 24), (8, 34), (12, 144), (13, 176), (14, 210)):
        raw = bench.whole(0, 256, 5, size, dtype=torch.uint8)
        scales = [slice(208, 210)] if kind == 14 else [slice(0, 2)]
        scales += [slice(2, 4)] if kind in (3, 7, 12, 13) else []
        for each in scales:  # halves that are numbers
            raw[:, each] = bench.normal(5, 1, dtype=torch.float16).view(torch.uint8)
        want = _ggml(kind, raw.int(), *(raw[:, s].contiguous().view(torch.float16).float() for s in scales))
        for dtype in (_BF16, torch.float32):
            out = bench.room(*want.shape, dtype=dtype)
            bench.library.ggml_dense(
                kind, raw.data_ptr(), raw.numel(), out.data_ptr(), int(dtype == torch.float32), _THREADS
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


@_kernel_check("rows8_dense")
def _rows8_dense(bench: Bench) -> Iterator[Same]:
    codes, scale = bench.whole(-127, 128, 5, 37, dtype=torch.int8), bench.normal(5, dtype=torch.float32).abs()
    for dtype in (_BF16, torch.float32):
        out = bench.room(5, 37, dtype=dtype)
        bench.library.rows8_dense(*at(codes, scale), 5, 37, out.data_ptr(), int(dtype == torch.float32), _THREADS)
        yield Same(out, (codes.float() * scale[:, None] * 7.874015718698502e-3).to(dtype), 0, 0)


_SUM = {"near": 2**-6, "far": 2e-2}
"""For sums of hundreds of products whose factors were rounded to bfloat16 on the way."""


# -- a training step, with AVX512-BF16 ---------------------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(n, tokens, heads, d): softmax(q·kᵀ/4)·v, and log Σ exp of the scores."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = 0.25 * q @ k.mT
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


_SIZES = [(2, 70, 3, 40), (2, 300, 3, 40)]  # queries, keys: more than a tile of each


@_kernel_check("attend")
def _attend(bench: Bench) -> Iterator[Same]:
    (n, S, heads, d), T = _SIZES[0], _SIZES[1][1]
    q, k, v = (bench.normal(*size) for size in (_SIZES[0], _SIZES[1], _SIZES[1]))
    out, lse = bench.room(n, S, heads, d), bench.room(n, heads, S, dtype=torch.float32)
    bench.library.attend(*at(q, k, v, out, lse), strides(q, k, v, out), n, heads, S, T, d, 0.25, _THREADS)
    want, log_sum = _attention(q, k, v)
    yield Same(out, want, far=2**-8)
    yield Same(lse, log_sum, 1e-3, 1e-3)


@_kernel_check("attend_backward")
def _attend_backward(bench: Bench) -> Iterator[Same]:
    (n, S, heads, d), T = _SIZES[0], _SIZES[1][1]
    q, k, v = (bench.normal(*size) for size in (_SIZES[0], _SIZES[1], _SIZES[1]))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    want, log_sum = _attention(*wide)
    out, lse, g = (
        want.detach().to(_BF16).contiguous(),
        log_sum.detach().float().contiguous(),
        bench.normal(n, S, heads, d),
    )
    made = [bench.room(*t.shape) for t in (q, k, v)]
    tensors = (q, k, v, out, g, *made)
    bench.library.attend_backward(*at(*tensors, lse), strides(*tensors), n, heads, S, T, d, 0.25, _THREADS)
    for got, slope in zip(made, torch.autograd.grad(want, wide, g.double()), strict=True):
        yield Same(got, slope, **_SUM)


@dataclass(frozen=True)
class _TwoProducts:
    """Two pairs of ranks 5 and 16 on columns 0 … 32 and 32 … 112 of 112, over 48 inputs, and 197 rows."""

    pairs: list[tuple[Tensor, Tensor, int, int, float]]
    table: Any

    ROWS: ClassVar[int] = 197
    IN: ClassVar[int] = 48
    OUT: ClassVar[int] = 112
    RANKS: ClassVar[int] = 32  # padded to sixteens

    @classmethod
    def of(cls, bench: Bench) -> _TwoProducts:
        wide = torch.float32
        pairs = [
            (bench.normal(5, cls.IN, dtype=wide) / 4, bench.normal(32, 5, dtype=wide), 0, 32, 0.5),
            (bench.normal(16, cls.IN, dtype=wide) / 4, bench.normal(80, 16, dtype=wide), 32, 112, 2.0),
        ]
        return cls(
            pairs,
            low_rank_structs([LowRank(A, B, s, first=first) for A, B, first, _, s in pairs]),
        )

    def each(self) -> Iterator[tuple[int, Tensor, Tensor, slice, slice, float]]:
        """(i, A, B, its columns, its part of the ranks, scale), in what the kernels round A and s·B to."""
        for i, (A, B, first, last, s) in enumerate(self.pairs):
            own = slice(16 * i, 16 * i + len(A))
            yield i, A.bfloat16().double(), (s * B).bfloat16().double(), slice(first, last), own, s


# -- rows in tiles -----------------------------------------------------------------------------------------------------


@dataclass
class _PackedRows:
    """Rows of several lengths, six heads over two key heads, of a width that no tile divides; float64 beside them."""

    dtype: torch.dtype
    turned: bool
    window: int

    LENGTHS: ClassVar = (70, 1, 33)
    HEADS: ClassVar = 6
    KV: ClassVar = 2
    DIM: ClassVar = 18

    def draw(self, bench: Bench) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """qkv, cos, sin and the output's gradient."""
        n, angles = sum(self.LENGTHS), bench.normal(sum(self.LENGTHS), self.DIM // 2, dtype=torch.float32)
        tables = [f(angles).to(self.dtype) if self.turned else None for f in (torch.cos, torch.sin)]
        qkv = bench.normal(n, self.HEADS + 2 * self.KV, self.DIM, dtype=self.dtype)
        return qkv, tables[0], tables[1], bench.normal(n, self.HEADS, self.DIM, dtype=self.dtype)

    def exact(self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and log Σ exp of the scores, of qkv in float64."""
        outputs, sums = [], []
        q, k, v = qkv.split([self.HEADS, self.KV, self.KV], 1)
        if cos is not None and sin is not None:
            c, s, half = cos.double()[:, None], sin.double()[:, None], self.DIM // 2
            q, k = (
                torch.cat([t[..., :half] * c - t[..., half:] * s, t[..., half:] * c + t[..., :half] * s], -1)
                for t in (q, k)
            )
        for a, b, d in zip(*(t.split(list(self.LENGTHS)) for t in (q, k, v)), strict=True):
            b, d = (t.repeat_interleave(self.HEADS // self.KV, 1).transpose(0, 1) for t in (b, d))
            scores = 0.3 * a.transpose(0, 1) @ b.mT
            back = torch.arange(len(a))[:, None] - torch.arange(len(a))
            hidden = (back < 0) | (back >= self.window) if self.window else back < 0
            scores = scores.masked_fill(hidden, -math.inf)
            outputs.append((scores.softmax(-1) @ d).transpose(0, 1))
            sums.append(scores.logsumexp(-1).mT)
        return torch.cat(outputs), torch.cat(sums)

    def given(self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor) -> list[Any]:
        sizes = len(self.LENGTHS), self.KV, self.HEADS // self.KV, self.DIM, 0.3, self.window
        return [qkv.data_ptr(), qkv.stride(0), *at(cos, sin, starts), *sizes, int(self.dtype == _BF16)]


def _tile_checks(prefix: str, dtypes: tuple[torch.dtype, ...]) -> None:
    def cases(bench: Bench) -> Iterator[tuple[_PackedRows, Tensor, tuple[Any, ...], float]]:
        for dtype in dtypes:
            for turned, window in ((True, 0), (False, 20)):
                rows = _PackedRows(dtype, turned, window)
                starts = torch.tensor([0, *rows.LENGTHS]).cumsum(0)
                yield rows, starts, rows.draw(bench), 2**-6 if dtype == _BF16 else 1e-5

    @_kernel_check(f"{prefix}rows_attend")
    def _forward(bench: Bench) -> Iterator[Same]:
        for rows, starts, (qkv, cos, sin, g), near in cases(bench):
            out, lse = bench.room(like=g), bench.room(*g.shape[:2], dtype=torch.float32)
            kernel = getattr(bench.library, f"{prefix}rows_attend")
            kernel(*rows.given(qkv, cos, sin, starts), *at(out, lse), _THREADS)
            want, sums = rows.exact(qkv.double(), cos, sin)
            yield Same(out, want, near, near)
            yield Same(lse, sums, near, near)

    @_kernel_check(f"{prefix}rows_attend_backward")
    def _backward(bench: Bench) -> Iterator[Same]:
        for rows, starts, (qkv, cos, sin, g), near in cases(bench):
            wide = qkv.double().requires_grad_()
            out, sums = rows.exact(wide, cos, sin)
            made, lse, d = out.detach().to(rows.dtype), sums.detach().float(), bench.room(like=qkv)
            kernel = getattr(bench.library, f"{prefix}rows_attend_backward")
            kernel(*at(g, made, lse), *rows.given(qkv, cos, sin, starts), d.data_ptr(), _THREADS)
            yield Same(d, gradient(out, wide, g), near, 2 * near)


_tile_checks("", (torch.float32, _BF16))
_tile_checks("narrow_", (_BF16,))


@_kernel_check("thin_add")
def _thin_add(bench: Bench) -> Iterator[Same]:
    t = _TwoProducts.of(bench)
    x, y = bench.normal(t.ROWS, t.IN), bench.normal(t.ROWS, t.OUT)
    got, u = bench.room(like=y), bench.room(t.ROWS, t.RANKS)
    bench.library.thin_add(t.table, 2, *at(x, got, u), t.ROWS, t.IN, t.OUT, _THREADS)
    want, narrow = y.double(), torch.zeros(u.shape, dtype=torch.float64)
    for _, A, B, columns, ranks, _s in t.each():
        narrow[:, ranks] = x.double() @ A.T
        want[:, columns] += u[:, ranks].double() @ B.T
    yield Same(u, narrow, far=2**-7)
    yield Same(got, want, far=2**-6)


@_kernel_check("thin_through")
def _thin_through(bench: Bench) -> Iterator[Same]:
    t = _TwoProducts.of(bench)
    g, dx = bench.normal(t.ROWS, t.OUT), bench.normal(t.ROWS, t.IN)
    du, got = bench.room(t.ROWS, t.RANKS), bench.room(like=dx)
    alone = bench.room(t.ROWS, t.RANKS)
    bench.library.thin_through(t.table, 2, *at(g, du, got), t.ROWS, t.IN, t.OUT, _THREADS)
    bench.library.thin_through(t.table, 2, *at(g, alone, None), t.ROWS, t.IN, t.OUT, _THREADS)
    want, narrow = dx.double(), torch.zeros(du.shape, dtype=torch.float64)
    for _, A, B, columns, ranks, _s in t.each():
        narrow[:, ranks] = g[:, columns].double() @ B
        want += du[:, ranks].double() @ A
    yield Same(du, narrow, **_SUM)
    yield Same(alone, narrow, **_SUM)
    yield Same(got, want, far=2**-6)


@_kernel_check("thin_gradients")
def _thin_gradients(bench: Bench) -> Iterator[Same]:
    t = _TwoProducts.of(bench)
    g, x, u, du = (bench.normal(t.ROWS, n) for n in (t.OUT, t.IN, t.RANKS, t.RANKS))
    factors = [A for A, *_ in t.pairs], [B for _, B, *_ in t.pairs]
    made = [[bench.room(*factor.shape, dtype=torch.float32) for factor in each] for each in factors]
    tables = [(ctypes.c_void_p * 2)(*at(*tensors)) for tensors in made]
    bench.library.thin_gradients(t.table, 2, *at(g, x, u, du), *tables, t.ROWS, t.IN, t.OUT, _THREADS)
    for i, _A, _B, columns, ranks, s in t.each():
        yield Same(made[0][i], du[:, ranks].double().T @ x.double(), 1e-4, 1e-3)
        yield Same(made[1][i], s * g[:, columns].double().T @ u[:, ranks].double(), 1e-4, 1e-3)


# -- serving, with AVX512-BF16 -----------------------------------------------------------------------------------------


def _sixteens(A: Tensor) -> Tensor:
    """(16, in) as thin_rows reads it: (1, in / 2, 16, 2)."""
    return A.view(1, 16, -1, 2).permute(0, 2, 1, 3).contiguous()


def _turned(B: Tensor) -> Tensor:
    """(columns, rank) as thin_rows reads it: (rank / 2, columns, 2)."""
    return B.view(len(B), -1, 2).permute(1, 0, 2).contiguous()


class _Adapters(NamedTuple):
    """Two adapters of rank 16 over columns in two parts: the first on both, the second on the other alone; five rows
    under the first, two under the second, row 2 under both."""

    A: list[Tensor]
    B: list[list[tuple[Tensor, int, int]]]  # (columns, rank), first column, first of the rank
    held: list[Tensor]
    table: Tensor
    starts: Tensor
    rows: Tensor
    strengths: Tensor

    @classmethod
    def of(cls, bench: Bench, inputs: int, columns: int) -> _Adapters:
        A = [bench.normal(16, inputs) / 8 for _ in range(2)]
        B = [
            [(bench.normal(16, 6) / 8, 0, 0), (bench.normal(columns - 16, 10) / 8, 16, 6)],
            [(bench.normal(columns - 16, 16) / 8, 16, 0)],
        ]
        held, table = [], torch.zeros(2, 17, dtype=torch.int64)
        for i in range(2):
            held.append(_sixteens(A[i]))
            flat: list[int] = [held[-1].data_ptr(), 16]
            for part, first, rank in B[i]:
                held.append(_turned(part))
                flat += [held[-1].data_ptr(), first, len(part), rank, part.shape[1]]
            table[i, : len(flat)] = torch.tensor(flat)
        rows, starts = torch.tensor([0, 2, 5, 6, 1, 2, 3]), torch.tensor([0, 5, 7])
        return cls(A, B, held, table, starts, rows, bench.normal(7, dtype=torch.float32))

    def onto(self, x: Tensor, y: Tensor) -> Tensor:
        """y with both adapters' products, float64; u rounded as the kernel rounds it."""
        out = y.double().clone()
        for i in range(2):
            for at_ in range(int(self.starts[i]), int(self.starts[i + 1])):
                row, s = int(self.rows[at_]), float(self.strengths[at_])
                u = (s * (x[row].double() @ self.A[i].double().T)).to(_BF16).double()
                for part, first, rank in self.B[i]:
                    out[row, first : first + len(part)] += part.double() @ u[rank : rank + part.shape[1]]
        return out

    def arguments(self, u: Tensor) -> list[int | None]:
        return [*at(self.table), 2, *at(self.starts, self.rows, self.strengths, u), 16]


@_kernel_check("thin_rows")
def _thin_rows(bench: Bench) -> Iterator[Same]:
    a = _Adapters.of(bench, 32, 40)
    x, y, u = bench.normal(7, 32), bench.normal(7, 40), bench.room(7, 16)
    got = bench.room(like=y)
    bench.library.thin_rows(x.data_ptr(), 32, got.data_ptr(), 40, *a.arguments(u), _THREADS)
    yield Same(got, a.onto(x, y), far=2**-7)


@dataclass(frozen=True)
class _Cache:
    """Two sequences, of 35 and 20 tokens, in blocks 4, 1, 3 and 2, 5; 4 query heads, 2 of keys and values, of 32."""

    k: list[Tensor]  # (tokens, kv, d) of each
    v: list[Tensor]

    HEADS: ClassVar[int] = 4
    KV: ClassVar[int] = 2
    D: ClassVar[int] = 32
    BLOCKS: ClassVar = ((4, 1, 3), (2, 5))
    LENGTHS: ClassVar = (35, 20)

    @classmethod
    def of(cls, bench: Bench) -> _Cache:
        k, v = ([bench.normal(n, cls.KV, cls.D) for n in cls.LENGTHS] for _ in range(2))
        return cls(k, v)

    def slots(self) -> Tensor:
        slots = [b[t // 16] * 16 + t % 16 for b, n in zip(self.BLOCKS, self.LENGTHS, strict=True) for t in range(n)]
        return torch.tensor(slots)

    def tables(self) -> Tensor:
        return torch.tensor([self.BLOCKS[0], (*self.BLOCKS[1], 0)])

    def pages(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of all tokens as the kernels lay them: (6, kv, d / 2, 16, 2) and (6, kv, 8, d, 2)."""
        K, V = (torch.zeros(6, 16, self.KV, self.D, dtype=_BF16) for _ in range(2))
        slots = self.slots()
        K[slots // 16, slots % 16], V[slots // 16, slots % 16] = k, v
        K = K.view(6, 16, self.KV, self.D // 2, 2).permute(0, 2, 3, 1, 4)
        V = V.view(6, 8, 2, self.KV, self.D).permute(0, 3, 1, 4, 2)
        return K.contiguous(), V.contiguous()

    def attended(self, q: Tensor, own: list[int], scale: float, cap: float, window: int) -> Tensor:
        """q (tokens, heads, d), the last own[s] tokens of each sequence."""
        out, first = [], 0
        for k, v, n in zip(self.k, self.v, own, strict=True):
            back = torch.arange(len(k) - n, len(k))[:, None] - torch.arange(len(k))
            seen = (back >= 0) & (back < window) if window else back >= 0
            wide = [t.double().transpose(0, 1).repeat_interleave(self.HEADS // self.KV, 0) for t in (k, v)]
            scores = scale * q[first : first + n].double().transpose(0, 1) @ wide[0].mT
            scores = cap * torch.tanh(scores / cap) if cap else scores
            out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide[1]).transpose(0, 1).flatten(1))
            first += n
        return torch.cat(out)


@_kernel_check("store_rows")
def _store_rows(bench: Bench) -> Iterator[Same]:
    c = _Cache.of(bench)
    k, v, slots, starts = torch.cat(c.k), torch.cat(c.v), c.slots(), torch.tensor([0, 35, 55])
    wants = c.pages(k, v)
    K, V = (bench.room(like=torch.zeros_like(t)) for t in wants)
    width = c.KV * c.D
    bench.library.store_rows(
        k.data_ptr(), width, v.data_ptr(), width, *at(slots, starts), 2, c.KV, c.D, *at(K, V), _THREADS
    )
    for got, want in zip((K, V), wants, strict=True):
        yield Same(got, want, 0, 0)


def _tables(bench: Bench, d: int) -> tuple[Tensor, Tensor]:
    angle = bench.normal(40, d // 2, dtype=torch.float32)
    return angle.cos(), angle.sin()


def _turn(x: Tensor, w: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """x (tokens, heads, d) normed by w and turned, float64; cos and sin (tokens, d / 2)."""
    x = x.double() if w is None else F.rms_norm(x.double(), (x.shape[-1],), w.double(), 1e-5)
    (a, b), c, s = x.chunk(2, -1), cos.double()[:, None], sin.double()[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


@_kernel_check("turn_and_store")
def _turn_and_store(bench: Bench) -> Iterator[Same]:
    c, starts = _Cache.of(bench), torch.tensor([0, 35, 55])
    positions = torch.cat([torch.arange(n) for n in c.LENGTHS])
    cos, sin = _tables(bench, c.D)
    for norms in ((None, None), (bench.normal(c.D), bench.normal(c.D))):
        given = bench.normal(55, (c.HEADS + 2 * c.KV) * c.D)
        qkv, places = bench.room(like=given), c.slots()
        K, V = (bench.room(like=torch.zeros(6, c.KV, 16 * c.D, dtype=_BF16)) for _ in range(2))
        bench.library.turn_and_store(
            qkv.data_ptr(),
            c.HEADS,
            c.KV,
            c.D,
            *at(cos, sin, *norms),
            1e-5,
            *at(positions, places, starts),
            2,
            *at(K, V),
            _THREADS,
        )
        q, k, v = given.view(55, -1, c.D).split([c.HEADS, c.KV, c.KV], 1)
        q, k = (_turn(t, w, cos[positions], sin[positions]) for t, w in ((q, norms[0]), (k, norms[1])))
        yield Same(qkv, torch.cat([q, k, v.double()], 1).flatten(1))
        stored = qkv.view(55, -1, c.D)[:, c.HEADS :].split(c.KV, 1)
        for got, want in zip((K, V), c.pages(*stored), strict=True):
            yield Same(got, want.view(got.shape), 0, 0)


@_kernel_check("paged_attend")
def _paged_attend(bench: Bench) -> Iterator[Same]:
    c, own = _Cache.of(bench), [7, 1]  # the last tokens of a prompt beside one of an answer
    K, V = c.pages(torch.cat(c.k), torch.cat(c.v))
    q = bench.normal(8, (c.HEADS + 2) * c.D)  # rows are longer than their queries
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(c.LENGTHS, own, strict=True)])
    starts, tables = torch.tensor([0, 7, 8]), c.tables()
    for cap, window in ((0.0, 0), (2.0, 0), (0.0, 9)):
        out = bench.room(8, c.HEADS * c.D)
        bench.library.paged_attend(
            q.data_ptr(),
            q.shape[1],
            out.data_ptr(),
            c.HEADS,
            c.KV,
            c.D,
            *at(positions, starts),
            2,
            tables.data_ptr(),
            tables.shape[1],
            *at(K, V),
            0.25,
            cap,
            window,
            35,
            _THREADS,
        )
        wide = q[:, : c.HEADS * c.D].view(8, c.HEADS, c.D)
        yield Same(out, c.attended(wide, own, 0.25, cap, window), far=2**-7)


_MATRICES = ((0, 0, 0), (1, 0, 0), (2, 16, 0), (2, 32, 1), (3, 8, 0), (3, 64, 0), (3, 32, 1), (3, 32, 2))
"""Kind, inputs that share a scale, and how scales lie, of all that decoder.c multiplies by."""


class _Matrix(NamedTuple):
    """W as decoder.c has it: numbers and pointers to what is held; and W (out, in) in float64 as it multiplies."""

    pointers: Tensor
    held: list[Tensor]
    dense: Tensor

    @classmethod
    def of(cls, bench: Bench, how: tuple[int, int, int], out: int, inputs: int) -> _Matrix:
        kind, size, constants = how
        if kind == 0:
            W = bench.normal(out, inputs) / 8
            return cls._made(0, 0, 0, [_panels(W)], W)
        if kind == 1:
            q, row = bench.whole(-127, 128, out, inputs, dtype=torch.int8), _scales(bench, out, 1) / 10
            fours = _panels(q).unflatten(1, (-1, 2)).unflatten(3, (4, 4, 4)).permute(0, 1, 3, 4, 2, 5, 6)
            table = torch.arange(128.0).bfloat16().view(torch.uint8).view(128, 2).t().contiguous()
            return cls._made(1, 0, 0, [fours.contiguous(), _of_panels(row), table], q.double() * row.double())
        table = bench.normal(16, dtype=torch.float32)
        if kind == 2:
            q = bench.whole(-127, 128, out, inputs, dtype=torch.int8)
            codes, values, shrink = _panels(q), q.float(), 10
        else:
            q = bench.whole(0, 16, out, inputs, dtype=torch.uint8)
            low, high = _of_sixteens(q)
            codes, values, shrink = (low | high << 4).contiguous(), table[q.int()], 1
        scale, zero = _scales(bench, out, inputs // size) / shrink, _scales(bench, out, inputs // size)
        if constants == 2:
            scale, zero = scale.to(_BF16).float(), zero.to(_BF16).float()
            scales = torch.stack([_of_panels(scale), _of_panels(zero)], 3).to(_BF16)
        else:
            scales = torch.stack([_of_panels(scale), _of_panels(zero)], 2) if constants else _of_panels(scale)
        W = values.view(out, -1, size) * scale[..., None] + (zero[..., None] if constants else 0)
        return cls._made(kind, size, constants, [codes, scales, table], W.flatten(1).to(_BF16))

    @classmethod
    def _made(cls, kind: int, size: int, constants: int, held: list[Tensor], dense: Tensor) -> _Matrix:
        own = [*at(*held), None, None][:3]
        return cls(torch.tensor([kind, size, constants, 0, *(p or 0 for p in own)]), held, dense.double())

    def in_tiles(self, tiles: bool) -> _Matrix:
        pointers = self.pointers.clone()
        pointers[3] = tiles
        return self._replace(pointers=pointers)


def _scales(bench: Bench, out: int, groups: int) -> Tensor:
    return bench.normal(out, groups, dtype=torch.float32).abs() / 50


def _of_panels(t: Tensor) -> Tensor:
    """(out, groups) -> (out / 64, groups, 64)"""
    whole: Tensor = F.pad(t, (0, 0, 0, -len(t) % 64)).unflatten(0, (-1, 64))
    return whole.transpose(1, 2).contiguous()


def _of_sixteens(q: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high half bytes of (out, in) codes, (out / 64, in / 8, 4, 16, 4)."""
    pairs = _panels(q).unflatten(1, (-1, 4)).unflatten(3, (4, 2, 8))  # panel, eight, pair, sixteen, half, column, input
    low, high = pairs.permute(0, 1, 3, 5, 6, 2, 4).unbind(-1)
    return low.flatten(3, 4), high.flatten(3, 4)


def _panels(W: Tensor) -> Tensor:
    out, n = W.shape
    return F.pad(W, (0, 0, 0, -out % 64)).view(-1, 64, n // 2, 2).permute(0, 2, 1, 3).contiguous()


def _panel_products(bench: Bench, product: Any, inputs: int, kinds: Sequence[tuple[int, int, int]]) -> Iterator[Same]:
    for kind in kinds:
        w = _Matrix.of(bench, kind, 80, inputs)
        for rows in (0, 1, 2, 3, 7, 17, 70):
            x, y = bench.normal(rows, inputs), bench.normal(rows, 80)
            for bias, onto in ((None, 0), (bench.normal(80), 0), (None, 1)):
                got = bench.room(like=y)
                product(x.data_ptr(), rows, inputs, *at(w.pointers, bias, got), 80, onto, _THREADS)
                want = x.double() @ w.dense.T + (0 if bias is None else bias.double())
                yield Same(got, want.to(_BF16).double() + y.double() if onto else want, 2**-6, 2**-6)


@_kernel_check("panel_product")
def _panel_product(bench: Bench) -> Iterator[Same]:
    yield from _panel_products(bench, bench.library.panel_product, 192, _MATRICES)


@_kernel_check("amx_panel_product")
def _amx_panel_product(bench: Bench) -> Iterator[Same]:
    """Of inputs that are more than one piece of codes, and of some that do not fill their last tile."""
    for inputs, kinds in ((320, _MATRICES), (200, (_MATRICES[0], _MATRICES[1], (3, 8, 0)))):
        yield from _panel_products(bench, bench.library.amx_panel_product, inputs, kinds)


@_kernel_check("decode")
def _decode(bench: Bench) -> Iterator[Same]:
    """A layer over the last tokens of two sequences whose others are in the cache, under two adapters."""
    c, dim, ffn, own = _Cache.of(bench), 64, 192, [6, 1]
    heads, wide = c.HEADS * c.D, (c.HEADS + 2 * c.KV) * c.D
    before = [n - m for n, m in zip(c.LENGTHS, own, strict=True)]
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(c.LENGTHS, own, strict=True)])
    places = torch.cat([c.slots()[:35][before[0] :], c.slots()[35:][before[1] :]])
    starts, tables, (cos, sin) = torch.tensor([0, 6, 7]), c.tables(), _tables(bench, c.D)
    norm, after, q_norm, k_norm, b_qkv, b_out = (bench.normal(n) for n in (dim, dim, c.D, c.D, wide, dim))
    sizes, numbers = torch.tensor([dim, c.HEADS, c.KV, c.D, ffn]), torch.tensor([1e-5, c.D**-0.5])
    adapters = [_Adapters.of(bench, *size) for size in ((dim, wide), (heads, dim), (dim, 2 * ffn), (ffn, dim))]
    for adapter in adapters[1:]:
        adapter.strengths.copy_(adapters[0].strengths)
    records, u = torch.stack([a.table for a in adapters]).contiguous(), bench.room(7, 16)
    shapes = (wide, dim), (dim, heads), (2 * ffn, dim), (dim, ffn)
    for first in range(len(_MATRICES)):
        kinds = (_MATRICES * 2)[first : first + 4]
        qkv, out, gate_up, down = (_Matrix.of(bench, kind, *of) for kind, of in zip(kinds, shapes, strict=True))
        x = bench.normal(7, dim)
        for adapted, tiles in itertools.product((False, True), (False, True)):
            if tiles and not bench.library.has("amx_panel_product"):
                continue
            qkv, out, gate_up, down = (w.in_tiles(tiles) for w in (qkv, out, gate_up, down))
            K, V = (bench.room(like=t) for t in c.pages(torch.cat(c.k), torch.cat(c.v)))
            fields = at(
                norm, qkv.pointers, b_qkv, q_norm, k_norm, out.pointers, b_out, after, gate_up.pointers, down.pointers
            )
            layer = torch.tensor([f or 0 for f in (*fields, 0, *at(K, V))])
            got, room = bench.room(like=x), bench.room(7 * (dim + wide + heads + 3 * ffn))
            a = adapters[0]
            segments = [*at(records), 2, *at(a.starts, a.rows, a.strengths, u), 16] if adapted else [0] * 7
            bench.library.decode(
                got.data_ptr(),
                7,
                layer.data_ptr(),
                1,
                *at(sizes, numbers, cos, sin, positions, places, starts),
                2,
                tables.data_ptr(),
                tables.shape[1],
                35,
                *segments,
                room.data_ptr(),
                _THREADS,
            )

            def onto(group: int, given: Tensor, y: Tensor, adapted: bool = adapted) -> Tensor:
                return (adapters[group].onto(given, y) if adapted else y).to(_BF16)

            h = F.rms_norm(x.double(), (dim,), norm.double(), 1e-5).to(_BF16)
            made = onto(0, h, (h.double() @ qkv.dense.T + b_qkv.double()).to(_BF16)).view(7, -1, c.D)
            q, k, v = made.split([c.HEADS, c.KV, c.KV], 1)
            q, k = (_turn(t, w, cos[positions], sin[positions]).to(_BF16) for t, w in ((q, q_norm), (k, k_norm)))
            joined = [
                [torch.cat([old[:n], new]) for old, n, new in zip(all_, before, t.split(own), strict=True)]
                for all_, t in ((c.k, k), (c.v, v))
            ]
            seen = _Cache(*joined).attended(q, own, c.D**-0.5, 0.0, 0).to(_BF16)
            y = onto(1, seen, (x.double() + (seen.double() @ out.dense.T + b_out.double()).to(_BF16)).to(_BF16))
            h = F.rms_norm(y.double(), (dim,), after.double(), 1e-5).to(_BF16)
            gate, up = onto(2, h, (h.double() @ gate_up.dense.T).to(_BF16)).double().chunk(2, -1)
            act = (F.silu(gate) * up).to(_BF16)
            want = onto(3, act, (y.double() + (act.double() @ down.dense.T).to(_BF16)).to(_BF16))
            yield Same(got, want, 2**-4, 2**-2)
