"""Changes as dense matrices: ΔW of a pair or delta, and weights with a mix merged in.

    linear, embedding, conv, experts:   ΔW = s·(B·A − B₀·A₀)                        (out, in), experts (E, out, in)
    DoRA:                               ΔW = m/‖W+sBA‖·(W+sBA) − W                  ‖·‖ over `in`, arXiv 2402.09353
    deltas:                             ΔW of their form                            core.forms
    mix:                                W' = W + Σ strengthᵢ·ΔWᵢ                    float32, rounded once

Every weight is treated as a matrix (out, in): an embedding (rows, dim) is transposed, a convolution's last
dimensions are flattened, and experts are used as stored, or transposed if the module sets `is_transposed`.
Nothing is changed in place. This module depends on modules and pairs, not on attachments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Pair, PairKind, TokenRows
from veneer.core.forms import Delta, change_of, product_of
from veneer.core.forms import delta_of as form_delta
from veneer.core.targets import base_modules
from veneer.errors import AdapterError, ConfigError
from veneer.ops.quantized import dequantized

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a result by its name. Raises ConfigError for an unknown name."""
    if name not in _DTYPES:
        raise ConfigError(f"there is no dtype {name!r}", fix=", ".join(_DTYPES))
    return _DTYPES[name]


def to_sum_dtype(t: Tensor) -> Tensor:
    """Return `t` in the dtype used for sums: float64 for float64, otherwise float32."""
    t = dequantized(t)
    return t if t.dtype == torch.float64 else t.float()


def weight_of(module: nn.Module, parameter: str | None = None) -> Tensor:
    """Return the weight of `module` as stored.

    The weight of a quantized linear is computed by passing the identity through the module."""
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


def _is_transposed(module: nn.Module, kind: PairKind) -> bool:
    """Return whether the stored weight is the transpose of the (out, in) matrix."""
    if kind == "experts":
        return bool(getattr(module, "is_transposed", False))
    return kind == "embedding" or type(module).__name__ == "Conv1D"


def to_matrix(module: nn.Module, kind: PairKind, weight: Tensor) -> Tensor:
    """Return a stored weight of `module` as (out, in) or (experts, out, in)."""
    if kind == "conv":
        return weight.flatten(1)
    return weight.transpose(-1, -2) if _is_transposed(module, kind) else weight


def pair_matrix(pair: Pair) -> Tensor:
    """Return s·(B·A − B₀·A₀), without the magnitude.

    The result is float32, or float64 for float64 pairs."""
    total: Tensor | None = None
    for A, B, sign in [(pair.A, pair.B, 1.0), *([(*pair.origin, -1.0)] if pair.origin else [])]:
        A, B = to_sum_dtype(A), to_sum_dtype(B)
        if pair.kind == "conv":
            A, B = A.flatten(1), B.flatten(1)
        product = (sign * pair.scale) * (B @ A)
        total = product if total is None else total + product
    assert total is not None
    return total


def adapted_norm(matrix: Tensor, pair: Pair) -> Tensor:
    """Return ‖W + s·(B·A − B₀·A₀)‖ over `in`: (out,).

    Computed without gradient, as in the paper."""
    with torch.no_grad():
        product = pair_matrix(pair)
        norm: Tensor = torch.linalg.vector_norm(matrix.to(product.dtype) + product, dim=-1)
        return norm


def low_rank_norm(matrix: Tensor, pair: Pair) -> Tensor:
    """Return `adapted_norm` without materializing W + s·B·A.

    Supports linear pairs without an origin.

        √( ‖W‖² + Σ_r (2s·(W·Aᵀ) + s²·B·(A·Aᵀ)) ⊙ B )

    For a 16-bit W, this takes a tenth of the time of `adapted_norm`. The error is about 10⁻⁵, from rounding
    W·Aᵀ to 16 bits. With B = 0 the result equals `adapted_norm`, so the scales of an untrained DoRA are
    exactly 1."""
    with torch.no_grad():
        W, A, B = dequantized(matrix), pair.A, pair.B * pair.scale
        cross = F.linear(W, A.to(W.dtype)).to(A.dtype)
        # Use the full-precision values of a quantized W, not the values rounded to 16 bits.
        exact = W if W is matrix else matrix.to(A.dtype)
        exact_squared = torch.linalg.vector_norm(exact, dim=-1, dtype=A.dtype).square()
        squared: Tensor = exact_squared + ((2 * cross + B @ (A @ A.t())) * B).sum(-1)
        return squared.clamp_min(0).sqrt()


