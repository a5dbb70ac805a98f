"""Training pictures in folders: class pictures, broken files, several folders, and cache keys."""

from __future__ import annotations

from pathlib import Path

from tests.train.make_pictures import put, read_error, scene, settings
from veneer.train.image.pictures import pictures_digest, read_pictures


def test_class_pictures_have_a_weight_and_no_trigger(tmp_path: Path) -> None:
    put(tmp_path, "own/a.png", "a dog")
    put(tmp_path, "own/class/c.png", None)
    put(tmp_path, "own/class/d.png", "sks dog")
    keys = {"class_folder": str(tmp_path / "own/class"), "class_prompt": "a dog", "class_weight": 0.5, "trigger": "sks"}
    pictures, _ = read_pictures(settings(tmp_path / "own", **keys))
    assert [(p.name, p.caption, p.is_class, p.weight) for p in pictures] == [
        ("a.png", "sks, a dog", False, 1.0),
        ("c.png", "a dog", True, 0.5),
        ("d.png", "sks dog", True, 0.5),
    ]
    del keys["class_prompt"]
    assert "data.class_prompt" in read_error(tmp_path / "own", **keys)


def test_broken_files_are_listed_with_reasons(tmp_path: Path) -> None:
    put(tmp_path, "good.png")
    for name, data in (("empty.png", b""), ("page.jpg", b"<html>"), ("lfs.png", b"version https://git-lfs.github")):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    cut = put(tmp_path, "cut.png")
    cut.write_bytes(cut.read_bytes()[:300])
    put(tmp_path, "phone.png").rename(tmp_path / "phone.heic")
    message = read_error(tmp_path)
    assert "4 of 6 pictures cannot be used" in message  # phone.heic contains a PNG, which can be read
    for words in (
        "empty.png: an empty file",
        "page.jpg: not a picture",
        "lfs.png: a Git LFS pointer",
        "cut.png: damaged",
    ):
        assert words in message
    pictures, summary = read_pictures(settings(tmp_path, broken="drop"))
    assert [p.name for p in pictures] == ["good.png", "phone.heic"]
    assert len(summary.broken) == 4
    for path in (tmp_path / "good.png", tmp_path / "phone.heic"):
        path.write_bytes(b"no")
    assert "no picture is left" in read_error(tmp_path, broken="drop")


def test_several_folders_and_a_validation_folder(tmp_path: Path) -> None:
    for name in ("one", "two", "held"):
        put(tmp_path / name, f"{name}.png", name)
    keys = settings((str(tmp_path / "one"), str(tmp_path / "two")), validation=str(tmp_path / "held"))
    assert [p.caption for p in read_pictures(keys)[0]] == ["one", "two"]
    assert [p.caption for p in read_pictures(keys, "validation")[0]] == ["held"]


def test_key_depends_on_content_only(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png", "x", scene(seed=1))
    put(tmp_path / "two", "z.png", "x", scene(seed=1))
    (a,), (z,) = (read_pictures(settings(tmp_path / name))[0] for name in ("one", "two"))
    assert a.key == z.key
    assert pictures_digest([a]) == pictures_digest([z])
    for caption, seed in (("y", 1), ("x", 2)):
        put(tmp_path / "two", "z.png", caption, scene(seed=seed))
        assert read_pictures(settings(tmp_path / "two"))[0][0].key != a.key
