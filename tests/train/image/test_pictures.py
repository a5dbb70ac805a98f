from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from tests.train.make_pictures import put, scene, settings
from veneer.errors import DataError
from veneer.train.config.image import ImageDataSection
from veneer.train.image.batches import split_pictures
from veneer.train.image.pictures import AboutPictures, TrainingPicture, pictures_digest, read_pictures, with_trigger


def read(folder: Path | tuple[str, ...], **keys: Any) -> tuple[list[TrainingPicture], AboutPictures]:
    return read_pictures(settings(folder, **keys))


def wrong(folder: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, **keys)
    return str(caught.value)


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
    pictures, about = read(tmp_path)
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
    pictures, about = read(tmp_path, **({"caption_column": "mine"} if column == "mine" else {}))
    assert captions(pictures) == {"a.png": "an a", "in/b.png": "a b"}
    assert about.unused == ["source"]
    assert about.captions == {"metadata": 2}


def test_metadata_that_does_not_fit(tmp_path: Path) -> None:
    put(tmp_path, "cat.png", None)
    rows: list[dict[str, Any]] = [{"file_name": "cats.png", "text": "x"}, {"file_name": "../cat.png", "text": "x"}]
    rows += [{"file_name": "cat.png", "text": 3}, {"text": "x"}, {"file_name": "cat.png", "text": "x"}]
    metadata(tmp_path, [*rows, {"file_name": "cat.png", "text": "y"}])
    message = wrong(tmp_path)
    assert "5 metadata row(s)" in message
    assert "metadata.jsonl:1: there is no picture `cats.png`; the nearest is cat.png" in message
    assert "leaves the folder" in message
    assert "should be text, found int" in message
    assert "has a row already" in message
    metadata(tmp_path, [{"file_name": "cat.png", "words": "x"}])
    assert "no column text or caption or prompt or instruction; the columns are file_name, words" in wrong(tmp_path)


def test_kohya_folders_repeat_and_caption(tmp_path: Path) -> None:
    put(tmp_path, "10_sks dog/a.png", None)
    put(tmp_path, "10_sks dog/b.png", "a file's words")
    put(tmp_path, "1_dog/c.png", None)
    pictures, about = read(tmp_path)
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
    pictures, about = read(tmp_path, prompt="for all")
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
    pictures, about = read(tmp_path, trigger="ohwx man")
    assert captions(pictures) == {"a.png": "ohwx man", "b.png": "photo of ohwx man"}
    assert about.trigger == {"added": 1, "replaced": 1}
    assert "b.png: holds [trigger], and data.trigger is not set" in wrong(tmp_path, prompt="x")


def test_class_pictures_are_flagged_weighed_and_get_no_trigger(tmp_path: Path) -> None:
    put(tmp_path, "own/a.png", "a dog")
    put(tmp_path, "own/class/c.png", None)
    put(tmp_path, "own/class/d.png", "sks dog")
    keys = {"class_folder": str(tmp_path / "own/class"), "class_prompt": "a dog", "class_weight": 0.5, "trigger": "sks"}
    pictures, about = read(tmp_path / "own", **keys)
    assert [(p.name, p.caption, p.is_class, p.weight) for p in pictures] == [
        ("a.png", "sks, a dog", False, 1.0),
        ("c.png", "a dog", True, 0.5),
        ("d.png", "sks dog", True, 0.5),
    ]
    assert (about.pictures, about.class_pictures, about.class_triggers) == (1, 2, ["d.png"])
    del keys["class_prompt"]
    assert "data.class_prompt" in wrong(tmp_path / "own", **keys)


def test_broken_files_are_named_with_their_reason(tmp_path: Path) -> None:
    put(tmp_path, "good.png")
    for name, data in (("empty.png", b""), ("page.jpg", b"<html>"), ("lfs.png", b"version https://git-lfs.github")):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    cut = put(tmp_path, "cut.png")
    cut.write_bytes(cut.read_bytes()[:300])
    put(tmp_path, "phone.png").rename(tmp_path / "phone.heic")
    message = wrong(tmp_path)
    assert "4 of 6 pictures cannot be used" in message  # phone.heic holds a PNG, which is read
    for words in ("empty.png: an empty file", "page.jpg: a web page", "lfs.png: a Git LFS pointer", "cut.png: damaged"):
        assert words in message
    pictures, about = read(tmp_path, broken="drop")
    assert [p.name for p in pictures] == ["good.png", "phone.heic"]
    assert len(about.broken) == 4
    for path in (tmp_path / "good.png", tmp_path / "phone.heic"):
        path.write_bytes(b"no")
    assert "no picture is left" in wrong(tmp_path, broken="drop")


