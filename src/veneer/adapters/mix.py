"""Make adapters from adapters and models: mix, resize, extract, compare, scale.

    add_mix(library, ["style:0.8", "product:0.5"], "both", alias="prod")
    mix_adapters(["style:0.8", "product:0.5"], "out")
                                         Σ strength·ΔW as one adapter, with a method of core.mix
    resize                               the best approximation of a given rank, energy share or maximum error
    extract                              an adapter from two full models, ΔW = W' − W, one tensor at a time
    diff                                 cosine and norms of two adapters' changes, per module
    strength                             multiply each block's change by a number, exactly

Each adapter that this module writes has a card with the digests of its parents, the recipe and the errors.
Every error is ‖result − exact‖/‖exact‖ (Frobenius), computed from the factors. Inputs can have any supported
format. Outputs have the layout `to` (formats.convert); by default, the output's extension determines the
layout (`target_of`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters import use as using
from veneer.core.adapter import Adapter, Card, all_finite, mix_text
from veneer.core.factors import factors, inner
from veneer.core.forms import BASED, product_of
from veneer.core.merge import dtype_of
from veneer.core.mix import Mixed, MixedModule, Weights, mix, scaled_by_module
from veneer.core.truncate import Bound, distance, like, low_rank, rebuilt
from veneer.errors import AdapterError, BaseError, ConfigError, first_few
from veneer.files.weights import Checkpoint, checkpoint_parts
from veneer.formats import convert
from veneer.formats.convert import target_of
from veneer.formats.reading import Reading
from veneer.formats.strengths import block_of, parse_blocks
from veneer.library.library import Added, Library
from veneer.library.names import check_alias, check_name

_EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "token_embedding", "position_embedding", "shared"}


@dataclass
class MixReport:
    """The result of a mix.

    error: relative error over all modules.
    parts: the norm and errors of each module (core.mix.MixedModule).
    left: the parts of the inputs that were left out of the result, with reasons."""

    path: str = ""
    layout: str = ""
    digest: str = ""
    method: str = ""
    bytes: int = 0
    norm: float = 0.0
    error: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict, repr=False)
    parts: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def worst(self, count: int = 3) -> list[tuple[str, float]]:
        """Return (module, relative error) tuples, largest absolute error first."""
        order = sorted(self.parts.items(), key=lambda item: -item[1]["error"])[:count]
        return [(name, p["error"] / p["norm"] if p["norm"] else 0.0) for name, p in order if p["error"]]


def mix_adapters(
    specs: Sequence[str | tuple[str, float]],
    out: str | Path,
    *,
    method: str = "sum",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    density: float = 0.5,
    dtype: str = "float32",
    blocks: str = "",
    base: str | Path | None = None,
    to: str | None = None,
) -> MixReport:
    """Write a mix of adapters as one adapter to the new path `out`.

    specs: each "NAME_OR_PATH[:strength]".
    method: a method of core.mix.
    rank, energy, error: at most one of these bounds (core.truncate.Bound).
    blocks: additional strengths per block, for all adapters (`parse_blocks`).
    base: a folder of safetensors files, for changes that need the base's weights (DoRA, full copies).
    dtype: the dtype of computed tensors; copied tensors keep their dtype.

    Raises ConfigError for an invalid request, and AdapterError with a list of everything that cannot be
    mixed."""
    selected = [using.parse_spec(s) for s in specs]
    if not selected:
        raise ConfigError("there is nothing to mix", fix="name at least one adapter")
    read = [using.read_adapter(name) for name, _ in selected]
    parts = [(_by_block(r.adapter, blocks), strength) for r, (_, strength) in zip(read, selected, strict=True)]
    bound, kind, weights = _bound(rank, energy, error), dtype_of(dtype), _weights(base)
    mixed = mix(parts, method, bound, density=density, dtype=kind, weights=weights)
    _check_finite(mixed, selected, dtype)
    bounds = _set_options(rank=rank, energy=energy, error_bound=error)
    recipe: dict[str, Any] = {"made": "mix", "method": method, **bounds}
    recipe |= {"density": density} if method == "ties" else {}
    recipe |= {"blocks": blocks} if blocks else {}
    recipe["strengths"] = dict(selected)
    return _write(mixed, out, read, recipe, to=to)


def add_mix(
    library: Library,
    specs: Sequence[str | tuple[str, float]],
    name: str,
    *,
    alias: str | None = None,
    tags: Sequence[str] = (),
    base: str | Path | None = None,
) -> tuple[Added, MixReport]:
    """Add the exact sum of adapters in the library as the next version of `name`.

    specs: references such as "support@2", each with an optional ":strength". The card records the version
        that each reference currently resolves to.
    alias: an alias to point to the new version.
    base: as in `mix_adapters`.

    Raises the errors of `mix_adapters` and Library.add. If the mix fails, nothing is added."""
    selected = [using.parse_spec(s) for s in specs]
    if not selected:
        raise ConfigError("there is nothing to mix", fix="name at least one adapter")
    check_name(name)
    if alias is not None:
        check_alias(alias)
    parts = [(library.find(reference).reference, strength) for reference, strength in selected]
    read = [using.read_adapter(library.resolve(reference)) for reference, _ in parts]
    mixed = mix([(r.adapter, strength) for r, (_, strength) in zip(read, parts, strict=True)], weights=_weights(base))
    _check_finite(mixed, parts, "float32")
    recipe: dict[str, Any] = {"made": "mix", "method": "sum", "strengths": dict(parts)}
    with tempfile.TemporaryDirectory() as folder:
        written = _write(mixed, Path(folder) / "adapter", read, recipe, to="peft")
        added = library.add(written.path, name, tags=tags)
    if alias is not None:
        added.version = library.alias(added.version.reference, alias)
    return added, replace(written, path=added.version.reference)


def _check_finite(mixed: Mixed, parts: Sequence[tuple[str, float]], dtype: str) -> None:
    if bad := [name for name, tensor in mixed.adapter.tensors() if not all_finite(tensor)]:
        problem = f"the mix of {mix_text(tuple(parts))} does not fit into {dtype}: {first_few(bad, 3)}"
        raise AdapterError(problem, fix="use smaller strengths, or a dtype with a larger range")


def resize(
    name: str,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    dtype: str = "float32",
    base: str | Path | None = None,
    to: str | None = None,
) -> MixReport:
    """Write a low-rank approximation of an adapter.

    Give exactly one limit: a `rank`, the share of energy to keep (`energy`), or a maximum `error`. Each module
    gets the best approximation within the limit. An error limit holds for each module, and therefore for all
    modules together. A module whose rank is already small enough stays exact. DoRA needs `base`, because its
    change depends on the base's weights."""
    if (bound := _bound(rank, energy, error)) is None:
        raise ConfigError("a resize needs a size", fix="give one of rank, energy and error")
    read = using.read_adapter(name)
    mixed = mix([(read.adapter, 1.0)], "sum", bound, dtype=dtype_of(dtype), weights=_weights(base))
    recipe = {"made": "resize", **_set_options(rank=rank, energy=energy, error_bound=error)}
    return _write(mixed, out, [read], recipe, to=to)


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    targets: str | None = None,
    dtype: str = "float32",
    prefix: str = "",
    to: str | None = None,
) -> MixReport:
    """Write an adapter that approximates the difference `tuned` − `base`.

    base, tuned: full models, as safetensors files or folders. Only one weight of each is in memory at a
        time.
    targets: a regular expression to search for in module names; by default all weights with two or more
        dimensions except embeddings.
    prefix: text to put before every module name, such as "unet.".

    `left` in the result lists each difference that the adapter leaves out (other shapes, vectors, modules
    outside the targets) and its size. Raises BaseError if no target differs or if the models share no tensor
    names."""
    if (bound := _bound(rank, energy, error)) is None:
        raise ConfigError("an extract needs a size", fix="give one of rank, energy and error")
    kept_dtype = dtype_of(dtype)
    try:
        pattern = re.compile(targets) if targets is not None else None
    except re.error as problem:
        raise ConfigError(f"{targets!r} is not a regular expression: {problem}") from None
    base_weights, tuned_weights = Checkpoint(base), Checkpoint(tuned)
    if not set(base_weights.entries) & set(tuned_weights.entries):
        raise BaseError("the two models have no tensor names in common", where=f"{base}, {tuned}")
    mixed = Mixed(Adapter())
    skipped = [f"{n}: only in base" for n in base_weights if n not in tuned_weights]
    skipped += [f"{n}: only in tuned" for n in tuned_weights if n not in base_weights]
    for name in tuned_weights:
        if name not in base_weights:
            continue
        if base_weights.entries[name].shape != tuned_weights.entries[name].shape:
            skipped.append(f"{name}: {base_weights.entries[name].shape} and {tuned_weights.entries[name].shape}")
            continue
        delta = _difference(base_weights.tensor(name), tuned_weights.tensor(name))
        if delta is None:
            continue
        module, _, key = name.rpartition(".")
        embedding = module.rpartition(".")[2] in _EMBEDDINGS
        fits = key == "weight" and delta.ndim >= 2 and (pattern.search(module) if pattern else not embedding)
        if not fits:
            skipped.append(f"{name}: ‖ΔW‖ {float(delta.double().norm()):.4g}, not among the targets")
            continue
        A, B, cut = low_rank(delta.mT if embedding else delta.flatten(1), bound)
        pair = rebuilt(like(tuple(delta.shape), embedding), A, B, kept_dtype)
        mixed.adapter.pairs[prefix + module] = pair
        off = distance(factors(pair), (A, B))
        mixed.parts[prefix + module] = MixedModule(cut.rank, cut.norm, (cut.error**2 + off**2) ** 0.5, cut.error)
    if not mixed.adapter.pairs:
        raise BaseError("no target differs between the two models", where=f"{base}, {tuned}", fix="check the targets")
    recipe = {"made": "extract", "base": Path(base).name, "tuned": Path(tuned).name}
    recipe |= _set_options(rank=rank, energy=energy, error_bound=error, targets=targets)
    return _write(mixed, out, [], recipe, left=skipped, to=to)


