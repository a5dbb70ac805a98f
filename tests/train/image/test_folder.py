"""Folders that hold no pictures."""

from __future__ import annotations

from pathlib import Path

from tests.train.make_pictures import put, wrong


def test_folders_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert f"did you mean {tmp_path / 'pictures'}?" in wrong(tmp_path / "picture")
    (tmp_path / "pictures/a.pdf").write_bytes(b"")
    assert "the folder holds 1 .pdf" in wrong(tmp_path / "pictures")
    assert "this is a file" in wrong(put(tmp_path, "a.png"))
