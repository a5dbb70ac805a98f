"""Training reads generated captions; existing captions are kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from PIL import Image

from tests.train.make_pictures import put, scene, settings
from veneer.errors import BaseError, DataError
from veneer.train.image.captions import WrittenCaption, write_caption, write_captions
from veneer.train.image.pictures import read_pictures


def colour(picture: Image.Image) -> tuple[str, bool]:
    """Return (a description that is unique to the picture, False), where False means "not truncated"."""
    return "pixels " + "-".join(map(str, picture.resize((1, 1)).getpixel((0, 0)))), False  # type: ignore[arg-type]


def read(folder: Path) -> dict[str, str]:
    return {p.name: p.caption for p in read_pictures(settings(folder))[0]}


def expected(folder: Path, *names: str) -> dict[str, str]:
    return {name: colour(Image.open(folder / name).convert("RGB"))[0] for name in names}


def test_only_missing_captions_are_written(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "my own words")
    put(tmp_path, "b.png", None)
    put(tmp_path, "deep/c.jpg", None)
    put(tmp_path, "d.png", None)
    put(tmp_path, "d.mask.png", None)
    put(tmp_path, "empty.png", "")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "d.png", "caption": "a row", "more": [1.50]}\n')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    report = write_captions(str(tmp_path), colour)
    own = expected(tmp_path, "b.png", "deep/c.jpg")
    assert {one.picture: one.caption for one in report.written} == own
    assert (report.had, report.failed) == (3, [])
    assert read(tmp_path) == own | {"a.png": "my own words", "d.png": "a row", "empty.png": ""}
    assert all(p.read_bytes() == data for p, data in before.items())
    assert write_captions(str(tmp_path), colour).written == []


def test_stopped_call_resumes(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path, f"{i}.png", None)
    numbers = itertools.count(1)

    def stop(_: WrittenCaption) -> None:
        if next(numbers) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_captions(str(tmp_path), colour, on_caption=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "0.txt", "1.png", "1.txt", "2.png", "3.png"]
    report = write_captions(str(tmp_path), colour)
    assert [one.picture for one in report.written] == ["2.png", "3.png"]
    assert read(tmp_path) == expected(tmp_path, "0.png", "1.png", "2.png", "3.png")


def test_overwriting_replaces_every_caption(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "old")
    put(tmp_path, "b.png", None)
    (tmp_path / "b.caption").write_text("old")
    put(tmp_path, "c.png", None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "old"}\n')
    write_captions(str(tmp_path), colour, overwrite=True, trigger="sks")
    new = expected(tmp_path, "a.png", "b.png", "c.png")
    assert read(tmp_path) == {name: f"sks, {text}" for name, text in new.items()}
    assert not (tmp_path / "b.txt").exists()
    assert "old" in (tmp_path / "metadata.jsonl").read_text(), "a caption file comes before metadata"


def test_pictures_of_one_name_have_separate_captions(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    scene(7).save(tmp_path / "a.jpg")
    write_captions(str(tmp_path), colour)
    assert sorted(p.name for p in tmp_path.glob("*.txt")) == ["a.jpg.txt", "a.png.txt"]
    assert read(tmp_path) == expected(tmp_path, "a.png", "a.jpg")
    write_captions(str(tmp_path), colour, overwrite=True)
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    (tmp_path / "a.txt").write_text("of both")
    with pytest.raises(DataError, match=r"a\.txt is the caption of a\.jpg, a\.png"):
        write_captions(str(tmp_path), colour, overwrite=True)


def test_failures_are_reported_and_the_others_written(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "c.png", None)
    (tmp_path / "b.png").write_bytes(b"<html>")
    texts = iter(["", "a cat"])
    report = write_captions(str(tmp_path), lambda picture: (next(texts), False))
    assert [one.picture for one in report.written] == ["c.png"]
    assert [line.partition(":")[0] for line in report.failed] == ["a.png", "b.png"]
    assert not (tmp_path / "a.txt").exists()


def test_error_of_the_model_names_the_picture(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)

    def fails(picture: Image.Image) -> tuple[str, bool]:
        raise BaseError("the model cannot describe this picture")

    with pytest.raises(BaseError, match=r"cannot describe[\s\S]*where: .*a\.png"):
        write_captions(str(tmp_path), fails)


def test_one_caption_is_written_to_its_file(tmp_path: Path) -> None:
    for name in ("0.png", "1.png", "2.png", "2.jpg"):
        put(tmp_path, name, None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "red"}\n')
    (tmp_path / "2.txt").write_text("shared")
    assert write_caption(tmp_path / "0.png", " blue\n sky").file == tmp_path / "0.txt"
    assert write_caption(tmp_path / "1.png", "new").file == tmp_path / "1.txt"
    assert read(tmp_path) == {"0.png": "blue sky", "1.png": "new", "2.jpg": "shared", "2.png": "shared"}
    for name, text, says in (
        ("2.png", "mine", r"2\.txt is the caption of 2\.jpg, 2\.png"),
        ("3.png", "mine", "no such picture"),
        ("0.png", " ", "at least one word"),
    ):
        with pytest.raises(DataError, match=says):
            write_caption(tmp_path / name, text)


def test_run_without_captions_names_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "my pictures"
    put(folder, "a.png", None)
    with pytest.raises(DataError, match=f"veneer data caption '{folder}' --model MODEL"):
        read(folder)
