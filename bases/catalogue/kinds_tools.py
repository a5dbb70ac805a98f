"""Tools and what lies about a workshop, a building site or a garden."""

from __future__ import annotations

import math

from shapes import Product, arc, kind, rounded, smooth


@kind("hammer")
def _hammer(p: Product) -> None:
    h = p.vary(1.15, 1.3)
    p.turned([(0.15, 0), (0.18, 0.05), (0.18, 0.5), (0.13, 0.75), (0.13, h)])
    p.prism(
        smooth([(-0.1, -0.13), (0.2, -0.11), (0.45, -0.17), (0.62, -0.28), (0.5, 0.0), (0.25, 0.12), (-0.1, 0.14)]),
        0.2, "metal", at=(0, h, 0), lift=0.5
    )  # fmt: skip
    p.turned([(0.12, 0.05), (0.12, 0.28), (0.2, 0.3), (0.2, 0.48)], "metal", at=(0, h, 0), axis=(-1, 0, 0), lift=0.5)


@kind("wrench")
def _wrench(p: Product) -> None:
    h, k = p.vary(1.5, 1.65), p.vary(0.95, 1.1)
    jaw = [(-0.09, 0.12), (-0.13, 0.28), (-0.27, 0.2), (-0.31, 0.0), (-0.22, -0.2), (-0.1, -0.3)]
    upper = [(k * x, h - 0.3 + k * y) for x, y in jaw[::-1]]
    mouth = [(-0.08 * k, h - 0.25), (0.08 * k, h - 0.25)]
    upper_right = [(-x, y) for x, y in upper[::-1]]
    eye = [(x, y) for x, y in arc(0, 0.24, 0.24, 70, -250, 20)]
    p.prism(upper + mouth + upper_right + eye, 0.15)
    p.mark(
        [(0.13 * math.cos(a * math.pi / 3), 0.24 + 0.13 * math.sin(a * math.pi / 3)) for a in range(6)], "dark",
        at=(0, 0, 0.076)
    )  # fmt: skip
    p.mark(rounded(-0.045, 0.55, 0.045, h - 0.65, 0.04), "second", at=(0, 0, 0.076))


@kind("traffic cone")
def _traffic_cone(p: Product) -> None:
    r, h = p.vary(0.36, 0.4), p.vary(1.05, 1.2)
    p.prism(rounded(-0.5, -0.5, 0.5, 0.5, 0.1), 0.1, "main", plane="floor")
    for i, (a, b) in enumerate(((0, 0.28), (0.28, 0.48), (0.48, 0.66), (0.66, 0.82), (0.82, 1))):
        low, high = (r * (1 - 0.82 * t) for t in (a, b))
        p.turned(
            [(low, 0.1 + a * h), (high, 0.1 + b * h)], "paper" if i % 2 else "main", lift=0.5 + 0.1 * i, bare=bool(i
            % 2)
        )  # fmt: skip


@kind("paint bucket")
def _paint_bucket(p: Product) -> None:
    r, h = p.vary(0.42, 0.47), p.vary(0.8, 0.9)
    handle = [(x, y + h - 0.08, 0.0) for x, y in arc(0, 0, r + 0.03, 170, 10, 13, 1.15)]
    p.rod(handle, 0.025, "metal", lift=-0.5)
    p.turned([(r, 0), (r, h)], "main")
    p.turned([(r + 0.02, h - 0.06), (r + 0.02, h)], "metal", hollow=True, inside="light", lift=0.2)
    drip = smooth([(-0.8, 0), (-0.6, 0.36), (-0.4, 0.2), (-0.15, 0.55), (0.08, 0.2), (0.35, 0.4), (0.6, 0)])
    ahead = math.radians(-p.view.yaw)
    p.sheet(
        [((r + 0.02) * math.sin(a + ahead), h - b, (r + 0.02) * math.cos(a + ahead)) for a, b in drip], "light",
        bare=True, lift=1
    )  # fmt: skip


@kind("broom")
def _broom(p: Product) -> None:
    h, w = p.vary(1.4, 1.55), p.vary(0.36, 0.42)
    p.prism([(-w, 0), (w, 0), (w * 0.72, 0.5), (-w * 0.72, 0.5)], 0.24, "#e3c36c")
    for x in (-0.5, 0, 0.5):
        p.mark(
            [(w * x * 1.25 - 0.015, 0.03), (w * x * 1.25 + 0.015, 0.03), (w * x + 0.015, 0.42), (w * x - 0.015,
            0.42)], "#a8853c", at=(0, 0, 0.121)
        )  # fmt: skip
    p.prism([(-w * 0.9, 0.32), (w * 0.9, 0.32), (w * 0.6, 0.74), (-w * 0.6, 0.74)], 0.3, lift=0.3)
    p.turned([(0.13, 0.7), (0.085, 0.9), (0.085, h)], lift=0.4)
