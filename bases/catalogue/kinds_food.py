"""What one eats, in any colour."""

from __future__ import annotations

import math

from shapes import Product, arc, around, disc, kind, rounded, smooth, standing, twofold

_DOUGH = "#dba25c"
_RED = "#d62f2f"


def _dots(
    p: Product, places: list[tuple[float, float, float]], paints: tuple[str, ...], size: float, lift: float
) -> None:
    for i, at in enumerate(places):
        p.ball(size, paints[i % len(paints)], at=at, lift=lift)


@kind("cake", "food")
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


@kind("cupcake", "food")
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


@kind("doughnut", "food")
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


@kind("ice cream cone", "food")
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


@kind("ice lolly", "food")
def _ice_lolly(p: Product) -> None:
    w, h = p.vary(0.28, 0.33), p.vary(0.8, 0.95)
    p.prism(rounded(-0.08, 0, 0.08, 0.5, 0.08), 0.07, "wood", lift=-0.1)
    p.prism([(-w, 0.34), (w, 0.34), *arc(0, 0.34 + h - w, w, 0, 180, 12)], 0.24)
    for x in (-0.14, 0.14):
        p.prism(rounded(x - 0.045, 0.46, x + 0.045, 0.1 + h, 0.045), 0.02, "second", at=(0, 0, 0.12), lift=0.3)


@kind("lollipop", "food")
def _lollipop(p: Product) -> None:
    r, y = p.vary(0.38, 0.44), 1.06
    p.turned([(0.035, 0), (0.035, y)], "light", lift=-0.2)
    p.prism(disc(0, y, r), 0.15)
    spiral = [
        (0.02 * r + r * 0.86 * t / 26 * math.cos(t * 0.62), y + r * 0.86 * t / 26 * math.sin(t * 0.62))
        for t in range(27)
    ]
    p.rod(standing(spiral, 0.08), r * 0.085, "second", lift=0.4)


@kind("candy", "food")
def _candy(p: Product) -> None:
    r = p.vary(0.32, 0.38)
    for s in (-1, 1):
        wing = [(s * r * 0.7, r), (s * (r + 0.42), r + 0.3), (s * (r + 0.34), r + 0.12), (s * (r + 0.44), r)]
        p.prism([*wing, (s * (r + 0.34), r - 0.12), (s * (r + 0.42), r - 0.3)], 0.1, "second", lift=-0.1)
    p.ball((r + 0.06, r, r), at=(0, r, 0))
    for x in (-0.16, 0.08):
        p.rod(
            standing(smooth([(x - 0.03, r * 1.72), (x + 0.1, r), (x + 0.06, r * 0.24)], closed=False), r * 0.8),
            0.05,
            "second",
            lift=0.3,
        )


@kind("hamburger", "food")
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


@kind("hot dog", "food")
def _hot_dog(p: Product) -> None:
    w = p.vary(0.5, 0.58)
    p.blob(
        [((-w, 0.18, -0.14), 0.17), ((w, 0.18, -0.14), 0.17), ((-w, 0.28, -0.16), 0.16), ((w, 0.28, -0.16), 0.16)],
        "main",
        lift=-0.4,
    )
    p.blob([((-w - 0.14, 0.34, 0), 0.14), ((w + 0.14, 0.34, 0), 0.14)], "#b5522f", lift=0.1)
    p.blob([((-w, 0.17, 0.16), 0.17), ((w, 0.17, 0.16), 0.17)], "main", lift=0.2)
    wave = [(-w + 2 * w * t / 10, 0.44 + (0.06 if t % 2 else -0.02)) for t in range(11)]
    p.rod(standing(smooth(wave, closed=False, steps=3), 0.08), 0.035, "#f5cf30", lift=0.7)


@kind("pizza slice", "food")
def _pizza_slice(p: Product) -> None:
    w = p.vary(0.46, 0.54)
    p.prism([(-w, 0.98), (w, 0.98), (0, 0)], 0.1, _DOUGH)
    p.prism([(-w * 0.96, 0.96), (w * 0.96, 0.96), (0.02, 0.06), (-0.02, 0.06)], 0.04, "main", at=(0, 0, 0.06), lift=0.2)
    p.blob([((-w, 1.0, 0), 0.085), ((w, 1.0, 0), 0.085)], "#b9762f", lift=0.4)
    for x, y, r in ((-0.2, 0.76, 0.11), (0.2, 0.74, 0.11), (0.02, 0.46, 0.1)):
        p.turned([(r, 0), (r * 0.9, 0.03)], "second", at=(x, y, 0.08), axis=(0, 0, 1), lift=0.6)


