"""Adapters as the runner uses them, and their low-rank products for a batch with a mix per row.

    y[i] += Σ over the mix of row i: strength · s·B·(A·x[i])           for each projection
          +                          strength · (g - 1) ⊙ (y₀[i] - b)  DoRA: g = m / ‖W + s·B·A‖, y₀: base

Projections that share an input (q, k, v; gate, up) form a *group*. Their A matrices are stacked, so each
adapter needs two products per group for all of its rows, whatever its ranks. Rows without an adapter are not
touched. `add` uses the fast kernel (ops/cpu/serving.c) if available, torch's products otherwise. With the
kernel, or if the layout has `rows`, a row's result is bit-identical whatever the rest of its batch; otherwise
the results are equal within rounding.

Only pairs on a projection, the embedding or the head have a low-rank form. `low_rank_problems` reports
everything else (full copies, token rows, LoHa …); for such an adapter, the runner uses the base's own modules
with core's attachment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.core.merge import adapted_norm
from veneer.ops.device_transfer import is_fake, put_numbers, sent
from veneer.ops.dispatch import dispatch
from veneer.ops.quantized import dequantized
from veneer.serve.forward.weights import in_blocks

_PARTS = 3
_RECORD = 2 + 5 * _PARTS
"""Number of integers in an adapter's record for one group, in ops/cpu/serving.c.

