"""Deltas: every form of change to a parameter except pairs.

| form        | parts                                                        | product P                              |
| dense       | value                                                        | value                                  |
| hadamard    | a1 (out, r) b1 (r, n) a2 (out, r) b2 (r, n)                  | (a1·b1) ⊙ (a2·b2)         LoHa         |
|             | the same with cores t1, t2 (r, r, k…), n = in                | each factor aᵢ, tᵢ, bᵢ as below        |
| kronecker   | w1, or a1·b1; w2, or a2·b2, or a2, b2 with the core t2       | w1 ⊗ w2                   LoKr         |
| gain        | value (out,) or (1, in)                                      | W ⊙ value                 (IA)³        |
| replacement | value                                                        | value − W                 a new value  |

    ΔW = s·P        with a magnitude m:  ΔW = m/‖W + s·P‖ · (W + s·P) − W

For a convolution, the factors a and b with a core t (p, q, k…) stand for Σ_pq a[o,p]·t[p,q,k…]·b[q,i]. The
magnitude m has the shape (out,), with one norm per output over all other dimensions, or (1, in, …), with one
norm per input. Sources: LyCORIS (arXiv 2309.14859), LoHa (arXiv 2108.06098), LoKr (arXiv 2212.10650), (IA)³
(arXiv 2205.05638), DoRA (arXiv 2402.09353). This module works on tensors, not on modules or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

_Form = Literal["dense", "hadamard", "kronecker", "gain", "replacement"]
BASED: frozenset[_Form] = frozenset({"gain", "replacement"})
"""The forms whose product P is computed from W."""

_PARTS: Mapping[_Form, list[set[str]]] = {
    "dense": [{"value"}],
    "gain": [{"value"}],
    "replacement": [{"value"}],
    "hadamard": [{"a1", "b1", "a2", "b2"}, {"a1", "b1", "a2", "b2", "t1", "t2"}],
    "kronecker": [one | two for one in ({"w1"}, {"a1", "b1"}) for two in ({"w2"}, {"a2", "b2"}, {"a2", "b2", "t2"})],
}


@dataclass
class Delta:
    """A change to one parameter.

    shape: the parameter's shape; () for a gain, which fits any shape.
    rows: the range [begin, end) of the product's rows to use. Set for one part of a fused projection if the
        form cannot be split.
    whole: the shape of the full product if `rows` is set; otherwise ()."""

    form: _Form
    parts: dict[str, Tensor]
    shape: tuple[int, ...] = ()
    scale: float = 1.0
    magnitude: Tensor | None = None
    rows: tuple[int, int] | None = None
    whole: tuple[int, ...] = ()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from sorted(self.parts.items())
        if self.magnitude is not None:
            yield "magnitude", self.magnitude


def tucker(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """Return Σ_pq a[o,p]·core[p,q,k…]·b[q,i] as (out, in, k…)."""
    import torch

    return torch.einsum("op,pq...,qi->oi...", a, core, b)


def product_of(delta: Delta) -> Tensor:
    """Return s·P in the shape `delta.shape`, as float32 (float64 for float64 parts).

    Raises ValueError for the forms in `BASED`, which have no product without W."""
    import torch

    p = {name: t if t.dtype == torch.float64 else t.float() for name, t in delta.parts.items()}
    full_shape = delta.whole or delta.shape
    if delta.form == "dense":
        out = p["value"]
    elif delta.form == "hadamard":
        out = _factor(p, "1", full_shape) * _factor(p, "2", full_shape)
    elif delta.form == "kronecker":
        w1, w2 = _factor(p, "1"), _factor(p, "2")
        out = torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim)), w2.contiguous())
    else:
        raise ValueError(f"a {delta.form} has no product without W")
    out = out.reshape(full_shape)
    if delta.rows is not None:
        out = out[delta.rows[0] : delta.rows[1]]
    return out * delta.scale


def _factor(p: Mapping[str, Tensor], n: str, shape: tuple[int, ...] | None = None) -> Tensor:
    if f"w{n}" in p:
        return p[f"w{n}"]
    a, b = p[f"a{n}"], p[f"b{n}"]
    out = tucker(a, p[f"t{n}"], b) if f"t{n}" in p else a @ b.flatten(1)
    return out if shape is None else out.reshape(shape)


def trained_shapes(
    kind: Literal["loha", "lokr"], shape: tuple[int, ...], rank: int, factor: int | None = None, both: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trainable parts of a LoHa or LoKr.

    shape: the weight's shape, (out, in, k…).

    The shapes are those of PEFT and LyCORIS. The kernel dimensions are flattened in b1 and b2, as in both
    tools if their options for cores are off.

        loha    a1, a2 (out, r)    b1, b2 (r, in·k…)
        lokr    out = l·k, in = m·n. If `factor` divides out, l is `factor`; otherwise, l is the largest
                divisor of out that is at most `factor` and at most √out. The same rule gives m for in.
                w1 (l, m); with `both`, a1 (l, r) and b1 (r, m) instead if r < max(l, m)/2
                w2 (k, n, k…); a2 (k, r) and b2 (r, n·k…) instead if r < max(k, n)/2"""
    rows, columns, kernel = shape[0], shape[1], shape[2:]
    if kind == "loha":
        a, b = (rows, rank), (rank, math.prod(shape[1:]))
        return {"a1": a, "b1": b, "a2": a, "b2": b}
    (l, k), (m, n) = _two_factors(rows, factor), _two_factors(columns, factor)
    parted = {"a1": (l, rank), "b1": (rank, m)} if both and 2 * rank < max(l, m) else {"w1": (l, m)}
    if 2 * rank < max(k, n):
        return {**parted, "a2": (k, rank), "b2": (rank, n * math.prod(kernel))}
    return {**parted, "w2": (k, n, *kernel)}


