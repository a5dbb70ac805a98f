"""Quantization formats of frozen 4-bit and 8-bit weights, from bitsandbytes and ggml.

    nf4, fp4         w = table[code]·absmax                 one absmax per block of 64 weights
    double quant     absmax = map[code₈]·absmax₂ + mean     one absmax₂ per 256 absmax; 4.127 bits per weight
    int8             w = code·absmax / 127                  one absmax per row
    Q4_K, Q8_0, …    the blocks of a GGUF file, unchanged

Each product and each sum is rounded to float32, and the result is rounded once to the requested dtype. Codes,
constants and values of the first three formats are bit-identical to bitsandbytes' (QLoRA, arXiv 2305.14314;
blocks and the 8-bit map, arXiv 2110.02861). Compiled kernels dequantize on the CPU, and bitsandbytes' kernels
dequantize nf4 and fp4 on CUDA. Everything else uses torch's operations, which are the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from veneer.compat import BITSANDBYTES
from veneer.ops.device_transfer import is_fake
from veneer.ops.dispatch import dispatch

KINDS = ("nf4", "fp4", "int8")
SAVED_KINDS = ("nf4", "fp4")
"""The 4-bit kinds that bitsandbytes' kernels and checkpoints support."""
BLOCK, NESTED = 64, 256
_CHUNK = 1 << 20  # weights per chunk of the reference; limits the size of its temporary tensors


class QuantizationFormat(Protocol):
    """The stored form of a quantized weight; `shape` is the shape of the weight.

    All methods treat the weight as a matrix whose columns are the last dimension."""

    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def dense(self, dtype: torch.dtype, first: int, last: int, into: Tensor | None = None) -> Tensor:
        """Return the dequantized rows first … last: (last − first, columns).

        into: a tensor to write the result to."""

    def tensors(self) -> dict[str, Tensor]:
        """Return every stored tensor."""

    def moved(self, change: Callable[[Tensor], Tensor]) -> QuantizationFormat:
        """Return a copy with `change` applied to each tensor, for example to move the tensors."""

    def groups(self, first: int, last: int) -> Groups | None:
        """Return rows first … last as Groups; None if the format cannot be expressed as Groups."""


@dataclass(frozen=True)
class Groups:
    """A weight (rows, columns) as codes and scales: a common form of several formats.

        w = values[code]·scale + zero

    codes: (rows, columns), uint8 indices into `values` (16,) float32; or int8 values if `values` is None.
    scales, zeros: (rows, columns / size), one per `size` columns of a row; `zeros` is optional."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    values: Tensor | None = None

    @property
    def size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dense(self) -> Tensor:
        """Return the weight (rows, columns) in float32; product and sum are rounded separately."""
        values = self.codes.float() if self.values is None else self.values[self.codes.int()]
        out: Tensor = values.unflatten(1, (-1, self.size)) * self.scales[..., None].float()
        return (out if self.zeros is None else out + self.zeros[..., None].float()).flatten(1)

    def split(self, size: int) -> Groups:
        """Return the same weight with one scale per `size` columns.

        `size` must divide the current size."""
        times = self.size // size
        zeros = None if self.zeros is None else self.zeros.repeat_interleave(times, 1)
        return replace(self, scales=self.scales.repeat_interleave(times, 1), zeros=zeros)

    def _widened(self) -> Groups | None:
        """Return the same weight with int8 codes that need no table of values.

        Returns None if `values` are not integers."""
        if self.values is None:
            return self
        if not torch.equal(self.values, self.values.round()):
            return None
        return replace(self, codes=self.values.to(torch.int8)[self.codes.int()], values=None)

    @staticmethod
    def joined(parts: Sequence[Groups | None]) -> Groups | None:
        """Concatenate weights along the rows; None if the weights have no common form.

        All weights must have the same number of columns."""
        there = [p for p in parts if p is not None]
        tables = [p.values for p in there]
        if any(v is None or not torch.equal(v, there[0].values) for v in tables):  # type: ignore[arg-type]
            there = [wide for p in there if (wide := p._widened()) is not None]
        if not there or len(there) < len(parts):
            return None
        size = math.gcd(*(p.size for p in there))
        there = [p.split(size) for p in there]
        zeros = [torch.zeros_like(p.scales) if p.zeros is None else p.zeros for p in there]
        all_zeros = None if all(p.zeros is None for p in there) else torch.cat(zeros)
        codes, scales = torch.cat([p.codes for p in there]), torch.cat([p.scales for p in there])
        return Groups(codes, scales, all_zeros, there[0].values)


@dataclass(frozen=True)
class _Stored:
    """Common methods of formats that store their tensors as dataclass fields."""

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def moved(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: change(t) for name, t in self.tensors().items()}
        return replace(self, **changed)


# -- 4 bits ------------------------------------------------------------------------------------------------------------

_TABLES = {
    # quantiles of the normal distribution: bins of equal probability, with an exact zero (QLoRA, appendix E)
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # bitsandbytes' 4-bit float: sign, two exponent bits, one mantissa bit, one subnormal; divided by its
    # maximum
    "fp4": tuple(s * v / 12 for s in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip


@functools.cache
def four_bit_values(kind: str, device: torch.device | None = None) -> Tensor:
    """Return the sixteen values of a 4-bit kind, indexed by code: (16,) float32 in −1 … 1."""
    return torch.tensor(_TABLES[kind], dtype=torch.float32, device=device)


@functools.cache
def code_bounds(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (bounds, order): a value that exceeds k of the 15 bounds has the code order[k]."""
    values, order = four_bit_values(kind).sort(stable=True)
    return ((values[:-1] + values[1:]) / 2).to(device), order.to(device, torch.int32)


