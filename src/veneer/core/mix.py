"""Mix several adapters into one: Σ strengthᵢ·ΔWᵢ, exactly or approximately.

| method     | result, with τᵢ = strengthᵢ·ΔWᵢ                                                  | source           |
| sum        | Σ τᵢ: ranks concatenated, then truncated to the bound if one is given            | exact            |
| svd        | as sum; the default bound is the largest rank among the adapters                 | Eckart-Young     |
| ties       | keep the largest |entries|, a fraction `density`; for each entry, take the sign  | arXiv 2306.01708 |
|            | of the sum, and the mean of the kept entries with this sign                      |                  |
| orthogonal | U⊥·diag(S)·V⊥: the singular vectors of all τᵢ concatenated, made orthogonal      | arXiv 2412.00081 |

TIES works on the entries of the true ΔW, one module at a time; `low_rank` turns the result back into a pair.
Other tools often trim A and B instead, which does not trim ΔW. `orthogonal` is for image adapters that
compete for the same directions. ZipLoRA (2311.13600) has the same aim, but `orthogonal` needs no data: it
replaces [U₁ U₂ …] by the nearest matrix with orthonormal columns, U·(UᵀU)^(-1/2), and V likewise. Adapters
without common directions stay unchanged; two equal adapters give their mean.

A change that only one adapter has, at strength 1, is copied unchanged, whatever its form. Every mixed module
reports its distance from the true sum. Some changes (DoRA, gains mixed with other deltas, full copies whose
strengths do not add up to 1) need the base's weight, which the caller provides (`Weights`). This module works
on tensors, and does not depend on files or bases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair, TokenRows
from veneer.core.factors import factors
from veneer.core.forms import BASED, Delta, change_of, delta_of, product_of
from veneer.core.truncate import (
    Bound,
    distance,
    like,
    low_rank,
    rebuilt,
    rounding,
    stacked,
    thin_svd,
    truncated,
)
from veneer.errors import AdapterError, bullets, first_few

METHODS = ("sum", "svd", "ties", "orthogonal")

Weights = Callable[[str], Tensor | None]
"""Function from a parameter name to the base's weight, (out, in, …) or (rows, dim) for an embedding; None if
the weight is not available."""


@dataclass(frozen=True)
class MixedModule:
    """The norm and errors of one module of a mix.

    rank: 0 if the result is not a pair.
    norm: ‖Σ strength·ΔW‖.
    error: ‖result − Σ strength·ΔW‖ after rounding.
    cut: the part of `error` caused by the bound and by rounding, ‖result − exact result of the method‖.

    Without the base, some norms are unknown: a gain counts as 0, a copied DoRA as ‖s·B·A‖."""

    rank: int
    norm: float
    error: float
    cut: float = 0.0


@dataclass
class Mixed:
    """A mix as one adapter, with the distance of each module from the exact sum."""

    adapter: Adapter
    parts: dict[str, MixedModule] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def norm(self) -> float:
        """‖Σ strength·ΔW‖ over all modules."""
        return math.sqrt(sum(p.norm**2 for p in self.parts.values()))

    @property
    def error(self) -> float:
        """‖result − Σ strength·ΔW‖/‖Σ strength·ΔW‖ over all modules."""
        off = math.sqrt(sum(p.error**2 for p in self.parts.values()))
        return off / self.norm if self.norm else off


# -- pairs of one module -----------------------------------------------------------------------------------------------


def mix_pairs(
    pairs: Sequence[tuple[Pair, float]],
    method: str = "sum",
    bound: Bound | None = None,
    *,
    density: float = 0.5,
    name: str = "",
    dtype: torch.dtype = torch.float32,
) -> tuple[Pair, MixedModule]:
    """Mix the pairs of one module into one pair of scale 1.

    method: see the table at the top of this module.
    density: the fraction of entries that TIES keeps.
    name: the module's name, for error messages.

    Raises AdapterError for pairs of different shapes, a pair with a magnitude, or TIES without a bound."""
    if any(p.magnitude is not None for p, _ in pairs):
        raise AdapterError("a pair with a magnitude (DoRA) is not low rank without its base", where=name or None)
    model = pairs[0][0]
    truth = stacked(pairs)
    if method == "svd" and bound is None:
        bound = Bound(rank=max(p.rank for p, _ in pairs))
    if method in ("sum", "svd"):
        product = truth
    elif method == "orthogonal":
        product = _orthogonal(pairs)
    else:
        factors_of_pairs = [stacked([pair]) for pair in pairs]
        dense = _ties([B.float() @ A.float() for A, B in factors_of_pairs], density)
        approximations = [low_rank(m, _require_bound(bound, name)) for m in dense.reshape(-1, *dense.shape[-2:])]
        A, B = _padded([f[0] for f in approximations], -2), _padded([f[1] for f in approximations], -1)
        lead = truth[0].shape[:-2]
        out = rebuilt(model, A.reshape(*lead, *A.shape[1:]), B.reshape(*lead, *B.shape[1:]), dtype)
        cut = math.sqrt(sum(f[2].error ** 2 for f in approximations))
        return out, MixedModule(out.rank, distance(truth), distance(factors(out), truth), cut)
    if bound is not None:
        out, report = truncated(*product, model, bound, dtype)
        norm, cut = report.norm, math.hypot(report.error, report.rounding)
    else:
        out = rebuilt(model, *product, dtype)
        norm, cut = distance(product), rounding(product, out)
    if product is truth:
        return out, MixedModule(out.rank, norm, cut, cut)
    return out, MixedModule(out.rank, distance(truth), distance(factors(out), truth), cut)


def _require_bound(bound: Bound | None, name: str) -> Bound:
    if bound is None:
        fix = "limit the result: give a rank, an energy or an error"
        raise AdapterError("the result has full rank", where=name or None, fix=fix)
    return bound


def _padded(parts: list[Tensor], dim: int) -> Tensor:
    """Stack matrices along a new dimension, padding matrices of lower rank with zeros."""
    most = max(t.shape[dim] for t in parts)
    out = []
    for t in parts:
        shape = list(t.shape)
        shape[dim] = most - shape[dim]
        out.append(torch.cat([t, t.new_zeros(shape)], dim))
    return torch.stack(out)


def _orthogonal(pairs: Sequence[tuple[Pair, float]]) -> tuple[Tensor, Tensor]:
    parts = [thin_svd(*stacked([pair])) for pair in pairs]
    U = torch.cat([u for u, _, _ in parts], -1)
    S = torch.cat([s for _, s, _ in parts], -1)
    V = torch.cat([v for _, _, v in parts], -2)
    return _nearest_orthonormal(V.mT, S).mT, _nearest_orthonormal(U, S) * S.unsqueeze(-2)


def _nearest_orthonormal(U: Tensor, S: Tensor) -> Tensor:
    """Return U·(UᵀU)^(-1/2), the nearest matrix with orthonormal columns.

    If the columns are linearly dependent, the result stays within the span of U. Directions with a singular
    value of zero are ignored."""
    U = U * (1e-12 * S.amax(-1, keepdim=True) < S).unsqueeze(-2)
    values, E = torch.linalg.eigh(U.mT @ U)
    inverse = torch.where(values > 1e-10, values.clamp_min(1e-10).rsqrt(), 0.0)
    out: Tensor = U @ (E * inverse.unsqueeze(-2)) @ E.mT
    return out


def _ties(tau: list[Tensor], density: float) -> Tensor:
    """Apply TIES to the scaled changes strength·ΔW."""
    if not 0 < density <= 1:
        raise AdapterError(f"density {density:g} must be above 0 and at most 1", fix="give a fraction, for example 0.5")
    trimmed = [_largest(t, density) for t in tau]
    sign = _total(trimmed).sign()
    count, agreed = torch.zeros_like(sign), torch.zeros_like(sign)
    for t in trimmed:
        agrees = (t.sign() == sign) & (t != 0)
        agreed += t * agrees
        count += agrees
    return agreed / count.clamp_min(1)


def _total(parts: Sequence[Tensor]) -> Tensor:
    out = parts[0].clone()
    for part in parts[1:]:
        out += part
    return out


def _largest(t: Tensor, density: float) -> Tensor:
    """Return `t` with all but the round(density·n) largest |entries| set to zero."""
    count = max(1, round(density * t.numel()))
    if count >= t.numel():
        return t
    edge = t.abs().flatten().kthvalue(t.numel() - count + 1).values
    return torch.where(t.abs() >= edge, t, 0.0)


# -- whole adapters ----------------------------------------------------------------------------------------------------


def mix(
    adapters: Sequence[tuple[Adapter, float]],
    method: str = "sum",
    bound: Bound | None = None,
    *,
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
    weights: Weights | None = None,
) -> Mixed:
    """Mix adapters of one base into one adapter.

    Ranks, scales and targets can differ. The pairs of one module become one pair. A delta that only one
    adapter has keeps its form. If several adapters have a delta of the same parameter, the deltas are summed:
    gains along the same axis give a gain, replacements a replacement, and other combinations a dense delta.
    With a bound, or with TIES, every delta of a weight is folded into its module's pair. Full copies and
    token rows are mixed as W + Σ strength·(copy − W), which does not need W if the strengths add up to 1.

    Raises one AdapterError that lists everything that cannot be mixed, and everything that would need
    `weights`."""
    if method not in METHODS:
        raise AdapterError(f"there is no method {method!r}", fix=", ".join(METHODS))
    if not adapters:
        raise AdapterError("there is nothing to mix", fix="name at least one adapter")
    return _Mix(adapters, method, bound, density, dtype, weights or (lambda name: None)).run()


@dataclass
class _Mix:
    adapters: Sequence[tuple[Adapter, float]]
    method: str
    bound: Bound | None
    density: float
    dtype: torch.dtype
    weights: Weights
    out: Mixed = field(default_factory=lambda: Mixed(Adapter()))
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> names of the changes that cannot be mixed."""

    @property
    def folds(self) -> bool:
        """Whether every change of a weight is folded into its module's pair."""
        return self.bound is not None or self.method == "ties"

    def run(self) -> Mixed:
        for kind in ("pairs", "deltas", "modules", "token_rows"):
            every: dict[str, list[tuple[Any, float]]] = {}
            for adapter, strength in self.adapters:
                for name, item in getattr(adapter, kind).items():
                    every.setdefault(name, []).append((item, strength))
            for name in sorted(every):
                try:
                    getattr(self, f"_{kind}")(name, every[name])
                except AdapterError as error:
                    why = error.what + (f" ({error.fix})" if error.fix else "")
                    self.problems.setdefault(why, []).append(name)
        if self.problems:
            lines = [f"{first_few(names, 3)}: {why}" for why, names in self.problems.items()]
            raise AdapterError(f"these adapters do not mix:\n{bullets(lines, None)}")
        return self.out

    def _weight(self, name: str, why: str) -> Tensor:
        weight = self.weights(name)
        if weight is None:
            raise AdapterError(f"{why} needs the base's weight", fix="give the base")
        return weight.detach().double()

    def _narrow(self, t: Tensor) -> Tensor:
        """Return `t`, converted to the requested dtype if `t` has a wider dtype."""
        return t if torch.promote_types(t.dtype, self.dtype) == self.dtype else t.to(self.dtype)

    # Deltas of a module's weight that are folded into the module's pair.
    def _weight_deltas(self, name: str) -> list[tuple[Delta, float]]:
        key = f"{name}.weight"
        if not self.folds:
            return []
        return [(a.deltas[key], s) for a, s in self.adapters if key in a.deltas]

    def _pairs(self, name: str, pairs: list[tuple[Pair, float]]) -> None:
        weight_deltas = self._weight_deltas(name)
        alone = len(pairs) == 1 and not weight_deltas and not self.folds and self.method in ("sum", "svd", "orthogonal")
        if alone:
            pair, strength = pairs[0]
            if strength == 1 or pair.magnitude is None:
                exact = replace(pair.collapsed(), scale=pair.scale * strength)
                out = replace(exact, A=self._narrow(exact.A), B=self._narrow(exact.B))
                truth = factors(replace(exact, magnitude=None))
                off = 0.0 if out.A is exact.A and out.B is exact.B else distance(factors(out), truth)
                self.out.adapter.pairs[name] = out
                self.out.parts[name] = MixedModule(out.rank, distance(truth), off, off)
                return
        if weight_deltas or any(p.magnitude is not None for p, _ in pairs):
            self._dense_pair(name, pairs, weight_deltas)
            return
        out, part = mix_pairs(pairs, self.method, self.bound, density=self.density, name=name, dtype=self.dtype)
        self.out.adapter.pairs[name], self.out.parts[name] = out, part

    def _dense_pair(self, name: str, pairs: list[tuple[Pair, float]], weight_deltas: list[tuple[Delta, float]]) -> None:
        """Mix one module as dense matrices, then turn the result into a pair.

        Used if a change of the module is not low rank."""
        parts: list[Tensor] = []
        shape: tuple[int, ...] = ()
        for adapter, strength in self.adapters:
            terms: list[Tensor] = []
            if (pair := adapter.pairs.get(name)) is not None and any(pair is p for p, _ in pairs):
                terms.append(self._change(name, pair))
            if (delta := adapter.deltas.get(f"{name}.weight")) is not None and weight_deltas:
                change = self._delta(f"{name}.weight", delta)
                shape = tuple(change.shape)
                change = change.mT if pairs and pairs[0][0].kind == "embedding" else change
                terms.append(change.flatten(1))
            if terms:
                parts.append(strength * _total(terms))
        if len({p.shape for p in parts}) > 1:
            raise AdapterError(f"changes of unlike shapes cannot be added: {[tuple(p.shape) for p in parts]}")
        truth = _total(parts)
        if self.method == "orthogonal" and len(parts) > 1:
            raise AdapterError("the method orthogonal takes low-rank changes only", fix="use sum with a bound, or ties")
        answer = _ties(parts, self.density) if self.method == "ties" else truth
        if self.bound is None and len(pairs) == 1 and self.method == "svd":
            bound = Bound(rank=pairs[0][0].rank)
        else:
            bound = _require_bound(self.bound, "")
        A, B, cut = low_rank(answer, bound)
        model = pairs[0][0] if pairs else like(shape)
        out = rebuilt(model, A, B, self.dtype)
        off = torch.linalg.vector_norm(_dense_of(out) - truth)
        self.out.adapter.pairs[name] = out
        self.out.parts[name] = MixedModule(out.rank, float(torch.linalg.vector_norm(truth)), float(off), cut.error)

    def _change(self, name: str, pair: Pair) -> Tensor:
        """Return a pair's ΔW as a dense matrix (out, n), float64."""
        product = _dense_of(replace(pair, magnitude=None))
        if pair.magnitude is None:
            return product
        if pair.kind == "experts":
            raise AdapterError("a DoRA on fused experts cannot be converted to low rank")
        weight = self._weight(f"{name}.weight", "a pair with a magnitude (DoRA)")
        weight = weight.mT if pair.kind == "embedding" else weight
        if weight.flatten(1).shape != product.shape:
            raise AdapterError(f"the base's weight {tuple(weight.shape)} does not fit a change {tuple(product.shape)}")
        return change_of(weight, product.reshape(weight.shape), pair.magnitude).flatten(1)

    def _delta(self, name: str, delta: Delta) -> Tensor:
        """Return a delta's ΔW in the parameter's shape, float64."""
        wide = replace(delta, parts={n: t.double() for n, t in delta.parts.items()})
        if delta.form in BASED or delta.magnitude is not None:
            why = f"a {delta.form}" if delta.form in BASED else "a delta with a magnitude (DoRA)"
            return delta_of(self._weight(name, why), wide)
        return product_of(wide)

    def _deltas(self, name: str, deltas: list[tuple[Delta, float]]) -> None:
        module, _, key = name.rpartition(".")
        shape = next((d.shape for d, _ in deltas if d.shape), ())
        if self.folds and key == "weight" and (len(shape) > 1 or deltas[0][0].form == "gain"):
            if module not in self.out.adapter.pairs and not any(module in a.pairs for a, _ in self.adapters):
                self._dense_pair(module, [], deltas)
            return
        first, strength = deltas[0]
        as_is = self.method != "ties" and (strength == 1 or first.magnitude is None)
        if len(deltas) == 1 and as_is:
            out = replace(first, scale=first.scale * strength)
            based = out.form in BASED or out.magnitude is not None
            norm = 0.0 if based else float(product_of(out).double().norm())
            self.out.adapter.deltas[name], self.out.parts[name] = out, MixedModule(0, norm, 0.0)
            return
        axes = {d.parts["value"].ndim for d, _ in deltas if d.form == "gain"}
        if all(d.form == "gain" for d, _ in deltas) and len(axes) == 1 and self.method != "ties":
            value = torch.stack([d.parts["value"].double() * (d.scale * s) for d, s in deltas]).sum(0)
            self.out.adapter.deltas[name] = Delta("gain", {"value": value.to(self.dtype)}, first.shape)
            self.out.parts[name] = MixedModule(0, 0.0, 0.0)
            return
        if all(d.form == "replacement" for d, _ in deltas) and self.method != "ties":
            self._replacements(name, [(d, d.scale * s) for d, s in deltas])
            return
        parts = [self._delta(name, d) * s for d, s in deltas]
        truth = _total(parts)
        answer = _ties(parts, self.density) if self.method == "ties" else truth
        value = answer.to(self.dtype)
        self.out.adapter.deltas[name] = Delta("dense", {"value": value}, tuple(value.shape))
        self.out.parts[name] = MixedModule(0, float(truth.norm()), float((value.double() - truth).norm()))

    def _replacements(self, name: str, deltas: list[tuple[Delta, float]]) -> None:
        """Mix replacements: Σ sᵢ·(vᵢ − W) = s·(Σ sᵢ·vᵢ/s − W) with s = Σ sᵢ.

        If s = 0, the result is the dense delta Σ sᵢ·vᵢ."""
        strength_sum = sum(s for _, s in deltas)
        exact = torch.stack([d.parts["value"].double() * s for d, s in deltas]).sum(0)
        out = Delta("dense" if abs(strength_sum) < 1e-12 else "replacement", {}, deltas[0][0].shape)
        if out.form == "replacement":
            out.scale, exact = strength_sum, exact / strength_sum
        out.parts["value"] = exact.to(self.dtype)
        self.out.adapter.deltas[name] = out
        off = float((out.parts["value"].double() - exact).norm()) * abs(out.scale)
        self.out.parts[name] = MixedModule(0, 0.0, off)

    def _modules(self, name: str, copies: list[tuple[Mapping[str, Tensor], float]]) -> None:
        if len(copies) == 1 and copies[0][1] == 1:
            self.out.adapter.modules[name] = dict(copies[0][0])
            return
        if len({frozenset(c) for c, _ in copies}) > 1:
            raise AdapterError("the full copies have different parameters")
        mixed = {}
        for key in copies[0][0]:
            exact = self._blend(f"{name}.{key}", [(c[key], s) for c, s in copies], "a mix of full copies")
            mixed[key] = exact.to(copies[0][0][key].dtype)
        self.out.adapter.modules[name] = mixed
        self.out.notes.append(f"{name}: a full copy, mixed and rounded to its dtype")

    def _blend(self, name: str, copies: list[tuple[Tensor, float]], why: str, rows: list[int] | None = None) -> Tensor:
        """Return W + Σ strength·(copy − W); needs W only if the strengths do not sum to 1."""
        base_strength = 1 - sum(s for _, s in copies)
        total = torch.stack([s * t.detach().double() for t, s in copies]).sum(0)
        if abs(base_strength) < 1e-12:
            return total
        weight = self._weight(name, f"{why} whose strengths add up to {1 - base_strength:g}")
        return total + base_strength * (weight if rows is None else weight[rows])

    def _token_rows(self, name: str, rows: list[tuple[TokenRows, float]]) -> None:
        by_index: dict[int, list[tuple[Tensor, float]]] = {}
        for token_rows, strength in rows:
            for index, row in zip(token_rows.indices, token_rows.rows, strict=True):
                by_index.setdefault(index, []).append((row, strength))
        indices = tuple(sorted(by_index))
        mixed_rows = [
            self._blend(f"{name}.weight", [(r[None], s) for r, s in by_index[i]], "token rows", [i]) for i in indices
        ]
        self.out.adapter.token_rows[name] = TokenRows(indices, torch.cat(mixed_rows).to(rows[0][0].rows.dtype))


