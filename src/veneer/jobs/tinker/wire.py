"""What Tinker's SDK sends and expects as protobuf (docs/notes/tinker.md): rows in, log-probabilities and samples out.

    head = read_head(body)                     ForwardHead: model, request number, memory needed to unpack
    asked = read_forward(body)                 ForwardAsked: also rows and loss
    forward_bytes(outputs, metrics)            what its future gives back
    sample_bytes(sequences, …)                 that of a sampling future

A message is a sequence of (field number, value); only what is used here of the format is here: numbers of variable
length, of 4 and 8 bytes, and bytes. Unknown fields are left out, as every reader of the format does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from veneer.serve.request import Refused, invalid

Array = np.ndarray[Any, np.dtype[Any]]

_NUMPY = {1: "<f4", 2: "<i8", 3: "<i4"}
_FLOAT = 1
_LARGEST = 1 << 28
"""Bytes of tensors in one request: those that are mostly zeros take next to nothing on the wire."""
_FIELDS = 1 << 18
"""Most fields of a message, counting nested messages: an empty row has 2 bytes on the wire but 500 in memory."""
_ROW, _COPIES = 512, 3
"""Bytes of memory per row besides its tensors; number of copies of the tensors during the checks."""
_SIZES = 64
"""Most bytes of a tensor's packed shape."""
_ABSENT = -99999.0
"""The log-probability of a token that is not there, in a table of the most likely ones."""


@dataclass(frozen=True, eq=False)
class WireRow:
    """`tokens`: (n,) of the input. `inputs`: the loss's tensors by name. `other`: what the input has beside text."""

    tokens: Array
    inputs: Mapping[str, Array]
    other: str = ""


@dataclass(frozen=True, eq=False)
class ForwardAsked:
    """`seq`: the number of the request among all that its client sends, from 1. `options`: of the loss."""

    model: str
    seq: int
    rows: Sequence[WireRow]
    loss: str
    options: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False


@dataclass(frozen=True)
class ForwardHead:
    """The part of a request that can be read without creating tensors. `tokens`: of all rows. `memory`: bytes needed to
    unpack and check the request."""

    model: str
    seq: int
    tokens: int
    memory: int


def read_head(body: bytes) -> ForwardHead:
    """Read a request's sizes without creating tensors. Raises Refused: 413 for tensors or fields over a limit, 400 for
    bytes that are not a forward_backward message."""
    with _wire_errors():
        return _head(memoryview(body))


def read_forward(body: bytes) -> ForwardAsked:
    """Read a whole request. Raises Refused like `read_head`, before any tensor is created."""
    read_head(body)
    with _wire_errors():
        return _forward(memoryview(body))


@contextmanager
def _wire_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError, struct.error) as error:
        raise invalid(f"the body is no forward_backward request in protobuf: {error}") from error


