"""Frozen weights in 4 and 8 bits: a tensor that holds codes and multiplies as the weight they stand for.

    nf4, fp4, int4    w = table[code]·absmax                 a block of 64 weights has one absmax
    doubly            absmax = map[code₈]·absmax₂ + mean     a block of 256 absmax has one absmax₂; 4.127 bits a weight
    int8              w = code·absmax / 127                  one absmax a row

`quantise` makes a `Quantised` of an ordinary weight, in the arithmetic of bitsandbytes, so that codes and constants are
the same bits (QLoRA, arXiv 2305.14314; blocks and the 8-bit map, arXiv 2110.02861). To the rest of torch a `Quantised`
is a frozen weight of `dtype` whose values are the dequantised ones, rounded once to that dtype: every operation gives
what it would give with that weight. Products make the dequantised weight for their own length and drop it; a product
under autograd keeps the codes for backward and dequantises again. Views by rows, a transpose and a move to another
device stay quantised; whatever else is asked of it is computed on the dequantised weight.

How codes are laid out is a `Code`: the ones here are bitsandbytes', and others may be brought (models/ggml.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from veneer import kernels

__all__ = [
    "KINDS",
    "Blocks4",
    "Code",
    "Quantised",
    "Rows8",
    "dequantised",
    "dynamic_map",
    "quantise",
    "stacked",
    "table",
]

KINDS = ("nf4", "fp4", "int4", "int8")
BLOCK, NESTED = 64, 256
_CHUNK = 1 << 22  # weights that the reference works on at once: its temporaries are several times as large


class Code(Protocol):
    """How the weights of a tensor are kept. `shape`: the weight's. A weight is seen as rows of its last dimension."""

    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def dense(self, dtype: torch.dtype, first: int, last: int) -> Tensor:
        """The dequantised rows first … last: (last − first, columns)."""

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept."""

    def moved(self, change: Callable[[Tensor], Tensor]) -> Code:
        """The same with each of its tensors changed (copied, moved to a device)."""


# -- 4 bits ------------------------------------------------------------------------------------------------------------

_TABLES = {
    # quantiles of the normal distribution, each bin as likely as the next, with an exact zero (QLoRA, appendix E)
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # a sign, two bits of exponent, one of mantissa, over the largest
    "fp4": tuple(s * v / 12 for s in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
    "int4": tuple(v / 7 for v in (*range(-7, 0), 0, *range(8))),
}  # fmt: skip


@functools.cache
def table(kind: str, device: torch.device | None = None) -> Tensor:
    """The sixteen values of a 4-bit kind in the order of their codes: (16,) float32 in −1 … 1."""
    return torch.tensor(_TABLES[kind], dtype=torch.float32, device=device)


@functools.cache
def _places(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(bounds, order): a value above k of the 15 bounds has the code order[k]."""
    values, order = table(kind).sort(stable=True)
    return ((values[:-1] + values[1:]) / 2).to(device), order.to(device, torch.int32)


