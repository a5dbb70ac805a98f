"""Adapters as the runner uses them, and their low-rank products for a batch where every row has a mix of its own.

    y[i] += Σ over the mix of row i:  strength · s·B·(A·x[i])           for each projection
          +                           strength · (g - 1) ⊙ (y₀[i] - b)  DoRA: g = m / ‖W + s·B·A‖, y₀ the base's

Projections that share an input (q, k, v; gate, up) are one *group*: their A lie below one another, so each adapter
takes two products a group for all of its rows, whatever its ranks. Rows without an adapter are not touched. `add`
is the fast form (ops/cpu/serving.c) where it runs and `add_reference` everywhere else; a row's
result depends on nobody in its batch (bit for bit by the first; by the others where the layout has `rows`, else within
rounding).

What is no pair on a projection, the embedding or the head (full copies, token rows, LoHa …) has no low-rank form:
`low_rank_problems` says so, and the runner then takes the base through its own modules with core's attachment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.core.experts import expert_product, has_grouped_product
from veneer.core.merge import adapted_norm
from veneer.ops.device_transfer import made_up, put_numbers, sent
from veneer.ops.dispatch import dispatch
from veneer.ops.quantized import dequantized
from veneer.serve.forward.weights import in_blocks

_PARTS = 3
_RECORD = 2 + 5 * _PARTS
"""Numbers of an adapter's record in ops/cpu/serving.c, for each group: the address of A (0: nothing here) and its rank,
then for each part the address of B (0: no part), its first column in y, columns, first row in A, rank."""
_STACK_BYTES = 1 << 30
"""The most that the stacked factors of a step's adapters take; for more, each adapter is multiplied by itself."""


@dataclass(frozen=True, eq=False)
class Group:
    """Linear modules with one input: names, sizes (out) and biases, in the order of the output's columns. `weight`: the
    i-th one's (out, in), as it is served."""

    modules: tuple[str, ...]
    sizes: tuple[int, ...]
    biases: tuple[Tensor | None, ...]
    weight: Callable[[int], Tensor]

    @property
    def columns(self) -> list[tuple[int, int]]:
        out, at = [], 0
        for size in self.sizes:
            out.append((at, size))
            at += size
        return out

    @property
    def bias(self) -> Tensor | None:
        """Of all columns; None where no module has one."""
        some = next((b for b in self.biases if b is not None), None)
        if some is None:
            return None
        parts = zip(self.sizes, self.biases, strict=True)
        return torch.cat([some.new_zeros(n) if b is None else b.detach() for n, b in parts])


@dataclass(frozen=True, eq=False)
class BaseLayout:
    """Every group of a base, and the name of its embedding. At most three modules a group. `rows`: of a product at a
    time, see packed.in_blocks."""

    groups: tuple[Group, ...]
    embedding: str
    dtype: torch.dtype
    device: torch.device
    rows: int = 0

    @property
    def names(self) -> set[str]:
        return {name for group in self.groups for name in group.modules}


@dataclass(eq=False)
class _PackedB:
    """One module's own B in a group: s·B, its first column in y, its first row in A. For the kernel (rank/2, columns,
    2), for torch (rank, columns)."""

    B: Tensor
    column: int
    rank_from: int

    @property
    def rank(self) -> int:
        return len(self.B) * (2 if self.B.ndim == 3 else 1)

    def turned(self) -> Tensor:
        """(rank, columns)"""
        return self.B if self.B.ndim == 2 else self.B.permute(0, 2, 1).flatten(0, 1)


@dataclass(eq=False)
class PackedAdapter:
    """An adapter as a batch of rows is multiplied by it. `groups`: group -> (A, parts), laid out for whoever multiplies
    by them: the kernel, or torch, which would have to turn every one of them in every step. `gains`: group -> (g - 1
    (columns), bias or None). `embedding`: (Aᵀ (rows, rank), (s·B)ᵀ (rank, dim)). `records`: of the groups, for the
    kernel, on the CPU. `rank`: the largest of a group's sums of ranks. `key`: its digest; a row adds up its adapters in
    the order of their keys, whoever shares its batch."""

    adapter: Adapter
    key: str
    groups: dict[int, tuple[Tensor, list[_PackedB]]]
    gains: dict[int, tuple[Tensor, Tensor | None]]
    embedding: tuple[Tensor, Tensor] | None
    records: Tensor
    rank: int
    bytes: int = 0


