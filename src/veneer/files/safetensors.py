"""Read untrusted safetensors files with checks, and write reproducible files.

    file   = header length (u64, little endian) | header (JSON, UTF-8) | data
    header = {"__metadata__": {str: str},
              name: {"dtype": str, "shape": [int…], "data_offsets": [begin, end)}, …}

The whole header is checked against the file's size before any tensor data is read. A hostile file therefore
costs no more than reading its header, and the size of a header is limited. torch is imported only to create
tensors, so that a header can be read without torch. This module works on bytes and tensors, and does not
depend on adapters or models.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from veneer.errors import AdapterError, UnsafeFileError, bullets
from veneer.files.atomic import atomic_write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAX_HEADER_BYTES = 100 << 20
MAX_TENSORS = 500_000
"""Maximum number of tensors in a file. An adapter with pairs on every expert of the largest mixture-of-experts
models (384 experts, 61 layers, with alphas) has about half as many."""
MAX_METADATA, MAX_METADATA_BYTES = 10_000, 32 << 20
"""Maximum number of metadata entries, and maximum bytes of their JSON. Training statistics and a thumbnail
take a few MB."""
_MAX_NAME_LENGTH = 1024
_MAX_DIMENSIONS = 16
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_ENTRY = _MAX_NAME_LENGTH + 512
"""Approximate maximum bytes of JSON for one tensor."""

STORED_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
"""Dtype name in the file -> dtype name in torch, for dtypes that can be read as tensors."""
NAMES = {name: kind for kind, name in STORED_DTYPES.items()}
BITS = {kind: 8 if kind == "BOOL" else int(re.search(r"\d+", kind)[0]) for kind in STORED_DTYPES}  # type: ignore[index]
"""Dtype name in the file -> bits per value, for dtypes that can be read as tensors."""

_OTHER_MAGIC = {
    b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"RIFF": "a WebP picture, or other media",
    b"\x1f\x8b": "a gzip archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive", b"\x89HDF": "an HDF5 file",
}  # fmt: skip
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
PICKLE_FIX = (
    "ask for the safetensors file; or, for a single adapter file, use `--from-pickle` (in Python "
    "`from_pickle=True`): torch's weights-only loader builds its tensors and runs none of its code"
)


@dataclass(frozen=True)
class HeaderEntry:
    """The header's entry for one tensor, whose bytes are [begin, end) of the data."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, STORED_DTYPES[self.kind])
        return dtype


@dataclass(frozen=True)
class Header:
    """A checked header.

    `data_start`: offset of the data in the file."""

    entries: dict[str, HeaderEntry]
    metadata: dict[str, str]
    data_start: int
    size: int


