"""Protobuf messages of Tinker's SDK (docs/notes/tinker.md).

    head = read_head(body)                     ForwardHead: model, request number, memory needed to unpack
    request = read_forward(body)               ForwardRequest: also rows and loss
    forward_bytes(logprobs, loss)              result of a forward request
    sample_bytes(samples, …)                   result of a sampling request

`protobuf` reads and writes the messages in `_MESSAGES`. A request's fields are counted before the request is
unpacked, because an empty row takes 2 bytes in the message but 500 in memory. Unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from veneer.serve.request import Refused, invalid

Array = np.ndarray[Any, np.dtype[Any]]

_NUMPY = {1: "<f4", 2: "<i8", 3: "<i4"}
_FLOAT = 1
_LARGEST = 1 << 28
"""Maximum size of a request's unpacked tensors, in bytes.

Needed because sparse tensors can be much larger unpacked than in the message."""
_FIELDS = 1 << 18
"""Maximum number of fields in a request, including nested messages."""
_ROW, _COPIES = 512, 3
"""Bytes of memory charged per row; number of copies of each tensor that the checks need."""


@dataclass(frozen=True, eq=False)
class WireRow:
    """A row of a request.

    tokens: (n,) input ids.
    inputs: the loss's tensors by name.
    text_only: whether all of the input is text."""

    tokens: Array
    inputs: Mapping[str, Array]
    text_only: bool = True


@dataclass(frozen=True, eq=False)
class ForwardRequest:
    """A forward request.

    seq: number of the request among the client's requests, from 1.
    options: options of the loss."""

    model: str
    seq: int
    rows: Sequence[WireRow]
    loss: str
    options: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False


@dataclass(frozen=True)
class ForwardHead:
    """The facts about a request that can be read without creating tensors.

    tokens: number of tokens in all rows.
    memory: bytes needed to unpack and check the request."""

    model: str
    seq: int
    tokens: int
    memory: int


def read_head(body: bytes) -> ForwardHead:
    """Return a request's model, number and sizes, without creating tensors.

    Raises Refused: 413 if the tensors or fields exceed a limit, 400 if the body is not a forward_backward
    message."""
    return _head(_parsed(body))


def read_forward(body: bytes) -> ForwardRequest:
    """Return a whole request.

    Raises Refused as `read_head` does, before any tensor is created."""
    message = _parsed(body)
    _head(message)
    values = {entry.name: entry.value for entry in message.options}
    options = {name: each.text if each.HasField("text") else each.number for name, each in values.items()}
    try:
        rows = [_row(row) for row in message.rows]
    except ValueError as error:
        raise _no_request(error) from error
    return ForwardRequest(message.model, message.seq, rows, message.loss, options, message.only)


def _parsed(body: bytes) -> Any:
    try:
        if _count_fields(memoryview(body), _NESTED, _FIELDS) < 0:
            raise _too_large(f"{_FIELDS:,} fields")
        return _Forward.FromString(body)
    except (DecodeError, IndexError) as error:
        raise _no_request(error) from error


def _no_request(error: Exception) -> Refused:
    return invalid(f"the body is not a forward_backward request in protobuf: {error}")


def _head(message: Any) -> ForwardHead:
    tokens = sum(len(chunk.text.tokens) // 4 for row in message.rows for chunk in row.chunks)
    size = 0
    for row in message.rows:
        for entry in row.inputs:
            size += _tensor_bytes(entry.tensor)
            if size > _LARGEST:
                raise _too_large(f"{_LARGEST:,} bytes of tensors")
    return ForwardHead(message.model, message.seq, tokens, _COPIES * (size + 8 * tokens) + _ROW * len(message.rows))


def _too_large(most: str) -> Refused:
    message, fix = f"the forward_backward request has more than {most}", "send fewer rows per request"
    return Refused(message, status=413, code="too_large", param="data", fix=fix)


def _tensor_bytes(tensor: Any) -> int:
    """Return the number of bytes that `_tensor` would allocate for a tensor."""
    if not tensor.HasField("sparse"):
        return len(tensor.dense)
    if tensor.kind not in _NUMPY or len(tensor.shape) != 2 or min(tensor.shape) < 0:
        raise _no_request(ValueError("a sparse tensor needs a known kind and two sizes"))
    return int(tensor.shape[0] * tensor.shape[1] * np.dtype(_NUMPY[tensor.kind]).itemsize)


def _row(row: Any) -> WireRow:
    text_only = all(chunk.HasField("text") for chunk in row.chunks)
    tokens = np.frombuffer(b"".join(chunk.text.tokens for chunk in row.chunks), "<i4").astype(np.int64)
    return WireRow(tokens, {entry.name: _tensor(entry.tensor) for entry in row.inputs}, text_only)


def _tensor(tensor: Any) -> Array:
    """Return a message's tensor, dense or sparse (CSR), as an array. Raises ValueError."""
    if tensor.kind not in _NUMPY:
        raise ValueError(f"unknown tensor kind {tensor.kind}")
    shape, sparse = list(tensor.shape), tensor.sparse
    if not tensor.HasField("sparse"):
        flat = np.frombuffer(tensor.dense, _NUMPY[tensor.kind])
        return flat.reshape(shape) if shape else flat
    values = np.frombuffer(sparse.values, _NUMPY[tensor.kind])
    starts, columns = np.frombuffer(sparse.starts, "<i8"), np.frombuffer(sparse.columns, "<i8")
    rows, width = shape
    counts = np.diff(starts)
    valid = len(counts) == rows and counts.sum() == len(values) == len(columns)
    if not valid or min(counts, default=0) < 0 or (len(columns) and not 0 <= columns.min() <= columns.max() < width):
        raise ValueError("a sparse tensor with inconsistent rows")
    out = np.zeros((rows, width), values.dtype)
    out[np.repeat(np.arange(rows), counts), columns] = values
    return out


