"""The selection: one mix for all rows, one mix per row, or one adapter per segment.

Rows are the first dimension of a module's input. A batch of k·n rows under n mixes repeats the mixes k times,
in the order of classifier-free guidance: [negative…, positive…]. The number of rows of a batch is recorded
when the model is called. An inner module has no rows if the first dimension of its input differs from the
batch, as in a shared expert that receives the tokens of all rows together. This module depends on adapters,
not on modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.errors import AdapterError
from veneer.ops.device_transfer import put_numbers, sent
from veneer.ops.lora_segments import LoraSegments

ActiveMix = tuple[tuple[Adapter, float], ...]
"""(adapter, strength) tuples in order; the adapters are the attachment's own objects."""

MAX_REPEATS = 4
"""How many times a batch can repeat the list of mixes. Classifier-free guidance doubles a batch; variants of
guidance triple the batch."""


class Segment(NamedTuple):
    """Rows with the same mix.

    In a repeated batch, the repeats of these rows belong to the segment too."""

    mix: ActiveMix
    rows: tuple[int, ...]


class AdapterRows(NamedTuple):
    """The rows that use one adapter, with the adapter's strength on each row."""

    adapter: Adapter
    rows: tuple[int, ...]
    strengths: tuple[float, ...]


@dataclass(eq=False)
class MixBatch:
    """A mix per row: row i of a batch uses mixes[i]; n = len(mixes).

    In a repeated batch, rows i + n, i + 2n, … use mixes[i] too.

    batch: the number of rows of the model's last call; None (n rows) if a module was called directly."""

    mixes: tuple[ActiveMix, ...]
    batch: int | None = None
    _indices: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)
    _segments: dict[frozenset[int], list[Segment]] = field(default_factory=dict, repr=False)

    @cached_property
    def rows_by_adapter(self) -> tuple[AdapterRows, ...]:
        """One entry per adapter with all of its rows, so that each adapter runs once."""
        by_adapter: dict[int, tuple[Adapter, dict[int, float]]] = {}
        for row, mix in enumerate(self.mixes):
            for adapter, strength in mix:
                row_strengths = by_adapter.setdefault(id(adapter), (adapter, {}))[1]
                row_strengths[row] = row_strengths.get(row, 0.0) + strength
        return tuple(
            AdapterRows(adapter, tuple(row_strengths), tuple(row_strengths.values()))
            for adapter, row_strengths in by_adapter.values()
        )

    def segments(self, acts: Callable[[Adapter], bool]) -> list[Segment]:
        """Return groups of rows with equal mixes, ordered by the first row of each group.

        acts: function that returns whether to take an adapter into account; other adapters are ignored."""
        acting = frozenset(id(share.adapter) for share in self.rows_by_adapter if acts(share.adapter))
        if acting not in self._segments:
            self._segments[acting] = self._segments_of(acting)
        return self._segments[acting]

    def _segments_of(self, acting: frozenset[int]) -> list[Segment]:
        by_mix: dict[tuple[tuple[int, float], ...], tuple[ActiveMix, list[int]]] = {}
        for row, mix in enumerate(self.mixes):
            acting_mix = tuple((a, s) for a, s in mix if id(a) in acting)
            by_mix.setdefault(tuple((id(a), s) for a, s in acting_mix), (acting_mix, []))[1].append(row)
        return [Segment(mix, tuple(rows)) for mix, rows in by_mix.values()]

    def without(self, adapter: Adapter) -> MixBatch:
        return MixBatch(tuple(tuple((a, s) for a, s in mix if a is not adapter) for mix in self.mixes), self.batch)

    def repeats(self, batch: int, where: str) -> int:
        """Return k for a batch of k·n rows.

        Raises AdapterError for any other number of rows. Also raises AdapterError if the number differs from
        the model's own batch size, because a number of flattened tokens can happen to be k·n."""
        n = len(self.mixes)
        rows = n if self.batch is None else self.batch
        if rows % n or not 1 <= rows // n <= MAX_REPEATS:
            fix = f"use {n} rows, one per mix, or repeat them 2 to {MAX_REPEATS} times as guidance does"
            raise AdapterError(f"{n} mixes for a batch of {rows} rows", where=where, fix=fix)
        if batch != rows:
            raise AdapterError(
                f"{n} mixes for a batch of {batch} in this module, where the model has {rows} rows",
                where=where,
                fix="a module without a batch dimension cannot have a mix per row: run each mix by "
                "itself, or use adapters that do not change this module",
            )
        return batch // n

    def index(self, rows: Sequence[int], batch: int, device: torch.device) -> Tensor:
        """Return the indices of these rows and of their repeats in a batch of k·n rows."""
        n = len(self.mixes)
        key = (tuple(rows), batch, device)
        if key not in self._indices:
            positions = [row + at for at in range(0, batch, n) for row in rows]
            self._indices[key] = put_numbers(device, positions)[0]
        return self._indices[key]

    def strengths(self, share: AdapterRows, change: Tensor) -> float | Tensor:
        """Return the strengths by which to multiply the change of an adapter's rows.

        A single number if all strengths are equal."""
        if len(set(share.strengths)) == 1:
            return share.strengths[0]
        repeats = len(change) // len(share.rows)
        key = ("strengths", share.strengths, repeats, change.dtype, change.device)
        if key not in self._indices:
            numbers = torch.tensor(share.strengths * repeats, dtype=change.dtype)
            self._indices[key] = sent(numbers, change.device)
        return self._indices[key].view(-1, *[1] * (change.ndim - 1))


