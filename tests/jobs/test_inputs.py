"""What jobs read: its lines are counted as they would be one by one, however they lie across chunks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from veneer.jobs import inputs


def test_lines_are_counted_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CHUNK", 5)
    file, draw = tmp_path / "rows.jsonl", random.Random(0)
    for _ in range(300):
        data = b"".join(draw.choices([b"\n", b" ", b"\r\n", b"x", b"xyz", b"\t"], k=draw.randrange(16)))
        file.write_bytes(data)
        wanted = sum(bool(line.strip()) for line in data.split(b"\n"))
        assert inputs.count_lines(file, 100) == wanted
        assert inputs.count_lines(file, 2) == min(wanted, 2)