def delta_of(weight: Tensor, change: Pair | Delta) -> Tensor:
    """Return ΔW of a pair or a delta on W, in W's shape.

    The result is float32, or float64 if W or the change is float64. W is (out, in) for a linear, (rows, dim)
    for an embedding, (E, out, in) for experts."""
    if isinstance(change, Delta):
        return form_delta(weight, change)
    out = pair_matrix(change)
    out = out.to(torch.promote_types(out.dtype, weight.dtype))
    out = out.reshape(weight.shape) if change.kind == "conv" else out
    if change.kind != "embedding":
        return change_of(weight, out, change.magnitude)
    return change_of(weight.t(), out, change.magnitude).t()


def delta(module: nn.Module, change: Pair | Delta, parameter: str | None = None) -> Tensor:
    """Return ΔW of `change` in the layout in which `module` stores the parameter.

    parameter: defaults to the weight."""
    with torch.no_grad():
        if isinstance(change, Delta) and parameter not in (None, "weight"):
            base_tensor = module._parameters[str(parameter)]
            return product_of(change) if base_tensor is None else delta_of(base_tensor.detach(), change)
        weight = weight_of(module, parameter)
        kind = "linear" if isinstance(change, Delta) else change.kind
        if kind == "embedding" or weight.ndim < 2 or not _is_transposed(module, kind):
            return delta_of(weight, change)
        return delta_of(weight.transpose(-1, -2), change).transpose(-1, -2)


def parameter_shape(module: nn.Module, key: str) -> tuple[int, ...]:
    """Return the shape that a delta of this parameter has.

    The weight of a linear is (out, in), however it is stored. For a missing bias, returns the shape that a
    bias would have, because a delta can add a bias to the output."""
    if key == "weight":
        weight = weight_of(module)
        return tuple(weight.t().shape if _is_transposed(module, "linear") and weight.ndim == 2 else weight.shape)
    if module._parameters[key] is None:
        return (len(to_matrix(module, "linear", weight_of(module))),)
    return tuple(module.get_parameter(key).shape)


def _full_change(module: nn.Module, key: str, tensor: Tensor) -> Tensor:
    return to_sum_dtype(tensor.detach()) - to_sum_dtype(module.state_dict(keep_vars=True)[key].detach())


def _rows_change(module: nn.Module, rows: TokenRows) -> Tensor:
    weight = weight_of(module)
    index = torch.tensor(rows.indices, device=weight.device)
    change = to_sum_dtype(rows.rows.detach()) - to_sum_dtype(weight[index])
    return change.new_zeros(weight.shape).index_copy_(0, index, change)


