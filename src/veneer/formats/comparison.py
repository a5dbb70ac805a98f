"""Compare an adapter with its copy read back from a file, module by module.

    ‖s·B·A − s'·B'·A'‖ / ‖s·B·A‖     from the Gram matrices of the factors [s·B, −s'·B'] and [A; A'], in float64

For a pair, no matrix of the weight's size is created. This module compares adapters in memory and reads no
files.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.core.factors import factors
from veneer.core.forms import BASED, Delta, product_of
from veneer.core.truncate import distance

TOLERANCE = 1e-6
Refusals = defaultdict[str, list[str]]
"""Message (reason and workaround) -> modules that cannot be written."""


def differences(source: Adapter, read_back: Adapter) -> list[str]:
    """Return one line for each module whose effect differs after reading back.

    A zero change that only `read_back` has is not a difference: fused projections are written whole, so their
    unchanged parts are read back as zero changes."""
    out = []
    for name in sorted({*source.pairs, *read_back.pairs}):
        a, b = source.pairs.get(name), read_back.pairs.get(name)
        if a is None or b is None:
            only = a if a is not None else b
            assert only is not None
            if b is not None and distance(factors(only)) == 0:
                continue
            out.append(f"{name}: {'lost' if b is None else 'an unexpected pair'}")
        elif (problem := _pair_problem(a.collapsed(), b)) is not None:
            out.append(f"{name}: {problem}")
    for name in sorted({*source.deltas, *read_back.deltas}):
        c, d = source.deltas.get(name), read_back.deltas.get(name)
        if c is None or d is None:
            if d is None or d.form in BASED or bool(product_of(d).any()):
                out.append(f"{name}: {'lost' if d is None else 'an unexpected change'}")
        elif (problem := _delta_problem(c, d)) is not None:
            out.append(f"{name}: {problem}")
    replaced, replaced_back = _replacement_tensors(source), _replacement_tensors(read_back)
    for name in sorted({*replaced, *replaced_back}):
        mine, theirs = replaced.get(name), replaced_back.get(name)
        if mine is None or theirs is None or not torch.equal(mine.double(), theirs.double()):
            out.append(f"{name}: the replacement is not the same")
    return out


def _replacement_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return full copies and token rows by name; the names of token rows include the ids."""
    out = {f"{name}.{key}": t for name, tensors in adapter.modules.items() for key, t in tensors.items()}
    return out | {f"{name}, rows {rows.indices}": rows.rows for name, rows in adapter.token_rows.items()}


def _pair_problem(a: Pair, b: Pair) -> str | None:
    if not _same_magnitude(a.magnitude, b.magnitude):
        return "the magnitude is not the same"
    if (a.kind == "experts") != (b.kind == "experts") or _shape(a) != _shape(b):
        return f"a delta of {_shape(a)} would come back as one of {_shape(b)}"
    error = relative_error(a, b)
    return None if error <= TOLERANCE else f"ΔW would come back with a relative error of {error:.2g}"


def _same_magnitude(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.ndim == b.ndim and torch.equal(a.double().reshape(-1), b.double().reshape(-1))


def _shape(pair: Pair) -> tuple[int, ...]:
    """Return (out, in), followed by the kernel size unless the kernel is 1×1."""
    A = pair.A
    tail = A.shape[2:] if pair.kind != "experts" and math.prod(A.shape[2:]) != 1 else ()
    first = 1 if pair.kind == "experts" else 0
    return (pair.B.shape[first], A.shape[-1] if pair.kind == "experts" else A.shape[1], *tail)


def relative_error(a: Pair, b: Pair) -> float:
    """Return ‖ΔW_a − ΔW_b‖ / ‖ΔW_a‖ (Frobenius), or ‖ΔW_b‖ if ΔW_a is zero."""
    if _equal(a, b):
        return 0.0
    (A, B), (C, D) = factors(a), factors(b)
    norm = distance((A, B))
    off = distance((torch.cat([A, C], dim=-2), torch.cat([B, -D], dim=-1)))
    return off / norm if norm else off


def _equal(a: Pair, b: Pair) -> bool:
    return a.scale == b.scale and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in ((a.A, b.A), (a.B, b.B))
    )


def _delta_problem(a: Delta, b: Delta) -> str | None:
    if not _same_magnitude(a.magnitude, b.magnitude):
        return "the magnitude is not the same"
    if a.form != b.form and not {a.form, b.form}.isdisjoint(BASED):
        return f"a {a.form} change would come back as a {b.form} one"
    if a.form == "replacement":
        equal = math.isclose(a.scale, b.scale, rel_tol=TOLERANCE) and _same_parts(a, b)
        return None if equal else "the new value is not the same"
    if a.form == "gain":
        x, y = (d.parts["value"].double() * d.scale for d in (a, b))
    elif _same_parts(a, b):
        return None if math.isclose(a.scale, b.scale, rel_tol=TOLERANCE) else "the scale is not the same"
    else:
        x, y = product_of(a).double(), product_of(b).double()
    if x.shape != y.shape and x.numel() == y.numel():
        y = y.reshape(x.shape)
    if x.shape != y.shape:
        return f"a change of {tuple(x.shape)} would come back as one of {tuple(y.shape)}"
    norm, off = float(x.norm()), float((x - y).norm())
    error = off / norm if norm else off
    return None if error <= TOLERANCE else f"the change would come back with a relative error of {error:.2g}"


def _same_parts(a: Delta, b: Delta) -> bool:
    matching = a.form == b.form and a.rows == b.rows and a.parts.keys() == b.parts.keys()
    return matching and all(
        t.shape == b.parts[k].shape and torch.equal(t.double(), b.parts[k].double()) for k, t in a.parts.items()
    )