def _two_factors(size: int, factor: int | None) -> tuple[int, int]:
    """Return two integers whose product is `size`, as PEFT's `factorization` does."""
    if factor is not None and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), factor or size)
    first = next(d for d in range(most, 0, -1) if size % d == 0)
    return first, size // first


def is_trained(delta: Delta) -> bool:
    """Return whether any part of a delta is trainable."""
    return any(t.requires_grad for t in delta.parts.values())


def as_low_rank(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Return a LoHa as A (r·r', in·k…) and B (out, r·r'), or None.

        B·A = (a1·b1) ⊙ (a2·b2) = Σ_pq (a1_p ⊙ a2_q)·(b1_p ⊙ b2_q)

    Return None for other deltas. Also return None if A and B have more entries than the weight, because
    materializing the product is then cheaper."""
    if delta.form != "hadamard" or set(delta.parts) != {"a1", "b1", "a2", "b2"} or delta.rows or delta.whole:
        return None
    a1, b1, a2, b2 = (delta.parts[name] for name in ("a1", "b1", "a2", "b2"))
    rows, columns = len(a1), b1.shape[1]
    if delta.magnitude is not None or a1.shape[1] * a2.shape[1] * (rows + columns) > rows * columns:
        return None
    return (b1[:, None] * b2).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1)


def kronecker_factors(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Return the factors w1 and w2 of a LoKr, or None.

    Return None for other deltas, for a LoKr with DoRA, and for a LoKr on only part of a parameter."""
    if delta.form != "kronecker" or delta.magnitude is not None or delta.rows or delta.whole:
        return None
    return _factor(delta.parts, "1"), _factor(delta.parts, "2")


def norm_along(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return ‖weight‖ along the magnitude's axis, broadcastable against the weight.

    One norm per output if the magnitude is (out,), one per input if the magnitude is (1, in, …)."""
    import torch

    axis = 0 if magnitude.ndim == 1 else 1
    other_dims = [d for d in range(weight.ndim) if d != axis]
    norm: Tensor = torch.linalg.vector_norm(weight, dim=other_dims, keepdim=True)
    return norm


def change_of(weight: Tensor, product: Tensor, magnitude: Tensor | None) -> Tensor:
    """Return ΔW, given W and s·P, all of shape (out, in, k…).

    Without a magnitude, ΔW = s·P. With a magnitude (DoRA), ΔW = m/‖W + s·P‖·(W + s·P) − W."""
    if magnitude is None:
        return product
    W = weight.to(product.dtype)
    new = W + product
    m = magnitude.to(product.dtype)
    m = m.reshape(-1, *[1] * (W.ndim - 1)) if m.ndim == 1 else m.reshape(1, -1, *[1] * (W.ndim - 2))
    return new * (m / norm_along(new, magnitude)) - W


def delta_of(weight: Tensor, delta: Delta) -> Tensor:
    """Return ΔW of `delta` on W, in W's shape and float32 (float64 for float64 tensors)."""
    import torch

    if delta.form == "gain":
        W, g = weight if weight.dtype == torch.float64 else weight.float(), delta.parts["value"]
        g = g.reshape(-1, *[1] * (W.ndim - 1)) if g.ndim == 1 else g.reshape(1, -1, *[1] * (W.ndim - 2))
        return W * g.to(W.dtype) * delta.scale
    if delta.form == "replacement":
        value = delta.parts["value"]
        wide = torch.float64 if torch.float64 in (weight.dtype, value.dtype) else torch.float32
        return (value.to(wide) - weight.to(wide)) * delta.scale
    return change_of(weight, product_of(delta), delta.magnitude)


def part_problems(delta: Delta) -> list[str]:
    """Return the problems with the parts of a delta, one line each."""
    have = set(delta.parts)
    if have not in _PARTS[delta.form]:
        want = " or ".join(", ".join(sorted(p)) for p in _PARTS[delta.form])
        return [f"{delta.form} has parts: {', '.join(sorted(have)) or 'none'}; expected {want}"]
    if delta.form in BASED and (delta.rows or delta.magnitude is not None):
        return [f"a {delta.form} cannot have rows or a magnitude"]
    if delta.form == "gain":
        return []
    try:
        shape = _shape_of(delta)
    except ValueError as error:
        parts = ", ".join(f"{name} {tuple(t.shape)}" for name, t in sorted(delta.parts.items()))
        return [f"parts {parts} do not fit: {error}"]
    if shape == tuple(delta.shape):
        return []
    return [f"the parts give the shape {shape}, but the delta's shape is {tuple(delta.shape)}"]


def _shape_of(delta: Delta) -> tuple[int, ...]:
    """Return the shape of `product_of`, computed from the shapes of the parts.

    Meta tensors would give the same shape, but torch takes two seconds to load them on first use."""
    p = {name: tuple(t.shape) for name, t in delta.parts.items()}
    full_shape = tuple(delta.whole or delta.shape)
    if delta.form in ("dense", "replacement"):
        shapes = [p["value"]]
    elif delta.form == "hadamard":
        shapes = [_factor_shape(p, "1"), _factor_shape(p, "2")]
    else:
        first, second = _factor_shape(p, "1"), _factor_shape(p, "2")
        if len(first) > len(second):
            raise ValueError(f"the first factor {first} has more dimensions than the second, {second}")
        first += (1,) * (len(second) - len(first))
        shapes = [tuple(m * n for m, n in zip(first, second, strict=True))]
    for shape in shapes:
        if math.prod(shape) != math.prod(full_shape):
            raise ValueError(f"the shape {shape} does not match {full_shape}")
    if delta.rows is None:
        return full_shape
    return len(range(*slice(*delta.rows).indices(full_shape[0]))), *full_shape[1:]


def _factor_shape(p: Mapping[str, tuple[int, ...]], n: str) -> tuple[int, ...]:
    if f"w{n}" in p:
        return p[f"w{n}"]
    a, b, core = p[f"a{n}"], p[f"b{n}"], p.get(f"t{n}")
    inner = (a[-1:], b[:1]) if core is None else (a[-1:] + b[:1], core[:2])
    if len(a) != 2 or len(b) < 2 or (core is not None and len(b) != 2) or inner[0] != inner[1]:
        raise ValueError(f"a{n} {a} and b{n} {b}" + (f" around t{n} {core}" if core else ""))
    return (a[0], math.prod(b[1:])) if core is None else (a[0], b[1], *core[2:])
