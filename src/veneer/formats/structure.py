"""What a file needs to know of a base: its module names, kinds and shapes, without importing what made the base.

A reader uses it to tell that an adapter fits; a writer to choose names that match those modules and no others. Works on
any torch model, also on one whose parameters are on the meta device. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Place", "Structure", "describe"]


@dataclass(frozen=True)
class Place:
    """One module. `shape` is the weight's as a pair counts it: (out, in), (rows, dim) or (out, in/groups, k…)."""

    kind: str  # linear, embedding, conv, other; unknown when only names are known
    shape: tuple[int, ...] = ()
    groups: int = 1
    fan_in_fan_out: bool = False
    """The weight is stored (in, out), as transformers' Conv1D does; `shape` is (out, in) all the same."""


@dataclass(frozen=True)
class Structure:
    """A base's outline. `tensors`: state-dict name -> shape. `parameters`: module -> its own parameters in the order
    they were declared. `in_first`: module with 3-d expert parameters -> True when they are stored (experts, in, out),
    False for (experts, out, in), None when neither the module nor its shapes say. `transposed`: modules that set
    `is_transposed`. `tied`: the output head uses the input embedding's weight."""

    places: dict[str, Place]
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    in_first: dict[str, bool | None] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    input_embedding: str | None = None
    output_embedding: str | None = None
    tied: bool = False
    weight: Callable[[str], Tensor | None] = lambda _: None
    """The module's weight itself, where there is one with data."""

    @property
    def detailed(self) -> bool:
        """Kinds and shapes are known, not names alone."""
        return bool(self.tensors)


def describe(model: nn.Module | Structure | Iterable[str] | Callable[[], Any]) -> Structure:
    """The outline of `model`; of an attached one, the base's. Plain module names give an outline of names only."""
    if isinstance(model, Structure):
        return model
    if not isinstance(model, nn.Module):
        names = model() if callable(model) else model
        return Structure({str(name): Place("unknown") for name in names})
    modules = _base_modules(model)
    tensors: dict[str, tuple[int, ...]] = {}
    parameters: dict[str, tuple[str, ...]] = {}
    in_first: dict[str, bool | None] = {}
    for name, module in modules.items():
        dot = f"{name}." if name else ""
        own = {n: p for n, p in module.named_parameters(recurse=False, remove_duplicate=False)}
        kept = {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        tensors |= {dot + n: tuple(t.shape) for n, t in (own | kept).items()}
        if own:
            parameters[name] = tuple(own)
        if any(p.ndim == 3 for p in own.values()):
            in_first[name] = _in_first(module, {n: tuple(p.shape) for n, p in own.items()})
    names = {id(m): n for n, m in reversed(modules.items())}
    inner = _call(model, "get_input_embeddings")
    outer = _call(model, "get_output_embeddings")
    return Structure(
        places={n: _place(m) for n, m in modules.items() if n},
        tensors=tensors,
        parameters=parameters,
        in_first=in_first,
        transposed=frozenset(n for n, m in modules.items() if getattr(m, "is_transposed", False) is True),
        input_embedding=names.get(id(_unwrapped(inner))) if inner is not None else None,
        output_embedding=names.get(id(_unwrapped(outer))) if outer is not None else None,
        tied=_weight(inner) is not None and _weight(inner) is _weight(outer),
        weight=lambda name: _weight(modules.get(name)),
    )


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name; a module wrapped by an attachment appears as the base module under its own name."""
    out: dict[str, nn.Module] = {}

    def walk(module: nn.Module, name: str) -> None:
        module = _unwrapped(module)
        out[name] = module
        for child, inner in module.named_children():
            walk(inner, f"{name}.{child}" if name else child)

    walk(model, "")
    return out


def _unwrapped(module: nn.Module) -> nn.Module:
    while type(module).__module__ == "veneer.core.layers" and isinstance(getattr(module, "base", None), nn.Module):
        module = module.base  # type: ignore[assignment]
    return module


def _place(module: nn.Module) -> Place:
    name = type(module).__name__
    if isinstance(module, nn.Embedding):
        return Place("embedding", (module.num_embeddings, module.embedding_dim))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Place("conv", tuple(module.weight.shape), groups=module.groups)
    if name == "Conv1D" and hasattr(module, "nf"):
        rows, columns = module.weight.shape  # type: ignore[misc, union-attr]
        return Place("linear", (int(columns), int(rows)), fan_in_fan_out=True)
    # Quantised linears are found by what they have; a subclass with a forward of its own (a router, which returns a
    # tuple) is not a linear map.
    wide, narrow = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(wide, int) and isinstance(narrow, int) and hasattr(module, "weight") and "outer" not in name:
        return Place("linear", (wide, narrow))
    return Place("other")


def _in_first(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> bool | None:
    """Whether expert weights are stored (experts, in, out): the module says, or gate_up (h -> 2f) and down (f -> h) do."""
    if isinstance(getattr(module, "is_transposed", None), bool):
        return bool(module.is_transposed)
    up, down = shapes.get("gate_up_proj", ()), shapes.get("down_proj", ())
    if len(up) == len(down) == 3:
        if up[1] == down[2] and up[2] == 2 * down[1]:
            return True
        if up[2] == down[1] and up[1] == 2 * down[2]:
            return False
    return None


def _call(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _weight(module: nn.Module | None) -> Tensor | None:
    weight = getattr(_unwrapped(module), "weight", None) if module is not None else None
    return weight if isinstance(weight, Tensor) and weight.device.type != "meta" else None
