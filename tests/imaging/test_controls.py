"""Control pictures: specs, edge detection and sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import veneer
from tests.tiny_image_base import tiny_image_base
from veneer.errors import BaseError, ConfigError, DataError, MissingExtraError
from veneer.imaging.controls import (
    ControlSpec,
    canny,
    control_model_of,
    control_picture,
    flattened,
    hashed_picture,
    parse_control,
)
from veneer.models.image.base import load_control, load_image


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("canny=sketch.png", ControlSpec("canny", "sketch.png")),
        ("canny=sketch.png:0.7", ControlSpec("canny", "sketch.png", 0.7)),
        ("edges=a/b.png:0.7@0-0.5", ControlSpec("edges", "a/b.png", 0.7, "", 0.0, 0.5)),
        ("depth=d.png", ControlSpec("depth", "d.png")),
        ("depth@runs/depth=d.png:0.5", ControlSpec("depth", "d.png", 0.5, "runs/depth")),
        ("canny=C:\\a.png", ControlSpec("canny", "C:\\a.png")),
    ],
)
def test_control_spec_is_parsed(text: str, spec: ControlSpec) -> None:
    assert parse_control(text) == spec


@pytest.mark.parametrize(
    "text", ["sketch.png", "canny=", "canny=a.png:x", "canny=a.png:0.7@50%-60%", "canny=a.png@0.6-0.2", "pose=d.png"]
)
def test_invalid_control_spec_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_control(text)


def test_default_controlnet_depends_on_the_base(tmp_path: Path) -> None:
    base = veneer.load_image_base(str(tiny_image_base(tmp_path, "sdxl")))
    depth = parse_control("depth=d.png")
    assert control_model_of(base, depth) == "diffusers/controlnet-depth-sdxl-1.0"
    assert control_model_of(base, parse_control("edges=d.png")) == "diffusers/controlnet-canny-sdxl-1.0"
    assert control_model_of(base, parse_control("depth@other=d.png")) == "other"
    catalogue = veneer.load_image_base("catalogue-sdxl")
    assert control_model_of(catalogue, depth) == "catalogue-sdxl-control"
    qwen = veneer.load_image_base(str(tiny_image_base(tmp_path, "qwen-image")))
    with pytest.raises(ConfigError, match="no depth ControlNet is known for"):
        control_model_of(qwen, depth)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(BaseError, match="this is not a ControlNet: its config says nothing"):
        load_control(str(tmp_path / "empty"), base)
    klein = load_image(str(tiny_image_base(tmp_path, "klein")))
    with pytest.raises(ConfigError, match="diffusers has no ControlNet for FLUX"):
        control_model_of(klein, depth)


def test_edges_equal_opencvs_after_resizing() -> None:
    cv2 = pytest.importorskip("cv2")
    drawn = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(drawn).rectangle((16, 16, 48, 48), fill="black")
    made, notes = control_picture(ControlSpec("canny", "a.png"), drawn, 32, 32)
    small = drawn.resize((32, 32), Image.Resampling.LANCZOS).convert("L")
    assert np.array_equal(np.asarray(made)[..., 0], cv2.Canny(np.asarray(small), 100, 200))
    assert "64×64 to 32×32" in notes[0]
    assert "edges detected" in notes[1]
    same, notes = control_picture(ControlSpec("edges", "a.png"), made, 32, 32)
    assert same.tobytes() == made.tobytes()
    assert "used unchanged" in notes[0]
    with pytest.raises(DataError, match="no edges"):
        control_picture(ControlSpec("canny", "a.png"), Image.new("RGB", (32, 32)), 32, 32)
    with pytest.raises(ConfigError, match="another aspect ratio"):
        control_picture(ControlSpec("edges", "a.png"), drawn, 64, 32)


def test_missing_opencv_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(MissingExtraError, match="OpenCV"):
        canny(Image.new("L", (8, 8)))


def test_pictures_are_opened_upright_without_transparency(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: rotated by a quarter turn
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=exif)
    assert hashed_picture(tmp_path / "a.jpg")[0].size == (4, 8)
    assert flattened(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert flattened(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), "black").getpixel((0, 0)) == (0, 0, 0)
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.asarray(hashed_picture(tmp_path / "deep.png")[0]).tolist() == [[0, 1, 128, 255]], (
        "16 bits are not clipped"
    )
    still, moving = Image.new("RGB", (2, 2)), tmp_path / "moving.webp"
    still.save(moving, save_all=True, append_images=[Image.new("RGB", (2, 2), "red")])
    with pytest.raises(DataError, match="has 2 frames"):
        hashed_picture(moving)
    (tmp_path / "b.png").write_text("no")
    with pytest.raises(DataError, match="not a picture"):
        hashed_picture(tmp_path / "b.png")
    with pytest.raises(DataError, match="no such picture"):
        hashed_picture(tmp_path / "c.png")
    with pytest.raises(DataError) as caught:
        hashed_picture(tmp_path / "a.jpeg")
    assert "a.jpg" in (caught.value.fix or "")
    with pytest.raises(DataError, match="a folder"):
        hashed_picture(tmp_path)
