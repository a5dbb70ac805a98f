"""How much of what was wanted is in a picture: of a brand's look, of a photographer's lens, of a product, of lines.

Each measure compares pictures with the true ones of the same scenes, and an effect is a share of the way from a scene
drawn without it to the same scene drawn with it: by distances,

    share = 1 - d(picture, truth) / d(plain, truth)      1: there, 0: as far away as without, below 0: farther away

or, where other effects are in the picture too, `way_gone`. So a measure needs no scale of its own. Pictures
are bytes (n, 128, 128, 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scenes import BRAND_PALETTE, SIDE, Array

_NEAR = 40.0  # of 255: a colour of the palette, drawn by a model


def share(got: float, without: float) -> float:
    """The share of an effect, by distances to the truth."""
    return 1 - got / without


def palette_distance(pictures: Array, truths: Array, palette: Sequence[str] = BRAND_PALETTE) -> float:
    """Half the sum of absolute differences between how often each colour of a palette, or none, is in both: 0 … 1."""
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in palette], dtype=float)
    one, two = (_palette_shares(each, colours) for each in (pictures, truths))
    return float(np.abs(one - two).sum(1).mean() / 2)


def _palette_shares(pictures: Array, colours: Array) -> Array:
    """(n, colours + 1): how many pixels are near each of the colours, and near none."""
    distance = np.stack([np.abs(pictures.astype(float) - colour).max(-1) for colour in colours], -1)
    nearest, close = distance.argmin(-1), distance.min(-1) < _NEAR
    kinds = np.where(close, nearest, len(colours)).reshape(len(pictures), -1)
    return np.stack([np.bincount(row, minlength=len(colours) + 1) for row in kinds]) / kinds.shape[1]


def way_gone(pictures: Array, truths: Array, without: Array) -> float:
    """How far pictures have gone from the truth without an effect towards the truth with it:

        <picture - without, truth - without> / |truth - without|²

    over the mean colours of 16 × 16 cells, the mean of all pictures. Unlike a distance it does not ask whether another
    effect, at right angles to this one, is there too."""
    x, one, none = (
        each.reshape(len(each), 16, SIDE // 16, 16, SIDE // 16, 3).mean((2, 4)).reshape(len(each), -1)
        for each in (pictures, truths, without)
    )
    way = one - none
    return float((((x - none) * way).sum(1) / (way * way).sum(1)).mean())


def lens_distance(pictures: Array, truths: Array, plain: Array) -> float:
    """Mean over the lens's marks, each the mean of all pictures, of how far they are from the truth's, in steps of what
    the lens does to `plain`; a mark that it hardly leaves there does not count."""
    one, two, none = (_lens_marks(each).mean(0) for each in (pictures, truths, plain))
    effect = np.abs(none - two)
    left = effect > 0.02
    return float((np.abs(one - two)[left] / effect[left]).mean())


def _lens_marks(pictures: Array) -> Array:
    """(n, 4): warmth of the lights, of the shadows, how much darker corners are than the middle, grain."""
    x = pictures.astype(float) / 255
    luma = x.mean(-1)
    warm = x[..., 0] - x[..., 2]
    middle = np.median(luma, axis=(1, 2), keepdims=True)
    lights = np.array([w[m].mean() for w, m in zip(warm, luma >= middle, strict=True)])
    shadows = np.array([w[m].mean() for w, m in zip(warm, luma < middle, strict=True)])
    q = SIDE // 8
    corners = np.stack([luma[:, :q, :q], luma[:, :q, -q:]]).mean((0, 2, 3))
    centre = luma[:, :q, 3 * q : 5 * q].mean((1, 2))  # both before the wall: a ground has its own brightness
    fine = luma[:, 1:-1, 1:-1] - (luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]) / 4
    grain = np.median(np.abs(fine), axis=(1, 2))  # half of the pixels lie on no edge
    return np.stack([lights, shadows, corners / (centre + 1e-3), 20 * grain], 1)


def spread(pictures: Array) -> float:
    """Mean distance of pictures' colours (8 × 8 × 8 classes) from their mean: how unlike twelve of one campaign are."""
    bins = pictures.astype(int) // 32
    classes = (bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]).reshape(len(pictures), -1)
    shares = np.stack([np.bincount(row, minlength=512) for row in classes]) / classes.shape[1]
    return float(np.abs(shares - shares.mean(0)).sum(1).mean() / 2)


def edge_agreement(one: Array, two: Array) -> float:
    """F1 of two edge pictures (n, 128, 128) of 0 and 1, with a pixel of tolerance, their mean."""
    scores = []
    for a, b in zip(one.astype(bool), two.astype(bool), strict=True):
        precision = float((a & _widened(b)).sum() / max(a.sum(), 1))
        recall = float((b & _widened(a)).sum() / max(b.sum(), 1))
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return float(np.mean(scores))


def _widened(lines: Array) -> Array:
    out = lines.copy()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            out |= np.roll(np.roll(lines, dy, 0), dx, 1)
    return out