def strict_json(text: str | bytes, *, where: str) -> Any:
    """Return parsed JSON.

    Raises AdapterError for invalid JSON, duplicate keys, NaN, Infinity or deep nesting."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in items:
            if key in out:
                raise ValueError(f"the key {key!r} appears twice")
            out[key] = value
        return out

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise AdapterError(f"not valid JSON: {error}", where=where) from None


def read_header(path: str | Path, *, bits: Mapping[str, int] = BITS) -> Header:
    """Return the checked header of a safetensors file, without reading its data.

    bits: the allowed dtypes, and the bits per value of each.

    Raises AdapterError for a file of another kind; UnsafeFileError for a pickle or an inconsistent header."""
    path = Path(path)
    try:
        with _opened(path) as file:
            return _checked(file, path, bits)
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=str(path)) from None


def _opened(path: Path) -> BinaryIO:
    """Return an open regular file.

    Raises AdapterError for a folder, for a pipe, which could block forever, and for a device, which can be
    endless."""
    if path.exists() and not path.is_file():
        raise AdapterError("cannot read it: not a file, but a folder, a pipe or a device", where=str(path))
    return path.open("rb")


def _checked(file: BinaryIO, path: Path, bits: Mapping[str, int] = BITS) -> Header:
    """Return the checked header of an open file, as `read_header` does."""
    where = str(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        problem = f"{path.suffix} files are pickles, and loading a pickle runs whatever code is in it"
        raise UnsafeFileError(problem, where=where, fix=PICKLE_FIX)
    size = os.fstat(file.fileno()).st_size
    start = file.read(512)
    _refuse_other_formats(start, size, where)
    (length,) = struct.unpack("<Q", start[:8])
    if length > size - 8:
        problem = f"the header claims {length:,} bytes, but only {size - 8:,} follow: the file is truncated or damaged"
        raise UnsafeFileError(problem, where=where, fix="download or copy the file again")
    if length > _MAX_HEADER_BYTES:
        raise UnsafeFileError(f"the header claims {length:,} bytes; the limit is {_MAX_HEADER_BYTES:,}", where=where)
    file.seek(8)
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise UnsafeFileError("the header does not start with '{': not a safetensors file", where=where)
    _check_counts(raw, where)
    try:
        table = strict_json(raw, where=where)
    except AdapterError as error:
        raise UnsafeFileError(f"the header is {error.what}", where=where) from None
    return _check_table(table, bits, data_start=8 + length, size=size, where=where)


def _check_counts(raw: bytes, where: str) -> None:
    """Raise UnsafeFileError for too many entries, without parsing the JSON.

    Parsing could take minutes and gigabytes. Keys are counted as quotes followed by a colon; quotes inside a
    text (JSON in metadata) are escaped and not counted."""
    keys = raw.count(b'":') - raw.count(b'\\":')
    tensors = raw.count(b'"data_offsets"')
    if tensors > MAX_TENSORS:
        problem = f"the header lists {tensors:,} tensors; at most {MAX_TENSORS:,} are read"
        raise UnsafeFileError(problem, where=where, fix="adapters have fewer; give the adapter's own file")
    if keys - 4 * tensors > MAX_METADATA + 1:
        problem = (
            f"the header has {keys - 4 * tensors:,} entries that are not tensors; at most {MAX_METADATA:,} are read"
        )
        raise UnsafeFileError(problem, where=where, fix="write the file again without them")
    if len(raw) - tensors * _LONGEST_ENTRY > MAX_METADATA_BYTES:
        raise UnsafeFileError(
            f"the header has {len(raw):,} bytes for {tensors:,} tensors; at most {MAX_METADATA_BYTES:,} bytes of "
            "metadata are read",
            where=where,
        )


def _refuse_other_formats(start: bytes, size: int, where: str) -> None:
    """Raise an error that names the format of a file in another known format."""
    if size == 0:
        raise AdapterError("the file is empty", where=where, fix="download or copy the file again")
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        fix = "run `git lfs install` and `git lfs pull` in the repository, or download the file itself"
        raise AdapterError("the file is a Git LFS pointer, not the tensors it points to", where=where, fix=fix)
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise AdapterError(
            "the file is a web page, not tensors: the page about the file, or a log-in page, was downloaded instead",
            where=where,
            fix="download the raw file (on a hub: the `resolve` address, not `blob`) and check that you may access it",
        )
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        problem = "the file is a zip archive, as torch.save writes pickles; loading one runs whatever code is in it"
        raise UnsafeFileError(problem, where=where, fix=PICKLE_FIX)
    if len(start) >= 2 and start[0] == 0x80 and start[1] in range(2, 6) and start[2:8] != b"\0" * 6:
        raise UnsafeFileError(
            "the file is a pickle, and loading a pickle runs whatever code is in it", where=where, fix=PICKLE_FIX
        )
    if start.startswith(b"GGUF"):
        raise AdapterError("the file is GGUF, not safetensors", where=where, fix="rename the file to end in .gguf")
    if other_format := next((label for magic, label in _OTHER_MAGIC.items() if start.startswith(magic)), None):
        raise AdapterError(
            f"the file is {other_format}, not tensors", where=where, fix="give the file of the adapter itself"
        )
    if size < 10:
        raise UnsafeFileError(f"only {size} bytes: too short for a safetensors file", where=where)
    if all(32 <= b < 127 for b in start[:8]):
        text = start[:60].decode("ascii", "replace")
        raise AdapterError(f"the file is text, not tensors; it starts with {text!r}", where=where)


def _check_table(table: Any, bits: Mapping[str, int], *, data_start: int, size: int, where: str) -> Header:
    if not isinstance(table, dict):
        raise UnsafeFileError("the header is not a JSON object", where=where)
    metadata = table.pop("__metadata__", {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append("__metadata__ must map strings to strings")
        metadata = {}
    if len(metadata) > MAX_METADATA or sum(map(len, metadata.values())) > MAX_METADATA_BYTES:
        problems.append(f"__metadata__ has more than {MAX_METADATA:,} entries, or {MAX_METADATA_BYTES:,} characters")
    entries: dict[str, HeaderEntry] = {}
    for name, value in table.items():
        problem = name_problem(name)
        entry = None if problem else _entry(value, bits)
        if isinstance(entry, HeaderEntry):
            entries[name] = entry
        else:
            problems.append(f"{name[:80]!r}: {problem or entry}")
    problems += _coverage_problems(entries, size - data_start) if not problems else []
    if problems:
        message = f"the header is inconsistent, so the file was not read:\n{bullets(problems)}"
        fix = "download or copy the file again; if that does not help, the file was written incorrectly"
        raise UnsafeFileError(message, where=where, fix=fix)
    return Header(entries, metadata, data_start, size)


def name_problem(name: str) -> str | None:
    """Return why `name` is invalid for a tensor, or None if valid."""
    if not name or len(name) > _MAX_NAME_LENGTH:
        return f"a tensor's name has 1 to {_MAX_NAME_LENGTH} characters"
    if _CONTROL.search(name):
        return "control characters in a name"
    if "/" in name or "\\" in name or ".." in name or name.startswith(".") or name.endswith("."):
        return "a name that looks like a path"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "a name that is not Unicode text"
    return None


def _entry(value: Any, bits: Mapping[str, int]) -> HeaderEntry | str:
    """Return the parsed entry, or an error message."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "expected exactly dtype, shape and data_offsets"
    kind = value["dtype"]
    if not isinstance(kind, str) or kind not in bits:
        return f"dtype {str(kind)[:40]!r} is not one of {', '.join(bits)}"
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        return f"shape {str(shape)[:60]} is not a list of at most {_MAX_DIMENSIONS} sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {str(offsets)[:60]} is not [begin, end]"
    if math.prod(n for n in shape if n) >= 1 << 60:
        return f"shape {str(shape)[:60]} is absurd"
    want = math.prod(shape) * bits[kind] // 8
    if want != offsets[1] - offsets[0]:
        return (
            f"shape {shape} of {value['dtype']} needs {want:,} bytes, but data_offsets give {offsets[1] - offsets[0]:,}"
        )
    return HeaderEntry(kind, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 60 for n in value)