def low_rank_problems(adapter: Adapter, layout: BaseLayout) -> list[str]:
    """Why `adapter` has no low-rank form here, one line each."""
    known = layout.names
    out = [f"{n}: a full copy" for n in adapter.modules]
    out += [f"{n}: token rows" for n in adapter.token_rows]
    out += [f"{n}: a {d.form} delta" for n, d in adapter.deltas.items()]
    for name, pair in adapter.pairs.items():
        if name == layout.embedding and pair.kind == "embedding" and pair.magnitude is None:
            continue
        if name not in known or pair.kind != "linear":
            out.append(f"{name}: a pair on something that is no projection of this base")
        elif pair.magnitude is not None and pair.magnitude.ndim > 1:
            out.append(f"{name}: DoRA with a norm for each input")
    return out


@torch.no_grad()
def pack_adapter(adapter: Adapter, layout: BaseLayout, key: str = "") -> PackedAdapter:
    """An adapter without `low_rank_problems`, each pair's `low_rank()` in the base's dtype and in the order of whoever
    multiplies by it; scales are multiplied in and rounded once."""
    groups: dict[int, tuple[Tensor, list[_PackedB]]] = {}
    gains: dict[int, tuple[Tensor, Tensor | None]] = {}
    records = [[0] * _RECORD for _ in layout.groups]
    device, dtype = layout.device, layout.dtype
    probe = torch.empty(0, 2, dtype=dtype, device=device)
    native = dispatch("rows_low_rank", probe, probe) is not None
    widest, held = 2, 0
    for g, group in enumerate(layout.groups):
        rows: list[Tensor] = []
        parts: list[_PackedB] = []
        gain: Tensor | None = None
        for i, (name, (column, n)) in enumerate(zip(group.modules, group.columns, strict=True)):
            if name not in adapter.pairs:
                continue
            pair = adapter.pairs[name]
            product = pair.low_rank()
            A, B = product.A.to(device), product.B.to(device).float() * product.scale
            if pair.magnitude is not None:
                own = _gain(pair, group.weight(i))
                B = B * own[:, None]
                gain = torch.zeros(sum(group.sizes), device=device) if gain is None else gain
                gain[column : column + n] = own - 1
            if len(A) % 2:  # the kernel takes two ranks at a time
                A, B = (torch.nn.functional.pad(t, p) for t, p in ((A, (0, 0, 0, 1)), (B, (0, 1))))
            B = B.to(device, dtype)
            B = B.unflatten(1, (-1, 2)).permute(1, 0, 2) if native else B.t()
            parts.append(_PackedB(B.contiguous(), column, sum(map(len, rows))))
            rows.append(A.to(device, dtype))
        if not rows:
            continue
        whole = torch.cat(rows)
        if native and whole.shape[1] % 2 == 0:
            whole = _sixteens(whole)
        ranks = len(whole) * (16 if whole.ndim == 4 else 1)
        widest = max(widest, ranks)
        flat = [_address(whole), ranks]
        for part in parts:
            flat += [_address(part.B), part.column, part.B.shape[1], part.rank_from, part.rank]
        records[g][: len(flat)] = flat
        groups[g] = whole, parts
        held += whole.nbytes + sum(p.B.nbytes for p in parts)
        if gain is not None:
            gains[g] = gain, group.bias
            held += gain.nbytes
    embedding = None
    if (pair_e := adapter.pairs.get(layout.embedding)) is not None and pair_e.kind == "embedding":
        product = pair_e.low_rank()
        A, B = product.A.to(device), product.B.to(device).float() * product.scale
        embedding = A.t().to(device, dtype).contiguous(), B.t().to(device, dtype).contiguous()
        held += embedding[0].nbytes + embedding[1].nbytes
    table = torch.tensor(records, dtype=torch.int64)
    return PackedAdapter(adapter, key, groups, gains, embedding, table, widest, held)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or made_up(tensor) else tensor.data_ptr()


def _add_rows(y: Tensor, rows: Tensor | slice, more: Tensor) -> None:
    if isinstance(rows, slice):
        y[rows] += more
    else:
        y.index_add_(0, rows, more)


