from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tests.train.make_pictures import ADOBE_RGB, SRGB, corners, grey_profile, profile, scene, settings, srgb_of, to_xyz
from veneer.train.image.decode import DecodedPicture, UnreadablePicture, decode_picture, mask_of


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def opened(
    image: Image.Image, format: str = "PNG", keys: dict[str, Any] | None = None, **options: Any
) -> DecodedPicture:
    return decode_picture(encoded(image, format, **options), settings(**(keys or {})))


def refused(data: bytes, **keys: Any) -> str:
    with pytest.raises(UnreadablePicture) as caught:
        decode_picture(data, settings(**keys))
    return str(caught.value)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


# EXIF 2.3, tag 0x0112: the edges of the upright picture at which the stored row 0 and column 0 lie
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: a.transpose(1, 0, 2)[:, ::-1]),
        (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda a: a.transpose(1, 0, 2)[::-1]),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_picture_is_rotated_upright(format: str, orientation: int, upright: Any) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = corners(40, 24)
    exact: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    found = opened(image, format, exif=exif, **exact)
    want = upright(array(image))
    assert found.size == (want.shape[1], want.shape[0])
    assert np.abs(array(found.colour) - want).max() <= 3  # JPEG rounds
    if format != "TIFF":  # Pillow rotates TIFF while reading, so there is no note
        assert ("turned upright (EXIF)" in found.notes) == (orientation != 1)


