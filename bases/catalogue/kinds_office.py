"""What is on a desk, in a school bag or on an office's shelf."""

from __future__ import annotations

import math

from shapes import Flat, Point, Product, arc, disc, kind, moved, rounded, smooth, star


def _rect(x: float, y: float, w: float, h: float) -> list[Flat]:
    """By its middle."""
    return [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2), (x - w / 2, y + h / 2)]


def _before(at: Point, tilt: float, by: float) -> Point:
    """A point moved along the normal of a front that leans back."""
    return at[0], at[1] + by * math.sin(math.radians(tilt)), at[2] + by * math.cos(math.radians(tilt))


@kind("scissors")
def _scissors(p: Product) -> None:
    y, lean = p.vary(0.6, 0.66), p.vary(11, 16)
    for s in (-1, 1):
        blade = [(-0.1, -0.1), (0.1, -0.1), (0.09, 0.5), (-0.03, 0.85), (-0.1, 0.5)]
        p.prism(
            moved([(s * a, b) for a, b in blade], 0, y, -s * lean), 0.06, "metal", at=(0, 0, 0.03 * s), lift=0.05 *
            s
        )  # fmt: skip
        p.rod([(-s * 0.03, y + 0.05, 0), (s * 0.17, y - 0.2, 0)], 0.09, "main", lift=0.2 + 0.05 * s)
        loop = disc(0, 0, 0.24, 1.2)
        p.rod([(a, b, 0.0) for a, b in moved(loop, s * 0.31, 0.36, s * 14)], 0.085, "main", closed=True, lift=0.1)
    p.mark(disc(0, y, 0.05), "dark", at=(0, 0, 0.1), lift=0.8)


@kind("pencil")
def _pencil(p: Product) -> None:
    r, h = p.vary(0.16, 0.19), p.vary(1.1, 1.25)
    p.turned([(r, 0), (r, 0.15)], "#ef86b0")
    p.turned([(r * 1.04, 0.13), (r * 1.04, 0.26)], "metal", lift=0.1)
    p.turned([(r * 1.04, 0.25), (r * 1.04, h)], sides=6, lift=0.2)
    p.turned([(r, h), (r * 0.32, h + 0.3)], "#e8c89a", lift=0.3)
    p.turned([(r * 0.34, h + 0.28), (0, h + 0.42)], "dark", lift=0.4)


@kind("book")
def _book(p: Product) -> None:
    w, h, d = p.vary(0.8, 0.9), p.vary(1.08, 1.2), p.vary(0.24, 0.32)
    p.box((w, h, 0.05), at=(0, 0, -d / 2))
    p.box((w - 0.06, h - 0.08, d - 0.04), "paper", at=(-0.01, 0.03, 0))
    p.box((0.05, h, d + 0.05), at=(-w / 2 + 0.025, 0, 0))
    p.box((w, h, 0.05), at=(0, 0, d / 2), lift=0.05)
    p.mark(_rect(-w * 0.38, h / 2, 0.05, h), "second", at=(0, 0, d / 2 + 0.026), lift=0.5)
    p.mark(_rect(0.05, h * 0.68, w * 0.56, h * 0.2), "light", at=(0, 0, d / 2 + 0.026), lift=0.5)
    for y, k in ((0.72, 0.44), (0.65, 0.3)):
        p.mark(_rect(0.05, h * y, w * k, 0.04), "dark", at=(0, 0, d / 2 + 0.027), lift=0.6)


