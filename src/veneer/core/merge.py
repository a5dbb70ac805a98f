"""Weights as matrices: what a pair adds to W, and new weights with a mix folded in.

    linear, embedding, conv, experts:   ΔW = s·(B·A − B₀·A₀)                        (out, in), experts (E, out, in)
    DoRA:                               ΔW = m/‖W+sBA‖·(W+sBA) − W                  ‖·‖ over `in`, arXiv 2402.09353
    mix:                                W' = W + Σ strengthᵢ·ΔWᵢ                    float32, rounded once

Every kind is seen as such a matrix: an embedding (rows, dim) as its transpose, a convolution with its last dimensions
flattened, experts as they are stored, or transposed where the module says `is_transposed`. Nothing is changed in
place. Knows modules and pairs; does not know about attachments.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Kind, Pair
from veneer.core.targets import base_modules
from veneer.errors import AdapterError

__all__ = ["adapted_norm", "delta", "from_matrix", "merged_state", "pair_matrix", "to_matrix", "weight_of"]


def _wide(t: Tensor) -> Tensor:
    """`t` in the dtype sums are taken in: float64 if it is that already, else float32."""
    return t if t.dtype == torch.float64 else t.float()


def weight_of(module: nn.Module, parameter: str | None = None) -> Tensor:
    """The weight of `module` as stored; a quantised linear's is read off by sending the identity through it."""
    weight = getattr(module, parameter or "weight", None)
    features = getattr(module, "in_features", None)
    shaped = features is None or getattr(weight, "shape", None) == (module.out_features, features)
    if isinstance(weight, Tensor) and weight.is_floating_point() and shaped:
        return weight.detach()
    with torch.no_grad():
        device = next(iter([*module.parameters(), *module.buffers()])).device
        columns: Tensor = module(torch.eye(int(str(features)), device=device)).float()
        bias = getattr(module, "bias", None)
        return (columns if bias is None else columns - bias.float()).t()


def _flipped(module: nn.Module, kind: Kind) -> bool:
    """Whether the stored weight is the transpose of the (out, in) matrix."""
    if kind == "experts":
        return bool(getattr(module, "is_transposed", False))
    return kind == "embedding" or type(module).__name__ == "Conv1D"


def to_matrix(module: nn.Module, kind: Kind, weight: Tensor) -> Tensor:
    """A stored weight of `module` as (out, in) or (experts, out, in)."""
    if kind == "conv":
        return weight.flatten(1)
    return weight.transpose(-1, -2) if _flipped(module, kind) else weight


def from_matrix(module: nn.Module, kind: Kind, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_matrix`."""
    return (matrix.transpose(-1, -2) if _flipped(module, kind) else matrix).reshape(shape)


def pair_matrix(pair: Pair) -> Tensor:
    """s·(B·A − B₀·A₀) without the magnitude, in float32 (float64 for float64 pairs)."""
    total: Tensor | None = None
    for A, B, sign in [(pair.A, pair.B, 1.0), *([(*pair.origin, -1.0)] if pair.origin else [])]:
        A, B = _wide(A), _wide(B)
        if pair.kind == "conv":
            A, B = A.flatten(1), B.flatten(1)
        product = (sign * pair.scale) * (B @ A)
        total = product if total is None else total + product
    assert total is not None
    return total


def adapted_norm(matrix: Tensor, pair: Pair) -> Tensor:
    """‖W + s·(B·A − B₀·A₀)‖ over `in`: (out,). No gradient, as the paper has it."""
    with torch.no_grad():
        product = pair_matrix(pair)
        norm: Tensor = torch.linalg.vector_norm(matrix.to(product.dtype) + product, dim=-1)
        return norm


def delta(module: nn.Module, pair: Pair, parameter: str | None = None) -> Tensor:
    """ΔW of `pair` on `module` in the shape the weight is stored in, float32. `parameter` names an expert weight.

    Raises AdapterError where no weight has that effect: a grouped convolution whose A sees all channels (PEFT's)."""
    with torch.no_grad():
        weight = weight_of(module, parameter)
        matrix = to_matrix(module, pair.kind, weight)
        if pair.kind == "conv" and pair.A.flatten(1).shape[1] != matrix.shape[1]:
            raise AdapterError(
                "a pair whose A sees all channels of a grouped convolution has no weight of the base's shape",
                fix="use the adapter attached, unmerged",
            )
        out = pair_matrix(pair)
        if pair.magnitude is not None:
            base = matrix.to(out.dtype)
            gain = pair.magnitude.to(out.dtype) / adapted_norm(matrix, pair)
            out = gain[:, None] * (base + out) - base
        return from_matrix(module, pair.kind, out, weight.shape)


def _changed(modules: dict[str, nn.Module], adapter: Adapter) -> Iterable[tuple[str, Tensor]]:
    """(weight name, ΔW) of everything in one adapter."""
    for name, pair in adapter.pairs.items():
        owner, _, parameter = name.rpartition(".")
        if pair.kind == "experts":
            yield name, delta(modules[owner], pair, parameter)
        else:
            yield f"{name}.weight", delta(modules[name], pair)
    for name, tensors in adapter.modules.items():
        own = modules[name].state_dict(keep_vars=True)
        for key, tensor in tensors.items():
            yield f"{name}.{key}", _wide(tensor.detach()) - _wide(own[key].detach())
    for name, rows in adapter.token_rows.items():
        weight = weight_of(modules[name])
        index = torch.tensor(rows.indices, device=weight.device)
        change = _wide(rows.rows.detach()) - _wide(weight[index])
        yield f"{name}.weight", change.new_zeros(weight.shape).index_copy_(0, index, change)


def merged_state(model: nn.Module, mix: Iterable[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """New weights by name for every weight the mix changes: W + Σ strength·ΔW in float32, rounded once to W's dtype.

    `model` may be attached; its own weights are left alone. Weights tied to a changed one are listed too, each with
    its own value: the head follows token rows, and stays the base's under a pair on the embedding, so a caller that
    loads the result unties the two where they differ."""
    modules = dict(base_modules(model))
    stored: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            stored[f"{name}.{key}" if name else key] = tensor
    total: dict[str, Tensor] = {}

    def fold(name: str, change: Tensor) -> None:
        total[name] = total[name].add_(change) if name in total else change

    for adapter, strength in mix:
        for name, change in _changed(modules, adapter):
            fold(name, change * strength)
            if name.removesuffix(".weight") in adapter.token_rows:
                for twin in _twins(stored, name):
                    fold(twin, change * strength)
    out: dict[str, Tensor] = {}
    for name, change in total.items():
        weight = stored[name].detach() if name in stored and stored[name].is_floating_point() else None
        if weight is None or weight.shape != change.shape:
            weight = weight_of(modules[name.removesuffix(".weight")])
        out[name] = (_wide(weight) + change).to(weight.dtype)
        for twin in _twins(stored, name):
            if twin not in total:
                out[twin] = stored[twin].detach().clone()
    return out


def _twins(stored: dict[str, Tensor], name: str) -> list[str]:
    return [n for n, t in stored.items() if n != name and t is stored.get(name)]
