"""Split and join changes of fused projections by rows, without changing ΔW.

    split:              W = [W₀; W₁; …]      ΔW = s·B·A  ⇒  ΔWᵢ = s·Bᵢ·A      Bᵢ: rows of B, A the same tensor
    join, A equal:      B = [B₀; B₁; …], the same rank
    join, A different:  A = [A₀; A₁; …], B = diag(B₀, B₁, …), the ranks add up; a shared A counts once

If the scales differ, s is the largest and Bᵢ becomes (sᵢ/s)·Bᵢ, computed in float64 and stored as float32, or
as float64 if Bᵢ is float64. For 16-bit factors this is exact if sᵢ/s has at most 13 significant bits, like
quotients of small powers of two; otherwise the result is correct to half a unit in the last place of float32.

A LoHa is split and joined in the same way, at its left factors. A LoKr is split by selecting rows of its
product. A magnitude of the outputs is split along with the rows. A magnitude of the inputs is a norm over all
rows and cannot be split. This module works on pairs and deltas, and does not depend on module names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar, cast

from veneer.core.adapter import Pair
from veneer.core.forms import Delta
from veneer.errors import AdapterError
from veneer.formats.topology import RowRange

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T", bound=Pair | Delta)


def split(item: T, parts: Sequence[RowRange]) -> list[T]:
    """Return the change of each row range in `parts`.

    Every tensor is a view. The results share A and any other tensor that applies to all rows.

    parts: (begin, end, total), in units of 1/total of the rows.

    Raises AdapterError if the number of rows is not a multiple of `total`, for a magnitude of the inputs, and
    for pairs of embeddings and experts, which are never fused by rows."""
    out: list[T] = []
    for begin, end, total in parts:
        if not 0 <= begin < end <= total:
            raise ValueError(f"a part is rows [begin, end) of total, not {(begin, end, total)}")
        rows = _rows(item)
        if rows is not None and rows % total:
            raise AdapterError(f"{rows} rows cannot be cut into {total} equal units", where=_describe(item))
        unit = 0 if rows is None else rows // total
        out.append(cast(T, _cut(item, begin * unit, end * unit)) if (begin, end) != (0, total) else item)
    return out


def swap_halves(item: T) -> T:
    """Return the change of [W₁; W₀], given the change of [W₀; W₁].

    BFL and diffusers order the final layer's shift and scale differently. Raises AdapterError for an odd
    number of rows, and for a LoKr if its first factor has an odd number of rows."""
    if isinstance(item, Delta) and item.form == "kronecker":
        return cast(T, _swap_kronecker(item))
    rows = _rows(item)
    if rows is not None and rows % 2:
        raise AdapterError(f"{rows} rows have no halves", where=_describe(item))
    return cast(T, _on_rows(item, _swapped))


def _swap_kronecker(delta: Delta) -> Delta:
    """Return the LoKr w1 ⊗ w2 with the two halves of w1's rows swapped."""
    first = "w1" if "w1" in delta.parts else "a1"
    if delta.rows is not None or delta.parts[first].shape[0] % 2:
        raise AdapterError(
            "the halves of a LoKr cannot be swapped: its first factor has an odd number of rows, or it is "
            "already a part",
            where=_describe(delta),
        )
    m = delta.magnitude
    m = m if m is None or m.ndim > 1 else _swapped(m)
    return replace(delta, parts={**delta.parts, first: _swapped(delta.parts[first])}, magnitude=m)


