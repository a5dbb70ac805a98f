"""Reading image folders: files are matched to pictures by name, and errors name the faulty files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.make_pictures import put, read_error, scene, settings
from veneer.train.image.folder import with_trigger
from veneer.train.image.pictures import count_pictures, read_pictures

MASK = Image.new("L", (48, 32), 255)


def captions(folder: Path, **keys: Any) -> dict[str, str]:
    return {p.name: p.caption for p in read_pictures(settings(folder, **keys))[0]}


def sources(folder: Path, **keys: Any) -> dict[str, list[str]]:
    pictures, summary = read_pictures(settings(folder, **keys))
    assert count_pictures(settings(folder, **keys)) == (len(pictures), summary.sources)
    return {p.name: [b.name for b in p.sources] for p in pictures}


def metadata(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    assert "the folder does not exist" in read_error(tmp_path / "picture")
    for i in range(20):
        (tmp_path / f"a.x{i}").touch()
    assert "the folder holds 1 .x0, 1 .x1, " in (error := read_error(tmp_path))
    assert error.endswith(" and 8 more")
    assert "this is a file" in read_error(put(tmp_path, "a.png"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_pipes_are_ignored_and_never_opened(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path, name)
    for name in ("c.png", "d.txt", "b.mask.png"):
        os.mkfifo(tmp_path / name)
    pictures, summary = read_pictures(settings(tmp_path))
    assert [p.name for p in pictures] == ["a.png", "b.png"]
    assert summary.ignored == {"pipe or device": 3}
    put(tmp_path, "before/a.png", None)
    os.mkfifo(tmp_path / "before" / "b.png")
    assert "before/b.png: is not a file" in read_error(tmp_path)


def test_captions_come_from_text_files(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "\ufeffa red\r\n  fox \n")
    put(tmp_path, "a.jpg", "ein Füchslein")
    put(tmp_path, "deep/c.d.webp", "a third")
    (tmp_path / "README.txt").write_text("no caption")
    (tmp_path / ".hidden.png").write_bytes(b"no")
    (tmp_path / "notes.md").write_text("")
    assert captions(tmp_path) == {"a.jpg": "ein Füchslein", "b.png": "a red fox", "deep/c.d.webp": "a third"}
    summary = read_pictures(settings(tmp_path))[1]
    assert (summary.captions, summary.ignored) == ({"caption files": 3}, {".txt": 1, ".md": 1})


def test_caption_without_a_picture_is_named(tmp_path: Path) -> None:
    put(tmp_path, "fox_standing.png")
    put(tmp_path, "hare.png")
    (tmp_path / "fox_standin.txt").write_text("a fox")
    error = read_error(tmp_path)
    assert "fox_standin.txt: no picture of this name" in error
    assert "fix:" in error


@pytest.mark.parametrize("column", ["text", "caption", "prompt", "mine"])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_captions_come_from_metadata(tmp_path: Path, column: str, kind: str) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "in/b.png", None)
    if kind.endswith("csv"):
        (tmp_path / kind).write_text(f"file_name,{column}\na.png,an a\nin/b.png,a b\n")
    else:
        metadata(tmp_path, {"file_name": "a.png", column: "an a"}, {"file_name": "in/b.png", column: "a b"})
    keys = {"caption_column": "mine"} if column == "mine" else {}
    assert captions(tmp_path, **keys) == {"a.png": "an a", "in/b.png": "a b"}


def test_invalid_metadata_rows_are_listed(tmp_path: Path) -> None:
    put(tmp_path, "cat.png", None)
    rows: list[dict[str, Any]] = [{"file_name": "cats.png", "text": "x"}, {"file_name": "../cat.png", "text": "x"}]
    rows += [{"file_name": "cat.png", "text": 3}, {"text": "x"}, {"file_name": "cat.png", "text": "x"}]
    metadata(tmp_path, *rows, {"file_name": "cat.png", "text": "y"})
    error = read_error(tmp_path)
    assert "5 metadata rows cannot be used" in error
    assert "metadata.jsonl:1: `file_name`: there is no picture `cats.png`" in error
    for part in ("is outside the folder", "should be text, found int", "already has a row"):
        assert part in error
    metadata(tmp_path, {"file_name": "cat.png", "words": "x"})
    assert "no column text or caption or prompt or instruction; the columns are file_name, words" in read_error(
        tmp_path
    )


def test_kohya_folders_repeat_and_caption(tmp_path: Path) -> None:
    put(tmp_path, "10_sks dog/a.png", None)
    put(tmp_path, "10_sks dog/b.png", "a file's words")
    put(tmp_path, "1_dog/c.png", None)
    assert {p.name: (p.caption, p.repeats) for p in read_pictures(settings(tmp_path))[0]} == {
        "10_sks dog/a.png": ("sks dog", 10),
        "10_sks dog/b.png": ("a file's words", 10),
        "1_dog/c.png": ("dog", 1),
    }
    put(tmp_path, "2024_holiday/d.png", "sea")
    assert "but N is 2,024" in read_error(tmp_path)


def test_prompt_replaces_missing_captions(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "b.png", "its own")
    assert captions(tmp_path, prompt="for all") == {"a.png": "for all", "b.png": "its own"}
    assert "1 of 2 pictures have no caption:\n  - a.png" in read_error(tmp_path)


@pytest.mark.parametrize(
    ("caption", "want", "change"),
    [
        ("a fox", "sks, a fox", "added"),
        ("", "sks", "added"),
        ("a sks fox", "a sks fox", "already there"),
        ("A SKS fox", "A SKS fox", "already there"),
        ("asks a fox", "sks, asks a fox", "added"),
        ("a [trigger] fox, [trigger]", "a sks fox, sks", "replaced"),
    ],
)
def test_trigger_is_in_every_caption(caption: str, want: str, change: str) -> None:
    assert with_trigger(caption, "sks") == (want, change)


def test_placeholder_needs_a_trigger(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "b.png", "photo of [trigger]")
    assert captions(tmp_path, trigger="ohwx man") == {"a.png": "ohwx man", "b.png": "photo of ohwx man"}
    assert read_pictures(settings(tmp_path, trigger="ohwx"))[1].triggers == {"added": 1, "replaced": 1}
    error = read_error(tmp_path, prompt="x")
    assert "they contain [trigger] and data.trigger is not set:\n  - b.png" in error


@pytest.mark.parametrize("place", ["own/in/a.mask.png", "own/masks/in/a.jpg", "shades/in/a.png"])
def test_masks_are_found(tmp_path: Path, place: str) -> None:
    put(tmp_path / "own", "in/a.png")
    put(tmp_path / "own", "b.png")
    path = put(tmp_path, place, None, MASK)
    keys = {"masks": str(tmp_path / "shades")} if place.startswith("shades") else {}
    pictures, _ = read_pictures(settings(tmp_path / "own", **keys))
    assert {p.name: p.mask for p in pictures} == {"b.png": None, "in/a.png": path}
    assert not any(p.mask for p in read_pictures(settings(tmp_path / "own", masks="off"))[0])


def test_invalid_masks_are_named(tmp_path: Path) -> None:
    put(tmp_path, "fox.png")
    put(tmp_path, "foy.mask.png", None)
    assert "foy.mask.png: no picture of this name" in read_error(tmp_path)
    (tmp_path / "foy.mask.png").unlink()
    put(tmp_path, "fox.mask.png", None, MASK.resize((96, 64)))
    assert len(read_pictures(settings(tmp_path))[0]) == 1, "another size of the same proportions"
    put(tmp_path, "fox.mask.png", None, MASK.resize((64, 64)))
    assert "has 64 x 64 pixels, but the picture has 48 x 32" in read_error(tmp_path)
    (tmp_path / "fox.mask.png").write_bytes(b"no")
    assert "fox.mask.png: not a picture" in read_error(tmp_path)


def test_transparency_can_be_the_mask(tmp_path: Path) -> None:
    transparent = scene()
    transparent.putalpha(100)
    put(tmp_path, "a.png", "a", transparent)
    put(tmp_path, "b.png")
    assert [p.alpha for p in read_pictures(settings(tmp_path, masks="alpha"))[0]] == [True, False]
    assert [p.alpha for p in read_pictures(settings(tmp_path))[0]] == [False, False]


def test_source_images_are_found_in_three_ways(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "beside", f"{name}.png", "make it red")
        put(tmp_path / "beside", f"{name}.before.jpg", None)
        put(tmp_path / "folder", f"{name}.png", "make it red")
        put(tmp_path / "folder/before", f"{name}.webp", None)
        put(tmp_path / "named", f"{name}.png", "make it red")
        put(tmp_path / "starts", f"{name}.png", None)
        put(tmp_path / "more", f"{name}.png", None)
    assert sources(tmp_path / "beside") == {f"{n}.png": [f"{n}.before.jpg"] for n in ("cat", "dog")}
    assert sources(tmp_path / "folder") == {f"{n}.png": [f"before/{n}.webp"] for n in ("cat", "dog")}
    one = sources(tmp_path / "named", before=str(tmp_path / "starts"))
    assert one == {f"{n}.png": [f"../starts/{n}.png"] for n in ("cat", "dog")}
    two = sources(tmp_path / "named", before=(str(tmp_path / "starts"), str(tmp_path / "more")))
    assert two["cat.png"] == ["../starts/cat.png", "../more/cat.png"]


def test_source_images_are_ignored_if_disabled(tmp_path: Path) -> None:
    put(tmp_path, "cat.png")
    put(tmp_path, "cat.before.png", None)
    pictures, summary = read_pictures(settings(tmp_path, before="off"))
    assert ([p.sources for p in pictures], summary.ignored["source images"]) == ([()], 1)
    assert read_pictures(settings(tmp_path))[0][0].key != pictures[0].key, "another cache entry"


def test_incomplete_pairs_are_named(tmp_path: Path) -> None:
    put(tmp_path, "cat.png")
    put(tmp_path, "dog.png")
    put(tmp_path, "cat.before.png", None)
    for part in ("1 of 2 pictures have no source image:\n", "dog.png", "data.before: off"):
        assert part in read_error(tmp_path)
    put(tmp_path, "dog.before.png", None)
    put(tmp_path, "dot.before.png", None)
    put(tmp_path / "before", "bird.png", None)
    error = read_error(tmp_path)
    assert "2 source images cannot be used" in error
    assert "dot.before.png: no picture of this name" in error
    assert "before/bird.png: no picture of this name" in error
    (tmp_path / "dot.before.png").rename(tmp_path / "dog.before.jpg")
    (tmp_path / "before/bird.png").unlink()
    assert "1 of 2 pictures have fewer than the 2 source images of dog.png" in read_error(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "this folder of source images has no pictures" in read_error(tmp_path, before=str(tmp_path / "empty"))


def test_class_pictures_need_source_images_too(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "own", f"{name}.png", "make it red")
        put(tmp_path / "own", f"{name}.before.png", None)
        put(tmp_path / "class", f"{name}.png", "a photo")
    error = read_error(tmp_path / "own", class_folder=str(tmp_path / "class"))
    assert "2 of 4 pictures have no source image" in error
    assert f"where: {tmp_path / 'class'}\n" in error


def test_long_source_image_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "cat.png")
    put(tmp_path, "cat.before.png", None, scene(90, 2))
    error = read_error(tmp_path)
    assert "source image cat.before.png has 90×2 pixels; one side can be at most 8 times as long as the other" in error
