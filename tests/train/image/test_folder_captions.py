"""Captions that a folder gives: files, metadata, kohya's folders, one prompt for all; and the trigger in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.make_pictures import put, settings, wrong
from veneer.train.image.folder_captions import with_trigger
from veneer.train.image.pictures import read_pictures
from veneer.train.image.training_picture import TrainingPicture


def captions(pictures: list[TrainingPicture]) -> dict[str, str]:
    return {p.name: p.caption for p in pictures}


def metadata(folder: Path, rows: list[dict[str, Any]], name: str = "metadata.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "\ufeffa red\r\n  fox \n")
    put(tmp_path, "a.jpg", "ein Füchslein")
    put(tmp_path, "deep/c.d.webp", "a third")
    (tmp_path / "README.txt").write_text("no caption")
    (tmp_path / ".hidden.png").write_bytes(b"no")
    (tmp_path / "notes.md").write_text("")
    pictures, about = read_pictures(settings(tmp_path))
    assert captions(pictures) == {"a.jpg": "ein Füchslein", "b.png": "a red fox", "deep/c.d.webp": "a third"}
    assert about.captions == {"caption files": 3}
    assert about.several_lines == 1
    assert about.ignored == {".txt": 1, ".md": 1}
    assert pictures[0].size == (48, 32)


def test_a_caption_without_a_picture_names_the_nearest(tmp_path: Path) -> None:
    put(tmp_path, "fox_standing.png")
    put(tmp_path, "hare.png")
    (tmp_path / "fox_standin.txt").write_text("a fox")
    message = wrong(tmp_path)
    assert "fox_standin.txt: no picture of this name; the nearest is fox_standing.png" in message
    assert "fix:" in message


@pytest.mark.parametrize("column", ["text", "caption", "prompt", "mine"])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_metadata(tmp_path: Path, column: str, kind: str) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "in/b.png", None)
    if kind.endswith("csv"):
        (tmp_path / kind).write_text(f"file_name,{column},source\na.png,an a,web\nin/b.png,a b,web\n")
    else:
        rows = [("a.png", "an a"), ("in/b.png", "a b")]
        metadata(tmp_path, [{"file_name": name, column: text, "source": "web"} for name, text in rows])
    pictures, about = read_pictures(settings(tmp_path, **({"caption_column": "mine"} if column == "mine" else {})))
    assert captions(pictures) == {"a.png": "an a", "in/b.png": "a b"}
    assert about.unused == ["source"]
    assert about.captions == {"metadata": 2}


def test_metadata_that_does_not_fit(tmp_path: Path) -> None:
    put(tmp_path, "cat.png", None)
    rows: list[dict[str, Any]] = [{"file_name": "cats.png", "text": "x"}, {"file_name": "../cat.png", "text": "x"}]
    rows += [{"file_name": "cat.png", "text": 3}, {"text": "x"}, {"file_name": "cat.png", "text": "x"}]
    metadata(tmp_path, [*rows, {"file_name": "cat.png", "text": "y"}])
    message = wrong(tmp_path)
    assert "5 metadata rows cannot be used" in message
    assert "metadata.jsonl:1: there is no picture `cats.png`; the nearest is cat.png" in message
    for said in ("leaves the folder", "should be text, found int", "has a row already"):
        assert said in message
    metadata(tmp_path, [{"file_name": "cat.png", "words": "x"}])
    assert "no column text or caption or prompt or instruction; the columns are file_name, words" in wrong(tmp_path)


def test_kohya_folders_repeat_and_caption(tmp_path: Path) -> None:
    put(tmp_path, "10_sks dog/a.png", None)
    put(tmp_path, "10_sks dog/b.png", "a file's words")
    put(tmp_path, "1_dog/c.png", None)
    pictures, about = read_pictures(settings(tmp_path))
    assert {p.name: (p.caption, p.repeats) for p in pictures} == {
        "10_sks dog/a.png": ("sks dog", 10),
        "10_sks dog/b.png": ("a file's words", 10),
        "1_dog/c.png": ("dog", 1),
    }
    assert about.repeats == {"10_sks dog": 10, "1_dog": 1}
    put(tmp_path, "2024_holiday/d.png", "sea")
    assert "2,024 times" in wrong(tmp_path)


def test_one_prompt_for_those_without_a_caption(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "b.png", "its own")
    pictures, about = read_pictures(settings(tmp_path, prompt="for all"))
    assert captions(pictures) == {"a.png": "for all", "b.png": "its own"}
    assert about.captions == {"caption files": 1, "the prompt": 1}
    assert "1 of 2 pictures have no caption" in wrong(tmp_path)
    assert "a.png" in wrong(tmp_path)


@pytest.mark.parametrize(
    ("caption", "want", "did"),
    [
        ("a fox", "sks, a fox", "added"),
        ("", "sks", "added"),
        ("a sks fox", "a sks fox", "already there"),
        ("A SKS fox", "A SKS fox", "already there"),
        ("asks a fox", "sks, asks a fox", "added"),
        ("a [trigger] fox, [trigger]", "a sks fox, sks", "replaced"),
    ],
)
def test_the_trigger(caption: str, want: str, did: str) -> None:
    assert with_trigger(caption, "sks") == (want, did)


def test_a_trigger_alone_is_a_caption_and_is_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "b.png", "photo of [trigger]")
    pictures, about = read_pictures(settings(tmp_path, trigger="ohwx man"))
    assert captions(pictures) == {"a.png": "ohwx man", "b.png": "photo of ohwx man"}
    assert about.trigger == {"added": 1, "replaced": 1}
    assert "b.png: holds [trigger], and data.trigger is not set" in wrong(tmp_path, prompt="x")
