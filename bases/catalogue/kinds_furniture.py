"""Furniture, lamps and clocks."""

from __future__ import annotations

import math

from shapes import Product, arc, disc, kind, rounded


def _beside(p: Product, side: int) -> float:
    """The lift of what stands at the right (1) or left (-1) of something: before it if that side is the nearer one."""
    return 0.4 if side * p.view.yaw < 0 else -0.4


def _legs(p: Product, w: float, d: float, h: float, thick: float, paint: str) -> None:
    for x in (-1, 1):
        for z in (-1, 1):
            p.box((thick, h, thick), paint, at=(x * (w - thick) / 2, 0, z * (d - thick) / 2), lift=-2)


def _plank(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


@kind("chair")
def _chair(p: Product) -> None:
    h = p.vary(0.5, 0.58)
    _legs(p, 0.66, 0.64, h, 0.09, "wood")
    p.box((0.72, 0.1, 0.7), at=(0, h, 0))
    for x in (-0.29, 0.29):
        p.box((0.09, 0.72, 0.08), "wood", at=(x, h + 0.08, -0.3), lift=-0.5)
    p.prism(rounded(-0.36, h + 0.34, 0.36, h + 0.86, 0.1), 0.1, at=(0, 0, -0.28), lift=-0.3)


@kind("armchair")
def _armchair(p: Product) -> None:
    h = p.vary(0.9, 1.02)
    for x in (-0.4, 0.4):
        p.box((0.1, 0.1, 0.1), "wood", at=(x, 0, 0.3), lift=-1)
    p.prism(rounded(-0.44, 0.1, 0.44, h, 0.16), 0.24, at=(0, 0, -0.3), lift=-0.5)
    p.box((0.7, 0.26, 0.72), at=(0, 0.1, 0.02), lift=-0.2)
    p.prism(rounded(-0.34, 0.34, 0.34, 0.5, 0.07), 0.62, "main", at=(0, 0, 0.09), lift=-0.1)
    p.prism(rounded(-0.2, 0.5, 0.2, 0.84, 0.09), 0.12, "second", at=(0, 0, -0.1), lift=0)
    for s in (-1, 1):
        p.prism(rounded(s * 0.44 - 0.12, 0.1, s * 0.44 + 0.12, 0.62, 0.12), 0.78, at=(0, 0, 0.03), lift=_beside(p, s))


@kind("table")
def _table(p: Product) -> None:
    w, h = p.vary(1.3, 1.5), p.vary(0.66, 0.76)
    _legs(p, w - 0.08, 0.8, h, 0.13, "main")
    p.box((w - 0.14, 0.14, 0.76), "second", at=(0, h - 0.12, 0), lift=-1)
    p.box((w, 0.1, 0.92), at=(0, h, 0))


@kind("picture frame")
def _picture_frame(p: Product) -> None:
    w, h = p.vary(1.0, 1.25), p.vary(0.85, 1.0)
    b, z = 0.17, 0.06
    p.prism([(-0.2, 0.1), (0.2, 0.1), (0.2, 0.6), (-0.2, 0.6)], 0.04, "dark", at=(0, 0, -0.2), tilt=-14, lift=-1)
    p.prism(_plank(-w / 2, 0, w / 2, h), 0.12, tilt=10)
    p.mark(_plank(-w / 2 + b, b, w / 2 - b, h - b), "#9fd3f2", at=(0, 0, z + 0.001), tilt=10)
    p.mark(disc(w * 0.17, h - b - 0.17, 0.09), "#f5cf30", at=(0, 0, z + 0.002), tilt=10, lift=0.4)
    hills = [(w / 2 - b, b), (w / 2 - b, b + 0.2), (w * 0.12, b + 0.34), (0, b + 0.22), (-w * 0.16, b + 0.44)]
    p.mark([(-w / 2 + b, b), *hills, (-w / 2 + b, b + 0.16)], "#4f8a5b", at=(0, 0, z + 0.003), tilt=10, lift=0.5)


@kind("alarm clock")
def _alarm_clock(p: Product) -> None:
    d = p.vary(0.3, 0.4)
    for s in (-1, 1):
        p.rod([(s * 0.24, 0.26, 0), (s * 0.38, 0.05, 0.0)], 0.06, "dark", lift=-0.6)
        p.ball((0.2, 0.16, 0.17), "second", at=(s * 0.33, 1.0, 0), lift=-0.2)
        p.rod([(s * 0.22, 0.82, 0), (s * 0.3, 0.95, 0)], 0.04, "dark", lift=-0.4)
    p.rod([(s * 0.14, 0.95, 0) for s in (-1, 1)], 0.03, "dark", lift=-0.9)
    p.rod([(x, y, 0) for x, y in arc(0, 1.05, 0.18, 0, 180, 10)], 0.035, "dark", lift=-0.5)
    p.turned([(0.48, -d / 2), (0.5, 0), (0.48, d / 2)], at=(0, 0.52, 0), axis=(0, 0, 1), sides=40)
    p.mark(disc(0, 0.52, 0.36), "paper", at=(0, 0, d / 2 + 0.001), lift=0.4)
    for a in range(0, 360, 30):
        x, y = 0.3 * math.cos(math.radians(a)), 0.3 * math.sin(math.radians(a))
        p.mark(disc(x, y + 0.52, 0.024), "dark", at=(0, 0, d / 2 + 0.002), lift=0.5)
    p.mark([(-0.03, 0.5), (0.03, 0.5), (0.02, 0.78), (-0.02, 0.78)], "dark", at=(0, 0, d / 2 + 0.003), lift=0.6)
    p.mark([(0, 0.49), (0.2, 0.6), (0.18, 0.64), (-0.01, 0.55)], "dark", at=(0, 0, d / 2 + 0.003), lift=0.6)
