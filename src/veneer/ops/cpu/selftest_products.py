"""The checks of selftest.py for what needs AVX512-BF16: attention in tiles, thin products, serving."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.cpu import Pair, strides
from veneer.ops.cpu.selftest import BF16, THREADS, Bench, Same, at, check

__all__ = ["SUM"]

SUM = {"near": 2**-6, "far": 2e-2}
"""For sums of hundreds of products whose factors were rounded to bfloat16 on the way."""


# -- a training step ---------------------------------------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(n, tokens, heads, d): softmax(q·kᵀ/4)·v, and log Σ exp of the scores."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = 0.25 * q @ k.mT
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


_SIZES = [(2, 70, 3, 40), (2, 300, 3, 40)]  # queries, keys: more than a tile of each


@check("attend")
def _attend(o: Bench) -> Iterator[Same]:
    (n, S, heads, d), T = _SIZES[0], _SIZES[1][1]
    q, k, v = (o.normal(*size) for size in (_SIZES[0], _SIZES[1], _SIZES[1]))
    out, lse = o.room(n, S, heads, d), o.room(n, heads, S, dtype=torch.float32)
    o.library.attend(*at(q, k, v, out, lse), strides(q, k, v, out), n, heads, S, T, d, 0.25, THREADS)
    want, log_sum = _attention(q, k, v)
    yield Same(out, want, far=2**-8)
    yield Same(lse, log_sum, 1e-3, 1e-3)


@check("attend_backward")
def _attend_backward(o: Bench) -> Iterator[Same]:
    (n, S, heads, d), T = _SIZES[0], _SIZES[1][1]
    q, k, v = (o.normal(*size) for size in (_SIZES[0], _SIZES[1], _SIZES[1]))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    want, log_sum = _attention(*wide)
    out, lse, g = want.detach().to(BF16).contiguous(), log_sum.detach().float().contiguous(), o.normal(n, S, heads, d)
    made = [o.room(*t.shape) for t in (q, k, v)]
    tensors = (q, k, v, out, g, *made)
    o.library.attend_backward(*at(*tensors, lse), strides(*tensors), n, heads, S, T, d, 0.25, THREADS)
    for got, slope in zip(made, torch.autograd.grad(want, wide, g.double()), strict=True):
        yield Same(got, slope, **SUM)


@dataclass(frozen=True)
class _Thin:
    """Two pairs of ranks 5 and 16 on columns 0 … 32 and 32 … 112 of 112, over 48 inputs, and 197 rows."""

    pairs: list[tuple[Tensor, Tensor, int, int, float]]
    table: Any

    ROWS: ClassVar[int] = 197
    IN: ClassVar[int] = 48
    OUT: ClassVar[int] = 112
    RANKS: ClassVar[int] = 32  # padded to sixteens

    @classmethod
    def of(cls, o: Bench) -> _Thin:
        wide = torch.float32
        pairs = [
            (o.normal(5, cls.IN, dtype=wide) / 4, o.normal(32, 5, dtype=wide), 0, 32, 0.5),
            (o.normal(16, cls.IN, dtype=wide) / 4, o.normal(80, 16, dtype=wide), 32, 112, 2.0),
        ]
        return cls(pairs, (Pair * 2)(*(Pair(*at(A, B), first, last, len(A), s) for A, B, first, last, s in pairs)))

    def each(self) -> Iterator[tuple[int, Tensor, Tensor, slice, slice, float]]:
        """(i, A, B, its columns, its part of the ranks, scale), in what the kernels round A and s·B to."""
        for i, (A, B, first, last, s) in enumerate(self.pairs):
            own = slice(16 * i, 16 * i + len(A))
            yield i, A.bfloat16().double(), (s * B).bfloat16().double(), slice(first, last), own, s


@check("thin_add")
def _thin_add(o: Bench) -> Iterator[Same]:
    t = _Thin.of(o)
    x, y = o.normal(t.ROWS, t.IN), o.normal(t.ROWS, t.OUT)
    got, u = o.room(like=y), o.room(t.ROWS, t.RANKS)
    o.library.thin_add(t.table, 2, *at(x, got, u), t.ROWS, t.IN, t.OUT, THREADS)
    want, thin = y.double(), torch.zeros(u.shape, dtype=torch.float64)
    for _, A, B, columns, ranks, _s in t.each():
        thin[:, ranks] = x.double() @ A.T
        want[:, columns] += u[:, ranks].double() @ B.T
    yield Same(u, thin, far=2**-7)
    yield Same(got, want, far=2**-6)


@check("thin_through")
def _thin_through(o: Bench) -> Iterator[Same]:
    t = _Thin.of(o)
    g, dx = o.normal(t.ROWS, t.OUT), o.normal(t.ROWS, t.IN)
    du, got = o.room(t.ROWS, t.RANKS), o.room(like=dx)
    alone = o.room(t.ROWS, t.RANKS)
    o.library.thin_through(t.table, 2, *at(g, du, got), t.ROWS, t.IN, t.OUT, THREADS)
    o.library.thin_through(t.table, 2, *at(g, alone, None), t.ROWS, t.IN, t.OUT, THREADS)
    want, thin = dx.double(), torch.zeros(du.shape, dtype=torch.float64)
    for _, A, B, columns, ranks, _s in t.each():
        thin[:, ranks] = g[:, columns].double() @ B
        want += du[:, ranks].double() @ A
    yield Same(du, thin, **SUM)
    yield Same(alone, thin, **SUM)
    yield Same(got, want, far=2**-6)


@check("thin_gradients")
def _thin_gradients(o: Bench) -> Iterator[Same]:
    t = _Thin.of(o)
    g, x, u, du = (o.normal(t.ROWS, n) for n in (t.OUT, t.IN, t.RANKS, t.RANKS))
    factors = [A for A, *_ in t.pairs], [B for _, B, *_ in t.pairs]
    made = [[o.room(*factor.shape, dtype=torch.float32) for factor in each] for each in factors]
    tables = [(ctypes.c_void_p * 2)(*at(*tensors)) for tensors in made]
    o.library.thin_gradients(t.table, 2, *at(g, x, u, du), *tables, t.ROWS, t.IN, t.OUT, THREADS)
    for i, _A, _B, columns, ranks, s in t.each():
        yield Same(made[0][i], du[:, ranks].double().T @ x.double(), 1e-4, 1e-3)
        yield Same(made[1][i], s * g[:, columns].double().T @ u[:, ranks].double(), 1e-4, 1e-3)


# -- serving -----------------------------------------------------------------------------------------------------------


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
    def of(cls, o: Bench, inputs: int, columns: int) -> _Adapters:
        A = [o.normal(16, inputs) / 8 for _ in range(2)]
        B = [
            [(o.normal(16, 6) / 8, 0, 0), (o.normal(columns - 16, 10) / 8, 16, 6)],
            [(o.normal(columns - 16, 16) / 8, 16, 0)],
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
        return cls(A, B, held, table, starts, rows, o.normal(7, dtype=torch.float32))

    def onto(self, x: Tensor, y: Tensor) -> Tensor:
        """y with both adapters' products, float64; u rounded as the kernel rounds it."""
        out = y.double().clone()
        for i in range(2):
            for at_ in range(int(self.starts[i]), int(self.starts[i + 1])):
                row, s = int(self.rows[at_]), float(self.strengths[at_])
                u = (s * (x[row].double() @ self.A[i].double().T)).to(BF16).double()
                for part, first, rank in self.B[i]:
                    out[row, first : first + len(part)] += part.double() @ u[rank : rank + part.shape[1]]
        return out

    def arguments(self, u: Tensor) -> list[int | None]:
        return [*at(self.table), 2, *at(self.starts, self.rows, self.strengths, u), 16]


