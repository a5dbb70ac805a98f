"""Replace the forward method of modules inside a with-block, and fuse projections.

    replace_forward(module, forward, undo)            on this instance; `undo` restores the original forward
    FusedProjection([q, k, v], undo).linear_map()     the joined weights and active low-rank products

The fast paths in models/text/fast.py and models/image/fast.py use these functions.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.layers import LoraLinear, forward_in_float32, has_other_forward
from veneer.core.targets import base_of
from veneer.ops.conv import frozen_conv
from veneer.ops.cpu import compiled, memory
from veneer.ops.int8 import Int8Weight
from veneer.ops.linear import LinearMap, join_maps
from veneer.ops.prepacked import ByteBudget, PrepackedWeights
from veneer.ops.products import in_float32
from veneer.ops.quantized import Quantized, stacked_rows

_MARK = "_veneer_fast"


@dataclass
class FastReport:
    """A report of the modules that run on a fast path.

    `swapped`: kind of module -> count. `skipped`: kind of module -> reason. `active`: whether the with-block
    of `fast` is running."""

    swapped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    rows: bool = False
    """Whether this model gives the same result on packed rows as on padded rows."""
    dequantized_bytes: int = 0
    """Bytes of cached dequantized weights (`cache_dequantized`)."""
    prepack_budget: ByteBudget = field(default_factory=lambda: ByteBudget(0))
    """Byte budget for prepacked copies of weights (`cache_prepacked`)."""
    head: PrepackedWeights | None = field(default=None, repr=False)
    """The prepacked weight of the output head."""
    joins: list[FusedProjection] = field(default_factory=list, repr=False)
    keeps: bool = False
    """Whether the last layer computes only `RowLayout.keep` rows after attention."""
    active: bool = False
    norms: dict[str, float] = field(default_factory=dict, repr=False)
    """Kind of replaced norm -> the number added to the norm's weight, 0 or 1."""

    def summary(self) -> str:
        """Return a one-line summary: replaced modules, skipped modules, and CPU kernels."""
        return f"{self.swaps()}; {compiled.status()}"

    def swaps(self) -> str:
        """Return a text that lists replaced modules, and skipped modules with reasons."""
        parts = [f"{n} × {kind}" for kind, n in sorted(self.swapped.items())]
        text = "fast paths: " + (", ".join(parts) if parts else "none")
        text += "; rows without padding" if self.rows else "; padded rows"
        text += "; last layer only at trained tokens" if self.keeps else ""
        if self.dequantized_bytes:
            text += f"; {self.dequantized_bytes / 1e6:,.0f} MB of dequantized weights in memory"
        if self.prepack_budget.most:
            text += f"; {self.prepack_budget.most / 1e6:,.0f} MB of prepacked weights in memory"
        for kind, why in sorted(self.skipped.items()):
            text += f"; {kind} unchanged ({why})"
        return text


def fast_report(model: nn.Module) -> FastReport:
    """Return the report of the model's active fast paths, or else an empty report."""
    return getattr(model, _MARK, FastReport())


@contextmanager
def marked(model: nn.Module, report: FastReport) -> Iterator[None]:
    """Make `fast_report(model)` return `report` inside the with-block."""
    setattr(model, _MARK, report)
    try:
        yield
    finally:
        delattr(model, _MARK)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode inside the with-block.

    With random dropout, the outputs of two implementations could not be compared."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Make `module` compute `forward(module, …)` until `undo` is closed."""
    module.forward = types.MethodType(forward, module)
    undo.callback(module.__dict__.pop, "forward", None)


def widen_products(model: nn.Module, undo: ExitStack | None = None) -> int:
    """Make linear modules and 2-d convolutions multiply in float32 if that is faster on this machine (ops.products).

    Changes modules with 16-bit weights, and returns their number. Without `undo`, the change is permanent."""
    undo, count = undo or ExitStack(), 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        kind = _IN_FLOAT32.get(type(module))
        if weight is None or kind is None or kind[0] in module.__dict__ or not in_float32(weight):
            continue
        name, run = kind
        setattr(module, name, types.MethodType(run, module))
        undo.callback(module.__dict__.pop, name, None)
        count += 1
    return count


