"""Electric and optical devices, from the phone to the washing machine."""

from __future__ import annotations

import math

from shapes import FRONT, Flat, Point, Product, arc, disc, kind, moved, rounded


def _rect(x: float, y: float, w: float, h: float) -> list[Flat]:
    """By its middle."""
    return [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2), (x - w / 2, y + h / 2)]


def _before(at: Point, tilt: float, by: float) -> Point:
    """A point moved along the normal of a front that leans back."""
    return at[0], at[1] + by * math.sin(math.radians(tilt)), at[2] + by * math.cos(math.radians(tilt))


@kind("laptop")
def _laptop(p: Product) -> None:
    w, h, lean = p.vary(1.25, 1.4), p.vary(0.85, 0.95), p.vary(10, 18)
    p.prism(rounded(-w / 2, -0.42, w / 2, 0.42, 0.07), 0.09, plane="floor")
    for row in range(3):
        p.mark(_rect(0, -0.24 + 0.15 * row, w * 0.8, 0.1), "dark", at=(0, 0.091, 0), plane="floor")
    p.mark(_rect(0, 0.28, 0.4, 0.18), "second", at=(0, 0.091, 0), plane="floor")
    at = (0, 0.08, -0.42)
    p.prism(rounded(-w / 2, 0, w / 2, h, 0.07), 0.07, at=at, tilt=lean, lift=-0.3)
    front = _before(at, lean, 0.037)
    p.mark(_rect(0, h / 2 + 0.01, w - 0.26, h - 0.26), "screen", at=front, tilt=lean, lift=0)
    p.mark(_rect(-0.1, h / 2 + 0.02, 0.45, 0.28), "glass", at=front, tilt=lean, lift=0.01)


@kind("phone")
def _phone(p: Product) -> None:
    w, h = p.vary(0.62, 0.7), p.vary(1.15, 1.3)
    p.prism(rounded(-w / 2, 0, w / 2, h, 0.1), 0.13, tilt=6)
    front = _before((0, 0, 0), 6, 0.067)
    p.mark(_rect(0, h / 2 + 0.03, w - 0.14, h - 0.3), "screen", at=front, tilt=6, lift=0.8)
    for row in range(4):
        for column in (-1, 0, 1):
            icon = rounded(-0.06, -0.06, 0.06, 0.06, 0.02)
            paint = "main" if (row + column) % 2 else "light"
            p.mark(moved(icon, column * w * 0.24, h * (0.25 + 0.17 * row)), paint, at=front, tilt=6, lift=0.9)
    p.mark(disc(0, 0.065, 0.04), "second", at=front, tilt=6, lift=0.8)
    p.mark(_rect(0, h - 0.06, 0.2, 0.03), "dark", at=front, tilt=6, lift=0.8)


@kind("camera")
def _camera(p: Product) -> None:
    w, h = p.vary(1.15, 1.3), p.vary(0.7, 0.8)
    p.prism([(-0.26, h - 0.02), (0.26, h - 0.02), (0.18, h + 0.2), (-0.18, h + 0.2)], 0.3)
    p.turned([(0.09, 0), (0.09, 0.08)], "metal", at=(-w * 0.36, h, 0), lift=0.2)
    p.prism(rounded(-w / 2, 0, w / 2, h, 0.1), 0.36)
    p.mark(_rect(w * 0.36, h * 0.82, 0.18, 0.11), "glow", at=(0, 0, 0.181))
    for r, z, paint in ((0.31, 0.3, "dark"), (0.25, 0.36, "metal")):
        p.turned([(r, 0), (r, z)], paint, at=(0, h * 0.46, 0.15), axis=FRONT, lift=1 + z)
    p.mark(disc(0, h * 0.46, 0.19), "dark", at=(0, 0, 0.515), lift=1.5)
    p.mark(disc(-0.05, h * 0.46 + 0.06, 0.07), "glass", at=(0, 0, 0.516), lift=1.6)


@kind("headphones")
def _headphones(p: Product) -> None:
    r = p.vary(0.48, 0.55)
    p.rod([(-r, 0.3, 0), *[(x, y, 0.0) for x, y in arc(0, 0.62, r, 180, 0)], (r, 0.3, 0)], 0.085, "main", lift=-0.4)
    for s in (-1, 1):
        p.turned([(0.25, 0), (0.27, 0.07), (0.25, 0.14)], "dark", at=(s * (r - 0.17), 0.3, 0), axis=(s, 0, 0))
        p.turned([(0.31, 0), (0.31, 0.12), (0.2, 0.22)], "main", at=(s * (r - 0.04), 0.31, 0), axis=(s, 0, 0), lift=0.1)


