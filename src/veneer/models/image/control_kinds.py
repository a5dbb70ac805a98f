"""Check by its colors whether a picture can be a control picture of a given kind.

| kind  | content                                    | pixel statistics                                     |
| canny | thin white lines on black (OpenCV's Canny) | gray, half of them black, few between dark and light |
| depth | gray by distance                           | gray, and not two-valued                             |
| pose  | a skeleton in colors on black (OpenPose)   | half of them black, most others colored              |

The bounds tolerate JPEG and downscaling. A picture that passes can still be the wrong picture of its kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_BLACK, _DARK, _LIGHT, _WHITE = 16, 48, 208, 239
_COLOURED = 48
"""Minimum difference between a colored pixel's channels; at most 255."""
_GREY = {"canny": "a picture of edges", "depth": "a depth picture"}


def unlike_kind(picture: Image, kind: str) -> str:
    """Return why an RGB picture is not of this `kind`, or "" if it can be.

    kind: picture, canny, depth or pose."""
    if kind == "picture":
        return ""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.int16)
    low, high = pixels.min(-1), pixels.max(-1)
    coloured, black = high - low >= _COLOURED, float((high <= _BLACK).mean())
    if black == 1:
        return "it is black all over"
    if kind == "pose":
        drawn = high > _BLACK
        if black < 0.5:
            return f"a skeleton is drawn on black, and {black:.0%} of it is black"
        if coloured[drawn].mean() < 0.5:
            return "a skeleton has coloured limbs, and its lines are grey"
        return ""
    if (share := float(coloured.mean())) > 0.02:
        return f"it has colours ({share:.0%} of its pixels), and {_GREY[kind]} is grey"
    between = float(((high > _DARK) & (high < _LIGHT)).mean())
    if kind == "depth":
        return "it is black and white alone, as edges are, and depth has greys" if between < 0.02 else ""
    if float((low >= _WHITE).mean()) > 0.5:
        return "it is mostly white, and edges are white on black: invert it"
    if black < 0.5 or between > 0.25:
        return f"edges are thin white lines on black, and {black:.0%} of it is black, {between:.0%} grey"
    return ""
