"""safetensors files: read without trust, written the same for the same tensors.

The header, and what is checked of it, is in header.py. Tensors are views of a private memory map. Knows bytes and
tensors; nothing of adapters.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.core.adapter import all_finite
from veneer.errors import AdapterError
from veneer.files.atomic import atomic_write
from veneer.files.header import (
    MAX_TENSORS,
    PICKLE_FIX,
    PICKLE_SUFFIXES,
    Entry,
    Header,
    checked_header,
    name_problem,
    opened,
    read_header,
    strict_json,
)

__all__ = [
    "MAX_TENSORS",
    "PICKLE_FIX",
    "PICKLE_SUFFIXES",
    "Entry",
    "Header",
    "check_finite",
    "encode_tensors",
    "name_problem",
    "read_header",
    "read_tensors",
    "strict_json",
    "write_tensors",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def read_tensors(path: str | Path, *, finite: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, sorted by name, as views of a private memory map (writing to one never reaches the file), and the
    metadata. With `finite`, NaN and infinity anywhere is an AdapterError that lists every such tensor."""
    path = Path(path)
    try:
        with opened(path) as file:
            header = checked_header(file.fileno(), path)
            mapped = mmap.mmap(file.fileno(), header.size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=str(path)) from None
    tensors = {name: _view(mapped, header.data_start, entry) for name, entry in sorted(header.entries.items())}
    if finite:
        check_finite(tensors, where=str(path))
    return tensors, header.metadata


def _view(mapped: mmap.mmap, data_start: int, entry: Entry) -> Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    begin = data_start + entry.begin
    count = (entry.end - entry.begin) // entry.dtype.itemsize
    if begin % entry.dtype.itemsize:
        copy = bytearray(mapped[begin : data_start + entry.end])
        return torch.frombuffer(copy, dtype=entry.dtype, count=count).view(entry.shape)
    return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=begin).view(entry.shape)


def check_finite(tensors: Mapping[str, Tensor], *, where: str | None = None) -> None:
    """AdapterError that lists every tensor holding NaN or infinity, with its shape and how many."""
    bad = []
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()) or all_finite(tensor):
            continue
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32)
        count = int((~torch.isfinite(wide)).sum())
        bad.append(f"    {name} {tuple(tensor.shape)}: {count:,} of {tensor.numel():,} values")
    if bad:
        raise AdapterError(
            f"{len(bad)} tensor(s) hold NaN or infinity:\n" + "\n".join(bad),
            where=where,
            fix="the run that wrote them diverged; take an earlier checkpoint",
        )


def encode_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """The file as chunks. Equal tensors give equal bytes: widest dtype first (which keeps all aligned), then by name.

    AdapterError for a name or dtype that a reader would refuse."""
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    table: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {}).items()))} if metadata else {}
    chunks: list[bytes | memoryview] = []
    at, problems = 0, []
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        if (problem := name_problem(name)) or flat.dtype not in NAMES or name == "__metadata__":
            problems.append(f"    {name[:80]!r}: {problem or f'dtype {flat.dtype} or name cannot be stored'}")
            continue
        end = at + flat.numel() * flat.dtype.itemsize
        table[name] = {"dtype": NAMES[flat.dtype], "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        if flat.numel():
            chunks.append(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        at = end
    if problems:
        raise AdapterError("tensors that safetensors cannot hold:\n" + "\n".join(problems))
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return [struct.pack("<Q", len(header)), header, *chunks]


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; see `encode_tensors` and `atomic_write`."""
    atomic_write(path, encode_tensors(tensors, metadata))
