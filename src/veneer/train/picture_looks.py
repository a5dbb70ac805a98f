"""Near-duplicates: pictures that look the same although their files differ.

    look = look_of(image)          near_pairs(looks) -> [(i, j), …]

A difference hash (dHash, Krawetz 2013: is each of 16 x 16 grey samples brighter than its right neighbour, here by more
than flat areas differ after JPEG) finds pairs, and a 16 x 16 colour thumbnail confirms them: flat drawings share
outlines, and with them hashes, without being alike. Re-encoding, resizing and slight changes of colour stay within both
bounds; mirrored pictures are compared too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["Look", "look_of", "near_pairs"]

_SIDE = 16
_MOST_BITS = 20  # of 256 that may differ
_MOST_COLOUR = 0.03  # root mean square over the thumbnail, of 0 to 1
_MARGIN = 2  # of 255: what counts as brighter
_BLOCK = 2048  # pictures compared at once: 2048 x 2048 float32 products are 16 MB


@dataclass(frozen=True)
class Look:
    """`bits`: 256 bits of the difference hash, packed to 32 bytes; `mirror`: those of the mirrored picture.
    `colours`: 16 x 16 RGB, 768 bytes."""

    bits: bytes
    mirror: bytes
    colours: bytes

    def mirrored(self) -> Look:
        """The look of the mirrored picture."""
        return Look(self.mirror, self.bits, _colours(self)[:, ::-1].tobytes())


def look_of(image: Image.Image) -> Look:
    """The look of an RGB picture of any size."""
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    thumbnail = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    bits, mirror = (g[:, :-1] > g[:, 1:] + _MARGIN for g in (grey, grey[:, ::-1]))
    return Look(np.packbits(bits).tobytes(), np.packbits(mirror).tobytes(), thumbnail.tobytes())


def near_pairs(looks: Sequence[Look], others: Sequence[Look] | None = None) -> list[tuple[int, int]]:
    """(i, j) of near-duplicates, i < j within `looks`; with `others`, i in `looks` and j in `others`.

    O(n²) in blocks: about a second for 5,000 pictures."""
    found: list[tuple[int, int]] = []
    right = looks if others is None else others
    for mirrored in (False, True):
        columns = [look.mirrored() if mirrored else look for look in right]
        for start in range(0, len(looks), _BLOCK):
            left = looks[start : start + _BLOCK]
            for begin in range(0, len(columns), _BLOCK):
                if others is None and begin + _BLOCK <= start:
                    continue
                for a, b in _near(left, columns[begin : begin + _BLOCK]):
                    pair = (start + a, begin + b)
                    if others is not None or pair[0] < pair[1]:
                        found.append(pair)
    return sorted(set(found))


def _near(left: Sequence[Look], right: Sequence[Look]) -> list[tuple[int, int]]:
    signs = [np.stack([_unpacked(look.bits).ravel() for look in side]) * np.float32(2) - 1 for side in (left, right)]
    distance = (_SIDE * _SIDE - signs[0] @ signs[1].T) / 2  # Hamming
    pairs = []
    for a, b in zip(*np.nonzero(distance <= _MOST_BITS), strict=True):
        difference = (_colours(left[a]).astype(np.float64) - _colours(right[b])) / 255
        if np.sqrt(np.mean(difference**2)) <= _MOST_COLOUR:
            pairs.append((int(a), int(b)))
    return pairs


def _unpacked(bits: bytes) -> Any:
    return np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(_SIDE, _SIDE).astype(bool)


def _colours(look: Look) -> Any:
    return np.frombuffer(look.colours, np.uint8).reshape(_SIDE, _SIDE, 3)
