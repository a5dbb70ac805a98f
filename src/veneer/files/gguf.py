"""Read untrusted GGUF files with checks, and write GGUF files atomically.

    file   = "GGUF" | version u32 | tensors u64 | fields u64 | fields | tensor entries | padding | data
    field  = key | type u32 | value       array = type u32 | count u64 | values       text = length u64 | UTF-8
    entry  = name | dimensions u32 | sizes u64… (innermost first) | type u32 | offset u64 (aligned, in the data)

All numbers are little endian; versions 2 and 3 are supported. The gguf package's reader does not check
counts: with a wrong count, it reads past the end of a file for hours without an error. This module first
checks every count against the remaining bytes. torch is imported only to read or write a tensor. This module
works on bytes and tensors, and does not depend on adapters or models. Source: ggml's specification.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.errors import AdapterError, UnsafeFileError
from veneer.files.atomic import atomic_write
from veneer.files.safetensors import MAX_TENSORS, name_problem

if TYPE_CHECKING:
    from torch import Tensor

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
MAX_TEXT, MAX_TEXTS = 16 << 20, 1 << 22
_LONG_ARRAY = 4096
"""Maximum length of an array that is not part of a tokenizer."""
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
DTYPES = {0: "float32", 1: "float16", 28: "float64", 30: "bfloat16"}
_NUMPY = {0: "f4", 1: "f2", 24: "i1", 25: "i2", 26: "i4", 27: "i8", 28: "f8"}
"""ggml's type number -> numpy dtype, for tensors stored as plain numbers."""


@dataclass(frozen=True)
class GgufEntry:
    """One tensor of a header.

    type: ggml's number of the type.
    kind: ggml's name of the type.
    shape: outermost dimension first.
    begin, end: the tensor's bytes are [begin, end), from the start of the file."""

    type: int
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SkippedArray:
    """An array of a tokenizer that was skipped; only its length was read."""

    count: int


@dataclass
class GgufFile:
    """A checked header and the memory-mapped file.

    types: field name -> (type,), or (9, element type) for an array."""

    version: int
    fields: dict[str, Any]
    types: dict[str, tuple[int, ...]]
    entries: dict[str, GgufEntry]
    data: mmap.mmap
    where: str

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor as stored: plain numbers, or blocks as (…, bytes per row)."""
        entry = self.entries[name]
        dtype = np.dtype(_NUMPY.get(entry.type, "u1")).newbyteorder("<")
        count = (entry.end - entry.begin) // dtype.itemsize
        flat = np.frombuffer(self.data, dtype=dtype, count=count, offset=entry.begin)
        return flat.reshape(entry.shape if entry.type in _NUMPY else (*entry.shape[:-1], -1))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; float dtypes are kept, quantized types become float32."""
        import torch

        entry = self.entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape)
        raw = np.frombuffer(self.data, dtype=np.uint8, count=entry.end - entry.begin, offset=entry.begin)
        if entry.type in DTYPES:
            return torch.from_numpy(raw.copy()).view(getattr(torch, DTYPES[entry.type])).reshape(entry.shape)
        import gguf

        try:
            values = gguf.quants.dequantize(raw.reshape(*entry.shape[:-1], -1), gguf.GGMLQuantizationType(entry.type))
        except NotImplementedError:
            raise AdapterError(f"{name} is {entry.kind}, which cannot be dequantized here", where=self.where) from None
        return torch.from_numpy(values).reshape(entry.shape)