@check("thin_rows")
def _thin_rows(o: Bench) -> Iterator[Same]:
    a = _Adapters.of(o, 32, 40)
    x, y, u = o.normal(7, 32), o.normal(7, 40), o.room(7, 16)
    got = o.room(like=y)
    o.library.thin_rows(x.data_ptr(), 32, got.data_ptr(), 40, *a.arguments(u), THREADS)
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
    def of(cls, o: Bench) -> _Cache:
        k, v = ([o.normal(n, cls.KV, cls.D) for n in cls.LENGTHS] for _ in range(2))
        return cls(k, v)

    def slots(self) -> Tensor:
        slots = [b[t // 16] * 16 + t % 16 for b, n in zip(self.BLOCKS, self.LENGTHS, strict=True) for t in range(n)]
        return torch.tensor(slots)

    def tables(self) -> Tensor:
        return torch.tensor([self.BLOCKS[0], (*self.BLOCKS[1], 0)])

    def pages(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of all tokens as the kernels lay them: (6, kv, d / 2, 16, 2) and (6, kv, 8, d, 2)."""
        K, V = (torch.zeros(6, 16, self.KV, self.D, dtype=BF16) for _ in range(2))
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


@check("store_rows")
def _store_rows(o: Bench) -> Iterator[Same]:
    c = _Cache.of(o)
    k, v, slots, starts = torch.cat(c.k), torch.cat(c.v), c.slots(), torch.tensor([0, 35, 55])
    wants = c.pages(k, v)
    K, V = (o.room(like=torch.zeros_like(t)) for t in wants)
    width = c.KV * c.D
    o.library.store_rows(k.data_ptr(), width, v.data_ptr(), width, *at(slots, starts), 2, c.KV, c.D, *at(K, V), THREADS)
    for got, want in zip((K, V), wants, strict=True):
        yield Same(got, want, 0, 0)


def _tables(o: Bench, d: int) -> tuple[Tensor, Tensor]:
    angle = o.normal(40, d // 2, dtype=torch.float32)
    return angle.cos(), angle.sin()


def _turn(x: Tensor, w: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """x (tokens, heads, d) normed by w and turned, float64; cos and sin (tokens, d / 2)."""
    x = x.double() if w is None else F.rms_norm(x.double(), (x.shape[-1],), w.double(), 1e-5)
    (a, b), c, s = x.chunk(2, -1), cos.double()[:, None], sin.double()[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


@check("turn_and_store")
def _turn_and_store(o: Bench) -> Iterator[Same]:
    c, starts = _Cache.of(o), torch.tensor([0, 35, 55])
    positions = torch.cat([torch.arange(n) for n in c.LENGTHS])
    cos, sin = _tables(o, c.D)
    for norms in ((None, None), (o.normal(c.D), o.normal(c.D))):
        given = o.normal(55, (c.HEADS + 2 * c.KV) * c.D)
        qkv, places = o.room(like=given), c.slots()
        K, V = (o.room(like=torch.zeros(6, c.KV, 16 * c.D, dtype=BF16)) for _ in range(2))
        o.library.turn_and_store(
            qkv.data_ptr(), c.HEADS, c.KV, c.D, *at(cos, sin, *norms), 1e-5, *at(positions, places, starts), 2,
            *at(K, V), THREADS,
        )  # fmt: skip
        q, k, v = given.view(55, -1, c.D).split([c.HEADS, c.KV, c.KV], 1)
        q, k = (_turn(t, w, cos[positions], sin[positions]) for t, w in ((q, norms[0]), (k, norms[1])))
        yield Same(qkv, torch.cat([q, k, v.double()], 1).flatten(1))
        stored = qkv.view(55, -1, c.D)[:, c.HEADS :].split(c.KV, 1)
        for got, want in zip((K, V), c.pages(*stored), strict=True):
            yield Same(got, want.view(got.shape), 0, 0)


@check("paged_attend")
def _paged_attend(o: Bench) -> Iterator[Same]:
    c, own = _Cache.of(o), [7, 1]  # the last tokens of a prompt beside one of an answer
    K, V = c.pages(torch.cat(c.k), torch.cat(c.v))
    q = o.normal(8, (c.HEADS + 2) * c.D)  # rows are longer than their queries
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(c.LENGTHS, own, strict=True)])
    starts, tables = torch.tensor([0, 7, 8]), c.tables()
    for cap, window in ((0.0, 0), (2.0, 0), (0.0, 9)):
        out = o.room(8, c.HEADS * c.D)
        o.library.paged_attend(
            q.data_ptr(), q.shape[1], out.data_ptr(), c.HEADS, c.KV, c.D, *at(positions, starts), 2, tables.data_ptr(),
            tables.shape[1], *at(K, V), 0.25, cap, window, 35, THREADS,
        )  # fmt: skip
        wide = q[:, : c.HEADS * c.D].view(8, c.HEADS, c.D)
        yield Same(out, c.attended(wide, own, 0.25, cap, window), far=2**-7)


class _Matrix(NamedTuple):
    """W as panel_product takes it, and W (out, in) in float64 as it multiplies."""

    kind: int
    codes: Tensor
    scales: Tensor | None
    dense: Tensor

    @classmethod
    def of(cls, o: Bench, kind: int, out: int, inputs: int) -> _Matrix:
        if kind == 0:
            W = o.normal(out, inputs) / 8
            return cls(0, _panels(W), None, W.double())
        if kind == 1:
            q, row = o.whole(-127, 128, out, inputs, dtype=torch.int8), o.normal(out, dtype=torch.float32).abs() / 500
            return cls(1, _panels(q), F.pad(row, (0, -out % 64)), q.double() * row.double()[:, None])
        q = o.whole(0, 16, out, inputs, dtype=torch.uint8)
        scale, zero = o.normal(out, inputs // 32).abs() / 50, o.normal(out, inputs // 32) / 50
        low, high = _panels(q).unflatten(2, (4, 2, 8)).flatten(4).unbind(3)
        both = F.pad(torch.stack([scale, zero], -1), (0, 0, 0, 0, 0, -out % 64))
        dense = (q.view(out, -1, 32).float() - 8) * scale[..., None].float() + zero[..., None].float()
        scales = both.unflatten(0, (-1, 64)).transpose(1, 2).contiguous()
        return cls(2, low | high << 4, scales, dense.flatten(1).to(BF16).double())


def _panels(W: Tensor) -> Tensor:
    out, n = W.shape
    return F.pad(W, (0, 0, 0, -out % 64)).view(-1, 64, n // 2, 2).permute(0, 2, 1, 3).contiguous()


@check("panel_product")
def _panel_product(o: Bench) -> Iterator[Same]:
    for kind in (0, 1, 2):
        w = _Matrix.of(o, kind, 80, 160)
        for rows in (1, 2, 3, 70):
            x, y = o.normal(rows, 160), o.normal(rows, 80)
            for bias, onto in ((None, 0), (o.normal(80), 0), (None, 1)):
                got = o.room(like=y)
                o.library.panel_product(
                    x.data_ptr(), rows, 160, kind, *at(w.codes, w.scales, bias, got), 80, onto, THREADS
                )
                want = x.double() @ w.dense.T + (0 if bias is None else bias.double())
                yield Same(got, want.to(BF16).double() + y.double() if onto else want, 2**-6, 2**-6)


@check("decode")
def _decode(o: Bench) -> Iterator[Same]:
    """A layer over the last tokens of two sequences whose others are in the cache, under two adapters."""
    c, dim, ffn, own = _Cache.of(o), 64, 96, [6, 1]
    heads, wide = c.HEADS * c.D, (c.HEADS + 2 * c.KV) * c.D
    before = [n - m for n, m in zip(c.LENGTHS, own, strict=True)]
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(c.LENGTHS, own, strict=True)])
    places = torch.cat([c.slots()[:35][before[0] :], c.slots()[35:][before[1] :]])
    starts, tables, (cos, sin) = torch.tensor([0, 6, 7]), c.tables(), _tables(o, c.D)
    norm, after, q_norm, k_norm, b_qkv, b_out = (o.normal(n) for n in (dim, dim, c.D, c.D, wide, dim))
    sizes, numbers = [dim, c.HEADS, c.KV, c.D, ffn], torch.tensor([1e-5, c.D**-0.5])
    adapters = [_Adapters.of(o, *size) for size in ((dim, wide), (heads, dim), (dim, 2 * ffn), (ffn, dim))]
    for adapter in adapters[1:]:
        adapter.strengths.copy_(adapters[0].strengths)
    records, u = torch.stack([a.table for a in adapters]).contiguous(), o.room(7, 16)
    for kind in (0, 1, 2):
        qkv, out, gate_up, down = (
            _Matrix.of(o, kind, *size) for size in ((wide, dim), (dim, heads), (2 * ffn, dim), (dim, ffn))
        )
        x = o.normal(7, dim)
        for thin in (False, True):
            K, V = (o.room(like=t) for t in c.pages(torch.cat(c.k), torch.cat(c.v)))
            fields = at(
                norm, qkv.codes, qkv.scales, b_qkv, q_norm, k_norm, out.codes, out.scales, b_out, after, gate_up.codes,
                gate_up.scales, down.codes, down.scales,
            )  # fmt: skip
            layer = torch.tensor([f or 0 for f in (*fields, 0, *at(K, V))])
            got, room = o.room(like=x), o.room(7 * (dim + wide + heads + 3 * ffn))
            own_sizes = torch.tensor([*sizes, kind])
            a = adapters[0]
            segments = [*at(records), 2, *at(a.starts, a.rows, a.strengths, u), 16] if thin else [0] * 7
            o.library.decode(
                got.data_ptr(), 7, layer.data_ptr(), 1, *at(own_sizes, numbers, cos, sin, positions, places, starts), 2,
                tables.data_ptr(), tables.shape[1], 35, *segments, room.data_ptr(), THREADS,
            )  # fmt: skip

            def onto(group: int, given: Tensor, y: Tensor, thin: bool = thin) -> Tensor:
                return (adapters[group].onto(given, y) if thin else y).to(BF16)

            h = F.rms_norm(x.double(), (dim,), norm.double(), 1e-5).to(BF16)
            made = onto(0, h, (h.double() @ qkv.dense.T + b_qkv.double()).to(BF16)).view(7, -1, c.D)
            q, k, v = made.split([c.HEADS, c.KV, c.KV], 1)
            q, k = (_turn(t, w, cos[positions], sin[positions]).to(BF16) for t, w in ((q, q_norm), (k, k_norm)))
            joined = [
                [torch.cat([old[:n], new]) for old, n, new in zip(all_, before, t.split(own), strict=True)]
                for all_, t in ((c.k, k), (c.v, v))
            ]
            seen = _Cache(*joined).attended(q, own, c.D**-0.5, 0.0, 0).to(BF16)
            y = onto(1, seen, (x.double() + (seen.double() @ out.dense.T + b_out.double()).to(BF16)).to(BF16))
            h = F.rms_norm(y.double(), (dim,), after.double(), 1e-5).to(BF16)
            gate, up = onto(2, h, (h.double() @ gate_up.dense.T).to(BF16)).double().chunk(2, -1)
            act = (F.silu(gate) * up).to(BF16)
            want = onto(3, act, (y.double() + (act.double() @ down.dense.T).to(BF16)).to(BF16))
            yield Same(got, want, 2**-4, 2**-2)
