"""Things for washing, cleaning, warming and growing."""

from __future__ import annotations

import math

from shapes import Product, arc, disc, kind, rounded, smooth, star


def _around(radius: float, y: float, degrees: float) -> tuple[float, float, float]:
    a = math.radians(degrees)
    return radius * math.sin(a), y, radius * math.cos(a)


@kind("basket", "house")
def _basket(p: Product) -> None:
    h = p.vary(0.46, 0.54)
    p.rod([(x, y, 0) for x, y in arc(0, h - 0.05, 0.54, 0, 180, 16, squash=1.15)], 0.05, "main", bare=False, lift=-0.2)
    p.turned([(0.42, 0), (0.6, h)], hollow=True, inside="wood")
    for row in range(3):
        y = 0.04 + row * h / 3
        for k in range(-4, 5):
            turn = 22 * (k + row % 2 / 2) - p.view.yaw
            at = _around(0.425 + 0.18 * (y + h / 8) / h, y + h / 8, turn)
            p.mark(rounded(-0.075, -0.045, 0.075, 0.045, 0.03), "second", at=at, turn=turn, tilt=-15)
    p.ring(0.59, 0.045, "main", at=(0, h, 0), axis="y", lift=0.1)


@kind("watering can", "house")
def _watering_can(p: Product) -> None:
    h = p.vary(0.58, 0.68)
    p.turned([(0.07, 0), (0.055, 0.72)], at=(-0.3, 0.14, 0), axis=(-0.85, 1, 0), lift=-0.1)
    p.turned([(0.06, 0.68), (0.19, 0.82)], "second", at=(-0.3, 0.14, 0), axis=(-0.85, 1, 0), lift=0.1)
    p.turned([(0.4, 0), (0.38, h), (0.3, h + 0.08)], hollow=True, inside="dark")
    grip = [(-0.2, h + 0.06), (-0.1, h + 0.34), (0.25, h + 0.36), (0.55, h), (0.52, 0.3), (0.38, 0.2)]
    p.rod([(x, y, 0) for x, y in grip], 0.05, "main", bare=False, lift=-0.05)


@kind("spray bottle", "house")
def _spray_bottle(p: Product) -> None:
    h = p.vary(0.78, 0.9)
    p.turned([(0.34, 0), (0.36, 0.06), (0.36, h * 0.6), (0.14, h), (0.13, h + 0.06)])
    p.turned([(0.365, 0.16), (0.365, h * 0.52)], "paper", band=True, bare=True, lift=0.1)
    p.turned([(0.15, h + 0.04), (0.15, h + 0.16)], "second", lift=0.1)
    head = [(-0.4, h + 0.34), (-0.4, h + 0.46), (0.08, h + 0.48), (0.28, h + 0.38), (0.3, h + 0.26), (0.12, h + 0.16),
            (-0.12, h + 0.16), (-0.16, h + 0.32)]  # fmt: skip
    p.prism(head, 0.22, "second", lift=0.3)
    p.box((0.1, 0.1, 0.16), "dark", at=(-0.44, h + 0.35, 0), lift=0.2)
    p.rod([(-0.22, h + 0.32, 0), (-0.3, h + 0.16, 0), (-0.28, h + 0.04, 0)], 0.045, "dark", lift=0.25)


@kind("trash can", "house")
def _trash_can(p: Product) -> None:
    h = p.vary(0.86, 0.98)
    p.turned([(0.36, 0), (0.45, h)])
    for a in range(-80, 81, 32):
        t = a - p.view.yaw
        p.rod([_around(0.375, 0.1, t), _around(0.44, h - 0.12, t)], 0.022, "second", lift=0.3)
    p.turned([(0.5, h), (0.5, h + 0.08), (0.42, h + 0.16), (0.2, h + 0.22)], "main", lift=0.5)
    p.rod([(-0.13, h + 0.2, 0), (-0.12, h + 0.32, 0), (0.12, h + 0.32, 0), (0.13, h + 0.2, 0)], 0.04, "dark", lift=0.8)
    for s in (-1, 1):
        p.rod(
            [(s * 0.44, h - 0.3, 0), (s * 0.58, h - 0.28, 0), (s * 0.58, h - 0.1, 0), (s * 0.45, h - 0.08, 0)],
            0.035,
            "dark",
            lift=-0.1,
        )


@kind("flower pot", "house")
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


@kind("cactus", "house")
def _cactus(p: Product) -> None:
    h = p.vary(0.85, 1.0)
    p.turned([(0.28, 0), (0.36, 0.3)], "second", lift=-0.4)
    p.turned([(0.41, 0.28), (0.41, 0.4)], "second", hollow=True, inside="#5a3d2b", lift=-0.3)
    for s, y in ((-1, 0.68), (1, 0.84)):
        p.rod([(0, y, 0), (s * 0.42, y, 0), (s * 0.42, y + 0.32, 0)], 0.115, "main", bare=False, lift=-0.1)
    p.turned([(0.2, 0.36), (0.22, 0.5), (0.22, 0.3 + h * 0.9), (0.15, 0.3 + h), (0.04, 0.34 + h)])
    for a in (-45, 0, 45):
        t = a - p.view.yaw
        for y in (0.55, 0.8, 1.05):
            p.mark(star(0, 0, 0.06, 0.025, 4), "light", at=_around(0.225, y, t), turn=t, lift=0.4)
    p.ball(0.1, "#ef5f97", at=(0, 0.38 + h, 0), lift=0.5)


@kind("clothes iron", "house")
def _clothes_iron(p: Product) -> None:
    h = p.vary(0.4, 0.46)
    sole = smooth(
        [(-0.75, 0), (-0.3, 0.26), (0.2, 0.32), (0.6, 0.3), (0.62, 0), (0.6, -0.3), (0.2, -0.32), (-0.3, -0.26)]
    )
    p.prism(sole, 0.09, "metal", plane="floor", lift=-0.5)
    p.prism([(-0.62, 0.09), (0.58, 0.09), (0.58, h), (0.1, h), (-0.3, h - 0.1)], 0.42)
    grip = [(-0.14, -0.05), (-0.1, 0.24), (0.1, 0.3), (0.46, 0.28), (0.5, -0.02)]
    p.rod([(x, h + y, 0) for x, y in grip], 0.085, "main", bare=False, lift=-0.1)
    p.mark(disc(0.22, h * 0.6, 0.1), "second", at=(0, 0, 0.211))
    p.turned([(0.08, 0), (0.05, 0.16)], "dark", at=(0.56, h + 0.16, 0), axis=(1, 0.3, 0), lift=-0.1)


@kind("barrel", "house")
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