@pytest.mark.parametrize("place", ["beside", "masks", "elsewhere"])
def test_masks_are_found(tmp_path: Path, place: str) -> None:
    own, other = tmp_path / "own", tmp_path / "shades"
    put(own, "in/a.png")
    put(own, "b.png")
    mask = Image.new("L", (48, 32), 255)
    name = {"beside": own / "in/a.mask.png", "masks": own / "masks/in/a.jpg", "elsewhere": other / "a.png"}[place]
    put(name.parent, name.name, None, mask)
    keys = {"masks": str(other)} if place == "elsewhere" else {}
    pictures, about = read(own, **keys)
    assert {p.name: p.mask for p in pictures} == {"b.png": None, "in/a.png": name}
    assert (about.masks, about.resized_masks) == (1, 0)
    assert read(own, masks="off")[1].masks == 0


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    put(tmp_path, "fox.png")
    put(tmp_path, "foy.mask.png", None)
    assert "foy.mask.png: no picture of this name; the nearest is fox.png" in wrong(tmp_path)
    (tmp_path / "foy.mask.png").rename(tmp_path / "fox.mask.png")
    put(tmp_path, "fox.mask.png", None, Image.new("L", (96, 64)))
    assert read(tmp_path)[1].resized_masks == 1
    put(tmp_path, "fox.mask.png", None, Image.new("L", (64, 64)))
    assert "64 x 64 pixels, but fox.png has 48 x 32" in wrong(tmp_path)
    (tmp_path / "fox.mask.png").write_bytes(b"no")
    assert "not a picture" in wrong(tmp_path)


def test_transparency_as_mask(tmp_path: Path) -> None:
    see_through = scene()
    see_through.putalpha(100)
    put(tmp_path, "a.png", "a", see_through)
    put(tmp_path, "b.png")
    pictures, about = read(tmp_path, masks="alpha")
    assert [p.alpha for p in pictures] == [True, False]
    assert about.alpha_masks == 1
    assert [p.alpha for p in read(tmp_path)[0]] == [False, False]


def test_keys_follow_content_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png", "x", scene(seed=1))
    put(tmp_path / "two", "z.png", "x", scene(seed=1))
    (a,), (z,) = read(tmp_path / "one")[0], read(tmp_path / "two")[0]
    assert a.key == z.key
    assert pictures_digest([a]) == pictures_digest([z])
    put(tmp_path / "two", "z.png", "y", scene(seed=1))
    assert read(tmp_path / "two")[0][0].key != a.key
    put(tmp_path / "two", "z.png", "x", scene(seed=2))
    assert read(tmp_path / "two")[0][0].key != a.key


def test_pictures_are_held_out_like_rows(tmp_path: Path) -> None:
    for i in range(10):
        put(tmp_path, f"{i}.png", f"number {i % 5}", scene(seed=i % 5))
    pictures, _ = read(tmp_path)
    train, held = split_pictures(pictures, 0.2, 3)
    assert (len(train), len(held)) == (8, 2)
    assert not {p.key for p in train} & {p.key for p in held}
    assert split_pictures(pictures[::-1], 0.2, 3)[1] == held[::-1]


def test_folders_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert f"did you mean {tmp_path / 'pictures'}?" in wrong(tmp_path / "picture")
    (tmp_path / "pictures/a.pdf").write_bytes(b"")
    assert "the folder holds 1 .pdf" in wrong(tmp_path / "pictures")
    assert "this is a file" in wrong(put(tmp_path, "a.png"))


def test_several_folders_and_a_validation_folder(tmp_path: Path) -> None:
    for name in ("one", "two", "held"):
        put(tmp_path / name, f"{name}.png", name)
    keys = settings((str(tmp_path / "one"), str(tmp_path / "two")), validation=str(tmp_path / "held"))
    seen: list[tuple[int, int]] = []
    pictures, _ = read_pictures(keys, progress=lambda n, of: seen.append((n, of)))
    assert [p.caption for p in pictures] == ["one", "two"]
    assert seen == [(1, 2), (2, 2)]
    assert [p.caption for p in read_pictures(keys, "validation")[0]] == ["held"]


@pytest.mark.parametrize(
    "keys",
    [
        {"background": "mauve"},
        {"resolution": 4},
        {"resolution": ()},
        {"trigger": "a, b"},
        {"trigger": " "},
        {"caption_dropout": 1.5},
        {"class_prompt": "a sks dog", "trigger": "sks"},
        {"pictures": ("a", "b"), "masks": "m"},
        {"flips": True},
    ],
)
def test_settings_are_strict(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImageDataSection.model_validate({"pictures": "a", **keys})


def test_every_setting_says_what_it_means() -> None:
    for name, key in ImageDataSection.model_fields.items():
        assert key.description, name
