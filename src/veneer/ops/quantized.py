"""Frozen weights in 4 and 8 bits: a tensor subclass that stores codes.

`quantize` makes a `Quantized` from a weight; quantization_formats.py defines how values are stored. To the
rest of torch, a `Quantized` looks like a plain frozen weight of `dtype` that contains the dequantized values,
rounded once: every operation gives the result that it would give for the plain weight. A product dequantizes
the weight, multiplies and frees the dequantized values, except for a product with few rows on a device that
can multiply by codes. Under autograd, a product saves the codes and dequantizes again in backward. Row views,
transposes and copies on another device stay quantized; any other operation runs on the dequantized weight and
returns a plain tensor. Writing to a `Quantized` raises BaseError.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from veneer.compat import TORCH
from veneer.errors import BaseError
from veneer.ops.dispatch import dispatch
from veneer.ops.products import in_float32, product
from veneer.ops.quantization_formats import KINDS, QuantizationFormat, StackedRows, row_count, to_format, with_tensors


class Quantized(torch.Tensor):
    """A weight stored as codes; see the module's docstring.

    Contains rows first … last of `stored`, (…, columns); with `transposed`, the last two dimensions are
    swapped.

    kept: the dequantized weight, set by `keep`."""

    stored: QuantizationFormat
    first: int
    last: int
    transposed: bool
    kept: Tensor | None

    @staticmethod
    def __new__(
        cls: type[Quantized],
        stored: QuantizationFormat,
        dtype: torch.dtype,
        shape: Sequence[int] | None = None,
        first: int = 0,
        last: int | None = None,
        transposed: bool = False,
        kept: Tensor | None = None,
    ) -> Quantized:
        size = list(stored.shape if shape is None else shape)
        if transposed:
            size[-2:] = size[:-3:-1]
        device = next(iter(stored.tensors().values())).device
        make_wrapper = TORCH("torch.Tensor._make_wrapper_subclass")
        weight = cast("Quantized", make_wrapper(cls, size, dtype=dtype, device=device, requires_grad=False))
        weight.stored, weight.first, weight.transposed, weight.kept = stored, first, transposed, kept
        weight.last = row_count(stored) if last is None else last
        return weight

    __torch_function__ = TORCH("torch._C._disabled_torch_function_impl")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Quantized({self.stored.kind}, {tuple(self.shape)}, {self.dtype}, {self.bytes:,} bytes)"

    @property
    def bytes(self) -> int:
        """Bytes of the codes and constants in `stored`, which can have more rows than this weight."""
        return sum(t.numel() * t.element_size() for t in self.stored.tensors().values())

    def dense(self) -> Tensor:
        """Return the dequantized weight. Never write to the result, because it can be the cached weight."""
        if self.kept is not None:
            return self.kept
        out = self.stored.dense(self.dtype, self.first, self.last)
        if not self.transposed:
            return out.view(self.shape)
        return out.view(*self.shape[:-2], self.shape[-1], self.shape[-2]).transpose(-1, -2)

    def keep(self) -> None:
        """Keep the dequantized weight in memory from now on.

        Products then do not dequantize, but a dequantized 16-bit weight takes two or four times the bytes of
        its codes."""
        self.kept = self.dense()

    def part(self, first: int, last: int, shape: Sequence[int]) -> Quantized:
        """Return rows first … last of this weight, in the shape `shape`."""
        at = self.first
        kept = None if self.kept is None else self.kept.reshape(-1, self.shape[-1])[first:last].view(tuple(shape))
        return Quantized(self.stored, self.dtype, shape, at + first, at + last, False, kept)

    def like(self, stored: QuantizationFormat, dtype: torch.dtype | None = None) -> Quantized:
        """Return the same view of another stored weight in the same format."""
        return Quantized(stored, dtype or self.dtype, self._stored_shape, self.first, self.last, self.transposed)

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        """The shape before `transposed` swaps the last two dimensions."""
        return tuple(self.shape) if not self.transposed else (*self.shape[:-2], self.shape[-1], self.shape[-2])

    # module.to(…) swaps the inner tensors with these methods; otherwise the module would keep the old codes.
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        inner = {f"code_{name.replace('.', '_')}": t for name, t in self.stored.tensors().items()}
        self.__dict__.update(inner)
        return list(inner), (self.stored, self.dtype, self._stored_shape, self.first, self.last, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: Any, size: Any, stride: Any) -> Quantized:
        stored, *view = rest
        return Quantized(with_tensors(stored, inner.values()), *view)

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantized:
        out = self.like(self.stored.moved(Tensor.clone))
        memo[id(self)] = out
        return _as_parameter(out) if isinstance(self, torch.nn.Parameter) else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.stored, self.dtype, self._stored_shape, self.first, self.last, self.transposed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _OWN.get(func.overloadpacket)
        if handler is not None:
            out = handler(*args, **kwargs)
            if out is not NotImplemented:
                return out
        _refuse_writing(func, args, kwargs)
        result = func(*_dense(args), **_dense(kwargs))
        # A view of `kept` is cloned, because writing to the view would change `kept`. Without `kept`, a view
        # is of a newly dequantized tensor.
        kept = any(isinstance(t, Quantized) and t.kept is not None for t in args)
        return _mapped(result, Tensor.clone) if kept and _is_view(func) else result


def _as_parameter(weight: Quantized) -> Quantized:
    return cast("Quantized", torch.nn.Parameter(weight, requires_grad=False))


def _restored(
    stored: QuantizationFormat, dtype: torch.dtype, shape: tuple[int, ...], first: int, last: int, transposed: bool
) -> Quantized:
    return Quantized(stored, dtype, shape, first, last, transposed)


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise BaseError if an operation would write to a quantized weight.

    The write would be lost, or would change the frozen base."""
    for i, formal in enumerate(func._schema.arguments):
        if formal.alias_info is None or not formal.alias_info.is_write:
            continue
        argument = args[i] if i < len(args) else kwargs.get(formal.name)
        for weight in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(weight, Quantized):
                raise BaseError(
                    f"{func} would write to a weight in {weight.stored.kind}, {tuple(weight.shape)}: it is frozen",
                    fix="work on a copy (veneer.ops.quantized.dequantized(weight).clone()), or put a new weight in "
                    "its place: load_state_dict(…, assign=True)",
                )


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _dense(value: Any) -> Any:
    return _mapped(value, lambda t: t.dense() if isinstance(t, Quantized) else t)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {key: _mapped(v, change) for key, v in value.items()}
    return value


