"""Errors when reading image files."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from veneer.errors import DataError
from veneer.files.pictures import open_image, upright
from veneer.imaging.controls import hashed_picture
from veneer.imaging.infotext import read_record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.effect_noise((32, 32), 90).save(tmp_path / "fox.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "fox.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("a fox")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize("read", [read_record, hashed_picture])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fx.png", r"there is no such picture[\s\S]*where: .*fx\.png[\s\S]*did you mean .*fox\.png\?"),
        ("no/fox.png", r"there is no such picture\s+where: .*fox\.png$"),
        ("folder.png", "this is a folder, not a picture"),
        ("text.png", "this is not a picture: it is in no format that Pillow knows"),
        ("empty.png", "this is not a picture: it is in no format that Pillow knows"),
        ("cut.png", "this is not a picture: .*truncated"),
    ],
)
def test_file_that_is_not_a_picture_is_refused(read: Callable[[Path], Any], name: str, says: str, folder: Path) -> None:
    with pytest.raises(DataError, match=says):
        read(folder / name)


def test_decoding_errors_in_the_block_are_reported(folder: Path) -> None:
    def read() -> None:
        with open_image(folder / "fox.png") as (picture, data):
            assert picture.size == (32, 32)
            assert data == (folder / "fox.png").read_bytes()
            raise SyntaxError("bad Exif")

    with pytest.raises(DataError, match=r"this is not a picture: bad Exif[\s\S]*fox"):
        read()


def test_error_of_a_huge_picture_states_the_pixel_limit(tmp_path: Path) -> None:
    """A file of 20,000 x 20,000 pixels in one color is small; only its header reveals the size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    white = tmp_path / "white.png"
    pixels = zlib.compress((b"\0" + b"\xff" * 2_500) * 20_000)
    white.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    for read in (read_record, hashed_picture):
        with pytest.raises(DataError, match="more pixels than veneer opens: 178,956,970") as error:
            read(white)
        assert "not a picture" not in str(error.value)
        assert "bomb" not in str(error.value)


@pytest.mark.parametrize(("first", "size"), [(b"", (4, 8)), (struct.pack("<HHI4s", 256, 2, 4, b"Mak"), (8, 4))])
def test_damaged_exif_is_ignored(first: bytes, size: tuple[int, int]) -> None:
    """The Exif data contain a rotation by 90 degrees.

    In the second case, the data also contain a width that is text, which Pillow reads but cannot write."""
    turn = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1 + bool(first)) + first + turn + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    assert upright(Image.open(file)).size == size
