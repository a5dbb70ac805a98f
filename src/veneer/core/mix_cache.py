"""A cache of mixed weights for use without training, one entry per module and mix.

    copy      W' = W + Σ strength·ΔW            one product, as in the base; supports every kind of change
    stack     A = [s₁·A₁; s₂·A₂; …]    B = [B₁, B₂, …]        y = x·Wᵀ + (x·Aᵀ)·Bᵀ, two low-rank products for any mix

The cache uses copies if the copies of all modules fit in `limit` bytes, stacks if only the stacks fit, and
nothing otherwise. A mix on a small base therefore costs as much as the base itself, and a large base never
holds a second set of weights. W' is summed in float32 and rounded once; the base's own W is never written to.
A stack instead rounds the base's output a second time. Both methods are equally accurate
(docs/notes/image-speed.md).

An entry is created when a module is first called with a mix, not when the mix is selected. Entries are keyed
by the mix's content; the oldest are dropped first. An entry is used only while its source tensors are
unchanged. Mixes with tensors in training are not cached, because these tensors change at every step. This
module depends on bases and adapters, not on layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Pair
from veneer.core.merge import delta, to_sum_dtype
from veneer.core.selection import ActiveMix
from veneer.ops.device_transfer import sent
from veneer.ops.lowrank import LowRank

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)
_VERSION = attrgetter("_version")


@dataclass(frozen=True, eq=False)
class CachedModule:
    """One module under one mix: a copy (`weight`, `bias`), or a stack (`product`).

    drops: whether an adapter has dropout; if so, the entry cannot be used in training mode."""

    weight: Tensor | None
    bias: Tensor | None
    product: LowRank | None
    dtype: torch.dtype
    drops: bool
    sources: list[Tensor]
    versions: int
    data_pointer: int

    def bytes(self) -> int:
        stack = () if self.product is None else (self.product.A, self.product.B)
        return sum(t.nbytes for t in (self.weight, *stack) if t is not None)

    def current(self) -> bool:
        """Return whether the source tensors are unchanged.

        `sources[0]` is the base's weight."""
        return _version_sum(self.sources) == self.versions and self.sources[0].data_ptr() == self.data_pointer


@dataclass(eq=False)
class _Table:
    """The cache entries of one mix.

    kind: "copy", "stack", or "" for no cache.
    needs: bytes that the entries of all modules need.
    modules: module name -> entry, or None if the module cannot be cached."""

    mix: ActiveMix
    kind: str
    needs: int
    modules: dict[str, CachedModule | None] = field(default_factory=dict)
    bytes: int = 0