def _difference(first: Tensor, second: Tensor) -> Tensor | None:
    """Return W' − W, exact in float32 for 16-bit weights.

    Returns None if the difference is zero, or if either tensor is not a floating-point tensor."""
    if not (first.is_floating_point() and second.is_floating_point()) or (
        first.dtype == second.dtype and torch.equal(first, second)
    ):
        return None
    wide = torch.float64 if torch.float64 in (first.dtype, second.dtype) else torch.float32
    delta = second.to(wide) - first.to(wide)
    return delta if delta.any() else None


def diff(a: str, b: str) -> dict[str, Any]:
    """Compare the changes of two adapters and return the comparison, ready for JSON.

    For each module, and for all comparable modules together, the result contains ‖ΔW_a‖, ‖ΔW_b‖, the cosine
    between ΔW_a and ΔW_b (Frobenius), and ‖ΔW_a − ΔW_b‖/‖ΔW_a‖. `only` lists modules that the other adapter
    does not change. `skipped` lists changes that cannot be compared without a base, with reasons. The spec
    "a:0.5" compares adapter a at half strength."""
    (first, s1), (second, s2) = (
        (using.read_adapter(name).adapter, strength) for name, strength in map(using.parse_spec, (a, b))
    )
    modules: dict[str, dict[str, float]] = {}
    fixed = [n for x in (first, second) for n in [*x.modules, *x.token_rows]]
    skipped = [f"{n}: full copies and token rows cannot be compared without a base" for n in fixed]
    have = [set(x.pairs) | {d.rpartition(".")[0] for d in x.deltas} for x in (first, second)]
    totals = [0.0, 0.0, 0.0]
    for name in sorted(have[0] | have[1]):
        try:
            values = _compare(_change_of(first, name), _change_of(second, name), s1, s2)
        except AdapterError as error:
            skipped.append(f"{name}: {error.what}")
            continue
        modules[name] = _row(*values)
        totals = [t + v for t, v in zip(totals, values, strict=True)]
    only = {"a": sorted(have[0] - have[1]), "b": sorted(have[1] - have[0])}
    return {"a": a, "b": b, "all": _row(*totals), "modules": modules, "only": only, "skipped": sorted(set(skipped))}