@kind("apple", "food")
def _apple(p: Product) -> None:
    s, r = p.pick(-1, 1), p.vary(0.46, 0.5)
    profile = [(0.2, 0), (r * 0.76, 0.1), (r, 0.42), (r * 0.98, 0.62), (r * 0.74, 0.82), (0.3, 0.86), (0.1, 0.76)]
    p.turned([(q, y) for q, y in smooth(profile, closed=False, steps=2)])
    p.rod(standing([(0, 0.76), (0.02, 0.92), (0.06, 1.04)]), 0.035, "#5b3a24", lift=0.6)
    p.prism(
        smooth([(s * 0.05, 0.9), (s * 0.16, 1.06), (s * 0.4, 1.06), (s * 0.3, 0.9)], steps=3), 0.03, "leaf", lift=0.7
    )


@kind("pear", "food")
def _pear(p: Product) -> None:
    s, r = p.pick(-1, 1), p.vary(0.4, 0.45)
    profile = [
        (0.16, 0),
        (r * 0.84, 0.12),
        (r, 0.36),
        (r * 0.82, 0.62),
        (r * 0.5, 0.84),
        (r * 0.42, 1.0),
        (r * 0.24, 1.12),
        (0.03, 1.14),
    ]
    p.turned([(q, y) for q, y in smooth(profile, closed=False, steps=2)])
    p.rod(standing([(0, 1.12), (0.05, 1.32)]), 0.035, "#5b3a24", lift=0.4)
    p.prism(
        smooth([(s * 0.05, 1.18), (s * 0.16, 1.32), (s * 0.38, 1.3), (s * 0.26, 1.18)], steps=3), 0.03, "leaf", lift=0.5
    )


@kind("cherries", "food")
def _cherries(p: Product) -> None:
    r = p.vary(0.27, 0.31)
    for s, h in ((-1, 0.0), (1, 0.0)):
        p.ball(r, at=(s * (r + 0.03), r + h, 0))
        p.rod(
            standing(smooth([(s * (r + 0.03), 2 * r - 0.06), (s * 0.2, 0.8), (0.06, 1.1)], closed=False)),
            0.028,
            "leaf",
            lift=0.3,
        )
    p.prism(smooth([(0.06, 1.08), (0.22, 1.24), (0.52, 1.14), (0.3, 1.02)], steps=3), 0.03, "leaf", lift=0.4)


@kind("strawberry", "food")
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


@kind("pineapple", "food")
def _pineapple(p: Product) -> None:
    r, h = p.vary(0.34, 0.4), 0.86
    for k in range(9):
        a, t = 40 * k, 0.3 if k % 2 else 0.16
        tip = 0.26 if k % 2 else 0.44
        p.sheet(
            [around(a - 40, 0.12, h - 0.04), around(a, t * 1.5, h + tip), around(a + 40, 0.12, h - 0.04)],
            "leaf",
            bare=True,
        )
    profile = [(r * 0.7, 0), (r * 0.95, 0.16), (r, 0.42), (r * 0.92, 0.68), (r * 0.6, h)]
    p.turned(profile, lift=0.1)
    for start in range(-120, 121, 30):
        for twist in (-60, 60):
            path = [around(start + twist * y, 1.01 * q, y) for q, y in profile]
            if all(p.sees((x, 0, z), 0.05) for x, _, z in path):
                p.rod(path, 0.016, "second", lift=0.5)


@kind("carrot", "food")
def _carrot(p: Product) -> None:
    for x, y in ((-0.2, 0.34), (0, 0.44), (0.2, 0.34)):
        p.blob([((0, 1.06, 0), 0.04), ((x, 1.06 + y, 0), 0.07)], "leaf", lift=-0.1)
    r = p.vary(0.22, 0.26)
    p.turned([(0.02, 0), (r * 0.5, 0.34), (r * 0.86, 0.76), (r, 0.98), (r * 0.6, 1.08)])
    for y, q, a in ((0.42, 0.6, 20), (0.6, 0.75, -30), (0.78, 0.9, 30), (0.92, 0.98, -20)):
        p.rod([around(a - 20, r * q, y), around(a + 20, r * q, y)], 0.015, "dark", lift=0.4)


@kind("pumpkin", "food")
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


@kind("mushroom", "food")
def _mushroom(p: Product) -> None:
    r = p.vary(0.52, 0.6)
    p.turned([(0.24, 0), (0.26, 0.08), (0.17, 0.3), (0.16, 0.56)], "light", lift=-0.5)
    p.turned([(0.18, 0.5), (r * 0.96, 0.46)], "second", lift=-0.3)
    cap = [(r * 0.96, 0.46), (r, 0.56), (r * 0.9, 0.74), (r * 0.64, 0.92), (r * 0.3, 1.02), (0.02, 1.04)]
    p.turned(smooth(cap, closed=False, steps=2))
    for a, q, y in ((-55, 0.93, 0.68), (0, 0.93, 0.68), (55, 0.93, 0.68), (-28, 0.68, 0.88), (30, 0.68, 0.88)):
        p.ball((0.085, 0.07, 0.085), "light", at=around(a, r * q, y), lift=0.3)