def _unchanged(w: Any, *args: Any, **kwargs: Any) -> Any:
    out = w.like(w.stored)
    out.kept = w.kept
    return out


def _transpose(w: Any, *dims: int, **kwargs: Any) -> Any:
    if dims and {d % w.ndim for d in dims} != {w.ndim - 2, w.ndim - 1}:
        return NotImplemented
    kept = None if w.kept is None else w.kept.transpose(-1, -2)
    return Quantized(w.stored, w.dtype, w._stored_shape, w.first, w.last, not w.transposed, kept)


def _select(w: Any, dim: int, index: int) -> Any:
    if dim % w.ndim or w.ndim < 3 or w.transposed:
        return NotImplemented
    rows, index = math.prod(w.shape[1:-1]), int(index) % w.shape[0]
    return w.part(index * rows, (index + 1) * rows, w.shape[1:])


def _slice(w: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim % w.ndim or step != 1 or w.transposed or w.ndim < 2:
        return NotImplemented
    start, end, _ = slice(start, end).indices(w.shape[0])
    rows, end = math.prod(w.shape[1:-1]), max(start, end)
    return w.part(start * rows, end * rows, (end - start, *w.shape[1:]))


def _split(w: Any, size: int | Sequence[int], dim: int = 0) -> Any:
    if dim % w.ndim or w.transposed or w.ndim < 2:
        return NotImplemented
    total = w.shape[0]
    sizes = [min(size, total - at) for at in range(0, total, size)] if isinstance(size, int) else size
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(w, 0, end - n, end) for n, end in zip(sizes, ends, strict=True)]


def _unbind(w: Any, dim: int = 0) -> Any:
    if dim % w.ndim or w.transposed or w.ndim < 3:
        return NotImplemented
    return [_select(w, 0, i) for i in range(w.shape[0])]


