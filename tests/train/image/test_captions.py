"""Captions that are written are those that training reads; what was there stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.make_pictures import put, scene, settings
from veneer.errors import BaseError, DataError
from veneer.train.image.captions import WrittenCaption, uncaptioned, write_captions
from veneer.train.image.pictures import read_pictures


def colour(picture: Image.Image) -> tuple[str, bool]:
    """Says of a picture what no other says."""
    return "pixels " + "-".join(map(str, picture.resize((1, 1)).getpixel((0, 0)))), False  # type: ignore[arg-type]


def read(folder: Path) -> dict[str, str]:
    return {p.name: p.caption for p in read_pictures(settings(folder))[0]}


def expected(folder: Path, *names: str) -> dict[str, str]:
    return {name: colour(Image.open(folder / name).convert("RGB"))[0] for name in names}


@pytest.mark.parametrize("to", ["txt", "jsonl"])
def test_training_reads_what_is_written_and_keeps_what_was_there(tmp_path: Path, to: Any) -> None:
    put(tmp_path, "a.png", "my own words")
    put(tmp_path, "b.png", None)
    put(tmp_path, "deep/c.jpg", None)
    put(tmp_path, "d.png", None)
    put(tmp_path, "d.mask.png", None)
    put(tmp_path, "empty.png", "")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "d.png", "caption": "a row", "more": [1.50]}\n')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    report = write_captions(str(tmp_path), colour, to=to)
    own = expected(tmp_path, "b.png", "deep/c.jpg")
    assert {one.picture: one.caption for one in report.written} == own
    assert (report.had, report.failed) == (3, [])
    assert read(tmp_path) == own | {"a.png": "my own words", "d.png": "a row", "empty.png": ""}
    kept = {p: data for p, data in before.items() if to == "txt" or p.name != "metadata.jsonl"}
    assert all(p.read_bytes() == data for p, data in kept.items())
    assert (tmp_path / "metadata.jsonl").read_bytes().startswith(before[tmp_path / "metadata.jsonl"])
    assert not uncaptioned(str(tmp_path))
    assert write_captions(str(tmp_path), colour, to=to).written == []


def test_a_call_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path, f"{i}.png", None)
    seen = []

    def stops(one: WrittenCaption) -> None:
        seen.append(one.picture)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_captions(str(tmp_path), colour, on_caption=stops)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "0.txt", "1.png", "1.txt", "2.png", "3.png"]
    report = write_captions(str(tmp_path), colour)
    assert [one.picture for one in report.written] == ["2.png", "3.png"]
    assert read(tmp_path) == expected(tmp_path, "0.png", "1.png", "2.png", "3.png")


def test_overwriting_replaces_the_caption_where_it_is(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "old")
    put(tmp_path, "b.png", None)
    (tmp_path / "b.caption").write_text("old")
    put(tmp_path, "c.png", None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "old"}\n')
    write_captions(str(tmp_path), colour, overwrite=True, trigger="sks")
    assert read(tmp_path) == {
        name: f"sks, {said}" for name, said in expected(tmp_path, "a.png", "b.png", "c.png").items()
    }
    assert not (tmp_path / "b.txt").exists()
    assert "old" in (tmp_path / "metadata.jsonl").read_text(), "a caption file counts before it"
    with pytest.raises(DataError, match=r"a\.png: a\.txt counts before metadata\.jsonl"):
        write_captions(str(tmp_path), colour, overwrite=True, to="jsonl")


def test_rows_are_overwritten_in_place(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "b.png", None)
    rows = [{"file_name": "b.png", "prompt": "old", "more": 1}, {"file_name": "a.png", "prompt": "old"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    write_captions(str(tmp_path), colour, overwrite=True, to="jsonl")
    own = expected(tmp_path, "a.png", "b.png")
    found = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert found == [rows[0] | {"prompt": own["b.png"]}, rows[1] | {"prompt": own["a.png"]}]
    assert read(tmp_path) == own


def test_pictures_of_one_name_have_captions_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    scene(7).save(tmp_path / "a.jpg")
    write_captions(str(tmp_path), colour)
    assert sorted(p.name for p in tmp_path.glob("*.txt")) == ["a.jpg.txt", "a.png.txt"]
    assert read(tmp_path) == expected(tmp_path, "a.png", "a.jpg")
    write_captions(str(tmp_path), colour, overwrite=True)
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    (tmp_path / "a.txt").write_text("of both")
    with pytest.raises(DataError, match=r"a\.jpg: a\.txt is the caption of other pictures too"):
        write_captions(str(tmp_path), colour, overwrite=True)


def test_a_trigger_stands_in_front_once(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "b.png", None)
    said = iter(["an SKS cat", "a dog"])
    write_captions(str(tmp_path), lambda picture: (next(said), False), trigger="sks")
    assert read(tmp_path) == {"a.png": "an SKS cat", "b.png": "sks, a dog"}


def test_what_cannot_be_described_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "c.png", None)
    (tmp_path / "b.png").write_bytes(b"<html>")
    said = iter(["", "a cat"])
    report = write_captions(str(tmp_path), lambda picture: (next(said), False))
    assert [one.picture for one in report.written] == ["c.png"]
    assert [line.partition(":")[0] for line in report.failed] == ["a.png", "b.png"]
    assert not (tmp_path / "a.txt").exists()


def test_a_model_that_fails_is_said_with_the_picture(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)

    def fails(picture: Image.Image) -> tuple[str, bool]:
        raise BaseError("the model cannot describe this picture")

    with pytest.raises(BaseError, match=r"cannot describe[\s\S]*where: .*a\.png"):
        write_captions(str(tmp_path), fails)


def test_a_run_without_captions_says_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "my pictures"
    put(folder, "a.png", None)
    with pytest.raises(DataError, match=f"veneer data caption '{folder}' --model MODEL"):
        read(folder)
    with pytest.raises(DataError, match="does not exist"):
        uncaptioned(str(tmp_path / "my pictires"))