Change = tuple[Tensor, Tensor] | None


def _change_of(adapter: Adapter, name: str) -> Change:
    """Return a module's change as factors (A, B), or None if there is no change.

    For a delta, B is the dense product and A is the identity."""
    out: list[tuple[Tensor, Tensor]] = []
    if (pair := adapter.pairs.get(name)) is not None:
        if pair.magnitude is not None:
            raise AdapterError("DoRA needs the base")
        out.append(factors(pair))
    for key, delta in adapter.deltas.items():
        if key.rpartition(".")[0] != name:
            continue
        if delta.form in BASED or delta.magnitude is not None or not key.endswith(".weight") or out:
            raise AdapterError(f"a {delta.form} delta cannot be compared without the base")
        dense = product_of(delta).double()
        dense = dense.flatten(1) if dense.ndim > 1 else dense[:, None]
        out.append((torch.eye(dense.shape[1], dtype=torch.float64), dense))
    return out[0] if out else None


def _compare(first: Change, second: Change, s1: float, s2: float) -> tuple[float, float, float]:
    """Return ‖a‖², ‖b‖² and ⟨a, b⟩, with the strengths applied."""
    if (
        first is not None
        and second is not None
        and (first[0].shape[-1], first[1].shape[-2]) != (second[0].shape[-1], second[1].shape[-2])
    ):
        raise AdapterError("changes of different shapes")
    aa = s1 * s1 * inner(first, first) if first else 0.0
    bb = s2 * s2 * inner(second, second) if second else 0.0
    return aa, bb, s1 * s2 * inner(first, second) if first and second else 0.0