def _conv_in_float32(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if not frozen or self.padding_mode != "zeros" or isinstance(self.padding, str) or not same_dtype(x, weight):
        out: Tensor = nn.Conv2d._conv_forward(self, x, weight, bias)
        return out
    return frozen_conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


_IN_FLOAT32: dict[type[nn.Module], tuple[str, Callable[..., Tensor]]] = {
    nn.Linear: ("forward", forward_in_float32),
    nn.Conv2d: ("_conv_forward", _conv_in_float32),
}
"""Class of module -> (name of the method that computes its product, method that computes the product in float32)."""


def random_input(*shape: int, like: Tensor) -> Tensor:
    """Return normally distributed values, the same at each call.

    The dtype and device are those of `like`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def projection_of(module: nn.Module) -> LinearMap | None:
    """Return a linear module's weight, bias and active low-rank products.

    Returns None if only a call of the module gives the right result, for example because it has hooks."""
    if isinstance(module, LoraLinear):
        return module.linear_map()
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    if module.weight.requires_grad or has_other_forward(module):
        return None
    return LinearMap(module.weight, module.bias)


def _storage_position(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's storage pointer, and the offset of its first element.

    Equal results mean that two tensors start at the same memory; this also works for meta tensors."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _as_consecutive_rows(weights: list[Tensor]) -> Tensor | None:
    """Return one view of these weights as consecutive rows, or None if impossible."""
    storage, first = _storage_position(weights[0])
    columns, rows = weights[0].shape[1], 0
    for weight in weights:
        if _storage_position(weight) != (storage, first + rows * columns) or not weight.is_contiguous():
            return None
        rows += len(weight)
    return weights[0].detach().as_strided((rows, columns), (columns, 1), first)


class FusedProjection:
    """The weights of linear modules with the same input, joined as rows of one tensor.

    `undo` separates the weights. Quantized weights are not copied, because the joined tensor refers to their
    codes. Weights that are already consecutive in memory are not copied either. `move`: whether weights can
    be moved to make them consecutive."""

    def __init__(self, modules: list[nn.Module], undo: ExitStack, *, move: bool = True) -> None:
        self.modules = modules
        self.weight: Tensor | None = None
        self.copies: PrepackedWeights | None = None
        self.int8: Int8Weight | None = None
        bases = [base_of(m) for m in modules]
        weights = [getattr(b, "weight", None) for b in bases]
        plain = all(type(b) is nn.Linear for b in bases)
        if not plain or len({(w.dtype, w.device, w.shape[1]) for w in weights if w is not None}) != 1:
            return
        parameters = [w for w in weights if w is not None]
        quantized = [w for w in parameters if isinstance(w, Quantized)]
        if len(quantized) == len(parameters):
            self.weight = stacked_rows(quantized)
            return
        if len(modules) < 2 or quantized or len({_storage_position(p) for p in parameters}) != len(parameters):
            return
        self.weight = _as_consecutive_rows(parameters)
        if self.weight is not None or not move:
            return
        joined = torch.cat([p.detach() for p in parameters])
        at = 0
        for p in parameters:
            memory.page_out(p.detach())
            p.data = joined[at : at + len(p)]
            at += len(p)
        self.weight = joined
        undo.callback(self._part, parameters)

    @property
    def whole_weight(self) -> Tensor | None:
        """The joined weight, or the weight of the only module; None if this weight is quantized or not joined."""
        weight = self.weight if len(self.modules) > 1 else getattr(base_of(self.modules[0]), "weight", None)
        return None if isinstance(weight, Quantized) else weight

    def _part(self, parameters: list[nn.Parameter]) -> None:
        self.weight = None
        for p in parameters:
            p.data = p.data.clone()

    def linear_map(self) -> LinearMap | None:
        """Return the joined projections with their active low-rank products.

        Returns None if the modules cannot be computed as one product."""
        parts = [projection_of(m) for m in self.modules]
        maps = [p for p in parts if p is not None]
        if len(maps) != len(parts) or len({p.dropout for p in maps if p.products}) > 1:
            return None
        if len(maps) > 1 and not isinstance(self.weight, Quantized):
            if self.weight is None:
                return None
            at = 0
            for p in maps:
                storage, offset = _storage_position(p.weight)
                if storage != _storage_position(self.weight)[0] or offset != at * self.weight.shape[1]:
                    return None
                at += len(p.weight)
        joined = join_maps(maps, self.weight)
        # Evaluation, which needs no gradient, runs on the 16-bit weights.
        copies = self.copies if self.int8 is None or not torch.is_grad_enabled() else self.int8
        return joined if copies is None else replace(joined, copies=copies)


def cache_dequantized(report: FastReport, most: int, undo: ExitStack) -> None:
    """Cache dequantized weights of at most `most` bytes, in order of use.

    The order does not affect the time saved, because every weight is used equally often."""
    for projection in report.joins:
        weight = projection.weight
        if isinstance(weight, Quantized) and weight.kept is None and report.dequantized_bytes + weight.nbytes <= most:
            weight.keep()
            report.dequantized_bytes += weight.nbytes
            undo.callback(setattr, weight, "kept", None)


def cache_prepacked(model: Any, report: FastReport, most: int, undo: ExitStack) -> None:
    """Prepack up to `most` bytes of weights, if prepacked products are clearly faster.

    Each weight is prepacked when it is first used."""
    report.prepack_budget = budget = ByteBudget(most)
    for projection in report.joins:
        weight = projection.whole_weight
        if weight is not None and not weight.is_inference():
            parts = [getattr(base_of(m), "weight", None) for m in projection.modules]
            projection.copies = PrepackedWeights(weight, budget, [part for part in parts if part is not None])
            undo.callback(setattr, projection, "copies", None)
    head = projection_of(model.get_output_embeddings())
    if head is not None and not isinstance(head.weight, Quantized) and not head.weight.is_inference():
        report.head = PrepackedWeights(head.weight, budget)
        undo.callback(setattr, report, "head", None)


@contextmanager
def recording_int8(report: FastReport) -> Iterator[None]:
    """Give every projection an 8-bit copy of its weight, which its training products use from then on.

    Inside the with-block, products use the weights themselves, and the copies record the largest |x| of each
    input channel (ops/int8.py). At the end of the block, the weights are quantized."""
    for projection in report.joins:
        if (weight := projection.whole_weight) is not None:
            projection.int8 = Int8Weight(weight)
    yield
    for projection in report.joins:
        if projection.int8 is not None and (weight := projection.whole_weight) is not None:
            projection.int8.quantize(weight)


def same_dtype(x: Tensor, weight: Tensor) -> bool:
    """Return whether x and the weight have the same dtype, and autocast is off."""
    return x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)