def _coverage_problems(entries: Mapping[str, HeaderEntry], size: int) -> list[str]:
    """Return errors unless the tensors cover the data exactly, without overlaps or gaps."""
    at, last = 0, "the start"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < at:
            return [f"{name!r} begins at byte {entry.begin:,}, inside {last!r} which ends at {at:,}"]
        if entry.begin > at:
            return [f"a hole of {entry.begin - at:,} bytes before {name!r}"]
        at, last = entry.end, name
    if at > size:
        return [f"the tensors need {at:,} bytes of data, but the file has only {size:,}: truncated"]
    if at < size:
        return [f"{size - at:,} bytes after the last tensor belong to no tensor"]
    return []


def map_file(path: str | Path) -> tuple[Header, mmap.mmap]:
    """Return the checked header, and a private memory map of the file.

    Raises the errors of `read_header`."""
    path = Path(path)
    try:
        with _opened(path) as file:
            header = _checked(file, path)
            return header, mmap.mmap(file.fileno(), header.size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=str(path)) from None


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors, sorted by name, and the metadata.

    The tensors are views of a private memory map; writing to them does not change the file. Raises the errors
    of `read_header`."""
    header, mapped = map_file(path)
    tensors = {name: _view(mapped, header.data_start, entry) for name, entry in sorted(header.entries.items())}
    return tensors, header.metadata


def _view(mapped: mmap.mmap, data_start: int, entry: HeaderEntry) -> Tensor:
    import torch

    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    begin = data_start + entry.begin
    count = (entry.end - entry.begin) // entry.dtype.itemsize
    if begin % entry.dtype.itemsize:
        copy = bytearray(mapped[begin : data_start + entry.end])
        return torch.frombuffer(copy, dtype=entry.dtype, count=count).view(entry.shape)
    return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=begin).view(entry.shape)


def encode_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """Return a safetensors file as chunks; equal tensors give equal bytes.

    Tensors are ordered by dtype, widest first (which keeps all tensors aligned), then by name. Raises
    AdapterError for a name or dtype that a reader would refuse."""
    import torch

    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    table: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {}).items()))} if metadata else {}
    chunks: list[bytes | memoryview] = []
    at, problems = 0, []
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        if (
            (problem := name_problem(name))
            or (kind := NAMES.get(str(flat.dtype)[6:])) is None
            or name == "__metadata__"
        ):
            problems.append(f"{name[:80]!r}: {problem or f'dtype {flat.dtype} or name cannot be stored'}")
            continue
        end = at + flat.numel() * flat.dtype.itemsize
        table[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        if flat.numel():
            chunks.append(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        at = end
    if problems:
        raise AdapterError(f"tensors that safetensors cannot hold:\n{bullets(problems, None)}")
    header = packed_header(table)
    return [struct.pack("<Q", len(header)), header, *chunks]


def packed_header(table: Mapping[str, Any]) -> bytes:
    """Return a header's JSON, padded with spaces to a multiple of 8 bytes.

    The length field is not included."""
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; see `encode_tensors` and `atomic_write`."""
    atomic_write(path, encode_tensors(tensors, metadata))
