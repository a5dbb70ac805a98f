"""The structure of a base: module names, kinds and shapes.

Does not import the base's library. A reader checks an adapter against the structure; a writer chooses names
that match the adapter's modules and no others. Supports any torch model, with or without adapters, including
models on the meta device. This module does not access files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from veneer.core.adapter import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Structure:
    """The names, kinds and shapes of a base's modules.

    `kinds`: every module name -> linear, embedding, conv, other, or unknown if only names were given.
    `shapes`: state-dict name -> shape. `experts`: module -> its 3-d parameters in declaration order.
    `transposed`: modules that set `is_transposed`. `interleaved`: expert modules whose gate_up_proj
    alternates rows of gate and up (`is_concatenated` is false). `fan_in_fan_out`: linear layers stored as
    (in, out). `tied`: modules that use the input embedding's weight."""

    kinds: dict[str, str]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    interleaved: frozenset[str] = frozenset()
    fan_in_fan_out: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    input_embedding: str | None = None
    output_embedding: str | None = None
    weight: Callable[[str], Tensor | None] = lambda _: None
    """Function that returns a module's weight, or None if the weight has no data."""
    problems: Callable[[Adapter], list[str]] = lambda _: []
    """Function that returns every reason why an adapter does not fit the base."""

    @property
    def detailed(self) -> bool:
        """Whether kinds and shapes are known, not only names."""
        return bool(self.shapes)

    def under(self, rename: Callable[[str], str], restore: Callable[[str], str]) -> Structure:
        """Return the same structure under other names.

        `rename` must be one-to-one; `restore` is its inverse."""
        named = {n: rename(n) for n in {*self.kinds, *self.experts, *self.shapes}}
        renamed = lambda name: None if name is None else rename(name)  # noqa: E731
        return replace(
            self,
            kinds={named[n]: kind for n, kind in self.kinds.items()},
            shapes={named[n]: shape for n, shape in self.shapes.items()},
            experts={named[n]: parameters for n, parameters in self.experts.items()},
            transposed=frozenset(map(rename, self.transposed)),
            interleaved=frozenset(map(rename, self.interleaved)),
            fan_in_fan_out=frozenset(map(rename, self.fan_in_fan_out)),
            tied=frozenset(map(rename, self.tied)),
            input_embedding=renamed(self.input_embedding),
            output_embedding=renamed(self.output_embedding),
            weight=lambda name: self.weight(restore(name)),
            problems=lambda adapter: self.problems(adapter.renamed(restore)),
        )


def structure_of(model: nn.Module | Structure | Iterable[str] | Callable[[], Any]) -> Structure:
    """Return the structure of a model without its adapters.

    If only module names are given, the structure has no kinds and shapes."""
    if isinstance(model, Structure):
        return model
    from torch import nn

    from veneer.core.attach import fit_problems
    from veneer.core.targets import base_modules, expert_parameters, kind_of

    if not isinstance(model, nn.Module):
        source = model() if callable(model) else model
        return Structure({str(name): "unknown" for name in source})
    modules = dict(base_modules(model))
    embedding, head = _find(model, "get_input_embeddings"), _find(model, "get_output_embeddings")
    names = {id(module): name for name, module in modules.items()}
    shared = getattr(embedding, "weight", None)
    return Structure(
        kinds={n: kind_of(m) or "other" for n, m in modules.items() if n},
        shapes={n: tuple(t.shape) for n, t in _tensors(modules)},
        experts={n: tuple(parameters) for n, m in modules.items() if (parameters := expert_parameters(m))},
        transposed=frozenset(n for n, m in modules.items() if getattr(m, "is_transposed", False) is True),
        interleaved=frozenset(n for n, m in modules.items() if getattr(m, "is_concatenated", True) is False),
        fan_in_fan_out=frozenset(n for n, m in modules.items() if type(m).__name__ == "Conv1D"),
        tied=frozenset(
            n for n, m in modules.items() if m is not embedding and m._parameters.get("weight") is shared is not None
        ),
        input_embedding=names.get(id(embedding)),
        output_embedding=names.get(id(head)),
        weight=lambda name: _data(modules.get(name)),
        problems=lambda adapter: fit_problems(model, adapter),
    )


def _tensors(modules: dict[str, nn.Module]) -> Iterable[tuple[str, Tensor]]:
    """Yield the names and tensors of the model's state dict, under the base's own names."""
    for name, module in modules.items():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, tensor


def _find(model: nn.Module, method: str) -> nn.Module | None:
    try:
        module = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    module = getattr(module, "base", module) if getattr(type(module), "is_veneer_layer", False) else module
    from torch import nn

    return module if isinstance(module, nn.Module) else None


def _data(module: nn.Module | None) -> Tensor | None:
    weight = module._parameters.get("weight") if module is not None else None
    return weight.detach() if weight is not None and not weight.is_meta else None
