"""Things for washing, cleaning, warming and growing."""

from __future__ import annotations

import math

from shapes import Product, disc, kind, smooth


def _around(radius: float, y: float, degrees: float) -> tuple[float, float, float]:
    a = math.radians(degrees)
    return radius * math.sin(a), y, radius * math.cos(a)


@kind("watering can")
def _watering_can(p: Product) -> None:
    h = p.vary(0.58, 0.68)
    p.turned([(0.07, 0), (0.055, 0.72)], at=(-0.3, 0.14, 0), axis=(-0.85, 1, 0), lift=-0.1)
    p.turned([(0.06, 0.68), (0.19, 0.82)], "second", at=(-0.3, 0.14, 0), axis=(-0.85, 1, 0), lift=0.1)
    p.turned([(0.4, 0), (0.38, h), (0.3, h + 0.08)], hollow=True, inside="dark")
    grip = [(-0.2, h + 0.06), (-0.1, h + 0.34), (0.25, h + 0.36), (0.55, h), (0.52, 0.3), (0.38, 0.2)]
    p.rod([(x, y, 0) for x, y in grip], 0.05, "main", bare=False, lift=-0.05)


@kind("flower pot")
def _flower_pot(p: Product) -> None:
    h = p.vary(0.52, 0.6)
    p.turned([(0.32, 0), (0.44, h - 0.15)], lift=-0.2)
    p.turned([(0.52, h - 0.17), (0.52, h)], hollow=True, inside="#5a3d2b", lift=-0.1)
    p.rod([(0, h - 0.06, 0), (0.02, h + 0.5, 0)], 0.035, "leaf", lift=0.1)
    for s in (-1, 1):
        leaf = smooth([(0, h + 0.02), (s * 0.2, h + 0.06), (s * 0.36, h + 0.28), (s * 0.14, h + 0.2)])
        p.prism(leaf, 0.03, "leaf", lift=0.05)
    turn = -p.view.yaw
    for a in range(0, 360, 60):
        x, y = 0.19 * math.cos(math.radians(a)), 0.19 * math.sin(math.radians(a))
        p.mark(disc(0.02 + x, h + 0.58 + y, 0.12), "main", at=_around(0.03, 0, turn), turn=turn, lift=0.3)
    p.mark(disc(0.02, h + 0.58, 0.12), "#f5cf30", at=_around(0.04, 0, turn), turn=turn, lift=0.5)


@kind("barrel")
def _barrel(p: Product) -> None:
    h = p.vary(1.0, 1.15)
    r = [(0.36, 0), (0.43, 0.16), (0.47, 0.36), (0.48, 0.5), (0.47, 0.64), (0.43, 0.84), (0.36, 1.0)]
    p.turned([(a, b * h) for a, b in r])
    for lo, hi, a, b in (
        (0.04, 0.13, 0.385, 0.425),
        (0.27, 0.36, 0.463, 0.478),
        (0.64, 0.73, 0.478, 0.463),
        (0.87, 0.96, 0.425, 0.385),
    ):
        p.turned([(a + 0.01, lo * h), (b + 0.01, hi * h)], "dark", band=True, lift=0.2)
    p.turned([(0.3, h), (0.3, h + 0.001)], "second", lift=0.3)