@functools.cache
def dynamic_map(device: torch.device | None = None) -> Tensor:
    """Return the values of the signed 8-bit dynamic data type: (256,) float32, sorted.

    A code consists of a decimal exponent and a linear fraction in the remaining bits (arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for scale in (10.0 ** (decade - 6), -(10.0 ** (decade - 6))):
            values += (middles * scale).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Blocks4(_Stored):
    """4-bit codes in blocks.

    packed: (⌈n/2⌉,) uint8, two codes per byte, the first code in the high half.
    absmax: (⌈n/64⌉,) float32. With double quantization, uint8 codes instead, with absmax2 (⌈n/16384⌉,) and
        mean () in float32."""

    kind: str
    shape: tuple[int, ...]
    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None = None
    mean: Tensor | None = None
    block: int = BLOCK
    nested: int = NESTED

    def dense(self, dtype: torch.dtype, first: int, last: int, into: Tensor | None = None) -> Tensor:
        columns = self.shape[-1]
        start, count = first * columns, (last - first) * columns
        run, is_fake_weight = dispatch("dequantize_blocks4", self.packed, dtype), is_fake(self.packed)
        if is_fake_weight or run is not None:
            device = self.packed.device
            out = torch.empty(last - first, columns, dtype=dtype, device=device) if into is None else into
            if is_fake_weight:  # the tables below are cached by device and must not contain fake tensors
                return out
            constants = dynamic_map(out.device), four_bit_values(self.kind, out.device)
            scales = self.absmax, self.absmax2, self.mean
            run(self.packed, *scales, *constants, start, count, self.block, self.nested, out)
            return out
        library = gpu_library(self.kind, self.block, self.packed.device.type)
        if library is not None and not start % self.block:
            return _copy_into(self._by_bitsandbytes(library, dtype, start, count).view(-1, columns), into)
        parts = [
            self._reference(at, min(_CHUNK, start + count - at)).to(dtype) for at in range(start, start + count, _CHUNK)
        ]
        return _copy_into(torch.cat(parts).view(-1, columns), into)

    def _reference(self, start: int, count: int) -> Tensor:
        """Return `count` weights from index `start` on, in float32, with torch's operations."""
        at = torch.arange(start // 2, (start + count + 1) // 2, device=self.packed.device)
        both = self.packed[at]
        codes = torch.stack([both >> 4, both & 15], 1).flatten()[start % 2 :][:count]
        first, last = self._blocks(start, count)
        blocks = torch.arange(start, start + count, device=self.packed.device) // self.block - first
        return four_bit_values(self.kind, self.packed.device)[codes.int()] * self.absmax_of(first, last)[blocks]

    def _by_bitsandbytes(self, library: Any, dtype: torch.dtype, start: int, count: int) -> Tensor:
        """Return the weights of `_reference` in `dtype`, from bitsandbytes' GPU kernels."""
        absmax, packed = self.absmax_of(*self._blocks(start, count)), self.packed[start // 2 : (start + count + 1) // 2]
        out: Tensor = library.dequantize_4bit(packed[:, None], absmax, self.block, self.kind, (1, count), dtype)
        return out.flatten()

    def groups(self, first: int, last: int) -> Groups | None:
        columns = self.shape[-1]
        if columns % 2:
            return None
        size, start, count = math.gcd(columns, self.block), first * columns, (last - first) * columns
        both = self.packed[start // 2 : (start + count) // 2]
        codes = torch.stack([both >> 4, both & 15], 1).view(-1, columns)
        low, high = self._blocks(start, count)
        block_index = torch.arange(start, start + count, size, device=both.device) // self.block - low
        scales = self.absmax_of(low, high)[block_index].view(len(codes), -1)
        return Groups(codes, scales, None, four_bit_values(self.kind, both.device))

    def _blocks(self, start: int, count: int) -> tuple[int, int]:
        return start // self.block, -(-(start + count) // self.block)

    def absmax_of(self, first: int, last: int) -> Tensor:
        """Return the absmax of blocks first … last in float32."""
        absmax = self.absmax[first:last]
        if self.absmax2 is None or self.mean is None:
            return absmax
        by = self.absmax2[torch.arange(first, last, device=absmax.device) // self.nested]
        return dynamic_map(absmax.device)[absmax.int()] * by + self.mean


def _blocks4(weight: Tensor, kind: str, double: bool) -> Blocks4:
    flat = weight.contiguous().view(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=flat.device)
    bounds, order = code_bounds(kind, flat.device)
    run = dispatch("quantize_blocks4", packed, flat.dtype)
    if run is not None:
        run(packed, absmax, flat, bounds, order, BLOCK)
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
    return Blocks4(kind, tuple(weight.shape), packed, *doubled(absmax))


def doubled(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the double-quantized absmax of all blocks: (8-bit codes, absmax2, mean)."""
    mean = absmax.mean()
    return *_blocks8(absmax - mean), mean


def _blocks8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of the dynamic map, and the absmax of each block of 256."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % NESTED)).view(-1, NESTED)
    most = blocks.abs().amax(1)
    values = dynamic_map(x.device)
    inside = (blocks * (1.0 / most.clamp(min=1e-38))[:, None]).flatten()[: len(x)]
    return torch.bucketize(inside, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8), most


# -- 8 bits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows8(_Stored):
    """8-bit codes with one scale per row: bitsandbytes' "vector-wise" weights, CB and SCB.

    codes: (rows, columns) int8, absmax: (rows,) float32."""

    shape: tuple[int, ...]
    codes: Tensor
    absmax: Tensor
    kind: str = "int8"

    def dense(self, dtype: torch.dtype, first: int, last: int, into: Tensor | None = None) -> Tensor:
        codes, absmax = self.codes[first:last], self.absmax[first:last]
        run = dispatch("dequantize_rows8", codes, dtype)
        if run is None:
            return _copy_into((codes.float() * absmax[:, None] * 7.874015718698502e-3).to(dtype), into)
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device) if into is None else into
        run(codes, absmax, out)
        return out

    def groups(self, first: int, last: int) -> Groups:
        """Return rows first … last as Groups; scales are rounded once more than in `dense`."""
        return Groups(self.codes[first:last], self.absmax[first:last, None] * 7.874015718698502e-3)


def _rows8(weight: Tensor) -> Rows8:
    rows = weight.reshape(-1, weight.shape[-1])
    absmax = rows.abs().amax(1).float()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part, most = rows[start : start + step].float(), absmax[start : start + step]
        codes[start : start + step] = (part * (127.0 / most.clamp(min=1e-38))[:, None]).round().to(torch.int8)
    return Rows8(tuple(weight.shape), codes, absmax)


def to_format(weight: Tensor, kind: str, double: bool) -> QuantizationFormat:
    """Quantize a float32 or bfloat16 weight to `kind`; see `quantized.quantize`."""
    return _rows8(weight) if kind == "int8" else _blocks4(weight, kind, double)


def empty_format(shape: Sequence[int], kind: str, device: torch.device) -> QuantizationFormat:
    """Return an uninitialized quantized weight of this shape.

    4-bit kinds are double-quantized."""
    n, columns = math.prod(shape), shape[-1]
    if kind == "int8":
        codes = torch.empty(n // columns, columns, dtype=torch.int8, device=device)
        return Rows8(tuple(shape), codes, torch.empty(n // columns, device=device))
    blocks = -(-n // BLOCK)
    return Blocks4(
        kind,
        tuple(shape),
        torch.empty((n + 1) // 2, dtype=torch.uint8, device=device),
        torch.empty(blocks, dtype=torch.uint8, device=device),
        torch.empty(-(-blocks // NESTED), device=device),
        torch.empty((), device=device),
    )


# -- blocks of a GGUF file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgmlBlocks(_Stored):
    """Blocks of a GGUF file; a row is a sequence of blocks, each with its own scales.

    gguf-py's `quants` defines the formulas of every type and is the reference.

    raw: (rows, bytes per row) uint8.
    kind: ggml's name, such as Q4_K."""

    kind: str
    shape: tuple[int, ...]
    raw: Tensor

    def dense(self, dtype: torch.dtype, first: int, last: int, into: Tensor | None = None) -> Tensor:
        rows = self.raw[first:last]
        run = dispatch("dequantize_ggml", rows, dtype, self.kind)
        if run is None:
            return _copy_into(self._reference(rows).to(rows.device, dtype), into)
        out = torch.empty(last - first, self.shape[-1], dtype=dtype, device=rows.device) if into is None else into
        run(rows, self.kind, out)
        return out

    def _reference(self, rows: Tensor) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(rows.cpu().numpy(), GGMLQuantizationType[self.kind]))

    def groups(self, first: int, last: int) -> Groups | None:
        read = _GGML_GROUPS.get(self.kind)
        return None if read is None else read(self.kind, self.raw[first:last])


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at byte `at` of each block, as (rows, blocks, 1) float32."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _bits(words: Tensor, width: int, count: int) -> Tensor:
    """Unpack bytes (…, n) to (…, n, count) values of `width` bits each, lowest bits first."""
    return words[..., None] >> torch.arange(0, width * count, width, dtype=torch.uint8) & (1 << width) - 1


def _groups_of_32(kind: str, raw: Tensor) -> Groups:
    """Return Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 blocks as Groups.

    A block stores a scale, a zero for the *_1 types, and 32 codes."""
    five, zero = kind[1] == "5", kind.endswith("1")
    blocks = raw.unflatten(1, (-1, {"Q4": 18, "Q5": 22, "Q8": 34}[kind[:2]] + 2 * zero))
    scales, zeros = _half(blocks, 0).flatten(1), _half(blocks, 2).flatten(1) if zero else None
    if kind == "Q8_0":
        return Groups(blocks[..., 2:].flatten(1).view(torch.int8), scales)
    codes = _bits(blocks[..., -16:], 4, 2).mT.flatten(-2)
    if five:
        codes = codes | _bits(blocks[..., -20:-16], 1, 8).flatten(-2) << 4
        return Groups((codes.to(torch.int8) - (0 if zero else 16)).flatten(1), scales, zeros)
    return Groups(codes.flatten(1), scales, zeros, torch.arange(16.0) - (0 if zero else 8))


def _groups_of_256(kind: str, raw: Tensor) -> Groups:
    """Return Q4_K or Q5_K blocks as Groups.

    A block stores a 6-bit scale and a 6-bit minimum for every 32 codes, and two float16 factors: one for the
    scales and one for the minima."""
    blocks = raw.unflatten(1, (-1, 144 if kind == "Q4_K" else 176))
    low, middle, high = blocks[..., 4:16].split(4, -1)
    scale = torch.cat([low & 63, high & 15 | low >> 6 << 4], -1).float()
    least = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], -1).float()
    scales, zeros = (_half(blocks, 0) * scale).flatten(1), -(_half(blocks, 2) * least).flatten(1)
    codes = _bits(blocks[..., -128:].unflatten(-1, (4, 32)), 4, 2).mT.flatten(-3, -2)
    if kind == "Q4_K":
        return Groups(codes.flatten(1), scales, zeros, torch.arange(16.0))
    codes = codes | _bits(blocks[..., 16:48], 1, 8).mT << 4
    return Groups(codes.flatten(1).to(torch.int8), scales, zeros)


def _groups_of_16(kind: str, raw: Tensor) -> Groups:
    """Return Q6_K blocks as Groups.

    A block stores an 8-bit scale for every 16 codes, a float16 factor for the scales, and codes split into 4
    and 2 bits."""
    blocks = raw.unflatten(1, (-1, 210))
    four = _bits(blocks[..., :128].unflatten(-1, (2, 64)), 4, 2).mT.unflatten(-1, (2, 32)).flatten(-3, -2)
    two = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2, 4).mT
    codes = (four | two << 4).to(torch.int8) - 32
    scales = _half(blocks, 208) * blocks[..., 192:208].contiguous().view(torch.int8).float()
    return Groups(codes.flatten(1), scales.flatten(1))


_GGML_GROUPS: dict[str, Callable[[str, Tensor], Groups]] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), _groups_of_32),
    **dict.fromkeys(("Q4_K", "Q5_K"), _groups_of_256),
    "Q6_K": _groups_of_16,
}