def test_damaged_exif_does_not_prevent_reading() -> None:
    found = opened(scene(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fjunk")
    assert found.size == (48, 32)


@pytest.mark.parametrize(("primaries", "gamma"), [(ADOBE_RGB, 2.2), (SRGB, 1.0), (SRGB, 1.8)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_profile_is_converted_to_srgb(mode: str, primaries: Any, gamma: float) -> None:
    """The float64 reference decodes with the profile's exponent, changes primaries, and encodes with sRGB's
    curve."""
    image = scene()
    linear = (array(image) / 255) ** (round(gamma * 256) / 256)
    want = srgb_of(linear @ to_xyz(primaries).T @ np.linalg.inv(to_xyz(SRGB)).T)
    found = opened(image.convert(mode), icc_profile=profile(primaries, gamma))
    assert np.abs(array(found.colour) - want).max() <= 3
    assert np.abs(array(found.colour) - array(image)).max() > 10
    assert found.notes == ("color profile converted to sRGB",)


def test_a_gray_profile_is_converted_and_srgb_is_kept() -> None:
    grey = scene().convert("L")
    found = opened(grey, icc_profile=grey_profile(1.0))
    assert np.abs(array(found.colour) - srgb_of(array(grey) / 255)[..., None]).max() <= 2
    same = opened(scene(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert np.array_equal(array(same.colour), array(scene()))
    assert same.notes == ()


@pytest.mark.parametrize("data", [b"junk", profile(SRGB, 2.2)[:200], grey_profile(2.2)])
def test_a_profile_that_cannot_be_used_is_noted(data: bytes) -> None:
    found = opened(scene(), icc_profile=data)
    assert np.array_equal(array(found.colour), array(scene()))
    assert found.notes == ("a color profile that cannot be used; sRGB is assumed",)


def test_every_mode_becomes_eight_bit_rgb() -> None:
    image = scene()
    for mode in ("L", "1", "P", "LA", "RGBA"):
        found = opened(image.convert(mode))
        assert found.colour.mode == "RGB"
        assert found.alpha is None
        assert np.array_equal(array(found.colour), array(image.convert(mode).convert("RGB"))), mode
    cmyk = opened(image.convert("CMYK"), "TIFF")
    assert np.array_equal(array(cmyk.colour), array(image))  # exact: both conversions only invert values to 255 - x
    assert cmyk.notes == ("CMYK without a profile, converted without color management",)
    lab = opened(image.convert("LAB"), "TIFF")
    assert np.abs(array(lab.colour) - array(image)).mean() < 3  # inexact, because 8-bit a* and b* are coarse
    jpeg = opened(image.convert("CMYK"), "JPEG", quality=100)
    assert np.abs(array(jpeg.colour) - array(image)).mean() < 4


def test_sixteen_bits_keep_their_brightness() -> None:
    values = np.linspace(0, 65535, 48 * 32).round().astype(np.uint16).reshape(32, 48)
    found = opened(Image.fromarray(values))
    assert np.abs(array(found.colour) - (values / 257)[..., None]).max() <= 0.5 + 1e-9
    assert found.notes == ("reduced from 16 to 8 bits",)
    colour = np.stack([values, values[::-1], values[:, ::-1]], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    found = decode_picture(png(48, 32, 16, 2, rows), settings())
    assert np.abs(array(found.colour) - colour / 257).max() <= 1


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("name", "colour"), [("white", (255,) * 3), ("#102030", (16, 32, 48)), ("black", (0,) * 3)])
def test_transparent_pixels_show_the_background(name: str, colour: tuple[int, int, int]) -> None:
    image = scene()
    alpha = np.tile(np.linspace(0, 255, 48).round().astype(np.uint8), (32, 1))
    image.putalpha(Image.fromarray(alpha))
    found = opened(image, keys={"background": name})
    share = alpha[..., None] / 255
    assert np.abs(array(found.colour) - (array(scene()) * share + np.array(colour) * (1 - share))).max() <= 1
    assert np.array_equal(array(found.alpha), alpha)
    assert found.notes == (f"transparent pixels on {name}",)


def test_one_transparent_palette_color_shows_the_background() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 0, 1])
    found = opened(image, transparency=0)
    assert [found.colour.getpixel((x, 0)) for x in range(4)] == [(255,) * 3, (200, 100, 50)] * 2
    assert [found.alpha.getpixel((x, 0)) for x in range(4)] == [0, 255, 0, 255]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animation_is_refused(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "green", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert "3 frames" in refused(data)


def test_a_phones_preview_image_is_not_an_animation() -> None:
    data = encoded(scene(), "MPO", save_all=True, append_images=[scene(seed=1)])
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert decode_picture(data, settings()).notes == ()


def test_a_bomb_is_refused_by_its_header() -> None:
    """Covers 30,000 x 30,000 gray pixels in under a megabyte, and a header that claims far more pixels."""
    assert "most_megapixels" in refused(png(30000, 30000, 8, 0, b"\0" * 1000))
    assert "most_megapixels" in refused(png(2**31 - 1, 2**31 - 1, 8, 0, b""))
    data = png(100, 100, 8, 0, (b"\0" + bytes(100)) * 100)
    assert "most_megapixels = 0.009" in refused(data, most_megapixels=0.009)
    assert decode_picture(data, settings(most_megapixels=0.01)).size == (100, 100)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"hello", "not a picture that can be read (it begins with b'hello')"),
        (encoded(scene(), "PNG")[:400], "damaged"),
        (encoded(scene(96, 96), "JPEG")[:900], "damaged"),
        (encoded(scene(), "PNG").replace(b"IDAT", b"IDAX"), "not a picture that can be read"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "outside 0 to 65535"),
    ],
)
def test_a_file_that_is_not_a_picture_is_described(data: bytes, reason: str) -> None:
    assert reason in refused(data)


def test_masks_use_gray_levels_or_transparency() -> None:
    grey = Image.new("L", (4, 4), 200)
    assert mask_of(encoded(grey, icc_profile=grey_profile(1.0)), settings()).getpixel((0, 0)) == 200
    assert mask_of(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 90))), settings()).getpixel((0, 0)) == 90
    assert mask_of(encoded(Image.new("1", (4, 4), 1)), settings()).getpixel((0, 0)) == 255
    lab = mask_of(encoded(Image.new("RGB", (4, 4), (200, 200, 200)).convert("LAB"), "TIFF"), settings())
    assert lab.getpixel((0, 0)) == pytest.approx(200, abs=2)


_WHOLE = [encoded(scene(), f) for f in ("PNG", "JPEG", "WEBP", "BMP", "GIF")]
_WHOLE += [encoded(scene(), "PNG", icc_profile=profile(ADOBE_RGB, 2.2)), encoded(scene().convert("P"), transparency=3)]


@effort(max_examples=200, deadline=None)
@given(st.sampled_from(_WHOLE), st.data())
def test_damaged_file_is_refused_or_decoded(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for at in draw.draw(st.lists(st.integers(0, len(data) - 1), max_size=6)):
        damaged[at] = draw.draw(st.integers(0, 255))
    damaged = damaged[: draw.draw(st.integers(1, len(data)) | st.just(len(data)))]
    for read in (decode_picture, mask_of):
        with contextlib.suppress(UnreadablePicture):
            read(bytes(damaged), settings(most_megapixels=1))
