"""safetensors headers, tested with files written byte by byte; needs no torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import AdapterError
from veneer.files.safetensors import read_header


def file_of(folder: Path, table: Any, data: bytes) -> Path:
    header = json.dumps(table).encode()
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def test_a_header_gives_names_shapes_and_metadata(tmp_path: Path) -> None:
    table = {"a": entry([2, 3], 0, 24), "b": entry([4], 24, 32, "BF16"), "__metadata__": {"k": "v"}}
    header = read_header(file_of(tmp_path, table, bytes(32)))
    assert {name: tuple(each.shape) for name, each in header.entries.items()} == {"a": (2, 3), "b": (4,)}
    assert dict(header.metadata) == {"k": "v"}


@pytest.mark.parametrize(
    ("table", "size"),
    [
        ({"a": entry([2, 3], 0, 20)}, 24),  # the shape needs 24 bytes
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),  # they overlap
        ({"a": entry([2], 8, 16)}, 16),  # a gap before the first tensor
        ({"a": entry([2], 0, 8)}, 4),  # truncated
        ({"a": entry([-1], 0, 8)}, 8),
        ({"../a": entry([2], 0, 8)}, 8),
        ([], 0),
    ],
)
def test_inconsistent_header_is_refused(tmp_path: Path, table: Any, size: int) -> None:
    with pytest.raises(AdapterError):
        read_header(file_of(tmp_path, table, bytes(size)))