The address of A (0: none) and its rank, then for each part the address of B (0: no part), its first column in
y, number of columns, first row in A, and rank.
"""


@dataclass(frozen=True, eq=False)
class Group:
    """Linear modules that share an input: names, output sizes and biases, in the order of output columns.

    `weight(i)`: the i-th module's weight (out, in), as served.
    """

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
        """Return the biases of all columns, concatenated, or None if no module has a bias."""
        some = next((b for b in self.biases if b is not None), None)
        if some is None:
            return None
        parts = zip(self.sizes, self.biases, strict=True)
        return torch.cat([some.new_zeros(n) if b is None else b.detach() for n, b in parts])


@dataclass(frozen=True, eq=False)
class BaseLayout:
    """The groups of a base, each with at most three modules, and the name of its embedding.

    `rows`: rows per block of a product; see weights.in_blocks.
    """

    groups: tuple[Group, ...]
    embedding: str
    dtype: torch.dtype
    device: torch.device
    rows: int = 0


@dataclass(eq=False)
class _PackedB:
    """One module's B in a group: s·B, its first column in y, and its first row in A.

    Shape (rank/2, columns, 2) for the kernel, (rank, columns) for torch.
    """

    B: Tensor
    column: int
    rank_from: int

    @property
    def rank(self) -> int:
        return len(self.B) * (2 if self.B.ndim == 3 else 1)

    def as_matrix(self) -> Tensor:
        """Return B as (rank, columns)."""
        return self.B if self.B.ndim == 2 else self.B.permute(0, 2, 1).flatten(0, 1)


@dataclass(eq=False)
class PackedAdapter:
    """An adapter prepared for batched products.

    `key`: the adapter's digest; a row sums its adapters in the order of their keys, so that the result does
    not depend on the batch. `groups`: group -> (A, parts), in the layout of the kernel or of torch, so that
    no step has to transpose them. `gains`: group -> (g - 1 (columns), bias or None). `embedding`: (Aᵀ (rows,
    rank), (s·B)ᵀ (rank, dim)). `records`: the kernel's records of all groups, on the CPU. `rank`: the largest
    sum of ranks in a group.
    """

    adapter: Adapter
    key: str
    groups: dict[int, tuple[Tensor, list[_PackedB]]]
    gains: dict[int, tuple[Tensor, Tensor | None]]
    embedding: tuple[Tensor, Tensor] | None
    records: Tensor
    rank: int
    bytes: int = 0


def low_rank_problems(adapter: Adapter, layout: BaseLayout) -> list[str]:
    """Return the reasons why `adapter` has no low-rank form on this base, one line each."""
    layer_names = {name for group in layout.groups for name in group.modules}
    out = [f"{n}: a full copy" for n in adapter.modules]
    out += [f"{n}: token rows" for n in adapter.token_rows]
    out += [f"{n}: a {d.form} delta" for n, d in adapter.deltas.items()]
    for name, pair in adapter.pairs.items():
        if name == layout.embedding and pair.kind == "embedding" and pair.magnitude is None:
            continue
        if name not in layer_names or pair.kind != "linear":
            out.append(f"{name}: a pair on a module that is not a projection of this base")
        elif pair.magnitude is not None and pair.magnitude.ndim > 1:
            out.append(f"{name}: DoRA with one norm per input")
    return out


@torch.no_grad()
def pack_adapter(adapter: Adapter, layout: BaseLayout, key: str = "") -> PackedAdapter:
    """Prepare an adapter that has no `low_rank_problems`.

    Each pair's `low_rank()` is converted to the base's dtype and to the layout of the kernel or of torch.
    B is multiplied by the scale before it is rounded.
    """
    groups: dict[int, tuple[Tensor, list[_PackedB]]] = {}
    gains: dict[int, tuple[Tensor, Tensor | None]] = {}
    records = [[0] * _RECORD for _ in layout.groups]
    device, dtype = layout.device, layout.dtype
    probe = torch.empty(0, 2, dtype=dtype, device=device)
    native = dispatch("rows_low_rank", probe, probe) is not None
    widest, size = 2, 0
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
                scale = _dora_scale(pair, group.weight(i))
                B = B * scale[:, None]
                gain = torch.zeros(sum(group.sizes), device=device) if gain is None else gain
                gain[column : column + n] = scale - 1
            if len(A) % 2:  # the kernel processes two ranks at a time
                A, B = (torch.nn.functional.pad(t, p) for t, p in ((A, (0, 0, 0, 1)), (B, (0, 1))))
            B = B.to(device, dtype)
            B = B.unflatten(1, (-1, 2)).permute(1, 0, 2) if native else B.t()
            parts.append(_PackedB(B.contiguous(), column, sum(map(len, rows))))
            rows.append(A.to(device, dtype))
        if not rows:
            continue
        packed = torch.cat(rows)
        if native and packed.shape[1] % 2 == 0:
            packed = _sixteens(packed)
        ranks = len(packed) * (16 if packed.ndim == 4 else 1)
        widest = max(widest, ranks)
        flat = [_address(packed), ranks]
        for part in parts:
            flat += [_address(part.B), part.column, part.B.shape[1], part.rank_from, part.rank]
        records[g][: len(flat)] = flat
        groups[g] = packed, parts
        size += packed.nbytes + sum(p.B.nbytes for p in parts)
        if gain is not None:
            gains[g] = gain, group.bias
            size += gain.nbytes
    embedding = None
    if (pair_e := adapter.pairs.get(layout.embedding)) is not None and pair_e.kind == "embedding":
        product = pair_e.low_rank()
        A, B = product.A.to(device), product.B.to(device).float() * product.scale
        embedding = A.t().to(device, dtype).contiguous(), B.t().to(device, dtype).contiguous()
        size += embedding[0].nbytes + embedding[1].nbytes
    table = torch.tensor(records, dtype=torch.int64)
    return PackedAdapter(adapter, key, groups, gains, embedding, table, widest, size)


def _address(tensor: Tensor) -> int:
    return 0 if is_fake(tensor) else tensor.data_ptr()


def _add_rows(y: Tensor, rows: Tensor | slice, more: Tensor) -> None:
    if isinstance(rows, slice):
        y[rows] += more
    else:
        y.index_add_(0, rows, more)


def _sixteens(A: Tensor) -> Tensor:
    """Convert A (rank, in), `in` even, to the kernel's layout, zero-padded: (⌈rank/16⌉, in/2, 16, 2)."""
    rank, n = A.shape
    A = torch.nn.functional.pad(A, (0, 0, 0, -rank % 16))
    return A.view(-1, 16, n // 2, 2).permute(0, 2, 1, 3).contiguous()


def _dense(A: Tensor) -> Tensor:
    """Convert A back to (rank, in), including the zero rows of the padding."""
    return A if A.ndim == 2 else A.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def _dora_scale(pair: Pair, weight: Tensor) -> Tensor:
    """Return DoRA's scale g = m / ‖W + s·B·A‖ in float32: (out,)."""
    assert pair.magnitude is not None
    collapsed = pair.collapsed()
    moved = Pair(
        collapsed.A.to(weight.device).float(), collapsed.B.to(weight.device).float(), collapsed.scale, collapsed.kind
    )
    return pair.magnitude.to(weight.device).float() / adapted_norm(dequantized(weight).float(), moved).float()


@dataclass(eq=False)
class AdapterBatch:
    """The rows of one batch, grouped by adapter."""

    layout: BaseLayout
    adapters: tuple[PackedAdapter, ...]
    _rows: list[int]
    _strengths: list[float]
    _bounds: list[int]
    scratch: Tensor | None = None

    @cached_property
    def starts(self) -> Tensor:
        """Offsets of each adapter's entries in `rows` and `strengths`: (adapters + 1,)."""
        return put_numbers(self.layout.device, self._bounds)[0]

    @cached_property
    def rows(self) -> Tensor:
        return put_numbers(self.layout.device, self._rows)[0]

    @cached_property
    def strengths(self) -> Tensor:
        return sent(torch.tensor(self._strengths, dtype=torch.float32), self.layout.device)

    @classmethod
    def build(
        cls, layout: BaseLayout, spans: Sequence[tuple[int, int, Sequence[tuple[PackedAdapter, float]]]]
    ) -> AdapterBatch | None:
        """Build from (first row, end, mix) spans; return None if no row has an adapter."""
        by_adapter: dict[int, tuple[PackedAdapter, list[int], list[float]]] = {}
        for first, end, mix in spans:
            for adapter, strength in mix:
                entry = by_adapter.setdefault(id(adapter), (adapter, [], []))
                entry[1].extend(range(first, end))
                entry[2].extend([strength] * (end - first))
        if not by_adapter:
            return None
        entries = sorted(by_adapter.values(), key=lambda e: e[0].key)
        adapters = tuple(e[0] for e in entries)
        bounds = [0]
        for _, rows, _ in entries:
            bounds.append(bounds[-1] + len(rows))
        all_rows = [row for _, rows, _ in entries for row in rows]
        strengths = [strength for _, _, entry in entries for strength in entry]
        return cls(layout, adapters, all_rows, strengths, bounds)

    def add(self, group: int, x: Tensor, y: Tensor, base_output: Tensor | None = None) -> None:
        """Add the group's low-rank products to y (rows, columns) in place.

        x: (rows, in). x and y must be contiguous. `base_output`: the base's own product, if y contains other
        terms too.
        """
        base_values = y.clone() if base_output is None and self.gained(group) else base_output
        run = dispatch("rows_low_rank", x, y)
        if run is not None:
            run(x, y, self.pointers(x, group))
        else:
            self._add_reference(group, x, y)
        self._add_gains(group, base_values, y)

    def pointers(self, x: Tensor, group: int = 0) -> tuple[int, ...]:
        """Return the arguments of ops/cpu/serving.c for these rows, from `group` on.

        Includes the address of a scratch buffer, which has room for float32."""
        if self.scratch is None:
            ranks = max(a.rank for a in self.adapters)
            self.scratch = x.new_empty(len(self.rows), ranks, dtype=torch.float32)
        return (
            self.records[group].data_ptr(),
            len(self.adapters),
            self.starts.data_ptr(),
            self.rows.data_ptr(),
            self.strengths.data_ptr(),
            self.scratch.data_ptr(),
            self.scratch.shape[1],
        )

    @cached_property
    def records(self) -> Tensor:
        """The kernel records of all groups: (groups, adapters, _RECORD)."""
        return sent(torch.stack([a.records for a in self.adapters], 1).contiguous(), self.layout.device)

    @property
    def gains(self) -> bool:
        """Whether any adapter in the batch uses DoRA."""
        return any(a.gains for a in self.adapters)

    def gained(self, group: int) -> bool:
        """Return whether any adapter uses DoRA in the group. If so, `add` needs the base's own output."""
        return any(group in a.gains for a in self.adapters)

    def embed(self, ids: Tensor, x: Tensor) -> None:
        """Add the products of embedding pairs to x (rows, dim) in place; ids (rows,)."""
        for adapter, rows, strengths in self._each:
            if adapter.embedding is not None:
                A, B = adapter.embedding
                u = (A[ids[rows]] * strengths).to(x.dtype)
                _add_rows(x, rows, in_blocks(lambda part, B=B: part @ B, u, self.layout.rows))  # type: ignore[misc]

    @cached_property
    def _each(self) -> list[tuple[PackedAdapter, Tensor | slice, Tensor]]:
        """Return each adapter, its rows, and its strength in each of these rows (rows, 1).

        Contiguous rows are given as a slice, because torch adds to a slice several times faster.
        """
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
                    product = self._product(u[:, part.rank_from : part.rank_from + part.rank], part.as_matrix())
                    _add_rows(y[:, part.column : part.column + part.B.shape[1]], rows, product)

    def _product(self, x: Tensor, W: Tensor) -> Tensor:
        return in_blocks(lambda part: part @ W, x, self.layout.rows)

    def _add_gains(self, group: int, base_values: Tensor | None, y: Tensor) -> None:
        """Add DoRA's change of the base's own output: strength · (g - 1) ⊙ (y₀ - b)."""
        if base_values is None:
            return
        for adapter, rows, strengths in self._each:
            if group in adapter.gains:
                gain, bias = adapter.gains[group]
                scaled = base_values[rows].float()
                scaled = scaled if bias is None else scaled - bias.float()
                _add_rows(y, rows, (scaled * gain * strengths).to(y.dtype))