def _to_copy(w: Any, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    return w.like(w.stored.moved(lambda t: t.to(device, copy=True, non_blocking=non_blocking)), dtype)


def _clone(w: Any, **kwargs: Any) -> Any:
    return w.like(w.stored.moved(Tensor.clone))


def _embedding(w: Any, indices: Any, *args: Any) -> Any:
    """Return rows of a quantized embedding, dequantizing only these rows if that is less work."""
    if (
        not isinstance(w, Quantized)
        or w.transposed
        or w.ndim != 2
        or w.kept is not None
        or indices.numel() > w.shape[0]
    ):
        return NotImplemented
    used, inverse = torch.unique(indices, return_inverse=True)
    rows = torch.cat([w.stored.dense(w.dtype, w.first + int(i), w.first + int(i) + 1) for i in used])
    return rows[inverse]


def _mm(x: Any, w: Any, **kwargs: Any) -> Any:
    return _addmm(None, x, w, **kwargs)


def _addmm(bias: Any, x: Any, w: Any, **kwargs: Any) -> Any:
    fits = isinstance(w, Quantized) and w.ndim == 2 and (bias is None or bias.ndim == 1)
    if kwargs or not fits or isinstance(x, Quantized) or isinstance(bias, Quantized):
        return NotImplemented
    out = quantized_linear(x, _transpose(w), bias) if w.transposed else None
    if out is None and in_float32(x):
        out = product(x, w.dense(), bias)
    return NotImplemented if out is None else out


_aten = torch.ops.aten
_OWN: dict[Any, Callable[..., Any]] = {
    _aten.detach: _unchanged,
    _aten.alias: _unchanged,
    _aten.lift_fresh: _unchanged,
    _aten.t: _transpose,
    _aten.transpose: _transpose,
    _aten.select: _select,
    _aten.slice: _slice,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
    _aten.unbind: _unbind,
    _aten.mm: _mm,
    _aten.addmm: _addmm,
    _aten._to_copy: _to_copy,
    _aten.clone: _clone,
    _aten.embedding: _embedding,
}


def quantize(weight: Tensor, kind: str, *, double: bool = True, dtype: torch.dtype | None = None) -> Quantized:
    """Quantize `weight` (…, columns) in float32, bfloat16 or float16 to one of KINDS.

    double: store the absmax of 4-bit kinds in 8 bits.
    dtype: the result's compute dtype, by default the weight's.

    Raises ValueError for another kind, and for weights with NaN or infinity, which codes cannot represent."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}")
    weight = weight.detach()
    dtype = weight.dtype if dtype is None else dtype
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight has values that are not finite")
    return Quantized(to_format(weight, kind, double), dtype)


def stacked_rows(parts: Sequence[Quantized]) -> Quantized:
    """Concatenate weights along the rows, without copying codes.

    All weights must have the same number of columns. If the parts are adjacent rows of one stored weight, the
    result is a view of this stored weight."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(b.stored is a.stored and b.first == a.last for a, b in itertools.pairwise(parts)):
        shape = (sum(len(part) for part in parts), *first.shape[1:])
        return Quantized(first.stored, first.dtype, shape, first.first, parts[-1].last)
    return Quantized(StackedRows(tuple(p.stored for p in parts)), parts[0].dtype)


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor | None:
    """Return x·Wᵀ + b for a few rows x (n, in), computed from the codes.

    The result is rounded once. Returns None if the device cannot multiply by these codes, or if the weight is
    kept dequantized."""
    if weight.kept is not None:
        return None
    stored = weight.stored
    if not isinstance(stored, StackedRows):
        stored = StackedRows((stored,))
    runs = {id(part): dispatch("quantized_linear", x, part) for part in stored.parts}
    if None in runs.values():
        return None
    y = x.new_empty(len(x), weight.last - weight.first)
    for part, low, high, columns in stored.part_slices(weight.first, weight.last):
        runs[id(part)](x, part, low, high, None if bias is None else bias[columns], y[:, columns])
    return y


def dequantized(weight: Tensor) -> Tensor:
    """Return the dequantized values of a quantized weight, or any other weight unchanged."""
    return weight.dense() if isinstance(weight, Quantized) else weight
