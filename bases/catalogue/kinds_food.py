"""What one eats, in any colour."""

from __future__ import annotations

import math

from shapes import Product, around, kind, smooth, standing

_DOUGH = "#dba25c"
_RED = "#d62f2f"


def _dots(
    p: Product, places: list[tuple[float, float, float]], paints: tuple[str, ...], size: float, lift: float
) -> None:
    for i, at in enumerate(places):
        p.ball(size, paints[i % len(paints)], at=at, lift=lift)


@kind("cake")
def _cake(p: Product) -> None:
    r, h = p.vary(0.56, 0.64), p.vary(0.26, 0.32)
    p.turned([(r + 0.14, 0), (r + 0.16, 0.05)], "light", lift=-1)
    p.turned([(r, 0.05), (r, h + 0.05)], lift=-0.5)
    p.turned([(r + 0.015, 0.05), (r + 0.015, 0.13)], "second", band=True, lift=-0.4)
    k = r * 0.66
    p.turned([(k, h + 0.05), (k, 2 * h + 0.05)], lift=-0.2)
    p.turned([(k + 0.015, h + 0.05), (k + 0.015, h + 0.12)], "second", band=True, lift=-0.1)
    for i in range(8):
        p.ball((0.09, 0.07, 0.09), "second", at=around(45 * i, k * 0.78, 2 * h + 0.07), lift=0.1)
    for i in range(3):
        x, y, z = around(120 * i + 20, k * 0.36, 2 * h + 0.05)
        p.turned([(0.032, 0), (0.032, 0.26)], "light", at=(x, y, z), lift=0.2)
        p.ball((0.035, 0.06, 0.035), "#f5a623", at=(x, y + 0.31, z), lift=0.3)


@kind("cupcake")
def _cupcake(p: Product) -> None:
    n = 16
    p.turned([(0.3, 0), (0.44, 0.42)], "second", lift=-0.3)
    for i in range(n):
        a = 360 * i / n
        if p.sees(around(a + 5, 1, -0.2)):
            p.sheet(
                [around(a, 0.3, 0), around(a + 10, 0.3, 0), around(a + 10, 0.445, 0.42), around(a, 0.445, 0.42)],
                "light",
                bare=True,
                lift=0.1,
            )
    y = 0.42
    for i, r in enumerate((0.5, 0.4, 0.27)):
        p.turned([(r * 0.8, y - 0.02), (r, y + 0.07), (r * 0.92, y + 0.15), (r * 0.66, y + 0.22)], lift=0.2 + 0.2 * i)
        y += 0.17
    p.turned([(0.16, y), (0.02, y + 0.16)], lift=0.8)
    p.ball(p.vary(0.1, 0.12), _RED, at=(0, y + 0.16, 0), lift=1.2)


@kind("doughnut")
def _doughnut(p: Product) -> None:
    r, k = 0.36, p.vary(0.19, 0.22)
    y = r + k + 0.03
    p.ring(r, k + 0.03, _DOUGH, at=(0, y, -0.06))
    p.ring(r, k, "main", at=(0, y, 0.02), lift=0.1)
    paints = ("light", "#f5cf30", "#2f6fd6", _RED)
    for i in range(13):
        a = 27.7 * i
        c, s = math.cos(math.radians(a)), math.sin(math.radians(a))
        q = r + (-0.09, 0.1, 0.0)[i % 3]
        u, v = 0.035 * math.cos(3.1 * a), 0.035 * math.sin(3.1 * a)
        p.rod(standing([(q * c - u, y + q * s - v), (q * c + u, y + q * s + v)], 0.14), 0.022, paints[i % 4], lift=0.5)


@kind("ice cream cone")
def _ice_cream_cone(p: Product) -> None:
    r = p.vary(0.3, 0.34)
    p.turned([(0.03, 0), (0.27, 0.72), (0.29, 0.8)], "#d59a4a", lift=-0.2)
    for a in (-60, -20, 20, 60):
        for twist in (-50, 50):
            if p.sees(around(a, 1, -0.3), 0.1) and p.sees(around(a + twist, 1, -0.3), 0.1):
                p.rod([around(a, 0.265, 0.7), around(a + twist, 0.11, 0.24)], 0.014, "#a06a2c", lift=0.1)
    p.turned([(r * 0.9, 0.74), (r * 1.1, 0.8), (r * 0.95, 0.88)], lift=0.2)
    p.ball(r, at=(0, 1.0, 0), lift=0.3)
    p.ball(r * 0.84, "second", at=(0.0, 1.36, 0), lift=0.5)
    p.ball(0.08, _RED, at=(0, 1.36 + r * 0.9, 0), lift=0.6)