class _Cursor:
    """A sequential reader that never reads past the end of the file."""

    def __init__(self, data: mmap.mmap, where: str, at: int, long_arrays: bool) -> None:
        self.data, self.where, self.at, self.long_arrays = data, where, at, long_arrays

    def bytes_left(self) -> int:
        return len(self.data) - self.at

    def fail(self, problem: str) -> UnsafeFileError:
        message = f"the GGUF header is inconsistent; the file is cut short or damaged: {problem} at byte {self.at:,}"
        fix = "download or copy the file again; if that does not help, the file was written incorrectly"
        return UnsafeFileError(message, where=self.where, fix=fix)

    def read(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if size > self.bytes_left():
            raise self.fail("it ends in the middle of a value: truncated")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def count(self, each: int, items: str) -> int:
        """Read the number of items and check that the file is long enough.

        each: minimum bytes per item."""
        n: int = self.read("Q")
        if n * each > self.bytes_left():
            raise self.fail(f"{n:,} {items} are claimed, but only {self.bytes_left():,} bytes are left")
        return n

    def text(self) -> str:
        n = self.count(1, "bytes of text")
        if n > MAX_TEXT:
            raise self.fail(f"a text of {n:,} bytes")
        raw = self.data[self.at : self.at + n]
        self.at += n
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a text that is not UTF-8") from None

    def value(self, kind: int) -> tuple[Any, tuple[int, ...]]:
        """Return the next value, of type `kind`, and its types as in `GgufFile.types`.

        The value is a string, a number, a numpy array of numbers, or a list of strings. An array of
        arrays is an error."""
        if kind == TEXT:
            return self.text(), (kind,)
        if kind in SCALARS:
            return self.read(SCALARS[kind]), (kind,)
        if kind != ARRAY:
            raise self.fail(f"a value of type {kind}")
        inner = self.read("I")
        if inner in SCALARS:
            dtype = np.dtype("<" + SCALARS[inner])
            n = self.count(dtype.itemsize, "numbers")
            values = np.frombuffer(self.data, dtype=dtype, count=n, offset=self.at)
            self.at += n * dtype.itemsize
            return (values if self._reads_all(n) else SkippedArray(n)), (kind, inner)
        if inner == TEXT and (n := self.count(8, "texts")) <= MAX_TEXTS:
            return self._texts(n), (kind, inner)
        raise self.fail(f"an array of {'too many texts' if inner == TEXT else f'type {inner}'}")

    def _reads_all(self, n: int) -> bool:
        return self.long_arrays or n <= _LONG_ARRAY

    def _texts(self, n: int) -> list[str] | SkippedArray:
        """Read `n` strings in one pass, which is fast enough for large vocabularies."""
        data, at, end, out = memoryview(self.data), self.at, len(self.data), []
        reads_all = self._reads_all(n)
        for _ in range(n):
            length = int.from_bytes(data[at : at + 8], "little")
            if length > MAX_TEXT or at + 8 + length > end:
                self.at = at
                raise self.fail(f"a text of {length:,} bytes, but only {max(end - at - 8, 0):,} are left: truncated")
            if reads_all:
                try:
                    out.append(str(data[at + 8 : at + 8 + length], "utf-8"))
                except UnicodeDecodeError:
                    self.at = at
                    raise self.fail("a text that is not UTF-8") from None
            at += 8 + length
        self.at = at
        return out if reads_all else SkippedArray(n)


def read_gguf_file(path: str | Path, *, long_arrays: bool = True) -> GgufFile:
    """Return the checked header of a GGUF file, from which tensors can be read.

    long_arrays: if False, long arrays of a tokenizer are skipped and returned as `SkippedArray`.

    Raises AdapterError for a file of another kind or version. Raises UnsafeFileError for a header with
    invalid counts, strings, names, shapes, types or offsets, or with overlapping tensors."""
    where = str(path)
    try:
        with Path(path).open("rb") as file:
            start = file.read(8)
            if start[:4] != MAGIC:
                raise AdapterError("the file is not GGUF", where=where)
            if len(start) < 8:
                raise UnsafeFileError(f"only {len(start)} bytes: a truncated GGUF file", where=where)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=where) from None
    (version,) = struct.unpack("<I", start[4:])
    if version not in VERSIONS:
        swapped = struct.unpack(">I", start[4:])[0] in VERSIONS
        problem = (
            "the file is big endian"
            if swapped
            else f"GGUF version {version} is not supported; use {' or '.join(map(str, VERSIONS))}"
        )
        raise AdapterError(problem, where=where, fix="convert it again with a current llama.cpp")
    cursor = _Cursor(data, where, 8, long_arrays)
    tensors = cursor.count(24, "tensors")
    fields: dict[str, Any] = {}
    types: dict[str, tuple[int, ...]] = {}
    if tensors > MAX_TENSORS:
        raise cursor.fail(f"{tensors:,} tensors are claimed; at most {MAX_TENSORS:,} are read")
    for _ in range(cursor.count(13, "fields")):
        key = cursor.text()
        if key in fields:
            raise cursor.fail(f"the field {key[:80]!r} appears twice")
        fields[key], types[key] = cursor.value(cursor.read("I"))
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment = {alignment!r}, which is not a power of two")
    raw = [_entry(cursor) for _ in range(tensors)]
    start_of_data = -(-cursor.at // alignment) * alignment
    entries = _located_entries(raw, start_of_data, alignment, cursor)
    return GgufFile(version, fields, types, entries, data, where)


def _entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.text()
    if problem := name_problem(name):
        raise cursor.fail(f"{name[:80]!r}: {problem}")
    dimensions = cursor.read("I")
    if not 1 <= dimensions <= 4:
        raise cursor.fail(f"{name!r} has {dimensions:,} dimensions")
    shape = tuple(cursor.read("Q") for _ in range(dimensions))[::-1]
    if math.prod(n for n in shape if n) >= 1 << 60:
        raise cursor.fail(f"{name!r} has the absurd shape {shape}")
    return name, cursor.read("I"), shape, cursor.read("Q")


def _located_entries(
    raw: list[tuple[str, int, tuple[int, ...], int]], start: int, alignment: int, cursor: _Cursor
) -> dict[str, GgufEntry]:
    import gguf

    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    out: dict[str, GgufEntry] = {}
    for name, kind, shape, offset in raw:
        if name in out:
            raise cursor.fail(f"the tensor {name!r} appears twice")
        if kind not in sizes:
            raise cursor.fail(f"{name!r} is of the unknown type {kind}")
        block, width = sizes[kind]
        if shape[-1] % block or offset % alignment:
            raise cursor.fail(
                f"{name!r} {shape} at {offset:,} does not consist of whole blocks of {block}, or is not aligned"
            )
        begin = start + offset
        out[name] = GgufEntry(
            kind, gguf.GGMLQuantizationType(kind).name, shape, begin, begin + math.prod(shape) * width // block
        )
    at, last = start, "the header"
    for name, entry in sorted(out.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < at:
            raise cursor.fail(f"{name!r} begins inside {last!r}")
        if entry.end > len(cursor.data):
            raise cursor.fail(f"{name!r} ends at {entry.end:,}, but the file ends at {len(cursor.data):,}: truncated")
        at, last = entry.end, name
    return out


def write_gguf_file(path: str | Path, fields: Mapping[str, str | float | int], tensors: Mapping[str, Tensor]) -> None:
    """Write a GGUF file of version 3 atomically; equal contents give equal bytes.

    fields: strings, floats (stored as f32) and integers (stored as u32).
    tensors: float32, float16 or bfloat16."""
    import torch

    types = {getattr(torch, name): number for number, name in DTYPES.items() if name != "float64"}
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        head.append(_text(key))
        if isinstance(value, str):
            head.append(struct.pack("<I", TEXT) + _text(value))
        else:
            head.append(struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value))
    data: list[bytes | memoryview] = []
    at = 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sizes = tensor.shape[::-1]
        head.append(_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, types[tensor.dtype], at))
        size = flat.numel() * flat.element_size()
        data += [memoryview(flat.view(torch.uint8).numpy()), b"\0" * (-size % ALIGNMENT)]  # type: ignore[arg-type]
        at += size + -size % ALIGNMENT
    header = b"".join(head)
    atomic_write(path, [header + b"\0" * (-len(header) % ALIGNMENT), *data])


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
