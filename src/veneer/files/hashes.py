"""Hashes by which managers and hubs identify an adapter file, and checks of them.

| name    | of                                                       | kept as        | stored in the header as       |
| sha256  | the whole file                                           | 64 hex digits  |                               |
| AutoV2  | the same                                                 | the first 10   |                               |
| AutoV1  | the 64 KiB from 1 MiB on                                 | the first 8    |                               |
| AutoV3  | the bytes after the header: the tensors                  | the first 12   | sshs_model_hash, all 64       |
|         |                                                          |                | modelspec.hash_sha256, `0x…`  |
| legacy  | as AutoV1, of the file as it would be with ss_ keys only | the first 8    | sshs_legacy_hash              |
| crc32   | the whole file                                           | 8 hex digits   |                               |
| short   | the stated sshs_model_hash, unverified, else AutoV3,     | the first 12   |                               |
|         | else sha256: A1111's and Forge's name of an adapter      |                |                               |

Editing the metadata changes sha256, AutoV1, AutoV2 and crc32; the stored hashes stay valid. Sources:
sd-scripts' train_util, Stability's ModelSpec 1.0.1, CivitAI's open source. This module knows bytes; it
does not know about adapters.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterError
from veneer.files.safetensors import Header, encode_tensors, packed_header, read_header

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = (0x100000, 0x110000)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Hashes:
    """Hashes in lower-case hexadecimal.

    `autov3` is "" unless the file is safetensors."""

    sha256: str
    autov1: str
    autov2: str
    autov3: str
    crc32: str


@dataclass(frozen=True)
class HashCheck:
    """A hash stored in a header, and the computed hash.

    holds: None if it cannot be recomputed; `note` says why."""

    key: str
    stored: str
    found: str
    holds: bool | None
    note: str = ""


def hashes(path: str | Path) -> Hashes:
    """Return all hashes of a file, read once.

    Any kind of file has all hashes but AutoV3. Raises AdapterError if the file cannot be read."""
    path = Path(path)
    try:
        start = read_header(path).data_start
    except AdapterError:
        start = None
    digest, old, tensors, crc, at = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), 0, 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                crc = zlib.crc32(chunk, crc)
                old.update(_between(chunk, at, *WINDOW))
                if start is not None:
                    tensors.update(chunk[max(0, start - at) :])
                at += len(chunk)
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=str(path)) from None
    sha = digest.hexdigest()
    return Hashes(
        sha, old.hexdigest()[:8], sha[:10], tensors.hexdigest()[:12] if start is not None else "", f"{crc:08x}"
    )


def short_hash(path: str | Path, file_hashes: Hashes) -> str:
    """Return the name of an adapter file in A1111's and Forge's `Lora hashes`.

    Both also look files up by this hash (extensions-builtin/Lora, NetworkOnDisk). file_hashes: the computed
    hashes, used if the header states no valid hash."""
    try:
        stated = read_header(path).metadata.get("sshs_model_hash", "")
    except AdapterError:
        stated = ""
    return stated[:12] if re.fullmatch("[0-9a-f]{12,64}", stated) else file_hashes.autov3 or file_hashes.sha256[:12]


def _between(chunk: bytes | memoryview, at: int, begin: int, end: int) -> bytes | memoryview:
    """Return the bytes of a chunk at offset `at` that lie in [begin, end)."""
    return chunk[max(0, begin - at) : max(0, end - at)]


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with every header hash, for a file of these tensors.

    The tensors are as `write_tensors` stores them. This is the last step before writing: a later change of
    an `ss_` key invalidates the legacy hash."""
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
    """Recompute every hash in a safetensors header. Errors as `read_header`.

    A mismatch is not an error: the caller decides. OneTrainer's `hash_sha256` hashes the tensors by name
    instead of file order; if it holds in this sense, the note says so."""
    path = Path(path)
    header = read_header(path)
    keys = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
    stored = {key: header.metadata[key] for key in keys if header.metadata.get(key)}
    if not stored:
        return []
    try:
        with path.open("rb") as file:
            file.seek(header.data_start)
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            model, checks = digest.hexdigest(), []
            for key, value in stored.items():
                plain = value.lower().removeprefix("0x")
                if key != "sshs_legacy_hash":
                    holds = plain == model or (
                        key == "sshs_model_hash" and len(plain) == 12 and model.startswith(plain)
                    )
                    note = "" if holds else _other_order(file, header, plain)
                    checks.append(HashCheck(key, value, model, holds, note))
                    continue
                legacy, sure = _legacy_of(file, header)
                holds = plain == legacy
                note = "" if holds or sure else "the header reaches into the hashed bytes, and its order is lost"
                checks.append(HashCheck(key, value, legacy, holds if holds or sure else None, note))
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=str(path)) from None
    return checks


def _other_order(file: Any, header: Header, plain: str) -> str:
    digest = hashlib.sha256()
    for _, entry in sorted(header.entries.items()):
        file.seek(header.data_start + entry.begin)
        digest.update(file.read(entry.end - entry.begin))
    if digest.hexdigest() == plain:
        return "it is the hash of the tensors in the order of their names, as OneTrainer writes it"
    return "the tensors were changed after it was written, or it was never theirs"


def _legacy_of(file: Any, header: Header) -> tuple[str, bool]:
    """Return the legacy hash, and whether it is certain.

    The hash is certain if the header with only ss_ keys ends before the hashed bytes begin."""
    by_place = sorted(header.entries.items(), key=lambda item: (item[1].begin, item[1].end))
    table: dict[str, Any] = {
        "__metadata__": {k: v for k, v in sorted(header.metadata.items()) if k.startswith("ss_")},
        **{name: {"dtype": e.kind, "shape": list(e.shape), "data_offsets": [e.begin, e.end]} for name, e in by_place},
    }
    text = packed_header(table)
    data_at = 8 + len(text)
    begin, end = (max(0, edge - data_at) for edge in WINDOW)
    file.seek(header.data_start + begin)
    data = file.read(end - begin)
    head = _between(struct.pack("<Q", len(text)) + text, 0, *WINDOW)
    return hashlib.sha256(bytes(head) + data).hexdigest()[:8], data_at <= WINDOW[0]