# -- responses ---------------------------------------------------------------------------------------------------------


def forward_bytes(logprobs: Sequence[Array], loss: float) -> bytes:
    """Return the result of a forward request as bytes.

    logprobs: the log-probabilities of each row, float32. Consecutive rows share a record if their shapes
        differ at most in the first dimension."""
    message = _Outputs(kind="ArrayRecord")
    for shape, group in groupby(logprobs, key=lambda row: row.shape[1:]):
        rows = [np.ascontiguousarray(row, "<f4") for row in group]
        batch = message.records.add(kind="ArrayRecord", count=len(rows)).arrays.add(name="logprobs").batch
        batch.data, batch.kind = b"".join(row.tobytes() for row in rows), _FLOAT
        batch.offsets = np.cumsum([0, *(row.nbytes for row in rows)], dtype="<i8").tobytes()
        batch.shape.extend(shape)
    message.metrics.add(name="loss:sum", value=loss)
    return bytes(message.SerializeToString())


Sample = tuple[Sequence[tuple[int, float]], bool]
"""(id and log-probability of each token, whether a stop token or stop text ended the sample)"""


def sample_bytes(samples: Sequence[Sample], *, prompt: Sequence[float | None] | None = None, cached: int = 0) -> bytes:
    """Return the result of a sampling request as bytes.

    `prompt`: log-probability of each token of the prompt; None for a token without a log-probability."""
    message = _Samples(cached=cached)
    for tokens, stopped in samples:
        sequence = message.sequences.add(stop=0 if stopped else 1)
        sequence.tokens = np.array([id for id, _ in tokens], "<i4").tobytes()
        sequence.logprobs = np.array([logprob for _, logprob in tokens], "<f4").tobytes()
    if prompt is not None:
        message.prompt = np.array([np.nan if p is None else p for p in prompt], "<f4").tobytes()
    return bytes(message.SerializeToString())


# -- the format --------------------------------------------------------------------------------------------------------

_MESSAGES = {
    "Text": ["bytes tokens"],
    "Chunk": ["Text text"],
    "Sparse": ["bytes values", "bytes starts", "bytes columns"],
    "Tensor": ["bytes dense", "Sparse sparse", "int kind", "ints shape"],
    "Input": ["string name", "Tensor tensor"],
    "Row": ["Chunk* chunks", "Input* inputs"],
    "Number": ["string name", "double value"],
    "Value": ["double number", "string text"],
    "Option": ["string name", "Value value"],
    "Forward": ["string model", "int seq", "Row* rows", "string loss", "Number* old_options", "bool only",
                "Option* options"],
    "Batch": ["bytes data", "bytes offsets", "int kind", "ints shape"],
    "Named": ["string name", "Batch batch"],
    "Record": ["string kind", "Named* arrays", "int count"],
    "Outputs": ["string kind", "Record* records", "Number* metrics"],
    "Sequence": ["int stop", "bytes tokens", "bytes logprobs"],
    "Samples": ["Sequence* sequences", "bytes prompt", "bytes top_prompt", "int cached"],
}  # fmt: skip
"""The fields of each message, numbered from 1. `ints` and types with `*` are repeated."""
_NESTED = {3: {1: {1: {}}, 2: {2: {2: {}}}}, 5: {}, 7: {2: {}}}
"""The nested messages of a request, by field number."""


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="tinker.proto", package="tinker", syntax="proto2")
    scalars = {"bytes": 12, "string": 9, "int": 3, "ints": 3, "double": 1, "bool": 8}  # FieldDescriptorProto.Type
    for message, fields in _MESSAGES.items():
        descriptor = DescriptorProto(name=message)
        for number, field_ in enumerate(fields, 1):
            kind, name = field_.split()
            repeated = kind.endswith("*") or kind == "ints"
            entry = descriptor.field.add(name=name, number=number, label=3 if repeated else 1)
            if kind in scalars:
                entry.type = scalars[kind]
                entry.options.packed = kind == "ints"
            else:
                entry.type, entry.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".tinker.{kind.rstrip('*')}"
            if name == "kind" and kind == "int":
                entry.default_value = str(_FLOAT)
        file.message_type.append(descriptor)
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"tinker.{name}")) for name in _MESSAGES}


_Forward, _Outputs, _Samples = (_classes()[name] for name in ("Forward", "Outputs", "Samples"))


def _count_fields(data: memoryview, nested: Mapping[int, Any], most: int) -> int:
    """Return `most` minus a message's number of fields, including nested messages.

    Stops reading once the result is below 0. Raises IndexError if the bytes end within a field."""
    at = 0
    while at < len(data) and most >= 0:
        most -= 1
        key, at = _varint(data, at)
        size, number = {1: 8, 5: 4}.get(key & 7, 0), key >> 3
        if key & 7 in (0, 2):
            value, at = _varint(data, at)
            size = value if key & 7 == 2 else 0
        if key & 7 == 2 and number in nested:
            most = _count_fields(data[at : at + size], nested[number], most)
        at += size
    return most


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
    return value, at