class MixCache:
    """The cache tables of one attachment, one per mix.

    modules: layer name -> the base's module in the layer.
    limit: maximum bytes of all tables together."""

    def __init__(self, modules: dict[str, nn.Module], limit: int) -> None:
        self.modules, self._limit = modules, limit
        self._tables: OrderedDict[tuple[tuple[int, float], ...], _Table] = OrderedDict()
        self._seen: dict[int, tuple[ActiveMix, _Table]] = {}

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        self._limit = value
        self.clear()

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self._tables.values())

    def kinds(self) -> list[str]:
        """Return the kind of each cached mix, oldest first: "copy", "stack", or "" for no cache."""
        return [table.kind for table in self._tables.values()]

    def clear(self, having: Adapter | None = None) -> None:
        """Drop every table, or only the tables of mixes that contain the adapter `having`."""
        for key, table in list(self._tables.items()):
            if having is None or any(a is having for a, _ in table.mix):
                del self._tables[key]
        self._seen.clear()

    def get(self, name: str, mix: ActiveMix) -> CachedModule | None:
        """Return the entry of module `name` under `mix`, creating the entry if possible.

        Return None if the module must run without the cache."""
        seen_entry = self._seen.get(id(mix))
        table = seen_entry[1] if seen_entry is not None else self._table(mix)
        cached = table.modules.get(name, self)
        if isinstance(cached, CachedModule):
            if cached.current():
                return cached
            table.bytes -= cached.bytes()
        elif cached is None or not table.kind:
            return None
        return self._build(table, name)

    def all_copied(self, mixes: Iterable[ActiveMix]) -> bool:
        """Return whether the copies of all these mixes fit in the cache at the same time.

        A batch with a mix per row needs all copies together."""
        tables = [self._seen[id(m)][1] if id(m) in self._seen else self._table(m) for m in mixes if m]
        return all(t.kind == "copy" for t in tables) and sum(t.needs for t in tables) <= self._limit

    def _table(self, mix: ActiveMix) -> _Table:
        key = tuple((id(a), s) for a, s in mix)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = _Table(mix, *self._choose_kind(mix))
        self._tables.move_to_end(key)
        if len(self._seen) > 64:
            self._seen.clear()
        self._seen[id(mix)] = mix, table  # keeps the tuple alive, so that its id stays valid
        return table

    def _choose_kind(self, mix: ActiveMix) -> tuple[str, int]:
        """Return the kind of table for a mix, and the bytes that its entries need.

        The kind is "copy", "stack" or ""."""
        copies = stacks = 0
        for name, base in self.modules.items():
            ranks = [a.pairs[name].rank for a, _ in mix if name in a.pairs]
            if type(base) in _PLAIN and (ranks or any(f"{name}.weight" in a.deltas for a, _ in mix if a.deltas)):
                weight = base._parameters["weight"]
                assert weight is not None
                copies += weight.nbytes
                stacks += (weight.nbytes // len(weight) + len(weight) * weight.element_size()) * sum(ranks)
        if copies <= self._limit:
            return "copy", copies
        return ("stack", stacks) if stacks <= self._limit else ("", 0)

    def _build(self, table: _Table, name: str) -> CachedModule | None:
        base, built = self.modules.get(name), dict[str, CachedModule | None]()
        with torch.no_grad():
            if table.kind == "copy" and not table.modules:
                built.update(_copied_together(self.modules, table.mix))
            if name not in built:
                build = _copied if table.kind == "copy" else _stacked
                sources = _sources(name, base, table.mix) if base is not None else []
                built[name] = build(name, base, table.mix, sources) if sources else None
        table.modules.update(built)
        table.bytes += sum(cached.bytes() for cached in built.values() if cached is not None)
        while self.bytes > self._limit and len(self._tables) > 1:
            self._tables.popitem(last=False)
            self._seen.clear()
        return built[name]


def _sources(name: str, base: nn.Module, mix: ActiveMix) -> list[Tensor]:
    """Return the tensors that W' depends on, the base's weight first.

    Empty if the module cannot be cached: the base is not a plain linear or convolution, the mix has a full
    copy, a tensor is being trained, or a tensor has no version counter (inference tensors)."""
    if type(base) not in _PLAIN:
        return []
    base_tensors = [t for t in (base._parameters["weight"], base._parameters["bias"]) if t is not None]
    acting: list[Tensor] = []
    for adapter, _ in mix:
        if name in adapter.modules:
            return []
        if (pair := adapter.pairs.get(name)) is not None:
            acting += [t for t in (pair.A, pair.B, pair.magnitude, *(pair.origin or ())) if t is not None]
        for key in ("weight", "bias") if adapter.deltas else ():
            if (change := adapter.deltas.get(f"{name}.{key}")) is not None:
                acting += [t for _, t in change.tensors()]
    out: list[Tensor] = [*base_tensors, *acting]
    if not acting or base_tensors[0].dtype.itemsize == 1 or any(t.is_inference() for t in out):
        return []
    return [] if any(t.requires_grad for t in acting) else out


def _stacked_product(pairs: Iterable[tuple[Pair, float]], dtype: torch.dtype) -> LowRank:
    """Return all pairs as one product.

    A is (Σ rank, …) and includes strengths and scales; B is (out, Σ rank, …)."""
    parts = [(p.collapsed(), s) for p, s in pairs]
    A = torch.cat([p.A for p, _ in parts])
    precise = torch.promote_types(torch.promote_types(A.dtype, dtype), torch.float32)
    by_row = _by_row(tuple((p.scale * s, p.rank) for p, s in parts), A.device, precise)
    A = A * by_row.view(-1, *[1] * (A.ndim - 1))
    return LowRank(A.to(dtype), torch.cat([p.B for p, _ in parts], dim=1).to(dtype))


@lru_cache(maxsize=64)
def _by_row(scales: tuple[tuple[float, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a vector that repeats each scale once per rank of its pair."""
    return sent(torch.tensor([s for s, rank in scales for _ in range(rank)], dtype=dtype), device)


def _copied_together(modules: dict[str, nn.Module], mix: ActiveMix) -> dict[str, CachedModule]:
    """Compute the copies of similar modules together, with grouped matrix products.

    Modules are grouped if they have equal shapes and only plain pairs. A small base has hundreds of modules;
    with one product per module, call overhead would exceed arithmetic."""
    if any(adapter.deltas for adapter, _ in mix):
        return {}
    alike: dict[Any, list[tuple[str, Any, list[tuple[Pair, float]], list[Tensor]]]] = {}
    for name, base in modules.items():
        if not (sources := _sources(name, base, mix)):
            continue
        weight = sources[0]
        pairs = [(adapter.pairs[name].collapsed(), strength) for adapter, strength in mix if name in adapter.pairs]
        if all(p.magnitude is None and p.A[0].numel() == weight[0].numel() for p, _ in pairs):
            shapes = tuple((p.A.shape, p.B.shape, p.A.dtype, p.B.dtype) for p, _ in pairs)
            alike.setdefault((weight.shape, weight.dtype, weight.device, shapes), []).append(
                (name, base, pairs, sources)
            )
    modules_by_name: dict[str, CachedModule] = {}
    for group in alike.values():
        if len(group) == 1:
            continue
        # Flatten before stacking: flattening a stack of channels-last weights would copy the stack.
        weight = torch.stack([base.weight.detach().flatten(1) for _, base, _, _ in group])
        precise = torch.promote_types(weight.dtype, torch.float32)
        each = range(len(group[0][2]))
        A = torch.cat([torch.stack([pairs[k][0].A for _, _, pairs, _ in group]) for k in each], dim=1).flatten(2)
        B = torch.cat([torch.stack([pairs[k][0].B for _, _, pairs, _ in group]) for k in each], dim=2).flatten(2)
        scales = [[p.scale * s for p, s in pairs for _ in range(p.rank)] for _, _, pairs, _ in group]
        A = A * sent(torch.tensor(scales, dtype=precise), A.device)[:, :, None]
        # As in `_copied`, the product is summed in float32 and rounded once. The product runs in place to
        # avoid a second copy of the weights.
        weight.baddbmm_(B.to(weight.dtype), A.to(weight.dtype))
        for copy, (name, base, _, sources) in zip(weight, group, strict=True):
            bias = None if base.bias is None else base.bias.detach()
            modules_by_name[name] = _cached(mix, sources, weight=copy.view(base.weight.shape), bias=bias)
    return modules_by_name


def _copied(name: str, base: Any, mix: ActiveMix, sources: list[Tensor]) -> CachedModule:
    weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
    pairs = [(a.pairs[name], s) for a, s in mix if name in a.pairs]
    plain = [(p, s) for p, s in pairs if p.magnitude is None and p.A[0].numel() == weight[0].numel()]
    unstacked = [(p, s) for p, s in pairs if all(p is not q for q, _ in plain)]
    changes = [(d, s) for a, s in mix if (d := a.deltas.get(f"{name}.weight")) is not None]
    total = to_sum_dtype(weight) if unstacked or changes else weight
    if plain:  # the product is summed in float32 for every dtype, and rounded once
        stack = _stacked_product(plain, total.dtype)
        total = torch.addmm(total.flatten(1), stack.B.flatten(1), stack.A.flatten(1)).view(weight.shape)
    for pair, strength in unstacked:
        total = total + delta(base, pair) * strength
    for change, strength in changes:
        total = total + delta(base, change) * strength
    for adapter, strength in mix:
        if (moved := adapter.deltas.get(f"{name}.bias")) is not None:
            bias_change = delta(base, moved, "bias") * strength
            bias = bias_change if bias is None else to_sum_dtype(bias) + bias_change
    bias = None if bias is None else bias.to(weight.dtype)
    return _cached(mix, sources, weight=total.to(weight.dtype), bias=bias)


def _stacked(name: str, base: Any, mix: ActiveMix, sources: list[Tensor]) -> CachedModule | None:
    """Return a stack, or None if a change of this module is not a plain pair."""
    pairs = [(a.pairs[name], s) for a, s in mix if name in a.pairs]
    if any(p.magnitude is not None for p, _ in pairs):
        return None
    if any(f"{name}.{key}" in a.deltas for a, _ in mix for key in ("weight", "bias")):
        return None
    return _cached(mix, sources, product=_stacked_product(pairs, base.weight.dtype))


def _cached(
    mix: ActiveMix,
    sources: list[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    product: LowRank | None = None,
) -> CachedModule:
    drops = any(a.dropout for a, _ in mix)
    return CachedModule(
        weight, bias, product, sources[0].dtype, drops, sources, _version_sum(sources), sources[0].data_ptr()
    )


def _version_sum(tensors: list[Tensor]) -> int:
    """Return the sum of the tensors' version counters, which grows with every write."""
    return sum(map(_VERSION, tensors))