@kind("easter egg", "food")
def _easter_egg(p: Product) -> None:
    r = p.vary(0.42, 0.46)

    def width(y: float) -> float:
        t = y / 1.14
        return r * math.sin(math.acos(1 - 2 * t)) * (1.08 - 0.3 * (t - 0.35))

    p.turned([(0.2, 0), (0.22, 0.05)], "wood", lift=-0.5)
    p.turned([(max(width(k * 1.14 / 14), 0.01), k * 1.14 / 14 + 0.03) for k in range(15)], sides=28)
    for y in (0.36, 0.76):
        p.turned(
            [(width(y - 0.05) + 0.004, y - 0.02), (width(y + 0.05) + 0.004, y + 0.08)], "second", band=True, lift=0.3
        )
    zig = [
        around(a, width(0.58) + 0.01, 0.6 + (0.06 if (a // 15) % 2 else -0.06))
        for a in range(-180, 180, 15)
        if p.sees(around(a, 1, 0), 0.05)
    ]
    p.rod(zig if len(zig) > 1 else [(0, 0.6, 0), (0, 0.61, 0)], 0.025, "light", lift=0.4)


@kind("gingerbread man", "food")
def _gingerbread_man(p: Product) -> None:
    half = [
        (0.0, 1.3),
        (0.2, 1.24),
        (0.27, 1.06),
        (0.17, 0.88),
        (0.52, 0.84),
        (0.6, 0.72),
        (0.5, 0.62),
        (0.24, 0.6),
        (0.26, 0.42),
        (0.42, 0.12),
        (0.34, 0.0),
        (0.2, 0.02),
        (0.06, 0.3),
        (0, 0.32),
    ]
    p.prism(twofold(smooth(half, closed=False, steps=3)), p.vary(0.12, 0.16))
    for s in (-1, 1):
        p.rod(standing([(s * 0.46, 0.83), (s * 0.42, 0.74), (s * 0.46, 0.64)], 0.08), 0.025, "second", lift=0.4)
        p.rod(standing([(s * 0.38, 0.14), (s * 0.28, 0.17), (s * 0.17, 0.12)], 0.08), 0.025, "second", lift=0.4)
        p.mark(disc(s * 0.09, 1.1, 0.035), "second", at=(0, 0, 0.083))
    p.rod(standing(arc(0, 1.04, 0.11, 205, 335, 8), 0.08), 0.022, "second", lift=0.4)
    for y in (0.5, 0.64, 0.78):
        p.ball((0.045, 0.045, 0.03), "second", at=(0, y, 0.09), lift=0.4)


@kind("french fries", "food")
def _french_fries(p: Product) -> None:
    for i in range(11):
        x = -0.34 + 0.068 * i
        y = 0.9 + 0.22 * p.vary(0, 1) - 0.9 * abs(x) ** 2
        p.box((0.085, y - 0.56, 0.085), "#f1c453", at=(x, 0.56, 0.08 * (i % 3 - 1)), turn=20 * (i % 3 - 1), lift=-0.2)
    p.prism([(-0.3, 0), (0.3, 0), (0.44, 0.74), *arc(0, 0.82, 0.36, -20, -160, 9, 0.6), (-0.44, 0.74)], 0.3, lift=0.3)
    p.mark(disc(0, 0.3, 0.15), "second", at=(0, 0, 0.152), lift=0.6)


@kind("popcorn box", "food")
def _popcorn_box(p: Product) -> None:
    h = p.vary(0.76, 0.86)
    p.turned([(0.3, 0), (0.46, h)], lift=-0.2)
    for k in range(7):
        a = 51.4 * k
        if p.sees(around(a + 9, 1, -0.2), 0.1):
            p.sheet(
                [around(a, 0.305, 0), around(a + 14, 0.305, 0), around(a + 14, 0.465, h), around(a, 0.465, h)],
                "paper",
                bare=True,
                lift=0.2,
            )
    spots = (
        [around(45 * k, 0.34, h + 0.03) for k in range(8)]
        + [around(60 * k + 20, 0.2, h + 0.14) for k in range(6)]
        + [(0, h + 0.24, 0)]
    )
    for i, at in enumerate(spots):
        p.ball(0.12, "#fbf1cf" if i % 2 else "#f6e3a1", at=at, lift=0.4 + at[1] - h)


@kind("cheese", "food")
def _cheese(p: Product) -> None:
    h = p.vary(0.46, 0.54)
    p.prism([(-0.7, 0.3), (0.62, 0.42), (0.62, -0.36)], h, plane="floor")
    t = -5.2
    for x, y, r in ((-0.3, 0.18, 0.07), (0.0, 0.32, 0.1), (0.3, 0.14, 0.09), (0.42, 0.36, 0.06)):
        p.mark(disc(0, 0, r), "second", at=(x, y * h / 0.5, 0.3 + (x + 0.7) * 0.12 / 1.32 + 0.004), turn=t, lift=0.5)
    for x, z, r in ((0.4, 0.2, 0.1), (0.1, 0.18, 0.07), (0.46, -0.1, 0.08)):
        p.mark(disc(x, z, r), "second", at=(0, h + 0.003, 0), plane="floor", lift=0.5)