def _sixteens(A: Tensor) -> Tensor:
    """(rank, in), `in` even, as the kernel reads it: (⌈rank/16⌉, in/2, 16, 2), zeros where there is nothing."""
    rank, n = A.shape
    A = torch.nn.functional.pad(A, (0, 0, 0, -rank % 16))
    return A.view(-1, 16, n // 2, 2).permute(0, 2, 1, 3).contiguous()


def _dense(A: Tensor) -> Tensor:
    """(rank, in) again, with rows of zeros behind it."""
    return A if A.ndim == 2 else A.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def _gain(pair: Pair, weight: Tensor) -> Tensor:
    """g = m / ‖W + s·B·A‖ in float32: (out,)."""
    assert pair.magnitude is not None
    whole = pair.collapsed()
    moved = Pair(whole.A.to(weight.device).float(), whole.B.to(weight.device).float(), whole.scale, whole.kind)
    return pair.magnitude.to(weight.device).float() / adapted_norm(dequantized(weight).float(), moved).float()


@dataclass(eq=False)
class _Tables:
    """The records of some adapters side by side, for all groups; made again only when who takes part changes."""

    adapters: tuple[PackedAdapter, ...]
    records: Tensor  # (groups, adapters, _RECORD), on the layout's device
    _stacks: dict[int, tuple[Tensor, list[tuple[int, int, Tensor]]]] = field(default_factory=dict)

    def stacked(self, group: int) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
        """The factors of a group padded to the largest rank: A, (adapters, in, Σ ranks), and of each module its first
        column in y, its first rank and B, (adapters, rank, columns). An adapter without a factor has zeros."""
        if group not in self._stacks:
            own = [(i, *a.groups[group]) for i, a in enumerate(self.adapters) if group in a.groups]
            ranks: dict[int, int] = {}
            for _, _, parts in own:
                for part in parts:
                    ranks[part.column] = max(part.rank, ranks.get(part.column, 0))
            first = dict(zip(ranks, itertools.accumulate(ranks.values(), initial=0), strict=False))
            factors = {part.column: part.turned() for _, _, parts in own for part in parts}
            Bs = {c: B.new_zeros(len(self.adapters), ranks[c], B.shape[1]) for c, B in factors.items()}
            whole = _dense(own[0][1])
            A = whole.new_zeros(len(self.adapters), whole.shape[1], sum(ranks.values()))
            for i, given, parts in own:
                for part in parts:
                    rows = _dense(given)[part.rank_from : part.rank_from + part.rank]
                    A[i, :, first[part.column] : first[part.column] + part.rank] = rows.t()
                    Bs[part.column][i, : part.rank] = part.turned()
            self._stacks[group] = A, [(c, first[c], B) for c, B in Bs.items()]
        return self._stacks[group]


@dataclass(eq=False)
class Segments:
    """The rows of one batch by adapter. `spans`: (first row, end, mix) of each run of rows under one mix."""

    layout: BaseLayout
    adapters: tuple[PackedAdapter, ...]
    spans: Sequence[tuple[int, int, Sequence[tuple[PackedAdapter, float]]]]
    _rows: list[int]
    _strengths: list[float]
    _bounds: list[int]
    tables: _Tables | None = None
    scratch: Tensor | None = None

    @cached_property
    def starts(self) -> Tensor:
        """(adapters + 1,) of each adapter in `rows` and `strengths`."""
        return put_numbers(self.layout.device, self._bounds)[0]

    @cached_property
    def rows(self) -> Tensor:
        return put_numbers(self.layout.device, self._rows)[0]

    @cached_property
    def strengths(self) -> Tensor:
        return sent(torch.tensor(self._strengths, dtype=torch.float32), self.layout.device)

    @classmethod
    def of(
        cls,
        layout: BaseLayout,
        spans: Sequence[tuple[int, int, Sequence[tuple[PackedAdapter, float]]]],
        before: Segments | None = None,
    ) -> Segments | None:
        """None where no row has an adapter. `before`: the last step's; its tables are used again if they still fit."""
        found: dict[int, tuple[PackedAdapter, list[int], list[float]]] = {}
        for first, end, mix in spans:
            for adapter, strength in mix:
                own = found.setdefault(id(adapter), (adapter, [], []))
                own[1].extend(range(first, end))
                own[2].extend([strength] * (end - first))
        if not found:
            return None
        entries = sorted(found.values(), key=lambda e: e[0].key)
        adapters = tuple(e[0] for e in entries)
        bounds = [0]
        for _, rows, _ in entries:
            bounds.append(bounds[-1] + len(rows))
        tables = before.tables if before else None
        all_rows = [row for _, rows, _ in entries for row in rows]
        strengths = [strength for _, _, own in entries for strength in own]
        out = cls(layout, adapters, spans, all_rows, strengths, bounds)
        if tables is not None and tables.adapters == adapters:
            out.tables = tables
        return out

    def add(self, group: int, x: Tensor, y: Tensor, own: Tensor | None = None) -> None:
        """The group's low-rank products onto y (rows, columns), in place; x (rows, in), both contiguous. `own`: the
        base's product, where y is more than that."""
        before = self._before_gains(group, y) if own is None else own
        run = dispatch("rows_low_rank", x, y)
        if run is not None:
            run(x, y, self.pointers(x, group))
        elif has_grouped_product(x) and self._stacks:
            self.add_grouped(group, x, y)
        else:
            self._add_reference(group, x, y)
        self._add_gains(group, before, y)

    def pointers(self, x: Tensor, group: int = 0) -> tuple[int, ...]:
        """What ops/cpu/serving.c reads of these rows from this group on, scratch with it, for an x of that dtype."""
        tables = self._tables()
        if self.scratch is None:
            self.scratch = x.new_empty(len(self.rows), max(a.rank for a in self.adapters))
        return (
            tables.records[group].data_ptr(),
            len(self.adapters),
            self.starts.data_ptr(),
            self.rows.data_ptr(),
            self.strengths.data_ptr(),
            self.scratch.data_ptr(),
            self.scratch.shape[1],
        )

    def _tables(self) -> _Tables:
        if self.tables is None:
            records = torch.stack([a.records for a in self.adapters], 1).contiguous()
            self.tables = _Tables(self.adapters, sent(records, self.layout.device))
        return self.tables

    def add_reference(self, group: int, x: Tensor, y: Tensor) -> None:
        """What `add` does, in torch's own operations."""
        before = self._before_gains(group, y)
        self._add_reference(group, x, y)
        self._add_gains(group, before, y)

    @property
    def gains(self) -> bool:
        """Whether some adapter here is a DoRA."""
        return any(a.gains for a in self.adapters)

    def gained(self, group: int) -> bool:
        """Whether some adapter here is a DoRA in the group, whose `add` needs the base's own output."""
        return any(group in a.gains for a in self.adapters)

    def embed(self, ids: Tensor, x: Tensor) -> None:
        """The embedding's pairs onto x (rows, dim), in place; ids (rows,)."""
        for adapter, rows, strengths in self._each:
            if adapter.embedding is not None:
                A, B = adapter.embedding
                u = (A[ids[rows]] * strengths).to(x.dtype)
                _add_rows(x, rows, in_blocks(lambda part, B=B: part @ B, u, self.layout.rows))  # type: ignore[misc]

    @cached_property
    def _each(self) -> list[tuple[PackedAdapter, Tensor | slice, Tensor]]:
        """Each adapter, its rows (a slice where they lie together, which torch adds to several times faster) and their
        strengths (rows, 1)."""
        out: list[tuple[PackedAdapter, Tensor | slice, Tensor]] = []
        numbers = self._rows
        for adapter, i, j in zip(self.adapters, self._bounds, self._bounds[1:], strict=False):
            first, together = numbers[i], numbers[i:j] == list(range(numbers[i], numbers[i] + j - i))
            rows = slice(first, first + j - i) if together else self.rows[i:j]
            out.append((adapter, rows, self.strengths[i:j, None]))
        return out

    def _add_reference(self, group: int, x: Tensor, y: Tensor) -> None:
        for adapter, rows, strengths in self._each:
            if group in adapter.groups:
                A, parts = adapter.groups[group]
                u = self._product(x[rows], _dense(A).t())
                u = (u * strengths).to(x.dtype)
                for part in parts:
                    made = self._product(u[:, part.rank_from : part.rank_from + part.rank], part.turned())
                    _add_rows(y[:, part.column : part.column + part.B.shape[1]], rows, made)

    @property
    def _stacks(self) -> bool:
        """Whether grouped products over stacked adapters pay, and their memory is small enough."""
        return len(self.adapters) > 1 and not self.layout.rows and sum(a.bytes for a in self.adapters) <= _STACK_BYTES

    def add_grouped(self, group: int, x: Tensor, y: Tensor) -> None:
        """Add the group's low-rank products onto y in place, those of all adapters as one grouped product for A and one
        for each module's B."""
        if not any(group in a.groups for a in self.adapters):
            return
        A, parts = self._tables().stacked(group)
        u = expert_product(x[self.rows], A, self.starts[1:])
        u = (u * self.strengths[:, None]).to(x.dtype)
        for column, first, B in parts:
            made = expert_product(u[:, first : first + B.shape[1]], B, self.starts[1:])
            for (_, rows, _), i, j in zip(self._each, self._bounds, self._bounds[1:], strict=False):
                _add_rows(y[:, column : column + B.shape[2]], rows, made[i:j])

    def _product(self, x: Tensor, W: Tensor) -> Tensor:
        return in_blocks(lambda part: part @ W, x, self.layout.rows)

    def _before_gains(self, group: int, y: Tensor) -> Tensor | None:
        return y.clone() if self.gained(group) else None

    def _add_gains(self, group: int, before: Tensor | None, y: Tensor) -> None:
        """DoRA's share that the base's own output has, of the output before any adapter."""
        if before is None:
            return
        for adapter, rows, strengths in self._each:
            if group in adapter.gains:
                gain, bias = adapter.gains[group]
                own = before[rows].float()
                own = own if bias is None else own - bias.float()
                _add_rows(y, rows, (own * gain * strengths).to(y.dtype))