@dataclass(frozen=True, eq=False)
class SpanAdapters:
    """Adapters that are trained in one forward pass. Each segment of tokens has its own adapter."""

    adapters: tuple[Adapter, ...]
    spans: LoraSegments


def span_problem(adapter: Adapter) -> str:
    """Return why an adapter cannot apply to a segment of tokens, or "" if the adapter can."""
    if adapter.modules or adapter.token_rows:
        return "it has full copies or rows of an embedding"
    if adapter.deltas:
        return "it has more than pairs"
    for name, pair in adapter.pairs.items():
        if pair.kind != "linear":
            return f"{name} is not a linear layer"
        if pair.magnitude is not None:
            return "it is a DoRA"
        if pair.origin is not None and adapter.dropout:
            return "it has dropout and an origin, which reads all of the input"
    return ""


@dataclass(frozen=True)
class Selection:
    """The active adapters: `spans` or `rows` if not None, else `mix` on every row.

    An empty mix selects the base, without extra cost."""

    mix: ActiveMix = ()
    rows: MixBatch | None = None
    spans: SpanAdapters | None = None

    def without(self, removed: Adapter) -> Selection:
        mix = tuple((a, s) for a, s in self.mix if a is not removed)
        spans = self.spans
        if spans is not None and any(adapter is removed for adapter in spans.adapters):
            spans = None
        return Selection(mix, None if self.rows is None else self.rows.without(removed), spans)


def run_segments(
    rows: MixBatch,
    segments: Sequence[Segment],
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: str,
    all_rows: bool = False,
) -> Any:
    """Run each segment's rows separately and restore the batch's order.

    Calls run(mix, *args, **kwargs). If the inputs contain several tensors and `all_rows` is false, the
    function cannot know which tensors have rows. Each segment then runs on all rows, and the segment's rows
    are selected from the result. Raises AdapterError if there are no rows."""
    tensors = list(_tensors((args, kwargs)))
    if not tensors or not tensors[0].ndim:
        raise AdapterError("this module is called without a batch, so no row can have its own mix", where=where)
    batch, device = len(tensors[0]), tensors[0].device
    rows.repeats(batch, where)
    parts, positions = [], []
    for mix, segment_rows in segments:
        at = rows.index(segment_rows, batch, device)
        select = partial(torch.index_select, dim=0, index=at)
        if len(tensors) == 1 or all_rows:
            own_args, own_kwargs = _mapped((args, kwargs), select)
            parts.append(_mapped(run(mix, *own_args, **own_kwargs), partial(_with_rows, len(at), where)))
        else:
            parts.append(_mapped(_mapped(run(mix, *args, **kwargs), partial(_with_rows, batch, where)), select))
        positions.append(at)
    order = torch.cat(positions).argsort()
    joined = iter([torch.cat(outputs).index_select(0, order) for outputs in zip(*map(_tensors, parts), strict=True)])
    return _mapped(parts[0], lambda _: next(joined))


def _with_rows(batch: int, where: str, t: Tensor) -> Tensor:
    if not t.ndim or len(t) != batch:
        raise AdapterError(
            f"called with {batch} rows, this module returns {tuple(t.shape)}, which has a different number of rows",
            where=where,
        )
    return t


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(part, change) for key, part in tree.items()}
    return type(tree)(_mapped(part, change) for part in tree) if isinstance(tree, (list, tuple)) else tree
