"""A tiny base, a Tinker service with it, and requests in the SDK's format."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from tests.tiny_base import tiny_base_dir
from veneer.jobs.tinker.service import TinkerService, TrainingRun
from veneer.library.library import open_library
from veneer.models.text.base import TextBase, load_text

ROWS = [[5 + (7 * i + 3 * j) % 300 for j in range(12 + i)] for i in range(3)]


@cache
def small_base() -> TextBase:
    return load_text(str(tiny_base_dir(Path(mkdtemp()))), dtype="float32", device="cpu")


@contextmanager
def small_service(folder: Path, **how: Any) -> Iterator[TinkerService]:
    with open_library(folder / "library") as library:
        service = TinkerService(small_base(), library, folder / "tinker", **how)
        try:
            yield service
        finally:
            service.close()


def result(service: TinkerService, run: TrainingRun, seq: int, kind: str, body: bytes) -> Any:
    """Submit a request and return its result."""
    return service.submit(run, seq, kind, body).result(300)  # the first request can take long to compile kernels


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def part(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(values: Any) -> bytes:
    array = np.array(values)
    kind = 2 if array.dtype.kind == "i" else 1
    data = array.astype("<i8" if kind == 2 else "<f4").tobytes()
    return part(1, data) + b"\x18" + varint(kind) + part(4, b"".join(varint(n) for n in array.shape))


def forward_body(
    model: str,
    seq: int,
    rows: Sequence[Sequence[int]],
    loss: str = "cross_entropy",
    only: bool = False,
    options: dict[str, float] | None = None,
    **inputs: Any,
) -> bytes:
    """Return a forward request.

    `inputs`: functions of a row's targets; default: `weights` of 1."""
    made = part(1, model.encode()) + b"\x10" + varint(seq)
    given = inputs or {"weights": lambda targets: [1.0] * len(targets)}
    for row in rows:
        tokens, targets = list(row[:-1]), list(row[1:])
        one = part(1, part(1, part(1, np.array(tokens, "<i4").tobytes())))
        for name, value in {"target_tokens": lambda targets: targets, **given}.items():
            one += part(2, part(1, name.encode()) + part(2, tensor(value(targets))))
        made += part(3, one)
    made += part(4, loss.encode()) + b"\x30" + varint(only)
    for name, number in (options or {}).items():
        made += part(7, part(1, name.encode()) + part(2, b"\x09" + struct.pack("<d", number)))
    return made


def fields(data: bytes) -> list[tuple[int, Any]]:
    """Return (number, raw value) for each field of a protobuf message."""
    found, at = [], 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            found.append((key >> 3, number()))
            continue
        size = number() if key & 7 == 2 else 8 if key & 7 == 1 else 4
        found.append((key >> 3, data[at : at + size]))
        at += size
    return found


def read_output(data: bytes) -> tuple[list[list[float]], dict[str, float]]:
    """Return the log-probabilities of each row, and the metrics."""
    logps: list[list[float]] = []
    metrics: dict[str, float] = {}
    for number, value in fields(data):
        if number == 2:
            batched = dict(fields(dict(fields(dict(fields(value))[2]))[2]))
            flat = np.frombuffer(batched[1], "<f4")
            ends = np.frombuffer(batched[2], "<i8") // 4
            logps += [flat[a:b].tolist() for a, b in pairwise(ends)]
        elif number == 3:
            entry = dict(fields(value))
            metrics[entry[1].decode()] = struct.unpack("<d", entry[2])[0]
    return logps, metrics
