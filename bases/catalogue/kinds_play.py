"""Sport, music and games."""

from __future__ import annotations

import math

from shapes import Flat, Point, Product, disc, kind, smooth


def _rect(x: float, y: float, w: float, h: float) -> list[Flat]:
    """By its middle."""
    return [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2), (x - w / 2, y + h / 2)]


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


@kind("basketball")
def _basketball(p: Product) -> None:
    r = 0.5
    p.ball(r, "main", at=(0, r, 0))
    turn = math.radians(p.vary(-25, 25))
    x, y = (math.cos(turn), math.sin(turn), 0.0), (-math.sin(turn), math.cos(turn), 0.0)
    for pole, degrees in ((x, 90), (y, 90), (x, 48), ((-x[0], -x[1], 0.0), 48)):
        _seam(p, pole, degrees, r, (0, r, 0), "second")


def _bows(low: float, waist: float, high: float, h: float) -> list[Flat]:
    """The body of a guitar: half widths below, in the middle and above."""
    half = [(0.0, 0.0), (low * 0.7, h * 0.05), (low, h * 0.28), (waist, h * 0.58), (high, h * 0.82), (high * 0.6, h)]
    return smooth([*half, *[(-x, y) for x, y in half[:0:-1]]])


@kind("guitar")
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
