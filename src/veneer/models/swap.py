"""Another forward on a model's modules for the length of a with-block, over weights that lie together.

    replace_forward(module, forward, undo)       on this instance; `undo` puts the module's own back
    Join([q, k, v], undo).linear_map()           projections that share an input as one product, with the pairs that act

What every fast path of a base is made of: models/text/fast.py and models/image/fast.py say what they replace, and when.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.layers import LoraLinear
from veneer.core.targets import base_of
from veneer.ops.cpu import compiled, memory
from veneer.ops.linear import LinearMap, join_maps
from veneer.ops.prepacked import ByteBudget, PrepackedWeights
from veneer.ops.quantized import Quantized, stacked_rows

_MARK = "_veneer_fast"


@dataclass
class FastReport:
    """What runs on a fast path: kind of module -> how many; `left`: kind -> why it was left as it is. `active`: within
    a with-block of `fast`."""

    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    rows: bool = False
    """Whether rows can lie one after another without padding (checked on this very model)."""
    kept: int = 0
    """Bytes of dequantised weights kept (`keep_dequantised`)."""
    room: ByteBudget = field(default_factory=lambda: ByteBudget(0))
    """For copies of weights in the order of their products (`keep_packed`)."""
    head: PrepackedWeights | None = field(default=None, repr=False)
    """Those of the head's weight."""
    joins: list[Join] = field(default_factory=list, repr=False)
    keeps: bool = False
    """Whether the last layer, after its attention, works on the tokens of `RowLayout.keep` alone."""
    active: bool = False
    norms: dict[str, float] = field(default_factory=dict, repr=False)
    """Kind of norm that was swapped -> what its formula adds to the weight, 0 or 1."""

    def summary(self) -> str:
        """One line for a person: what was swapped, what was left as it is and why, and which CPU kernels there are."""
        return f"{self.ways()}; {compiled.status()}"

    def ways(self) -> str:
        """What was swapped, and what was left as it is and why."""
        parts = [f"{n} × {kind}" for kind, n in sorted(self.swapped.items())]
        text = "fast paths: " + (", ".join(parts) if parts else "none")
        text += "; rows without padding" if self.rows else "; padded rows"
        text += "; last layer at trained tokens alone" if self.keeps else ""
        text += f"; {self.kept / 1e6:,.0f} MB of weights kept dequantised" if self.kept else ""
        text += f"; {self.room.most / 1e6:,.0f} MB of weights kept packed" if self.room.most else ""
        for kind, why in sorted(self.left.items()):
            text += f"; {kind} as transformers has it ({why})"
        return text


def report_of(model: nn.Module) -> FastReport:
    """The report of what was swapped on `model`; an empty one where nothing was."""
    return getattr(model, _MARK, FastReport())


@contextmanager
def marked(model: nn.Module, report: FastReport) -> Iterator[None]:
    """`report` is what `report_of(model)` gives within the with-block."""
    setattr(model, _MARK, report)
    try:
        yield
    finally:
        delattr(model, _MARK)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Eval mode in every module for the with-block: two ways can only be compared where neither draws."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """`module` computes `forward(module, …)` from now on, until `undo` is closed."""
    module.forward = types.MethodType(forward, module)
    undo.callback(module.__dict__.pop, "forward", None)


def random_input(*shape: int, like: Tensor) -> Tensor:
    """Normal values of this shape, the same at each call, in the dtype of `like` and on its device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def projection_of(module: nn.Module) -> LinearMap | None:
    """What a linear module computes now (weight, bias and the pairs on it), or None if it has to be called."""
    if isinstance(module, LoraLinear):
        return module.linear_map()
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    if module.weight.requires_grad or "forward" in module.__dict__:
        return None
    return LinearMap(module.weight, module.bias)


