"""Targets: the modules of a model that support a pair, and the patterns that select them.

| pattern      | selects                                                                                              |
| name, .name  | the module of exactly that name, or every module whose name ends in `.name` (as PEFT's lists do)     |
| glob `*?[`   | every name that the glob matches, in full or after any dot; `*` also matches dots                    |
| `re:REGEX`   | every name that the regular expression matches in full                                               |
| `all-linear` | every linear module, quantized ones too, and every fused expert parameter, but not the output head   |

A fused expert parameter is named `module.parameter`. No pattern selects a router: transformers' routers are
bare parameters or return two tensors, and a pair on a router changes which expert is chosen. An adapter file
can still contain a pair for a router (`has_bare_weight`). This module identifies modules by class and
attributes, and does not depend on the tensors of pairs, on adapters or on transformers.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.core.adapter import LoraSpec, PairKind
from veneer.errors import TargetError, counted, nearest

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target:
    """A module or expert parameter that receives a pair.

    `name` is the pair's key in `Adapter.pairs`; `parameter` is set only for experts."""

    name: str
    kind: PairKind
    module_name: str
    parameter: str | None = None


def base_of(module: nn.Module) -> nn.Module:
    """Return the base's module if `module` is an attached layer, otherwise `module`."""
    base: nn.Module = module.base if getattr(type(module), "is_veneer_layer", False) else module  # type: ignore[assignment]
    return base


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules that `model.named_modules()` gives before attaching.

    Each attached layer is replaced by its base module."""
    visited: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = base_of(module)
        if id(module) in visited:
            return
        visited.add(id(module))
        yield name, module
        for key, child in module.named_children():
            yield from walk(child, f"{name}.{key}" if name else key)

    return walk(model, "")


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is linear.

    nn.Linear, transformers' Conv1D and quantized linears are linear. A subclass of nn.Linear with its own
    forward, such as a router that returns scores, is linear only if its class name contains Linear, as the
    names of the quantized classes do."""
    cls = type(module)
    if cls.__name__ == "NonDynamicallyQuantizableLinear":  # torch's attention only reads this module's weight
        return False
    if isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward:
        return True
    if cls.__name__ == "Conv1D":
        return hasattr(module, "nf") and hasattr(module, "weight")
    return "Linear" in cls.__name__ and hasattr(module, "in_features") and hasattr(module, "out_features")


def kind_of(module: nn.Module) -> PairKind | None:
    """Return the kind of pair that `module` supports, or None.

    For fused experts see `expert_parameters`."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "conv" if module.groups == 1 else None
    return "linear" if _is_linear(module) else None


def has_bare_weight(module: nn.Module) -> bool:
    """Return whether `module` is not linear but has a 2-d `weight`, as routers have.

    An adapter file can contain a linear pair for this weight, but no target pattern selects the module."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or kind_of(module) is not None:
        return False
    return type(module).__name__ != "NonDynamicallyQuantizableLinear" and type(module).forward is not nn.Linear.forward


def expert_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's 3-d parameters, the weights of fused experts.

    The list is empty for linears, convolutions and embeddings."""
    if kind_of(module) is not None or isinstance(module, nn.modules.conv._ConvNd):
        return []
    return [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]


def _output_head(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = find() if find is not None else None
    except NotImplementedError:
        return None
    return base_of(head) if isinstance(head, nn.Module) else None


def _candidates(model: nn.Module) -> Iterator[tuple[Target, bool]]:
    """Yield every possible target in the model's order, and whether `all-linear` includes it."""
    head = _output_head(model)
    for name, module in base_modules(model):
        kind = kind_of(module)
        if kind is not None and name:
            yield Target(name, kind, name), kind == "linear" and module is not head
        for parameter in expert_parameters(module) if name else ():
            fused = parameter.endswith("proj") or "Experts" in type(module).__name__
            yield Target(f"{name}.{parameter}", "experts", name, parameter), fused


def target_matches(pattern: str, name: str) -> bool:
    """Return whether `pattern` selects `name`.

    `all-linear` is not supported; the table at the top of this module describes all other patterns."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise TargetError(f"target {pattern!r} is not a regular expression: {error}") from None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)
    return name == pattern or name.endswith("." + pattern.removeprefix("."))


def _block(name: str) -> int | None:
    """Return the index of the repeated block: the first numeric part of `name`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _unmatched(label: str, pattern: str, names: Sequence[str], model: nn.Module) -> TargetError:
    unsupported = [(n, type(m).__name__) for n, m in base_modules(model) if n and target_matches(pattern, n)]
    if unsupported and label == "target":
        listing = ", ".join(f"{n} ({cls})" for n, cls in unsupported[:3])
        fix = "name linear, embedding or convolution modules or 3-d expert parameters, or use modules_to_save"
        return TargetError(f"target {pattern!r} selects only modules that do not support a pair: {listing}", fix=fix)
    leaves = sorted({n.rsplit(".", 1)[-1] for n in names} - {""})
    similar = nearest(pattern, [*leaves, *names]) or leaves[:8]
    return TargetError(f"{label} {pattern!r} matches nothing in this model", fix=f"nearest: {', '.join(similar)}")


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)