# -- weights concatenated by rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StackedRows:
    """Weights (rows, columns) with the same number of columns, concatenated along the rows."""

    parts: tuple[QuantizationFormat, ...]

    @property
    def kind(self) -> str:
        return self.parts[0].kind

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(row_count(p) for p in self.parts), self.parts[0].shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, p in enumerate(self.parts) for name, t in p.tensors().items()}

    def moved(self, change: Callable[[Tensor], Tensor]) -> StackedRows:
        return StackedRows(tuple(p.moved(change) for p in self.parts))

    def dense(self, dtype: torch.dtype, first: int, last: int, into: Tensor | None = None) -> Tensor:
        if into is None:  # write into one allocation: concatenating afterwards would need twice the memory
            device = next(iter(self.tensors().values())).device
            into = torch.empty(last - first, self.shape[-1], dtype=dtype, device=device)
        for part, low, high, rows in self.part_slices(first, last):
            part.dense(dtype, low, high, into[rows])
        return into

    def groups(self, first: int, last: int) -> Groups | None:
        return Groups.joined([part.groups(low, high) for part, low, high, _ in self.part_slices(first, last)])

    def part_slices(self, first: int, last: int) -> Iterator[tuple[QuantizationFormat, int, int, slice]]:
        """Yield the parts that contain rows first … last.

        Each item is (part, first row in the part, last row in the part, slice of the output rows)."""
        at = 0
        for part in self.parts:
            low, high = max(first - at, 0), min(last - at, row_count(part))
            if low < high:
                yield part, low, high, slice(at + low - first, at + high - first)
            at += row_count(part)


def _copy_into(result: Tensor, into: Tensor | None) -> Tensor:
    return result if into is None else into.copy_(result)


def with_tensors(stored: QuantizationFormat, tensors: Iterable[Tensor]) -> QuantizationFormat:
    """Return `stored` with other tensors, in the order of `stored.tensors()`."""
    values = iter(tensors)
    return stored.moved(lambda _: next(values))


def row_count(stored: QuantizationFormat) -> int:
    """Return the number of rows of a weight, with the last dimension as columns."""
    return math.prod(stored.shape[:-1])


def gpu_library(kind: str, block: int, device: str) -> Any:
    """Return bitsandbytes' operators if they can dequantize this weight, else None.

    They can dequantize nf4 and fp4 on CUDA, in the block sizes of bitsandbytes' kernels. (bitsandbytes would
    treat any other kind as nf4.)"""
    theirs = device == "cuda" and kind in SAVED_KINDS and block in (64, 128, 256, 512, 1024, 2048, 4096)
    return bitsandbytes_operators() if theirs else None


@functools.cache
def bitsandbytes_operators() -> Any:
    """Return bitsandbytes' operators, or None if bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    BITSANDBYTES.check()
    return torch.ops.bitsandbytes