@kind("television")
def _television(p: Product) -> None:
    w, h = p.vary(1.2, 1.35), p.vary(0.9, 1.0)
    for s in (-1, 1):
        p.rod([(0, h + 0.12, -0.1), (s * 0.36, h + 0.6, -0.1)], 0.025, "metal", lift=-0.2)
        p.rod([(s * w * 0.33, 0.16, 0), (s * w * 0.42, 0.02, 0)], 0.045, "dark", lift=-0.5)
    p.ball((0.16, 0.1, 0.16), "dark", at=(0, h + 0.14, -0.1))
    p.prism(rounded(-w / 2, 0.14, w / 2, h + 0.14, 0.1), 0.6)
    p.mark(rounded(-w * 0.42, 0.28, w * 0.2, h, 0.16), "dark", at=(0, 0, 0.301))
    p.mark(rounded(-w * 0.38, 0.33, w * 0.16, h - 0.05, 0.14), "glass", at=(0, 0, 0.302), lift=0.31)
    for y in (0.8, 0.55):
        p.turned([(0.1, 0), (0.09, 0.07)], "light", at=(w * 0.34, h * y + 0.08, 0.3), axis=FRONT, lift=1)
    for y in (0.2, 0.29):
        p.mark(_rect(w * 0.34, h * y + 0.1, 0.2, 0.04), "dark", at=(0, 0, 0.301))


@kind("robot")
def _robot(p: Product) -> None:
    w, head = p.vary(0.65, 0.75), p.vary(0.5, 0.6)
    for s in (-1, 1):
        p.box((0.22, 0.3, 0.3), "second", at=(s * 0.19, 0, 0), lift=-0.4)
        p.rod(
            [(s * w * 0.45, 0.78, 0), (s * (w / 2 + 0.18), 0.68, 0), (s * (w / 2 + 0.18), 0.45, 0)], 0.075, "metal",
            lift=-0.3
        )  # fmt: skip
        p.ball(0.13, "main", at=(s * (w / 2 + 0.18), 0.4, 0.03))
        p.turned([(0.1, 0), (0.1, 0.1)], "second", at=(s * (head / 2 - 0.02), 1.19, 0), axis=(s, 0, 0))
    p.box((w, 0.62, 0.45), at=(0, 0.26, 0))
    p.mark(_rect(0, 0.62, w * 0.6, 0.26), "light", at=(0, 0, 0.226))
    for i, paint in enumerate(("#d62f2f", "#f5cf30", "#3f9b4b")):
        p.mark(disc(-0.12 + 0.12 * i, 0.62, 0.045), paint, at=(0, 0, 0.227), lift=0.31)
    p.box((0.2, 0.1, 0.2), "metal", at=(0, 0.88, 0))
    p.box((head, 0.46, 0.42), at=(0, 0.97, 0), lift=0.2)
    for s in (-1, 1):
        p.mark(disc(s * 0.13, 1.26, 0.085), "glow", at=(0, 0, 0.211), lift=0.6)
        p.mark(disc(s * 0.13, 1.26, 0.035), "dark", at=(0, 0, 0.212), lift=0.61)
    p.mark(_rect(0, 1.07, 0.28, 0.06), "dark", at=(0, 0, 0.211), lift=0.6)
    p.rod([(0, 1.42, 0), (0, 1.6, 0)], 0.03, "metal")
    p.ball(0.09, "#d62f2f", at=(0, 1.64, 0), lift=0.1)


@kind("light bulb")
def _light_bulb(p: Product) -> None:
    r = p.vary(0.42, 0.48)
    screw = [(0.1, 0), (0.17, 0.06), (0.2, 0.1), (0.16, 0.15), (0.2, 0.2), (0.16, 0.25), (0.2, 0.3), (0.17, 0.36)]
    p.turned(screw, "metal", bare=True)
    p.turned([(0.18, 0.35), (0.22, 0.48), (r * 0.74, 0.96 - r * 0.67), (r * 0.8, 0.96 - r * 0.6)], lift=0.2)
    p.ball(r, "main", at=(0, 0.96, 0), lift=0.3)
