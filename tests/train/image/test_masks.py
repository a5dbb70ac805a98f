"""Masks: where they are found, and what is said of those that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.train.make_pictures import put, scene, settings, wrong
from veneer.train.image.pictures import read_pictures


@pytest.mark.parametrize("place", ["beside", "masks", "elsewhere"])
def test_masks_are_found(tmp_path: Path, place: str) -> None:
    own, other = tmp_path / "own", tmp_path / "shades"
    put(own, "in/a.png")
    put(own, "b.png")
    mask = Image.new("L", (48, 32), 255)
    name = {"beside": own / "in/a.mask.png", "masks": own / "masks/in/a.jpg", "elsewhere": other / "a.png"}[place]
    put(name.parent, name.name, None, mask)
    keys = {"masks": str(other)} if place == "elsewhere" else {}
    pictures, about = read_pictures(settings(own, **keys))
    assert {p.name: p.mask for p in pictures} == {"b.png": None, "in/a.png": name}
    assert (about.masks, about.resized_masks) == (1, 0)
    assert read_pictures(settings(own, masks="off"))[1].masks == 0


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    put(tmp_path, "fox.png")
    put(tmp_path, "foy.mask.png", None)
    assert "foy.mask.png: no picture of this name; the nearest is fox.png" in wrong(tmp_path)
    (tmp_path / "foy.mask.png").rename(tmp_path / "fox.mask.png")
    put(tmp_path, "fox.mask.png", None, Image.new("L", (96, 64)))
    assert read_pictures(settings(tmp_path))[1].resized_masks == 1
    put(tmp_path, "fox.mask.png", None, Image.new("L", (64, 64)))
    assert "64 x 64 pixels, but fox.png has 48 x 32" in wrong(tmp_path)
    (tmp_path / "fox.mask.png").write_bytes(b"no")
    assert "not a picture" in wrong(tmp_path)


def test_transparency_as_mask(tmp_path: Path) -> None:
    see_through = scene()
    see_through.putalpha(100)
    put(tmp_path, "a.png", "a", see_through)
    put(tmp_path, "b.png")
    pictures, about = read_pictures(settings(tmp_path, masks="alpha"))
    assert [p.alpha for p in pictures] == [True, False]
    assert about.alpha_masks == 1
    assert [p.alpha for p in read_pictures(settings(tmp_path))[0]] == [False, False]