@kind("hamburger")
def _hamburger(p: Product) -> None:
    r = p.vary(0.5, 0.56)
    p.turned([(r * 0.9, 0), (r, 0.08), (r, 0.16)], lift=-1)
    p.turned([(r * 1.04, 0.16), (r * 1.06, 0.24), (r * 1.04, 0.3)], "#6b3f24", lift=-0.7)
    p.prism(
        [
            (
                r * 1.12 * math.cos(a) * (1 + 0.06 * math.sin(9 * a)),
                r * 1.12 * math.sin(a) * (1 + 0.06 * math.sin(9 * a)),
            )
            for a in [k * 0.13 for k in range(48)]
        ],
        0.06,
        "leaf",
        at=(0, 0.3, 0),
        plane="floor",
        lift=-0.4,
    )
    p.prism(
        [(x * r * 1.2, z * r * 1.2) for x, z in ((1, 0.1), (0.1, 1), (-1, 0.1), (0.1, -1))],
        0.05,
        "#f5cf30",
        at=(0, 0.36, 0),
        plane="floor",
        lift=-0.2,
    )
    p.turned(
        [(r * 0.98, 0.4), (r * 1.04, 0.48), (r * 0.98, 0.6), (r * 0.76, 0.74), (r * 0.4, 0.82), (0.02, 0.84)], lift=0.2
    )
    seeds = [(-0.24, 0.62), (0.05, 0.6), (0.3, 0.64), (-0.1, 0.74), (0.16, 0.74)]
    _dots(
        p,
        [(x, y, math.sqrt(max(0, (r * 0.92) ** 2 - x * x)) * (0.94 - y) * 2.2) for x, y in seeds],
        ("paper",),
        0.028,
        0.8,
    )


@kind("apple")
def _apple(p: Product) -> None:
    s, r = p.pick(-1, 1), p.vary(0.46, 0.5)
    profile = [(0.2, 0), (r * 0.76, 0.1), (r, 0.42), (r * 0.98, 0.62), (r * 0.74, 0.82), (0.3, 0.86), (0.1, 0.76)]
    p.turned([(q, y) for q, y in smooth(profile, closed=False, steps=2)])
    p.rod(standing([(0, 0.76), (0.02, 0.92), (0.06, 1.04)]), 0.035, "#5b3a24", lift=0.6)
    p.prism(
        smooth([(s * 0.05, 0.9), (s * 0.16, 1.06), (s * 0.4, 1.06), (s * 0.3, 0.9)], steps=3), 0.03, "leaf", lift=0.7
    )


@kind("strawberry")
def _strawberry(p: Product) -> None:
    r = p.vary(0.4, 0.45)
    profile = [(0.03, 0), (r * 0.5, 0.2), (r * 0.9, 0.5), (r, 0.7), (r * 0.82, 0.86), (r * 0.4, 0.93), (0.04, 0.94)]
    p.turned([(q, y) for q, y in smooth(profile, closed=False, steps=2)])
    for i, (y, q) in enumerate(((0.28, 0.68), (0.48, 0.92), (0.66, 1.02))):
        for k in range(8):
            a = 45 * k + 22 * i
            if p.sees(around(a, 1, -0.2), 0.25):
                p.ball((0.03, 0.045, 0.03), "second", at=around(a, r * q, y), lift=0.5)
    for k in range(7):
        a = 51.4 * k
        p.sheet(
            [around(a - 20, 0.1, 0.95), around(a, r * 0.98, 0.86), around(a + 20, 0.1, 0.95)],
            "leaf",
            bare=True,
            lift=0.7,
        )
    p.rod(standing([(0, 0.94), (0.04, 1.1)]), 0.04, "leaf", lift=1)


@kind("pumpkin")
def _pumpkin(p: Product) -> None:
    h = p.vary(0.32, 0.37)
    for a in (180, 130, 230, 80, 280):
        x, y, z = around(a, 0.28, h)
        p.ball((0.26, h, 0.26), at=(x, y, z))
    for a in (-40, 40):
        x, y, z = around(a, 0.28, h)
        p.ball((0.22, h, 0.26), at=(x, y, z), lift=0.1)
    p.ball((0.22, h, 0.26), at=(0, h, 0.3), lift=0.2)
    p.turned([(0.1, 0), (0.05, 0.12), (0.07, 0.2)], "leaf", at=(0, 2 * h - 0.05, 0), axis=(0.25, 1, 0), lift=0.6)


@kind("mushroom")
def _mushroom(p: Product) -> None:
    r = p.vary(0.52, 0.6)
    p.turned([(0.24, 0), (0.26, 0.08), (0.17, 0.3), (0.16, 0.56)], "light", lift=-0.5)
    p.turned([(0.18, 0.5), (r * 0.96, 0.46)], "second", lift=-0.3)
    cap = [(r * 0.96, 0.46), (r, 0.56), (r * 0.9, 0.74), (r * 0.64, 0.92), (r * 0.3, 1.02), (0.02, 1.04)]
    p.turned(smooth(cap, closed=False, steps=2))
    for a, q, y in ((-55, 0.93, 0.68), (0, 0.93, 0.68), (55, 0.93, 0.68), (-28, 0.68, 0.88), (30, 0.68, 0.88)):
        p.ball((0.085, 0.07, 0.085), "light", at=around(a, r * q, y), lift=0.3)