def _swapped(t: Tensor) -> Tensor:
    return t.roll(t.shape[0] // 2, 0)


def _cut(item: Pair | Delta, begin: int, end: int) -> Pair | Delta:
    if item.magnitude is not None and item.magnitude.ndim > 1:
        raise AdapterError(
            "a magnitude of the inputs is a norm over all rows of the fused projection together: no part has its own",
            where=_describe(item),
            fix="merge the adapter into the base, or keep the projection fused",
        )
    if isinstance(item, Delta) and item.form == "kronecker":
        start = item.rows[0] if item.rows else 0
        m = None if item.magnitude is None else item.magnitude[begin:end]
        shape, full_shape = (end - begin, *item.shape[1:]), item.whole or item.shape
        return replace(item, shape=shape, rows=(start + begin, start + end), whole=full_shape, magnitude=m)
    return _on_rows(item, lambda t: t[begin:end])


def _on_rows(item: Pair | Delta, select: Callable[[Tensor], Tensor]) -> Pair | Delta:
    """Apply `select` to every tensor of `item` that has one row per row of the weight."""
    m = item.magnitude if item.magnitude is None or item.magnitude.ndim > 1 else select(item.magnitude)
    if isinstance(item, Pair):
        origin = None if item.origin is None else (item.origin[0], select(item.origin[1]))
        return replace(item, B=select(item.B), magnitude=m, origin=origin)
    if _rows(item) is None:
        return item
    on = {"dense": ("value",), "gain": ("value",), "replacement": ("value",), "hadamard": ("a1", "a2")}[item.form]
    parts = {name: select(t) if name in on else t for name, t in item.parts.items()}
    shape = item.shape and (parts[on[0]].shape[0], *item.shape[1:])
    return replace(item, parts=parts, shape=shape, magnitude=m)


def _rows(item: Pair | Delta) -> int | None:
    """Return the number of rows of the weight that `item` changes.

    Return None for a gain on the inputs, which fits any number of rows."""
    if isinstance(item, Delta):
        value = item.parts.get("value")
        return item.shape[0] if item.form != "gain" else len(value) if value is not None and value.ndim == 1 else None
    if item.kind not in ("linear", "conv"):
        raise AdapterError(f"a pair of {item.kind} is not fused by rows", where=_describe(item))
    return item.B.shape[0]


def _describe(item: Pair | Delta) -> str:
    if isinstance(item, Pair):
        return f"a pair, A {tuple(item.A.shape)}, B {tuple(item.B.shape)}"
    return f"a {item.form} change {tuple(item.shape)}"


def trimmed(pair: Pair) -> Pair:
    """Return the pair without the rank dimensions for which B is zero.

    At least one rank is kept. ΔW and scale do not change. If `pair` is one part of a block-diagonal pair
    (from `join_parts`, or from sd-scripts' `split_qkv`), this restores the part's original rank."""
    if pair.kind not in ("linear", "conv") or pair.origin is not None:
        return pair
    used = pair.B.flatten(1).ne(0).any(0).nonzero().reshape(-1)
    used = used if len(used) else used.new_zeros(1)
    if len(used) == pair.rank:
        return pair
    return replace(pair, A=pair.A[used], B=pair.B[:, used])


def join_parts(parts: Sequence[T | None], rows: Sequence[int] | None = None) -> T:
    """Return one change of the fused projection, ΔW = [ΔW₀; ΔW₁; …].

    parts: the change of each part; None for an unchanged part.
    rows: the number of rows of each part, required if a part is None.

    Raises AdapterError if no single pair or delta can express the result: the forms differ, only some parts
    have a magnitude, a magnitude has one norm per input, or LoKr parts come from different products."""
    items = [p for p in parts if p is not None]
    if not items:
        raise ValueError("nothing to join")
    first = items[0]
    if len({type(p) for p in items}) > 1 or len({p.form if isinstance(p, Delta) else p.kind for p in items}) > 1:
        raise _not_joinable(items, "they are of different forms")
    sizes = [rows[i] if rows is not None else _rows(p) if p is not None else None for i, p in enumerate(parts)]
    if any(p is not None and _rows(p) not in (None, n) for p, n in zip(parts, sizes, strict=True)):
        raise _not_joinable(items, f"their numbers of rows are not {sizes}")
    magnitude = _joined_magnitude(parts)
    if isinstance(first, Delta):
        return cast(T, _join_deltas(first, cast("Sequence[Delta | None]", parts), sizes, magnitude))
    return cast(T, _join_pairs(cast("Sequence[Pair | None]", parts), sizes, magnitude))


def _not_joinable(items: Sequence[Pair | Delta], why: str) -> AdapterError:
    problem = f"these parts do not form one change of a fused projection: {why}"
    where = "; ".join(_describe(p) for p in items)
    return AdapterError(problem, where=where, fix="use a format with split projections")


def _joined_magnitude(parts: Sequence[Pair | Delta | None]) -> Tensor | None:
    magnitudes = [None if p is None else p.magnitude for p in parts]
    items = [p for p in parts if p is not None]
    if all(m is None for m in magnitudes):
        return None
    if any(m is None for m in magnitudes):
        raise _not_joinable(items, "some have a magnitude and some have none")
    if any(m is not None and m.ndim > 1 for m in magnitudes):
        raise _not_joinable(items, "a magnitude per input is a norm over the rows of one part only")
    return _cat([m for m in magnitudes if m is not None])


def _join_pairs(parts: Sequence[Pair | None], sizes: Sequence[int | None], magnitude: Tensor | None) -> Pair:
    pairs = [None if p is None else p.collapsed() for p in parts]
    have = [p for p in pairs if p is not None]
    if len({p.A.shape[1:] for p in have}) > 1:
        raise _not_joinable(have, "their inputs differ")
    scale = max((p.scale for p in have), key=abs)
    As = _distinct([p.A for p in have])
    blocks = [None if p is None else (_index(As, p.A), _folded(p.B, p.scale, scale)) for p in pairs]
    A = As[0] if len(As) == 1 else _cat(As)
    return Pair(A, _blocks(blocks, [a.shape[0] for a in As], sizes), scale, have[0].kind, magnitude)


def _blocks(blocks: Sequence[tuple[int, Tensor] | None], ranks: Sequence[int], sizes: Sequence[int | None]) -> Tensor:
    """Return the block-diagonal matrix (Σ sizes, Σ ranks, 1…).

    The block of a part is in the rows of this part and in the columns of its A; other entries are zero."""
    some = [b[1] for b in blocks if b is not None]
    dtype = _common_dtype(some)
    tail = some[0].shape[2:]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    bands = []
    for block, size in zip(blocks, sizes, strict=True):
        assert size is not None
        if block is not None and len(ranks) == 1:
            bands.append(block[1].to(dtype))
            continue
        band = some[0].new_zeros(size, sum(ranks), *tail, dtype=dtype)
        if block is not None:
            band[:, starts[block[0]] : starts[block[0]] + ranks[block[0]]] = block[1]
        bands.append(band)
    return _cat(bands)


def _join_deltas(
    first: Delta, parts: Sequence[Delta | None], sizes: Sequence[int | None], magnitude: Tensor | None
) -> Delta:
    import torch

    have = [p for p in parts if p is not None]
    if len({p.shape[1:] for p in have}) > 1:
        raise _not_joinable(have, "their inputs differ")
    if first.form == "replacement":
        raise _not_joinable(have, "they are new values, not changes")
    if first.form == "kronecker":
        return _join_rows(have, len(have) == len(parts), magnitude)
    if first.form == "gain" and _rows(first) is None:
        alike = all(p.scale == first.scale and _equal(p.parts["value"], first.parts["value"]) for p in have)
        if not alike or len(have) < len(parts):
            raise _not_joinable(have, "they are different gains on the same inputs")
        return first
    scale = max((p.scale for p in have), key=abs)
    if any(size is None for size in sizes):
        raise _not_joinable(have, "some are gains on the inputs")
    total = sum(size for size in sizes if size is not None)
    if first.form in ("dense", "gain"):
        like = first.parts["value"]
        values = [
            _folded(p.parts["value"], p.scale, scale) if p is not None else torch.zeros(n, *like.shape[1:])  # type: ignore[arg-type]
            for p, n in zip(parts, sizes, strict=True)
        ]
        value, shape = _cat(values), first.shape and (total, *first.shape[1:])
        return replace(first, parts={"value": value}, shape=shape, scale=scale, magnitude=magnitude)
    joined: dict[str, Tensor] = {}
    for n in "12":
        # Right factors (and cores) are treated like A: equal factors are shared, different ones concatenated.
        rights = [tuple(p.parts[k] for k in (f"b{n}", f"t{n}") if k in p.parts) for p in have]
        distinct: list[tuple[Tensor, ...]] = []
        for r in rights:
            if not any(_all_same(r, d) for d in distinct):
                distinct.append(r)
        if len(distinct) > 1 and any(len(d) > 1 for d in distinct):
            raise _not_joinable(have, "they are LoHa with different cores")
        at = iter(next(i for i, d in enumerate(distinct) if _all_same(r, d)) for r in rights)
        scales = [(p.scale, scale) if p is not None and n == "1" else (1, 1) for p in parts]
        pairs = zip(parts, scales, strict=True)
        blocks = [None if p is None else (next(at), _folded(p.parts[f"a{n}"], *each)) for p, each in pairs]
        joined[f"a{n}"] = _blocks(blocks, [d[0].shape[0] for d in distinct], sizes)
        joined[f"b{n}"] = distinct[0][0] if len(distinct) == 1 else _cat([d[0] for d in distinct])
        if len(distinct[0]) > 1:
            joined[f"t{n}"] = distinct[0][1]
    return Delta("hadamard", joined, (total, *first.shape[1:]), scale, magnitude)


def _join_rows(have: Sequence[Delta], covers_all: bool, magnitude: Tensor | None) -> Delta:
    """Return one LoKr delta for adjacent row ranges of the same product.

    If the ranges together cover all rows, the result has `rows=None`."""
    first = have[0]
    alike = all(
        p.scale == first.scale and p.whole == first.whole and p.parts.keys() == first.parts.keys() for p in have
    ) and all(_equal(p.parts[k], t) for p in have for k, t in first.parts.items())
    ranges = [p.rows or (0, p.shape[0]) for p in have]
    if not alike or not covers_all or any(a[1] != b[0] for a, b in pairwise(ranges)):
        raise _not_joinable(have, "they are not adjacent rows of one LoKr")
    full_shape = first.whole or first.shape
    rows = (ranges[0][0], ranges[-1][1])
    if rows == (0, full_shape[0]):
        return replace(first, shape=full_shape, rows=None, whole=(), magnitude=magnitude)
    return replace(first, shape=(rows[1] - rows[0], *full_shape[1:]), rows=rows, whole=full_shape, magnitude=magnitude)


def _folded(t: Tensor, scale: float, into: float) -> Tensor:
    if scale == into:
        return t
    wide = t.double() * (scale / into)
    return wide if t.dtype == wide.dtype else wide.float()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.equal(b))


def _all_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    out: list[Tensor] = []
    for t in tensors:
        if not any(_equal(t, o) for o in out):
            out.append(t)
    return out


def _index(tensors: Sequence[Tensor], t: Tensor) -> int:
    return next(i for i, o in enumerate(tensors) if _equal(o, t))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    dtype = _common_dtype(tensors)
    return torch.cat([t.to(dtype) for t in tensors])


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    import torch

    return reduce(torch.promote_types, (t.dtype for t in tensors))