def _patterns(spec: LoraSpec) -> tuple[str, ...]:
    return (spec.targets,) if isinstance(spec.targets, str) else tuple(spec.targets)


def matches_per_pattern(model: nn.Module, spec: LoraSpec) -> dict[str, list[str]]:
    """Return the names that each target pattern selects.

    Leaves out the names that `exclude`, `layers` or `modules_to_save` removes. Raises TargetError for any
    target, exclude, rank or alpha pattern, and any layer index, that selects nothing."""
    candidates = list(_candidates(model))
    names = [t.name for t, _ in candidates]
    for pattern in spec.exclude:
        if not any(target_matches(pattern, n) for n in [*names, *(n for n, _ in base_modules(model))]):
            raise _unmatched("exclude", pattern, names, model)
    blocks = {block for n in names if (block := _block(n)) is not None}
    if missing := sorted(set(spec.layers or ()) - blocks):
        fix = f"its blocks are numbered {min(blocks, default=0)} to {max(blocks, default=0)}"
        raise TargetError(f"layers {missing} do not exist in this model", fix=fix)
    full = full_modules(model, spec)
    selectable = {
        n
        for n in names
        if not _inside(n, full)
        and not any(target_matches(p, n) or target_matches(p, n.rsplit(".", 1)[0]) for p in spec.exclude)
        and (spec.layers is None or _block(n) in spec.layers)
    }
    out: dict[str, list[str]] = {}
    for pattern in _patterns(spec):
        hits = [
            t.name for t, linear in candidates if (linear if pattern == ALL_LINEAR else target_matches(pattern, t.name))
        ]
        if not hits:
            raise _unmatched("target", pattern, names, model)
        out[pattern] = [n for n in hits if n in selectable]
        if not out[pattern]:
            hit_count = counted(len(hits), "module")
            problem = f"target {pattern!r} selects {hit_count}, but exclude, layers or modules_to_save drop them all"
            fix = "drop the target, or widen `layers` or narrow `exclude`"
            raise TargetError(problem, where=", ".join(hits[:3]), fix=fix)
    selected = {n for hits in out.values() for n in hits}
    for label, keys in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for pattern in keys:
            if not any(target_matches(pattern, n) for n in selected):
                raise _unmatched(label, pattern, sorted(selected), model)
    return out


def resolve_targets(model: nn.Module, spec: LoraSpec) -> list[Target]:
    """Return the targets of a spec in the model's order.

    Raises the same errors as `matches_per_pattern`."""
    selected = {n for hits in matches_per_pattern(model, spec).values() for n in hits}
    return [t for t, _ in _candidates(model) if t.name in selected]


def full_modules(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Return the names of the modules that `modules_to_save` selects.

    Submodules of a selected module are left out. Raises TargetError for a pattern without a match."""
    names = [n for n, m in base_modules(model) if n and any(True for _ in m.parameters())]
    for pattern in spec.modules_to_save:
        if not any(target_matches(pattern, n) for n in names):
            raise _unmatched("modules_to_save", pattern, names, model)
    hits: list[str] = []
    for name in names:  # names are in the model's order, so a module comes before its submodules
        if any(target_matches(p, name) for p in spec.modules_to_save) and not _inside(name, hits):
            hits.append(name)
    return hits


def token_embeddings(model: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Return the sorted token ids of each embedding that `token_rows` selects.

    Raises TargetError for a pattern without a match or an id out of range."""
    embeddings = {n: m for n, m in base_modules(model) if isinstance(m, nn.Embedding)}
    out: dict[str, tuple[int, ...]] = {}
    for pattern, ids in spec.token_rows.items():
        hits = [n for n in embeddings if target_matches(pattern, n)]
        if not hits:
            raise _unmatched("token_rows", pattern, list(embeddings), model)
        for name in hits:
            if bad := [i for i in ids if not 0 <= i < embeddings[name].num_embeddings]:
                problem = f"token ids {bad[:5]} are outside {name}'s {embeddings[name].num_embeddings} rows"
                raise TargetError(problem, fix="resize the base's embedding first, or correct the ids")
            out[name] = tuple(sorted(set(ids) | set(out.get(name, ()))))
    return out