@kind("trophy")
def _trophy(p: Product) -> None:
    r, h = p.vary(0.36, 0.42), 0.62
    p.box((0.6, 0.2, 0.6), "wood")
    for s in (-1, 1):
        ear = [(s * x, y + 0.93, 0.0) for x, y in arc(r + 0.03, 0, 0.22, -110, 100, 12)]
        p.rod(ear, 0.05, "main", lift=-0.1)
    p.turned([(0.24, 0.2), (0.1, 0.3), (0.07, 0.44), (0.12, 0.5)], lift=0.1)
    p.turned([(0.1, 0.48), (r * 0.75, h), (r, h + 0.25), (r + 0.05, h + 0.62)], hollow=True, lift=0.2)
    ahead = math.radians(-p.view.yaw)
    at = (math.sin(ahead) * (r + 0.04), 0.98, math.cos(ahead) * (r + 0.04))
    p.mark(star(0, 0, 0.18, 0.075), "light", at=at, turn=-p.view.yaw, lift=1)


@kind("bell")
def _bell(p: Product) -> None:
    r = p.vary(0.46, 0.52)
    p.ball(0.13, "dark", at=(0, 0.1, 0))
    p.turned(
        [(r, 0.1), (r * 0.96, 0.17), (r * 0.72, 0.36), (r * 0.6, 0.62), (r * 0.46, 0.8), (r * 0.2, 0.88)], lift=0.3
    )  # fmt: skip
    p.turned([(r * 0.86, 0.24), (r * 0.75, 0.34)], "second", band=True, lift=1)
    p.turned([(0.06, 0.86), (0.08, 0.95), (0.12, 1.15), (0.09, 1.35), (0.11, 1.4), (0.05, 1.46)], "wood", lift=0.5)


def _around(lon: float, lat: float) -> Point:
    """The direction from a globe's middle, in degrees; (0, 0) is the front."""
    a, b = math.radians(lon), math.radians(lat)
    return math.cos(b) * math.sin(a), math.sin(b), math.cos(b) * math.cos(a)


@kind("globe")
def _globe(p: Product) -> None:
    r, y = 0.5, 0.86
    p.turned([(0.36, 0), (0.34, 0.07), (0.1, 0.12), (0.07, 0.3)], "wood")
    p.rod([(a, b + y, 0.0) for a, b in arc(0, 0, r + 0.08, 60, -110, 20)], 0.035, "gold", lift=-0.6)
    p.ball(r, "main", at=(0, y, 0))
    spin = p.vary(-30, 30) - p.view.yaw
    america = [
        (-60, 55), (-20, 60), (-12, 40), (-30, 22), (-14, 8), (-5, -10), (-18, -48), (-30, -20), (-44, 20), (-62,
        38)
    ]  # fmt: skip
    africa = [(28, 30), (55, 34), (72, 10), (62, -30), (48, -34), (42, -2), (26, 8)]
    europe = [(30, 42), (38, 66), (80, 70), (100, 40), (60, 42)]
    for land in (america, africa, europe):
        p.patch([_around(a + spin, b) for a, b in smooth(land)], r, "second", at=(0, y, 0), lift=0.3)


@kind("folder")
def _folder(p: Product) -> None:
    w, h, lean = p.vary(1.15, 1.25), p.vary(0.8, 0.88), 10.0
    back = [
        (-w / 2, 0), (w / 2, 0), (w / 2, h), (-w * 0.06, h), (-w * 0.13, h + 0.13), (-w * 0.45, h + 0.13), (-w / 2,
        h)
    ]  # fmt: skip
    p.prism(back, 0.05, at=(0, 0, -0.12), tilt=lean)
    p.prism(
        moved(_rect(0.04, h / 2 + 0.06, w * 0.86, h), 0, 0, 1.5), 0.06, "paper", at=(0, 0, -0.05), tilt=lean,
        lift=0.1
    )  # fmt: skip
    front = [(-w / 2, 0), (w / 2, 0), (w / 2 + 0.06, h * 0.84), (-w / 2 - 0.06, h * 0.84)]
    p.prism(front, 0.05, at=(0, 0, 0.06), tilt=-4, lift=0.4)
    p.mark(
        rounded(w * 0.1, h * 0.5, w * 0.42, h * 0.68, 0.03), "light", at=_before((0, 0, 0.06), -4, 0.027), tilt=-4,
        lift=0.8
    )  # fmt: skip
