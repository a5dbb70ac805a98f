"""Test pictures: folders of drawings, and color profiles written byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from veneer.errors import DataError
from veneer.train.config.image import ImageDataSection
from veneer.train.image.pictures import read_pictures

ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))  # chromaticities of red, green and blue, for white point D65
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
D65 = np.array([0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290])
D50 = np.array([0.9642, 1.0, 0.8249])


def scene(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """Return a smooth picture that is different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def corners(width: int, height: int) -> Image.Image:
    """Return a picture with red top left, green top right, blue bottom left, and white bottom right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


def put(folder: Path, name: str, caption: str | None = "a thing", image: Image.Image | None = None) -> Path:
    """Write a picture and its caption file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or scene(seed=sum(map(ord, name)))).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def settings(folder: Path | str | tuple[str, ...] = "pictures", **keys: object) -> ImageDataSection:
    where = folder if isinstance(folder, tuple) else str(folder)
    return ImageDataSection.model_validate({"pictures": where, **keys})


def read_error(folder: Path | str, **keys: Any) -> str:
    """Return the error message for a folder that cannot be read."""
    with pytest.raises(DataError) as caught:
        read_pictures(settings(folder, **keys))
    return str(caught.value)


def to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the matrix from linear RGB to XYZ under D65, calculated from chromaticities (Lindbloom)."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, D65)


def bradford() -> np.ndarray:
    """Return the matrix from XYZ under D65 to XYZ under D50."""
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    return np.linalg.inv(cone) @ np.diag((cone @ D50) / (cone @ D65)) @ cone


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(primaries: tuple[tuple[float, float], ...], gamma: float) -> bytes:
    """Return an ICC version 2 matrix profile with primaries under D50 and the same gamma for all channels."""
    matrix = bradford() @ to_xyz(primaries)
    tags = {name: _curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    tags |= {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)}
    return _icc(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    return _icc(b"GRAY", {b"kTRC": _curve(gamma)})


def _icc(space: bytes, own: dict[bytes, bytes]) -> bytes:
    text = b"made by hand\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), b"cprt": b"text\0\0\0\0none\0"}
    tags |= {b"wtpt": _xyz(D50), **own}
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for signature, data in tags.items():
        data += bytes(-len(data) % 4)
        table += signature + struct.pack(">II", at + len(body), len(data))
        body += data
    head = bytearray(128)
    head[0:4] = struct.pack(">I", 128 + len(table) + len(body))
    head[8:12] = bytes([2, 0x40, 0, 0])
    head[12:24] = b"mntr" + space + b"XYZ "
    head[36:40] = b"acsp"
    head[68:80] = b"".join(struct.pack(">i", round(v * 65536)) for v in D50)
    return bytes(head) + table + body


def srgb_of(linear: np.ndarray) -> np.ndarray:
    """Encode linear values as sRGB (IEC 61966-2-1), scaled to 0..255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
