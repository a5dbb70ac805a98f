"""Folders that hold no pictures, and what in a folder is no file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.train.make_pictures import put, settings, wrong
from veneer.train.image.pictures import read_pictures


def test_folders_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert f"did you mean {tmp_path / 'pictures'}?" in wrong(tmp_path / "picture")
    (tmp_path / "pictures/a.pdf").write_bytes(b"")
    assert "the folder holds 1 .pdf" in wrong(tmp_path / "pictures")
    for i in range(20):
        (tmp_path / "pictures" / f"a.x{i}").touch()
    assert "the folder holds 1 .pdf, 1 .x0, " in (said := wrong(tmp_path / "pictures"))
    assert said.endswith(" and 9 more")
    assert "this is a file" in wrong(put(tmp_path, "a.png"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_a_pipe_is_neither_waited_for_nor_a_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path, name)
    for name in ("c.png", "d.txt", "b.mask.png"):
        os.mkfifo(tmp_path / name)
    pictures, about = read_pictures(settings(tmp_path))
    assert [p.name for p in pictures] == ["a.png", "b.png"]
    assert about.ignored == {"pipe or device": 3}
    (tmp_path / "before").mkdir()
    put(tmp_path, "before/a.png", None)
    os.mkfifo(tmp_path / "before" / "b.png")
    assert "before/b.png, is no file" in wrong(tmp_path)


def test_a_folder_in_it_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "locked/b.png")
    scan = os.scandir

    def scandir(place: str) -> object:
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"{tmp_path / 'locked'}" in (said := wrong(tmp_path))
    assert "this folder cannot be read: Permission denied" in said
