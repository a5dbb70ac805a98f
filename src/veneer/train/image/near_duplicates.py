"""Find near-duplicates: images that look the same although their files differ.

    near_duplicates([perceptual_hash(image) for image in images]) -> [(i, j), …]

Two images are near-duplicates if both a difference hash and a 16 x 16 color thumbnail are similar. The
difference hash (dHash, Krawetz 2013) records whether each of 16 x 16 gray samples is brighter than its right
neighbor, by a margin above the JPEG noise of flat areas. The thumbnail is needed because flat drawings can
have equal outlines, and therefore equal hashes, without looking alike. Re-encoding, resizing and slight color
changes remain within both limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

_SIDE = 16
_BITS = _SIDE * _SIDE
_MOST_BITS = 20  # maximum number of the 256 bits that differ between near-duplicates
_MOST_COLOUR = 0.03  # maximum root mean square difference between the thumbnails, with values from 0 to 1
_MARGIN = 2  # minimum difference (of 255) for a sample to count as brighter
_BLOCK = 1024  # number of images per block that is compared with all others at once


def perceptual_hash(image: Image.Image) -> bytes:
    """Return the hash of an RGB image of any size: 32 bytes of bits, then a 16 x 16 RGB thumbnail."""
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = grey[:, :-1] > grey[:, 1:] + _MARGIN
    return np.packbits(bits).tobytes() + image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX).tobytes()


def near_duplicates(hashes: Sequence[bytes], others: Sequence[bytes] | None = None) -> list[tuple[int, int]]:
    """Return near-duplicates as index pairs (i, j) with i < j.

    With `others`, i indexes `hashes` and j indexes `others`. Takes O(n²), a few seconds for 5,000 images."""
    bits, colours = _matrices(hashes)
    other_bits, other_colours = _matrices(hashes if others is None else others)
    pairs = []
    for start in range(0, len(hashes), _BLOCK):
        b, c = bits[start : start + _BLOCK], colours[start : start + _BLOCK]
        squares = (c**2).sum(1)[:, None] - 2 * c @ other_colours.T + (other_colours**2).sum(1)
        alike = (b @ other_bits.T >= _BITS - 2 * _MOST_BITS) & (squares <= 3 * _BITS * _MOST_COLOUR**2)
        indices = zip(*(axis.tolist() for axis in np.nonzero(alike)), strict=True)
        pairs += [(start + i, j) for i, j in indices if others is not None or start + i < j]
    return pairs


def _matrices(hashes: Sequence[bytes]) -> tuple[Any, Any]:
    """Return (bits as ±1: (n, 256), colors: (n, 768) in 0..1) in float32."""
    data = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), _BITS // 8 + 3 * _BITS)
    bits = np.unpackbits(data[:, : _BITS // 8], axis=1)
    return bits.astype(np.float32) * 2 - 1, data[:, _BITS // 8 :].astype(np.float32) / 255
