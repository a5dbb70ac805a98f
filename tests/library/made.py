"""Fake adapter files for library tests; a file's first line is its card."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError
from veneer.library.describe_files import AdapterDescription
from veneer.library.library import Library, open_library

__all__ = ["adapter_bytes", "made", "open_made", "read_made"]


def adapter_bytes(seed: int, size: int = 2000, **card: Any) -> bytes:
    return json.dumps(card, sort_keys=True).encode() + b"\n" + random.Random(seed).randbytes(size)


def made(folder: Path, seed: int, name: str = "a.safetensors", size: int = 2000, **card: Any) -> Path:
    """Write a file with a card; equal arguments give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(adapter_bytes(seed, size, **card))
    return path


def read_made(path: Path) -> AdapterDescription:
    """Return the description of a file written by `made`."""
    head, newline, body = path.read_bytes().partition(b"\n")
    if not newline:
        raise AdapterError("no card", where=str(path))
    return AdapterDescription("sha256:" + hashlib.sha256(body).hexdigest(), "made", json.loads(head))


def open_made(place: str, index: str | None = None) -> Library:
    return open_library(place, index)