def _start_of(tensor: Tensor) -> tuple[int, int]:
    """Which storage a tensor begins in and at which element of it: where it lies, whether it has values or not."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _lying_together(weights: list[Tensor]) -> Tensor | None:
    """The tensor whose rows these are, one weight's after another's; None where they are not."""
    storage, first = _start_of(weights[0])
    columns, rows = weights[0].shape[1], 0
    for weight in weights:
        if _start_of(weight) != (storage, first + rows * columns) or not weight.is_contiguous():
            return None
        rows += len(weight)
    return weights[0].detach().as_strided((rows, columns), (columns, 1), first)


class Join:
    """The weights of linear modules that share an input, laid below one another in one tensor; `undo` parts them.

    Quantized weights stay where they are: the tensor is one over all their codes. So do those that lie so already.
    `move`: whether others may be moved."""

    def __init__(self, modules: list[nn.Module], undo: ExitStack, *, move: bool = True) -> None:
        self.modules = modules
        self.weight: Tensor | None = None
        self.copies: PrepackedWeights | None = None
        bases = [base_of(m) for m in modules]
        weights = [getattr(b, "weight", None) for b in bases]
        plain = all(type(b) is nn.Linear for b in bases)
        if not plain or len({(w.dtype, w.device, w.shape[1]) for w in weights if w is not None}) != 1:
            return
        parameters = [w for w in weights if w is not None]
        quantised = [w for w in parameters if isinstance(w, Quantized)]
        if len(quantised) == len(parameters):
            self.weight = stacked_rows(quantised)
            return
        if len(modules) < 2 or quantised or len({_start_of(p) for p in parameters}) != len(parameters):
            return
        self.weight = _lying_together(parameters)
        if self.weight is not None or not move:
            return
        whole = torch.cat([p.detach() for p in parameters])
        at = 0
        for p in parameters:
            memory.page_out(p.detach())
            p.data = whole[at : at + len(p)]
            at += len(p)
        self.weight = whole
        undo.callback(self._part, parameters)

    def _part(self, parameters: list[nn.Parameter]) -> None:
        self.weight = None
        for p in parameters:
            p.data = p.data.clone()

    def linear_map(self) -> LinearMap | None:
        """The joined projections with the pairs that act now, or None if some module has to be called."""
        parts = [projection_of(m) for m in self.modules]
        known = [p for p in parts if p is not None]
        if len(known) != len(parts) or len({p.dropout for p in known if p.products}) > 1:
            return None
        if len(known) > 1 and not isinstance(self.weight, Quantized):
            if self.weight is None:
                return None
            at = 0
            for p in known:
                storage, offset = _start_of(p.weight)
                if storage != _start_of(self.weight)[0] or offset != at * self.weight.shape[1]:
                    return None
                at += len(p.weight)
        joined = join_maps(known, self.weight)
        return joined if self.copies is None else replace(joined, copies=self.copies)


def keep_dequantised(report: FastReport, most: int, undo: ExitStack) -> None:
    """Keeps dequantised weights, in the order in which they are used, up to `most` bytes. Which ones does not matter:
    every weight is used equally often."""
    for join in report.joins:
        weight = join.weight
        if isinstance(weight, Quantized) and weight.kept is None and report.kept + weight.nbytes <= most:
            weight.keep()
            report.kept += weight.nbytes
            undo.callback(setattr, weight, "kept", None)


def keep_packed(model: Any, report: FastReport, most: int, undo: ExitStack) -> None:
    """Keeps weights a second time, in the order of their products, where these are clearly faster so, up to `most`
    bytes: each copy is made at its first use."""
    report.room = room = ByteBudget(most)
    for join in report.joins:
        parts = [getattr(base_of(m), "weight", None) for m in join.modules]
        weight = join.weight if len(parts) > 1 else parts[0]
        if weight is not None and not isinstance(weight, Quantized) and not weight.is_inference():
            join.copies = PrepackedWeights(weight, room, [part for part in parts if part is not None])
            undo.callback(setattr, join, "copies", None)
    head = projection_of(model.get_output_embeddings())
    if head is not None and not isinstance(head.weight, Quantized) and not head.weight.is_inference():
        report.head = PrepackedWeights(head.weight, room)
        undo.callback(setattr, report, "head", None)


def same_dtype(x: Tensor, weight: Tensor) -> bool:
    """Whether x can be multiplied by this weight as it is: one dtype, and no autocast that would change it."""
    return x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)