@functools.cache
def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The 8-bit dynamic data type, signed: (256,) float32, sorted. A code has a decade and as many bits of a linear
    fraction as the decade leaves (arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for scale in (10.0 ** (decade - 6), -(10.0 ** (decade - 6))):
            values += (middles * scale).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Blocks4:
    """packed: (⌈n/2⌉,) uint8, two codes a byte, the first in the high half. absmax: (⌈n/64⌉,) float32; or doubly
    quantised: (⌈n/64⌉,) uint8 with absmax2 (⌈n/16384⌉,) and mean (), float32."""

    kind: str
    shape: tuple[int, ...]
    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None = None
    mean: Tensor | None = None
    block: int = BLOCK
    nested: int = NESTED

    def tensors(self) -> dict[str, Tensor]:
        named = {"packed": self.packed, "absmax": self.absmax, "absmax2": self.absmax2, "mean": self.mean}
        return {name: t for name, t in named.items() if t is not None}

    def moved(self, change: Callable[[Tensor], Tensor]) -> Blocks4:
        changed: dict[str, Any] = {name: change(t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    def dense(self, dtype: torch.dtype, first: int, last: int) -> Tensor:
        columns = self.shape[-1]
        start, count = first * columns, (last - first) * columns
        native = _native(self.packed, dtype)
        if native is None:
            return self._reference(start, count).to(dtype).view(-1, columns)
        out = torch.empty(last - first, columns, dtype=dtype)
        doubly = self.absmax2 is not None and self.mean is not None
        native.blocks4_dense(
            self.packed.data_ptr(), (self.absmax2 if self.absmax2 is not None else self.absmax).data_ptr(),
            self.absmax.data_ptr() if doubly else None, dynamic_map().data_ptr() if doubly else None,
            float(self.mean) if self.mean is not None else 0.0, table(self.kind).data_ptr(), start, count, self.block,
            self.nested, out.data_ptr(), int(dtype == torch.float32), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _reference(self, start: int, count: int) -> Tensor:
        """Weights start … start + count in float32, by torch's own operations."""
        at = torch.arange(start // 2, (start + count + 1) // 2, device=self.packed.device)
        both = self.packed[at]
        codes = torch.stack([both >> 4, both & 15], 1).flatten()[start % 2 :][:count]
        blocks = torch.arange(start, start + count, device=self.packed.device) // self.block
        return table(self.kind, self.packed.device)[codes.int()] * self._absmax()[blocks]

    def _absmax(self) -> Tensor:
        if self.absmax2 is None or self.mean is None:
            return self.absmax
        by = self.absmax2.repeat_interleave(self.nested)[: len(self.absmax)]
        return dynamic_map(self.absmax.device)[self.absmax.int()] * by + self.mean


def _blocks4(weight: Tensor, kind: str, double: bool) -> Blocks4:
    flat = weight.contiguous().view(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=flat.device)
    bounds, order = _places(kind, flat.device)
    native = _native(packed, flat.dtype)
    if native is not None:
        native.blocks4_quantise(
            flat.data_ptr(), int(flat.dtype == torch.float32), bounds.data_ptr(), order.data_ptr(), n, BLOCK,
            packed.data_ptr(), absmax.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    else:
        for start in range(0, n, _CHUNK):
            part = flat[start : start + _CHUNK].float()
            blocks = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
            most = blocks.abs().amax(1)
            absmax[start // BLOCK :][: len(most)] = most
            inside = (blocks * (1.0 / most.clamp(min=1e-38))[:, None]).flatten()[: len(part) + len(part) % 2]
            codes = order[torch.bucketize(inside, bounds)].to(torch.uint8)
            packed[start // 2 :][: len(codes) // 2] = codes[::2] << 4 | codes[1::2]
    if not double:
        return Blocks4(kind, tuple(weight.shape), packed, absmax)
    mean = absmax.mean()
    codes8, absmax2 = _blocks8(absmax - mean)
    return Blocks4(kind, tuple(weight.shape), packed, codes8, absmax2, mean)


def _blocks8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes of the dynamic map, absmax of each block of 256)."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % NESTED)).view(-1, NESTED)
    most = blocks.abs().amax(1)
    values = dynamic_map(x.device)
    inside = (blocks * (1.0 / most.clamp(min=1e-38))[:, None]).flatten()[: len(x)]
    return torch.bucketize(inside, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8), most


# -- 8 bits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows8:
    """codes: (rows, columns) int8, absmax: (rows,) float32. bitsandbytes' "vector-wise" weights, its CB and SCB."""

    shape: tuple[int, ...]
    codes: Tensor
    absmax: Tensor
    kind: str = "int8"

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "absmax": self.absmax}

    def moved(self, change: Callable[[Tensor], Tensor]) -> Rows8:
        return replace(self, codes=change(self.codes), absmax=change(self.absmax))

    def dense(self, dtype: torch.dtype, first: int, last: int) -> Tensor:
        codes, absmax = self.codes[first:last], self.absmax[first:last]
        native = _native(codes, dtype)
        if native is None:
            return (codes.float() * absmax[:, None] * 7.874015718698502e-3).to(dtype)
        out = torch.empty(codes.shape, dtype=dtype)
        native.rows8_dense(
            codes.data_ptr(), absmax.data_ptr(), *codes.shape, out.data_ptr(), int(dtype == torch.float32),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def _rows8(weight: Tensor) -> Rows8:
    rows = weight.reshape(-1, weight.shape[-1])
    absmax = rows.abs().amax(1).float()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part, most = rows[start : start + step].float(), absmax[start : start + step]
        codes[start : start + step] = (part * (127.0 / most.clamp(min=1e-38))[:, None]).round().to(torch.int8)
    return Rows8(tuple(weight.shape), codes, absmax)


# -- several of one width below one another ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stacked:
    parts: tuple[Code, ...]

    @property
    def kind(self) -> str:
        return self.parts[0].kind

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(_rows(p) for p in self.parts), self.parts[0].shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, p in enumerate(self.parts) for name, t in p.tensors().items()}

    def moved(self, change: Callable[[Tensor], Tensor]) -> _Stacked:
        return _Stacked(tuple(p.moved(change) for p in self.parts))

    def dense(self, dtype: torch.dtype, first: int, last: int) -> Tensor:
        found, at = [], 0
        for part in self.parts:
            low, high = max(first - at, 0), min(last - at, _rows(part))
            if low < high:
                found.append(part.dense(dtype, low, high))
            at += _rows(part)
        return found[0] if len(found) == 1 else torch.cat(found)


def _rows(code: Code) -> int:
    return math.prod(code.shape[:-1])


# -- the tensor --------------------------------------------------------------------------------------------------------


class Quantised(torch.Tensor):
    """A weight that is kept as `code`; see the module. Rows first … last of the code's, (…, columns), or with `turned`
    its last two dimensions the other way round. `kept`: the dequantised weight, where `keep` was called."""

    code: Code
    first: int
    last: int
    turned: bool
    kept: Tensor | None

    @staticmethod
    def __new__(
        cls: type[Quantised], code: Code, dtype: torch.dtype, shape: Sequence[int] | None = None, first: int = 0,
        last: int | None = None, turned: bool = False, kept: Tensor | None = None,
    ) -> Quantised:  # fmt: skip
        size = list(code.shape if shape is None else shape)
        if turned:
            size[-2:] = size[:-3:-1]
        device = next(iter(code.tensors().values())).device
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        return cast("Quantised", make(cls, size, dtype=dtype, device=device, requires_grad=False))

    def __init__(
        self, code: Code, dtype: torch.dtype, shape: Sequence[int] | None = None, first: int = 0,
        last: int | None = None, turned: bool = False, kept: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.code, self.first, self.turned, self.kept = code, first, turned, kept
        self.last = _rows(code) if last is None else last

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Quantised({self.code.kind}, {tuple(self.shape)}, {self.dtype}, {self.bytes:,} bytes)"

    @property
    def bytes(self) -> int:
        """What the codes and constants take, of the whole tensor that this may be a part of."""
        return sum(t.numel() * t.element_size() for t in self.code.tensors().values())

    def dense(self) -> Tensor:
        """The dequantised weight. Not to be written to: it may be the kept one."""
        if self.kept is not None:
            return self.kept
        out = self.code.dense(self.dtype, self.first, self.last)
        if not self.turned:
            return out.view(self.shape)
        return out.view(*self.shape[:-2], self.shape[-1], self.shape[-2]).transpose(-1, -2)

    def keep(self) -> None:
        """Keep the dequantised weight from now on: twice or four times the memory of a 16-bit one's codes, and no
        dequantising."""
        self.kept = self.dense()

    def part(self, first: int, last: int, shape: Sequence[int]) -> Quantised:
        """Rows first … last of this one, as `shape`."""
        at = self.first
        kept = None if self.kept is None else self.kept.reshape(-1, self.shape[-1])[first:last].view(tuple(shape))
        return Quantised(self.code, self.dtype, shape, at + first, at + last, False, kept)

    def like(self, code: Code, dtype: torch.dtype | None = None) -> Quantised:
        """The same view of another code."""
        return Quantised(code, dtype or self.dtype, self._stored, self.first, self.last, self.turned)

    @property
    def _stored(self) -> tuple[int, ...]:
        """The shape before `turned`."""
        return tuple(self.shape) if not self.turned else (*self.shape[:-2], self.shape[-1], self.shape[-2])

    # torch swaps what module.to(…) changes by these two; without them it would keep the old codes
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        inner = {f"code_{name.replace('.', '_')}": t for name, t in self.code.tensors().items()}
        self.__dict__.update(inner)
        return list(inner), (self.code, self.dtype, self._stored, self.first, self.last, self.turned)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: Any, size: Any, stride: Any) -> Quantised:
        code, *view = rest
        values = iter(inner.values())
        return Quantised(code.moved(lambda _: next(values)), *view)

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantised:
        out = self.like(self.code.moved(Tensor.clone))
        memo[id(self)] = out
        return _as_parameter(out) if isinstance(self, torch.nn.Parameter) else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.code, self.dtype, self._stored, self.first, self.last, self.turned)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(func.overloadpacket)
        if own is not None:
            out = own(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return func(*_dense(args), **_dense(kwargs))


def _as_parameter(weight: Quantised) -> Quantised:
    return cast("Quantised", torch.nn.Parameter(weight, requires_grad=False))


def _restored(code: Code, dtype: torch.dtype, shape: tuple[int, ...], first: int, last: int, turned: bool) -> Quantised:
    return Quantised(code, dtype, shape, first, last, turned)


def _dense(value: Any) -> Any:
    if isinstance(value, Quantised):
        return value.dense()
    if isinstance(value, list | tuple):
        return type(value)(_dense(v) for v in value)
    if isinstance(value, dict):
        return {key: _dense(v) for key, v in value.items()}
    return value


def _same(w: Any, *args: Any, **kwargs: Any) -> Any:
    out = w.like(w.code)
    out.kept = w.kept
    return out


def _turn(w: Any, *dims: int, **kwargs: Any) -> Any:
    if dims and {d % w.ndim for d in dims} != {w.ndim - 2, w.ndim - 1}:
        return NotImplemented
    kept = None if w.kept is None else w.kept.transpose(-1, -2)
    return Quantised(w.code, w.dtype, w._stored, w.first, w.last, not w.turned, kept)


def _select(w: Any, dim: int, index: int) -> Any:
    if dim % w.ndim or w.ndim < 3 or w.turned:
        return NotImplemented
    rows, index = math.prod(w.shape[1:-1]), int(index) % w.shape[0]
    return w.part(index * rows, (index + 1) * rows, w.shape[1:])


def _slice(w: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim % w.ndim or step != 1 or w.turned or w.ndim < 2:
        return NotImplemented
    start, end, _ = slice(start, end).indices(w.shape[0])
    rows, end = math.prod(w.shape[1:-1]), max(start, end)
    return w.part(start * rows, end * rows, (end - start, *w.shape[1:]))


def _split(w: Any, size: int | Sequence[int], dim: int = 0) -> Any:
    if dim % w.ndim or w.turned or w.ndim < 2:
        return NotImplemented
    whole = w.shape[0]
    sizes = [min(size, whole - at) for at in range(0, whole, size)] if isinstance(size, int) else size
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(w, 0, end - n, end) for n, end in zip(sizes, ends, strict=True)]


def _unbind(w: Any, dim: int = 0) -> Any:
    if dim % w.ndim or w.turned or w.ndim < 3:
        return NotImplemented
    return [_select(w, 0, i) for i in range(w.shape[0])]


def _to_copy(w: Any, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    return w.like(w.code.moved(lambda t: t.to(device, copy=True, non_blocking=non_blocking)), dtype)


def _clone(w: Any, **kwargs: Any) -> Any:
    return w.like(w.code.moved(Tensor.clone))


def _embedding(w: Any, indices: Any, *args: Any) -> Any:
    """Rows of a quantised table, dequantised one by one where that is less than the whole."""
    if not isinstance(w, Quantised) or w.turned or w.ndim != 2 or w.kept is not None or indices.numel() > w.shape[0]:
        return NotImplemented
    used, place = torch.unique(indices, return_inverse=True)
    rows = torch.cat([w.code.dense(w.dtype, w.first + int(i), w.first + int(i) + 1) for i in used])
    return rows[place]


_aten = torch.ops.aten
_OWN: dict[Any, Callable[..., Any]] = {
    _aten.detach: _same, _aten.alias: _same, _aten.lift_fresh: _same, _aten.t: _turn, _aten.transpose: _turn,
    _aten.select: _select, _aten.slice: _slice, _aten.split: _split, _aten.split_with_sizes: _split,
    _aten.unbind: _unbind,
    _aten._to_copy: _to_copy, _aten.clone: _clone, _aten.embedding: _embedding,
}  # fmt: skip


def quantise(weight: Tensor, kind: str, *, double: bool = True, dtype: torch.dtype | None = None) -> Quantised:
    """`weight` (…, columns), float32, bfloat16 or float16, as `kind`: nf4, fp4, int4 or int8. `double`: the absmax of
    4-bit kinds in 8 bits. `dtype`: what the result computes in, the weight's own where it is not given.

    Raises ValueError for another kind and for weights that are not finite, which no code stands for."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}")
    weight = weight.detach()
    dtype = weight.dtype if dtype is None else dtype
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight has values that are not finite")
    code = _rows8(weight) if kind == "int8" else _blocks4(weight, kind, double)
    return Quantised(code, dtype)


def stacked(parts: Sequence[Quantised]) -> Quantised:
    """Whole weights (rows, columns) of one width below one another, without copying a code."""
    if len(parts) == 1:
        return parts[0]
    return Quantised(_Stacked(tuple(p.code for p in parts)), parts[0].dtype)


def dequantised(weight: Tensor) -> Tensor:
    """The values of a weight: its own, or what its codes stand for."""
    return weight.dense() if isinstance(weight, Quantised) else weight


def _native(codes: Tensor, dtype: torch.dtype) -> Any:
    """The compiled kernels, if there are any for these."""
    if codes.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32) or not codes.is_contiguous():
        return None
    return kernels.load()
