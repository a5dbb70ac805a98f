"""Control pictures: told from those of another kind, and from photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.train.make_pictures import scene
from veneer.models.image.control_kinds import unlike_kind


def edges() -> Image.Image:
    cv2 = pytest.importorskip("cv2")
    return Image.fromarray(cv2.Canny(np.asarray(scene(96, 96, seed=2)), 30, 60)).convert("RGB")


def depth() -> Image.Image:
    return scene(96, 96, seed=4).convert("L").convert("RGB")


def pose() -> Image.Image:
    image = Image.new("RGB", (96, 96))
    pen = ImageDraw.Draw(image)
    for i, colour in enumerate(("#ff0000", "#ffaa00", "#00ff55", "#0055ff")):
        pen.line((48, 20 + 10 * i, 20 + 15 * i, 85), fill=colour, width=4)
    return image


MADE = {"canny": edges, "depth": depth, "pose": pose, "photo": lambda: scene(96, 96, seed=5)}


@pytest.mark.parametrize("kind", ["canny", "depth", "pose"])
def test_a_control_picture_is_of_its_own_kind_alone(kind: str) -> None:
    verdicts = {name: unlike_kind(make(), kind) for name, make in MADE.items()}
    assert [name for name, why in verdicts.items() if not why] == [kind]
    assert not any(unlike_kind(make(), "picture") for make in MADE.values())
    assert "black all over" in unlike_kind(Image.new("RGB", (8, 8)), kind)


def test_what_a_resized_jpeg_of_edges_is(tmp_path: Path) -> None:
    large = edges().resize((192, 192), Image.Resampling.NEAREST)
    large.resize((120, 120), Image.Resampling.LANCZOS).save(tmp_path / "edges.jpg", quality=80)
    assert unlike_kind(Image.open(tmp_path / "edges.jpg"), "canny") == ""
    inverted = Image.fromarray(255 - np.asarray(edges()))
    assert "invert it" in unlike_kind(inverted, "canny")