def _dense_of(pair: Pair) -> Tensor:
    A, B = factors(pair)
    return B @ A


def scaled_by_module(adapter: Adapter, by: Callable[[str], float]) -> Adapter:
    """Return the adapter with each module's change multiplied by `by(module)`, exactly.

    Only scales change; tensors are reused. Modules with a factor of 0 are dropped. Raises AdapterError if the
    factor is not 0 or 1 for a change that cannot be scaled without the base: a magnitude (DoRA), full copies,
    token rows."""
    problems = []
    out = replace(adapter, pairs={}, deltas={}, modules={}, token_rows={})
    for name, pair in adapter.pairs.items():
        factor = by(name)
        if factor not in (0, 1) and pair.magnitude is not None:
            problems.append(f"{name}: a pair with a magnitude (DoRA) at {factor:g}")
        elif factor:
            out.pairs[name] = replace(pair, scale=pair.scale * factor)
    for name, delta in adapter.deltas.items():
        factor = by(name.rpartition(".")[0])
        if factor not in (0, 1) and delta.magnitude is not None:
            problems.append(f"{name}: a delta with a magnitude (DoRA) at {factor:g}")
        elif factor:
            out.deltas[name] = replace(delta, scale=delta.scale * factor)
    for kind in ("modules", "token_rows"):
        for name, item in getattr(adapter, kind).items():
            factor = by(name)
            if factor not in (0, 1):
                problems.append(f"{name}: {kind.replace('_', ' ')} at {factor:g}")
            elif factor:
                getattr(out, kind)[name] = item
    if problems:
        message = f"these changes cannot be scaled exactly without the base:\n{bullets(problems, None)}"
        raise AdapterError(message, fix="use a factor of 0 or 1 for these modules")
    return out
