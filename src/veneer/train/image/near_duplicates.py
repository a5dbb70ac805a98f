"""Near-duplicates: pictures that look the same although their files differ.

    near_duplicates([perceptual_hash(image) for image in images]) -> [(i, j), …]

A difference hash (dHash, Krawetz 2013: is each of 16 x 16 gray samples brighter than its right neighbor, here
by more than flat areas differ after JPEG) and a 16 x 16 color thumbnail must both agree: flat drawings can
share outlines, and so hashes, without being alike. Re-encoding, resizing and slight changes of color stay
within both bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

_SIDE = 16
_BITS = _SIDE * _SIDE
_MOST_BITS = 20  # maximum of 256 that can differ
_MOST_COLOUR = 0.03  # maximum root mean square over the thumbnail, in 0 to 1
_MARGIN = 2  # of 255: minimum difference of a brighter sample
_BLOCK = 1024  # pictures compared with all others at once


def perceptual_hash(image: Image.Image) -> bytes:
    """Return the hash of an RGB picture of any size: 32 bytes of bits, then a 16 x 16 RGB thumbnail."""
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = grey[:, :-1] > grey[:, 1:] + _MARGIN
    return np.packbits(bits).tobytes() + image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX).tobytes()


def near_duplicates(hashes: Sequence[bytes], others: Sequence[bytes] | None = None) -> list[tuple[int, int]]:
    """Return near-duplicates (i, j), i < j within `hashes`.

    With `others`, i indexes `hashes` and j indexes `others`. O(n²), a few seconds for 5,000 pictures."""
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
    """Return (signs of the bits: (n, 256), colors: (n, 768) in 0..1), float32."""
    data = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), _BITS // 8 + 3 * _BITS)
    bits = np.unpackbits(data[:, : _BITS // 8], axis=1)
    return bits.astype(np.float32) * 2 - 1, data[:, _BITS // 8 :].astype(np.float32) / 255