def _head(body: memoryview) -> ForwardHead:
    spent = count(1)

    def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
        for field_ in _fields(data):
            if next(spent) > _FIELDS:
                raise _too_large(f"{_FIELDS:,} fields")
            yield field_

    model, seq, tokens, rows, size = "", 0, 0, 0, 0
    for number, value in fields(body):
        if number == 1:
            model = _text(value)
        elif number == 2:
            seq = int(value)
        elif number == 3:
            rows += 1
            for part, inner in fields(value):
                if part == 1:
                    packed = [dict(fields(chunk)).get(1, b"") for kind, chunk in fields(inner) if kind == 1]
                    tokens += sum(len(each) // 4 for each in packed)
                elif part == 2:
                    size += _tensor_bytes(dict(fields(inner)).get(2, memoryview(b"")), fields)
                if size > _LARGEST:
                    raise _too_large(f"{_LARGEST:,} bytes of tensors")
    return ForwardHead(model, seq, tokens, _COPIES * (size + 8 * tokens) + _ROW * rows)


def _too_large(most: str) -> Refused:
    return Refused(
        f"the forward_backward request has more than {most}",
        status=413,
        code="too_large",
        param="data",
        fix="send fewer rows per request",
    )


def _tensor_bytes(data: memoryview, fields: Callable[[memoryview], Iterator[tuple[int, Any]]]) -> int:
    """Return the number of bytes that `_tensor` would allocate."""
    found = list(fields(data))
    kind = dict(found).get(3, _FLOAT)
    if all(number != 2 for number, _ in found):
        return sum(len(value) for number, value in found if number == 1)
    rows, width = [n for number, value in found if number == 4 for n in _sizes(value)]
    return int(rows * width * np.dtype(_NUMPY[kind]).itemsize)


def _forward(body: memoryview) -> ForwardAsked:
    model, loss, seq, only = "", "", 0, False
    rows: list[WireRow] = []
    old: dict[str, float | str] = {}
    options: dict[str, float | str] = {}
    for number, value in _fields(body):
        if number == 1:
            model = _text(value)
        elif number == 2:
            seq = int(value)
        elif number == 3:
            rows.append(_row(value))
        elif number == 4:
            loss = _text(value)
        elif number == 5:
            entry = dict(_fields(value))
            old[_text(entry[1])] = _double(entry.get(2, b"\0" * 8))
        elif number == 6:
            only = bool(value)
        elif number == 7:
            entry = dict(_fields(value))
            given = dict(_fields(entry.get(2, memoryview(b""))))
            options[_text(entry[1])] = _text(given[2]) if 2 in given else _double(given.get(1, b"\0" * 8))
    return ForwardAsked(model, seq, rows, loss, options or old, only)


def _row(data: memoryview) -> WireRow:
    tokens: list[Array] = []
    inputs: dict[str, Array] = {}
    other = ""
    for number, value in _fields(data):
        if number == 1:
            for kind, chunk in _fields(value):
                if kind == 1:
                    packed = dict(_fields(chunk)).get(1, b"")
                    tokens.append(np.frombuffer(packed, "<i4").astype(np.int64))
                else:
                    other = {2: "a picture", 3: "sound"}.get(kind, "something that is no text")
        elif number == 2:
            entry = dict(_fields(value))
            inputs[_text(entry[1])] = _tensor(entry.get(2, memoryview(b"")))
    return WireRow(np.concatenate(tokens) if tokens else np.empty(0, np.int64), inputs, other)


def _tensor(data: memoryview) -> Array:
    """Dense, or in compressed rows whose other values are 0."""
    dense: Any = b""
    sparse: dict[int, Any] | None = None
    kind = _FLOAT
    shape: list[int] = []
    for number, value in _fields(data):
        if number == 1:
            dense = value
        elif number == 2:
            sparse = dict(_fields(value))
        elif number == 3:
            kind = value
        elif number == 4:
            shape += _sizes(value)
    if kind not in _NUMPY:
        raise ValueError(f"a tensor of the kind {kind}")
    if sparse is None:
        flat = np.frombuffer(dense, _NUMPY[kind])
        return flat.reshape(shape) if shape else flat
    values = np.frombuffer(sparse.get(1, b""), _NUMPY[kind])
    starts, columns = np.frombuffer(sparse.get(2, b""), "<i8"), np.frombuffer(sparse.get(3, b""), "<i8")
    rows, width = shape
    counts = np.diff(starts)
    whole = len(counts) == rows and counts.sum() == len(values) == len(columns)
    if not whole:
        raise ValueError("a sparse tensor whose rows do not fit together")
    out = np.zeros((rows, width), values.dtype)
    out[np.repeat(np.arange(rows), counts), columns] = values
    return out


# -- answers -----------------------------------------------------------------------------------------------------------


def forward_bytes(outputs: Sequence[Mapping[str, Array]], metrics: Mapping[str, float]) -> bytes:
    """`outputs`: of each row, float32; a name's tensors share all but their first size. Rows whose do not are apart."""
    made = _part(1, b"ArrayRecord")
    at = 0
    while at < len(outputs):
        kind = {name: value.shape[1:] for name, value in outputs[at].items()}
        end = at
        while end < len(outputs) and {name: value.shape[1:] for name, value in outputs[end].items()} == kind:
            end += 1
        made += _part(2, _record(outputs[at:end]))
        at = end
    for name, value in metrics.items():
        made += _part(3, _part(1, name.encode()) + b"\x11" + struct.pack("<d", value))
    return made


def _record(outputs: Sequence[Mapping[str, Array]]) -> bytes:
    made = _part(1, b"ArrayRecord")
    for name in outputs[0]:
        parts = [np.ascontiguousarray(row[name], "<f4") for row in outputs]
        offsets = np.cumsum([0, *(part.nbytes for part in parts)], dtype="<i8")
        batched = _part(1, b"".join(part.tobytes() for part in parts)) + _part(2, offsets.tobytes())
        batched += b"\x18" + _varint(_FLOAT)
        batched += _part(4, b"".join(map(_varint, parts[0].shape[1:]))) if parts[0].ndim > 1 else b""
        made += _part(2, _part(1, name.encode()) + _part(2, batched))
    return made + b"\x18" + _varint(len(outputs))


@dataclass(frozen=True, eq=False)
class WireSample:
    """`top`: (token, log p) of the most likely ones at each place, where they are asked for."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    stopped: bool
    top: Sequence[Sequence[tuple[int, float]]] | None = None


def sample_bytes(
    samples: Sequence[WireSample],
    *,
    prompt: Sequence[float | None] | None = None,
    top_prompt: Sequence[Sequence[tuple[int, float]] | None] | None = None,
    top: int = 0,
    cached: int = 0,
) -> bytes:
    """`prompt`: log p of the prompt's tokens; None for those that have none. `top`: how many of the most likely tokens
    are in `top_prompt`, and at least in the samples' own."""
    made = b""
    for sample in samples:
        one = b"\x08" + _varint(0 if sample.stopped else 1)
        one += _part(2, np.array(sample.tokens, "<i4").tobytes())
        one += _part(3, np.array(sample.logprobs, "<f4").tobytes())
        if sample.top is not None:
            one += _part(4, _table(sample.top))
        made += _part(1, one)
    if prompt is not None:
        made += _part(2, np.array([np.nan if p is None else p for p in prompt], "<f4").tobytes())
    if top_prompt is not None and top:
        made += _part(3, _table(top_prompt))
    return made + b"\x20" + _varint(cached)


def _table(rows: Sequence[Sequence[tuple[int, float]] | None]) -> bytes:
    width = max((len(row) for row in rows if row), default=0)
    ids, logprobs = np.zeros((len(rows), width), "<i4"), np.full((len(rows), width), _ABSENT, "<f4")
    for i, row in enumerate(rows):
        for j, (token, logprob) in enumerate(row or ()):
            ids[i, j], logprobs[i, j] = token, logprob
    sizes = b"\x18" + _varint(width) + b"\x20" + _varint(len(rows))
    return _part(1, ids.tobytes()) + _part(2, logprobs.tobytes()) + sizes


# -- the format --------------------------------------------------------------------------------------------------------


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Each field's number, and its value: an integer, or bytes. Raises ValueError, IndexError."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _read_varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of the kind {kind}")
        if at + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[at : at + size]
        at += size


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number has no end")


def _sizes(value: memoryview | int) -> list[int]:
    """Return a tensor's shape from a packed or unpacked field."""
    if isinstance(value, int):
        return [value]
    if len(value) > _SIZES:
        raise ValueError("a tensor has too many dimensions")
    out, at = [], 0
    while at < len(value):
        size, at = _read_varint(value, at)
        out.append(size)
    return out


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _part(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _text(data: Any) -> str:
    if not isinstance(data, memoryview):  # bytes(n) are n zeros
        raise TypeError("a number where a text belongs")
    return bytes(data).decode()


def _double(data: Any) -> float:
    return float(struct.unpack("<d", data)[0])