def _changes(
    modules: Mapping[str, nn.Module], stored: Mapping[str, Tensor], adapter: Adapter
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield (weight name, function that returns ΔW) for every change of an adapter."""
    for name, pair in adapter.pairs.items():
        owner, _, parameter = name.rpartition(".")
        if pair.kind == "experts":
            yield name, partial(delta, modules[owner], pair, parameter)
        else:
            yield f"{name}.weight", partial(delta, modules[name], pair)
    for name, tensors in adapter.modules.items():
        for key, tensor in tensors.items():
            yield f"{name}.{key}", partial(_full_change, modules[name], key, tensor)
    for name, change in adapter.deltas.items():
        owner, _, key = name.rpartition(".")
        if name not in stored:
            raise AdapterError(
                f"{name}: the base has no such bias to merge into", fix="attach the adapter instead of merging it"
            )
        yield name, partial(delta, modules[owner], change, key)
    for name, rows in adapter.token_rows.items():
        for tied in [f"{name}.weight", *_tied_names(stored, f"{name}.weight")]:
            if tied.removesuffix(".weight") not in adapter.modules:
                yield tied, partial(_rows_change, modules[name], rows)


def parameter_changes(adapter: Adapter) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield (parameter name, function from W to ΔW) for every change of an adapter.

    The base's modules are not needed. W is (out, in) for a linear, (rows, dim) for an embedding, (E, out, in)
    for experts. ΔW has W's dtype and, if the change fits, W's shape."""
    for name, pair in adapter.pairs.items():
        yield (name if pair.kind == "experts" else f"{name}.weight"), partial(_change_in, pair)
    for name, delta in adapter.deltas.items():
        yield name, partial(_change_in, delta)
    for name, tensors in adapter.modules.items():
        for key, tensor in tensors.items():
            yield f"{name}.{key}", partial(_copy_change, tensor)
    for name, rows in adapter.token_rows.items():
        yield f"{name}.weight", partial(_token_change, rows)


def _change_in(change: Pair | Delta, weight: Tensor) -> Tensor:
    return delta_of(weight, change).to(weight.dtype)


def _copy_change(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.detach().to(weight.dtype) - weight


def _token_change(rows: TokenRows, weight: Tensor) -> Tensor:
    if max(rows.indices, default=0) >= len(weight):
        raise IndexError(f"token {max(rows.indices)} is outside the weight's {len(weight)} rows")
    index = torch.tensor(rows.indices, device=weight.device)
    return torch.zeros_like(weight).index_copy_(0, index, rows.rows.detach().to(weight.dtype) - weight[index])


def change_problem(change: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> str:
    """Return why a change does not fit a weight of `shape`, or "" if the change fits.

    change: from `parameter_changes` of an adapter on the meta device, so that only shapes are computed."""
    weight = torch.empty(shape, device="meta")
    try:
        with torch.no_grad():
            got = tuple(change(weight).shape)
    except (RuntimeError, IndexError, ValueError) as error:
        return f"the change does not fit a weight of shape {tuple(shape)}: {str(error).splitlines()[0]}"
    return "" if got == tuple(shape) else f"it changes {got}, but the weight is {tuple(shape)}"


def _tied_names(stored: Mapping[str, Tensor], name: str) -> list[str]:
    """Return the other names of the weight `name` if it is tied."""
    return [n for n, t in stored.items() if n != name and t is stored.get(name)]


def exact_weights(model: nn.Module, mix: Iterable[tuple[Adapter, float]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, W, W') for every weight that the mix changes, one at a time.

    W is the weight as stored, and W' = W + Σ strength·ΔW in float32. `model` can be attached; its weights do
    not change. Weights tied to a changed weight are included, each with its own value. If token rows change
    the embedding, the tied head changes too; if a LoRA pair changes the embedding, the head keeps the base's
    values. A caller that loads the result must untie the two weights if their values differ."""
    modules = dict(base_modules(model))
    stored: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            stored[f"{name}.{key}" if name else key] = tensor
    makers: dict[str, list[tuple[Callable[[], Tensor], float]]] = {}
    for adapter, strength in mix:
        for name, change in _changes(modules, stored, adapter):
            makers.setdefault(name, []).append((change, strength))
    for name, parts in makers.items():
        owner, _, key = name.rpartition(".")
        plain = name in stored and key != "weight"
        weight = dequantized(stored[name].detach() if plain else weight_of(modules[owner], key))
        total = to_sum_dtype(weight)
        for change, strength in parts:
            total = total + change() * strength
        yield name, weight, total
        for tied in _tied_names(stored, name):
            if tied not in makers:
                yield tied, stored[tied].detach(), to_sum_dtype(stored[tied].detach())


def merged_state(model: nn.Module, mix: Iterable[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Return the merged weights of `exact_weights` by name, each rounded once to W's dtype."""
    return {name: total.to(weight.dtype, copy=True) for name, weight, total in exact_weights(model, mix)}
