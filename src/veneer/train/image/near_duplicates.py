"""Near-duplicates: pictures that look the same although their files differ.

    near_duplicates([perceptual_hash(image) for image in images]) -> [(i, j), …]

A difference hash (dHash, Krawetz 2013: is each of 16 x 16 gray samples brighter than its right neighbor, here
by more than flat areas differ after JPEG) finds pairs, and a 16 x 16 color thumbnail confirms them: flat
drawings can share outlines, and so hashes, without being alike. Re-encoding, resizing and slight changes of
color stay within both bounds; mirrored pictures are compared too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_SIDE = 16
_MOST_BITS = 20  # maximum of 256 that can differ
_MOST_COLOUR = 0.03  # maximum root mean square over the thumbnail, in 0 to 1
_MARGIN = 2  # of 255: minimum difference of a brighter sample


@dataclass(frozen=True)
class PerceptualHash:
    """The hash of a picture.

    `bits`: 256 bits of the difference hash, packed to 32 bytes; `mirror`: those of the mirrored picture.
    `colours`: 16 x 16 RGB, 768 bytes."""

    bits: bytes
    mirror: bytes
    colours: bytes

    def mirrored(self) -> PerceptualHash:
        """Return the hash of the mirrored picture."""
        colours = np.frombuffer(self.colours, np.uint8).reshape(_SIDE, _SIDE, 3)
        return PerceptualHash(self.mirror, self.bits, colours[:, ::-1].tobytes())


def perceptual_hash(image: Image.Image) -> PerceptualHash:
    """Return the hash of an RGB picture of any size."""
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    thumbnail = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    bits, mirror = (g[:, :-1] > g[:, 1:] + _MARGIN for g in (grey, grey[:, ::-1]))
    return PerceptualHash(np.packbits(bits).tobytes(), np.packbits(mirror).tobytes(), thumbnail.tobytes())


def near_duplicates(
    hashes: Sequence[PerceptualHash], others: Sequence[PerceptualHash] | None = None, *, block: int = 2048
) -> list[tuple[int, int]]:
    """Return near-duplicates (i, j), i < j within `hashes`.

    With `others`, i is in `hashes` and j in `others`. O(n²), a few seconds for 5,000 pictures. `block`:
    pictures compared at once; the products of 2048 take 16 MB."""
    if not hashes or (others is not None and not others):
        return []
    pairs: set[tuple[int, int]] = set()
    left = _matrices(hashes)
    for mirrored in (False, True):
        right = _matrices([h.mirrored() if mirrored else h for h in (hashes if others is None else others)])
        for i in range(0, len(left[0]), block):
            for j in range(i if others is None else 0, len(right[0]), block):
                one, two = ([m[n : n + block] for m in side] for n, side in ((i, left), (j, right)))
                pairs |= {(i + a, j + b) for a, b in _near(one, two, block) if others is not None or i + a < j + b}
    return sorted(pairs)


def _near(left: Sequence[Any], right: Sequence[Any], block: int) -> Iterator[tuple[int, int]]:
    distance = (_SIDE * _SIDE - left[0] @ right[0].T) / 2  # Hamming
    rows, columns = np.nonzero(distance <= _MOST_BITS)
    for at in range(0, len(rows), block):
        a, b = rows[at : at + block], columns[at : at + block]
        near = np.mean((left[1][a] - right[1][b]) ** 2, axis=1) <= _MOST_COLOUR**2
        yield from zip(a[near].tolist(), b[near].tolist(), strict=True)


def _matrices(hashes: Sequence[PerceptualHash]) -> tuple[Any, Any]:
    """Return (signs of the bits: (n, 256), colors: (n, 768) in 0..1), float32."""
    bits = np.unpackbits(np.frombuffer(b"".join(h.bits for h in hashes), np.uint8))
    colours = np.frombuffer(b"".join(h.colours for h in hashes), np.uint8)
    return (
        bits.reshape(len(hashes), -1).astype(np.float32) * 2 - 1,
        colours.reshape(len(hashes), -1).astype(np.float32) / 255,
    )