def _row(aa: float, bb: float, ab: float) -> dict[str, float]:
    a, b = max(aa, 0.0) ** 0.5, max(bb, 0.0) ** 0.5
    off = max(aa + bb - 2 * ab, 0.0) ** 0.5
    return {"norm_a": a, "norm_b": b, "cosine": ab / (a * b) if a and b else 0.0, "difference": off / a if a else 0.0}


def strength(name: str, out: str | Path | None = None, *, blocks: str = "", to: str | None = None) -> dict[str, Any]:
    """Return each block's ‖ΔW‖, share of the total and strengths; optionally write the adapter.

    blocks: strengths per block.
    out: where to write the adapter with these strengths. The result is exact, because only scales change, and
        tensors stay the same."""
    read = using.read_adapter(name)
    adapter = read.adapter
    modules = _modules(adapter)
    by = parse_blocks(blocks, modules) if blocks else dict.fromkeys(modules, 1.0)
    by_block: dict[str, dict[str, Any]] = {}
    skipped = []
    for module in modules:
        row = by_block.setdefault(block_of(module), {"modules": 0, "square": 0.0, "strengths": set()})
        row["modules"] += 1
        row["strengths"].add(by[module])
        try:
            row["square"] += _compare(_change_of(adapter, module), None, by[module], 0)[0]
        except AdapterError as error:
            skipped.append(f"{module}: {error.what}")
    total = sum(r["square"] for r in by_block.values())
    blocks_out: dict[str, Any] = {}
    for block, r in by_block.items():
        norm, share = max(r["square"], 0.0) ** 0.5, r["square"] / total if total else 0.0
        blocks_out[block] = {"modules": r["modules"], "strengths": sorted(r["strengths"]), "norm": norm, "share": share}
    report: dict[str, Any] = {"adapter": name, "blocks": blocks_out, "skipped": skipped}
    if out is not None:
        if not blocks:
            raise ConfigError("there are no strengths to write", fix="give blocks, such as down_blocks.0=0.5")
        scaled = scaled_by_module(adapter, by.__getitem__)
        written = _write(Mixed(scaled), out, [read], {"made": "strength", "blocks": blocks}, to=to)
        report["written"] = {"path": written.path, "digest": written.digest, "bytes": written.bytes}
    return report


