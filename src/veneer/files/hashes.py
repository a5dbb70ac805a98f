"""Compute and verify the hashes that identify an adapter file in managers and hubs.

| name    | hash of                                                  | length         | stored in the header as       |
| sha256  | the whole file                                           | 64 hex digits  |                               |
| AutoV2  | the whole file                                           | the first 10   |                               |
| AutoV3  | the bytes after the header: the tensors                  | the first 12   | sshs_model_hash, all 64       |
|         |                                                          |                | modelspec.hash_sha256, `0x…`  |
| legacy  | the 64 KiB after the first MiB, with metadata reduced to |                | sshs_legacy_hash, 8 digits    |
|         | the ss_ keys                                             |                |                               |
| short   | in A1111 and Forge: the header's sshs_model_hash,        | the first 12   |                               |
|         | unverified, else AutoV3, else sha256                     |                |                               |

Editing the metadata changes sha256 and AutoV2; the stored hashes stay valid. Sources: sd-scripts' train_util,
Stability's ModelSpec 1.0.1, CivitAI's open source. This module works on bytes, not on adapters.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import AdapterError
from veneer.files.safetensors import encode_tensors, packed_header, read_header

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = (0x100000, 0x110000)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Hashes:
    """The hashes of a file, in lower-case hexadecimal.

    `autov3` is "" unless the file is in safetensors format."""

    sha256: str
    autov2: str
    autov3: str


@dataclass(frozen=True)
class HashCheck:
    """A hash stored in a header, and the hash computed from the file."""

    key: str
    stored: str
    found: str
    holds: bool


def hashes(path: str | Path) -> Hashes:
    """Return all hashes of a file, reading the file once.

    Works for any kind of file; AutoV3 is only for safetensors files. Raises AdapterError if the file cannot
    be read."""
    path = Path(path)
    try:
        start = read_header(path).data_start
    except AdapterError:
        start = None
    digest, tensors, at = hashlib.sha256(), hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if start is not None:
                    tensors.update(chunk[max(0, start - at) :])
                at += len(chunk)
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=str(path)) from None
    sha = digest.hexdigest()
    return Hashes(sha, sha[:10], tensors.hexdigest()[:12] if start is not None else "")


def short_hash(path: str | Path, file_hashes: Hashes) -> str:
    """Return the hash by which A1111 and Forge list an adapter file in `Lora hashes`.

    Both tools also find files by this hash (extensions-builtin/Lora, NetworkOnDisk).

    file_hashes: the computed hashes, used if the header contains no valid hash."""
    try:
        stated = read_header(path).metadata.get("sshs_model_hash", "")
    except AdapterError:
        stated = ""
    return stated[:12] if re.fullmatch("[0-9a-f]{12,64}", stated) else file_hashes.autov3 or file_hashes.sha256[:12]


def _between(chunk: bytes | memoryview, at: int, begin: int, end: int) -> bytes | memoryview:
    """Return the part of a chunk that lies in [begin, end) of the file.

    at: the chunk's offset in the file."""
    return chunk[max(0, begin - at) : max(0, end - at)]


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with all hashes that belong in the header added.

    The hashes are valid for a file that `write_tensors` writes with these tensors. Call this function last
    before writing, because a later change of an `ss_` key invalidates the legacy hash."""
    data = encode_tensors(tensors)[2:]
    model = hashlib.sha256()
    for chunk in data:
        model.update(chunk)
    header = encode_tensors(tensors, metadata={k: v for k, v in metadata.items() if k.startswith("ss_")})
    if not any(k.startswith("ss_") for k in metadata):
        header[1] = _with_empty_metadata(header[1])
    return {
        **metadata,
        "modelspec.hash_sha256": "0x" + model.hexdigest(),
        "sshs_model_hash": model.hexdigest(),
        "sshs_legacy_hash": _legacy([struct.pack("<Q", len(header[1])), header[1], *data]),
    }


def _with_empty_metadata(header: bytes | memoryview) -> bytes:
    """Return the header that safetensors writes for empty metadata.

    The legacy hash includes this header."""
    table = {"__metadata__": {}, **json.loads(bytes(header))}
    return packed_header(table)


def _legacy(chunks: Iterable[bytes | memoryview]) -> str:
    digest, at = hashlib.sha256(), 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        digest.update(_between(view, at, *WINDOW))
        at += len(view)
    return digest.hexdigest()[:8]


def verify_hashes(path: str | Path) -> list[HashCheck]:
    """Recompute the tensor hashes that a safetensors header contains.

    A mismatch is not an error; the caller decides. Raises the errors of `read_header`."""
    path = Path(path)
    header = read_header(path)
    keys = ("modelspec.hash_sha256", "sshs_model_hash")
    stored = {key: header.metadata[key] for key in keys if header.metadata.get(key)}
    if not stored:
        return []
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(header.data_start)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=str(path)) from None
    model, checks = digest.hexdigest(), []
    for key, value in stored.items():
        plain = value.lower().removeprefix("0x")
        short = key == "sshs_model_hash" and len(plain) == 12 and model.startswith(plain)
        checks.append(HashCheck(key, value, model, plain == model or short))
    return checks
