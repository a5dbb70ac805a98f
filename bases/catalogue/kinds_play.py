"""Sport, music and games."""

from __future__ import annotations

import itertools
import math

from shapes import Flat, Point, Product, disc, kind, smooth


def _rect(x: float, y: float, w: float, h: float) -> list[Flat]:
    """By its middle."""
    return [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2), (x - w / 2, y + h / 2)]


def _before(at: Point, tilt: float, by: float) -> Point:
    """A point moved along the normal of a front that leans back."""
    return at[0], at[1] + by * math.sin(math.radians(tilt)), at[2] + by * math.cos(math.radians(tilt))


def _unit(p: Point) -> Point:
    length = math.hypot(*p)
    return p[0] / length, p[1] / length, p[2] / length


def _cross(a: Point, b: Point) -> Point:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _round(pole: Point, degrees: float, count: int, start: float = 0.0) -> list[Point]:
    """`count` directions that lie `degrees` from `pole`, all around it."""
    w = _unit(pole)
    u = _unit(_cross(w, (0.31, 0.2, 0.93)))
    v = _cross(w, u)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    out = []
    for i in range(count):
        a = math.radians(start) + 2 * math.pi * i / count
        x, y, z = (c * w[k] + s * (math.cos(a) * u[k] + math.sin(a) * v[k]) for k in range(3))
        out.append((x, y, z))
    return out


def _seam(p: Product, pole: Point, degrees: float, radius: float, at: Point, paint: str, half: float = 2.6) -> None:
    """A line around a ball, `degrees` from `pole`."""
    inner, outer = _round(pole, degrees - half, 36), _round(pole, degrees + half, 36)
    for i in range(36):
        j = (i + 1) % 36
        p.patch([inner[i], inner[j], outer[j], outer[i]], radius, paint, at=at)


@kind("football", "play")
def _football(p: Product) -> None:
    r = 0.5
    p.ball(r, "main", at=(0, r, 0))
    first = _unit((p.vary(-0.3, 0.3), p.vary(0.0, 0.4), 1.0))
    ring = _round(first, 63.4, 5, p.vary(0, 70))
    corners = [first, *ring, *[(-x, -y, -z) for x, y, z in [first, *ring]]]
    for a, b in itertools.combinations(corners, 2):
        if 0.3 < sum(x * y for x, y in zip(a, b, strict=True)) < 0.6:
            across = _unit(_cross(a, b))
            ends = []
            for t, s in ((0.3, 1), (0.7, 1), (0.7, -1), (0.3, -1)):
                ends.append(tuple(a[k] * (1 - t) + b[k] * t + s * 0.025 * across[k] for k in range(3)))
            p.patch([(e[0], e[1], e[2]) for e in ends], r, "second", at=(0, r, 0))
    for c in corners:
        nearest = max((d for d in corners if d != c), key=lambda d: sum(x * y for x, y in zip(c, d, strict=True)))
        side = _round(c, 22, 60)
        start = max(range(60), key=lambda i: sum(x * y for x, y in zip(side[i], nearest, strict=True)))
        p.patch([side[(start + 12 * i) % 60] for i in range(5)], r, "second", at=(0, r, 0), lift=0.6)


@kind("basketball", "play")
def _basketball(p: Product) -> None:
    r = 0.5
    p.ball(r, "main", at=(0, r, 0))
    turn = math.radians(p.vary(-25, 25))
    x, y = (math.cos(turn), math.sin(turn), 0.0), (-math.sin(turn), math.cos(turn), 0.0)
    for pole, degrees in ((x, 90), (y, 90), (x, 48), ((-x[0], -x[1], 0.0), 48)):
        _seam(p, pole, degrees, r, (0, r, 0), "second")


@kind("dumbbell", "play")
def _dumbbell(p: Product) -> None:
    r, w = p.vary(0.32, 0.38), p.vary(0.5, 0.58)
    axis = (1.0, 0.0, 0.2)
    at = (0.0, r, 0.0)
    p.turned([(0.09, -w), (0.09, w)], "metal", at=at, axis=axis)
    for s in (-1, 1):
        end = (s * w * 0.98, r, s * w * 0.196)
        p.turned([(r, -0.2), (r, 0.2)], at=end, axis=axis, sides=6 if w < 0.54 else 22, lift=0.3 * s)
        outer = (end[0] + s * 0.2, r, end[2] + s * 0.04)
        p.turned([(r * 0.66, -0.06), (r * 0.66, 0.08)], "main", at=outer, axis=axis, lift=0.3 * s + 0.05 * s)


def _bows(low: float, waist: float, high: float, h: float) -> list[Flat]:
    """The body of a guitar: half widths below, in the middle and above."""
    half = [(0.0, 0.0), (low * 0.7, h * 0.05), (low, h * 0.28), (waist, h * 0.58), (high, h * 0.82), (high * 0.6, h)]
    return smooth([*half, *[(-x, y) for x, y in half[:0:-1]]])


@kind("guitar", "play")
def _guitar(p: Product) -> None:
    k, h = p.vary(0.94, 1.06), 0.82
    p.prism(_bows(0.44 * k, 0.27 * k, 0.34 * k, h), 0.2)
    p.prism(_rect(0, 1.12, 0.12, 0.74), 0.1, "wood", at=(0, 0, 0.08), lift=0.3)
    p.prism([(-0.08, 1.46), (0.08, 1.46), (0.13, 1.74), (-0.13, 1.74)], 0.08, "dark", at=(0, 0, 0.06), lift=0.2)
    for s in (-1, 1):
        for y in (1.54, 1.66):
            p.ball(0.04, "light", at=(s * 0.16, y, 0.06), lift=0.2)
    p.mark(disc(0, h * 0.6, 0.14), "dark", at=(0, 0, 0.101), lift=0.4)
    p.mark(_rect(0, h * 0.24, 0.3, 0.07), "dark", at=(0, 0, 0.101), lift=0.4)
    for x in (-0.035, 0.035):
        p.rod([(x, h * 0.24, 0.12), (x, 1.5, 0.14)], 0.01, "light", lift=0.8)


@kind("tent", "play")
def _tent(p: Product) -> None:
    w, h, d = p.vary(0.62, 0.7), p.vary(0.85, 0.95), p.vary(1.1, 1.3)
    p.prism([(-w, 0), (w, 0), (0, h)], d)
    p.mark([(-w * 0.4, 0), (w * 0.4, 0), (0, h * 0.72)], "dark", at=(0, 0, d / 2 + 0.001))
    for s in (-1, 1):
        flap = [(s * w * 0.5, 0), (s * w * 0.26, 0.0), (0, h * 0.74), (0, h * 0.78)]
        p.mark(flap, "second", at=(0, 0, d / 2 + 0.002), lift=0.4)
        p.rod([(s * w * 0.5, h * 0.5, d / 2), (s * w * 1.2, 0, d / 2 + 0.12)], 0.018, "light", lift=0.5)
    p.rod([(0, h - 0.03, d / 2), (0, h + 0.1, d / 2)], 0.035, "wood", lift=0.5)
