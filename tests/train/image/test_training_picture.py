"""What a picture is known by."""

from __future__ import annotations

from pathlib import Path

from tests.train.make_pictures import put, scene, settings
from veneer.train.image.pictures import read_pictures
from veneer.train.image.training_picture import TrainingPicture, pictures_digest


def read(folder: Path) -> list[TrainingPicture]:
    return read_pictures(settings(folder))[0]


def test_keys_follow_content_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png", "x", scene(seed=1))
    put(tmp_path / "two", "z.png", "x", scene(seed=1))
    (a,), (z,) = read(tmp_path / "one"), read(tmp_path / "two")
    assert a.key == z.key
    assert pictures_digest([a]) == pictures_digest([z])
    put(tmp_path / "two", "z.png", "y", scene(seed=1))
    assert read(tmp_path / "two")[0].key != a.key
    put(tmp_path / "two", "z.png", "x", scene(seed=2))
    assert read(tmp_path / "two")[0].key != a.key
