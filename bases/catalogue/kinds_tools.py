"""Tools and what lies about a workshop, a building site or a garden."""

from __future__ import annotations

import math

from shapes import Flat, Product, arc, disc, kind, rounded, smooth


def _rect(x: float, y: float, w: float, h: float) -> list[Flat]:
    """By its middle."""
    return [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2), (x - w / 2, y + h / 2)]


@kind("hammer", "tools")
def _hammer(p: Product) -> None:
    h = p.vary(1.15, 1.3)
    p.turned([(0.15, 0), (0.18, 0.05), (0.18, 0.5), (0.13, 0.75), (0.13, h)])
    p.prism(
        smooth([(-0.1, -0.13), (0.2, -0.11), (0.45, -0.17), (0.62, -0.28), (0.5, 0.0), (0.25, 0.12), (-0.1, 0.14)]),
        0.2, "metal", at=(0, h, 0), lift=0.5
    )  # fmt: skip
    p.turned([(0.12, 0.05), (0.12, 0.28), (0.2, 0.3), (0.2, 0.48)], "metal", at=(0, h, 0), axis=(-1, 0, 0), lift=0.5)


@kind("screwdriver", "tools")
def _screwdriver(p: Product) -> None:
    r = p.vary(0.21, 0.25)
    p.turned([(r * 0.75, 0), (r, 0.06), (r, 0.55), (r * 0.65, 0.66), (r * 0.9, 0.76)])
    for x in (-0.5, 0, 0.5):
        p.prism(
            rounded(r * x - 0.025, 0.1, r * x + 0.025, 0.5, 0.02), 0.02, "second", at=(0, 0, r * (0.95 - 0.5 *
            abs(x))), lift=1
        )  # fmt: skip
    p.turned([(0.075, 0.76), (0.065, 1.25)], "metal", lift=0.3)
    p.prism(
        [(-0.065, 1.25), (0.065, 1.25), (0.1, 1.33), (0.08, 1.48), (-0.08, 1.48), (-0.1, 1.33)], 0.06, "metal",
        lift=0.4
    )  # fmt: skip


@kind("wrench", "tools")
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


@kind("axe", "tools")
def _axe(p: Product) -> None:
    h = p.vary(1.2, 1.35)
    handle = smooth([(-0.06, 0), (0.1, 0), (0.09, 0.5), (0.08, h), (-0.08, h), (-0.09, 0.5)])
    p.prism(handle, 0.13, "wood")
    blade = [
        (0.16, h - 0.4), (0.16, h - 0.06), (-0.15, h - 0.08), *arc(-0.15, h - 0.25, 0.5, 140, 220, 9), (-0.15, h -
        0.36)
    ]  # fmt: skip
    p.prism(blade, 0.2, lift=0.3)
    edge = arc(-0.15, h - 0.25, 0.5, 140, 220, 9)
    p.mark([*edge, *arc(-0.15, h - 0.25, 0.4, 218, 142, 9)], "metal", at=(0, 0, 0.101), lift=0.6)


@kind("shovel", "tools")
def _shovel(p: Product) -> None:
    h, w = p.vary(1.5, 1.65), p.vary(0.34, 0.38)
    blade = smooth(
        [(0, 0), (0.2, 0.12), (w, 0.4), (w, 0.72), (0.1, 0.76), (-0.1, 0.76), (-w, 0.72), (-w, 0.4), (-0.2, 0.12)]
    )  # fmt: skip
    p.prism(blade, 0.09)
    p.prism([(-0.03, 0.3), (0.03, 0.3), (0.06, 0.76), (-0.06, 0.76)], 0.04, at=(0, 0, 0.06), lift=0.3)
    p.turned([(0.08, 0.68), (0.07, 0.9)], "main", lift=0.3)
    p.turned([(0.055, 0.85), (0.055, h)], "wood", lift=0.1)
    grip = [(0, h - 0.05), (-0.17, h + 0.08), (-0.17, h + 0.22), (0.17, h + 0.22), (0.17, h + 0.08)]
    p.rod([(x, y, 0) for x, y in grip], 0.05, "main", closed=True, lift=0.2)