def _modules(adapter: Adapter) -> list[str]:
    names = [*adapter.pairs, *(n.rpartition(".")[0] for n in adapter.deltas), *adapter.modules]
    return list(dict.fromkeys([*sorted(names), *adapter.token_rows]))


def _by_block(adapter: Adapter, blocks: str) -> Adapter:
    return scaled_by_module(adapter, parse_blocks(blocks, _modules(adapter)).__getitem__) if blocks else adapter


# -- files -------------------------------------------------------------------------------------------------------------


def _set_options(**settings: Any) -> dict[str, Any]:
    return {n: v for n, v in settings.items() if v is not None}


def _bound(rank: int | None, energy: float | None, error: float | None) -> Bound | None:
    return None if rank is energy is error is None else Bound(rank, energy, error)


def _weights(base: str | Path | None) -> Weights | None:
    """Return a function from module name to the base's weight; None without a base.

    For a pipeline folder, module names start with the component."""
    if base is None:
        return None
    parts = checkpoint_parts(Path(base))

    def weight(name: str) -> Tensor | None:
        part, name_in_part = (
            (parts[""], name) if "" in parts else (parts.get(name.partition(".")[0]), name.partition(".")[2])
        )
        entry = part.find(name_in_part) if part is not None else None
        return part.tensor(entry) if part is not None and entry is not None else None

    return weight


def _write(
    mixed: Mixed,
    out: str | Path,
    parents: Sequence[Reading],
    recipe: Mapping[str, Any],
    *,
    to: str | None,
    left: Sequence[str] = (),
) -> MixReport:
    path = Path(out)
    if path.is_file() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ConfigError("the output already exists", where=str(path), fix="give a new one with -o")
    cards = [r.adapter.card for r in parents]
    bases = {(c.base, c.base_fingerprint) for c in cards if c.base_fingerprint or c.base}
    prints = {f for _, f in bases if f}
    if len(prints) > 1:
        problem = "the adapters belong to different bases: " + "; ".join(sorted(f"{n or '?'} {f}" for n, f in bases))
        raise AdapterError(problem, fix="mix adapters of one base")
    worst = MixReport(parts={n: asdict(p) for n, p in mixed.parts.items()}).worst()
    card = Card(
        base=next(iter(sorted(bases)), ("", ""))[0],
        base_fingerprint=next(iter(prints), ""),
        kind=next((c.kind for c in cards), "text"),
        recipe=dict(recipe),
        metrics={"norm": mixed.norm, "error": mixed.error, "worst": dict(worst)} if mixed.parts else {},
        trigger_words=list(dict.fromkeys(w for c in cards for w in c.trigger_words)),
        licence=" AND ".join(dict.fromkeys(c.licence for c in cards if c.licence)),
        parents=[r.adapter.digest() for r in parents],
    )
    layout = to or target_of(path, parents[0].format if parents else "")
    family = next((r.family for r in parents if r.family), None) if layout not in ("peft", "vllm", "gguf") else None
    written = convert.write(replace(mixed.adapter, card=card), path, layout, family=family)
    return MixReport(
        path=str(path),
        layout=layout,
        digest=written.digest,
        method=str(recipe.get("method", recipe["made"])),
        bytes=sum((path / f if path.is_dir() else path).stat().st_size for f in written.files),
        norm=mixed.norm,
        error=mixed.error,
        ranks={str(rank): count for rank, count in written.ranks.items()},
        parts={n: asdict(p) for n, p in mixed.parts.items()},
        left=list(left),
        notes=[*(n for r in parents for n in r.notes), *mixed.notes, *written.notes],
    )