@kind("paint brush", "tools")
def _paint_brush(p: Product) -> None:
    h = p.vary(0.62, 0.72)
    handle = smooth(
        [(-0.14, h + 0.5), (-0.15, 0.34), (-0.2, 0.14), (-0.34, 0.0), (0.34, 0.0), (0.2, 0.14), (0.15, 0.34), (0.14,
        h + 0.5)]
    )  # fmt: skip
    p.prism([(x, y + 0.54) for x, y in handle], 0.2)
    p.prism(_rect(0, 0.45, 0.74, 0.2), 0.24, "metal", lift=0.1)
    p.prism(
        [(-0.36, 0.36), (0.36, 0.36), (0.39, 0.08), (0.24, 0), (0.1, 0.05), (-0.06, 0), (-0.22, 0.05), (-0.38,
        0.1)], 0.2, "second", lift=0.05
    )  # fmt: skip
    p.mark(disc(0, h + 0.9, 0.05), "dark", at=(0, 0, 0.101))


@kind("magnet", "tools")
def _magnet(p: Product) -> None:
    r, k = p.vary(0.5, 0.56), 0.23
    outline = [
        (-r, 0.3), *arc(0, 0.62, r, 180, 0, 18), (r, 0.3), (r - k, 0.3), *arc(0, 0.62, r - k, 0, 180, 14), (k - r,
        0.3)
    ]  # fmt: skip
    outline = [(x, 1.45 - y) for x, y in outline]
    p.prism(outline, 0.28)
    for s in (-1, 1):
        p.prism(_rect(s * (r - k / 2), 1.26, k, 0.26), 0.28, "light", lift=0.05)


@kind("fire extinguisher", "tools")
def _fire_extinguisher(p: Product) -> None:
    r, h = p.vary(0.28, 0.32), p.vary(0.95, 1.05)
    p.turned([(r, 0), (r, h - 0.12), (r * 0.85, h), (r * 0.35, h + 0.1)])
    p.turned([(0.1, h + 0.08), (0.1, h + 0.22)], "metal", lift=0.2)
    p.prism([(-0.05, h + 0.2), (0.32, h + 0.16), (0.34, h + 0.24), (-0.05, h + 0.3)], 0.12, "dark", lift=0.3)
    p.prism([(-0.05, h + 0.32), (0.3, h + 0.42), (0.28, h + 0.5), (-0.08, h + 0.4)], 0.12, "dark", lift=0.31)
    hose = smooth([(-0.08, h + 0.24), (-0.36, h + 0.16), (-0.46, 0.75), (-0.42, 0.5)], closed=False)
    p.rod([(x, y, 0.05) for x, y in hose], 0.045, "dark", lift=0.3)
    p.turned([(0.05, 0), (0.11, 0.3)], "dark", at=(-0.42, 0.55, 0.05), axis=(0.05, -1, 0), lift=0.3)
    p.turned([(r + 0.004, 0.4), (r + 0.004, 0.62)], "paper", band=True, bare=True, lift=0.2)


@kind("anchor", "tools")
def _anchor(p: Product) -> None:
    k = p.vary(0.94, 1.06)
    p.ring(0.15, 0.05, "second", at=(0, 1.3, 0), lift=-0.1)
    p.prism(_rect(0, 0.66, 0.16, 1.1), 0.16)
    p.prism(rounded(-0.36, 0.92, 0.36, 1.06, 0.06), 0.18, lift=0.1)
    bow = [*arc(0, 0.62, 0.62 * k, 200, 340, 17), *arc(0, 0.7, 0.5 * k, 332, 208, 15)]
    p.prism(bow, 0.16, lift=0.05)
    for s in (-1, 1):
        p.prism([(s * 0.36 * k, 0.4), (s * 0.78 * k, 0.42), (s * 0.62 * k, 0.8)], 0.18, lift=0.08)


@kind("traffic cone", "tools")
def _traffic_cone(p: Product) -> None:
    r, h = p.vary(0.36, 0.4), p.vary(1.05, 1.2)
    p.prism(rounded(-0.5, -0.5, 0.5, 0.5, 0.1), 0.1, "main", plane="floor")
    for i, (a, b) in enumerate(((0, 0.28), (0.28, 0.48), (0.48, 0.66), (0.66, 0.82), (0.82, 1))):
        low, high = (r * (1 - 0.82 * t) for t in (a, b))
        p.turned(
            [(low, 0.1 + a * h), (high, 0.1 + b * h)], "paper" if i % 2 else "main", lift=0.5 + 0.1 * i, bare=bool(i
            % 2)
        )  # fmt: skip


@kind("paint bucket", "tools")
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


@kind("broom", "tools")
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
