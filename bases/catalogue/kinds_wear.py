"""What people wear and carry."""

from __future__ import annotations

import math

from shapes import FRONT, Product, arc, around, disc, kind, rounded, smooth, standing, star, twofold

# -- for the feet ------------------------------------------------------------------------------------------------------


@kind("shoe")
def _shoe(p: Product) -> None:
    t, h = p.vary(0.36, 0.42), p.vary(0.5, 0.58)
    p.prism(rounded(-0.6, 0, 0.68, 0.13, 0.06), t + 0.06, "light")
    top = [(-0.54, 0.1), (-0.58, 0.3), (-0.55, h), (-0.38, h - 0.08), (-0.14, h - 0.06), (-0.06, h + 0.04)]
    p.prism([*top, (0.04, h - 0.02), (0.3, 0.34), (0.55, 0.28), (0.65, 0.2), (0.65, 0.1)], t, lift=0.2)
    p.prism([(0.38, 0.12), (0.44, 0.31), (0.56, 0.28), (0.66, 0.2), (0.66, 0.12)], t + 0.02, "second", lift=0.3)
    p.mark(
        rounded(-0.46, 0.06 - t / 2, -0.12, t / 2 - 0.06, 0.06), "dark", at=(0, h - 0.06, 0), plane="floor", lift=0.5
    )
    for x, y in ((0.05, h - 0.05), (0.14, h - 0.13), (0.23, h - 0.2)):
        p.rod([(x, y, -t * 0.4), (x, y, t * 0.48), (x - 0.07, y - 0.1, t / 2)], 0.025, "light", lift=0.6)


@kind("boot")
def _boot(p: Product) -> None:
    h = p.vary(0.95, 1.15)
    p.prism(
        [(-0.26, 0), (-0.02, 0), (0.02, 0.07), (0.12, 0.0), (0.66, 0), (0.68, 0.12), (-0.26, 0.14)],
        0.36,
        "dark",
        lift=-0.2,
    )
    p.blob([((-0.06, 0.3, 0), 0.2), ((0.46, 0.24, 0), 0.16), ((0.5, 0.2, 0), 0.14), ((-0.1, 0.22, 0), 0.14)])
    p.turned([(0.2, 0.26), (0.19, 0.5), (0.25, h)], at=(-0.06, 0, 0), hollow=True, inside="dark", lift=0.1)
    p.turned([(0.262, h - 0.14), (0.265, h)], "second", at=(-0.06, 0, 0), hollow=True, inside="dark", lift=0.2)


@kind("high heel")
def _high_heel(p: Product) -> None:
    h = p.vary(0.52, 0.62)
    p.turned([(0.035, 0), (0.04, 0.1), (0.1, h)], "second", at=(-0.5, 0, 0), lift=-0.1)
    sole = [(-0.6, h - 0.02), (-0.35, h - 0.04), (-0.1, 0.3), (0.15, 0.06), (0.3, 0.0), (0.66, 0.0)]
    upper = [
        (0.74, 0.06),
        (0.6, 0.2),
        (0.36, 0.3),
        (0.2, 0.36),
        (0.12, 0.34),
        (-0.1, 0.5),
        (-0.34, h + 0.12),
        (-0.56, h + 0.36),
        (-0.64, h + 0.3),
        (-0.64, h + 0.1),
    ]
    p.prism(smooth(sole + upper, steps=3), 0.26)
    if p.sees((0.5, 0.9, 0)):
        bed = [(0.12, 0.35), (-0.1, 0.51), (-0.34, h + 0.14), (-0.5, h + 0.3)]
        p.sheet(
            [*[(x, y, 0.09) for x, y in bed], *[(x, y, -0.09) for x, y in reversed(bed)]], "dark", bare=True, lift=0.4
        )


# -- clothes -----------------------------------------------------------------------------------------------------------


@kind("t-shirt")
def _t_shirt(p: Product) -> None:
    w = p.vary(0.33, 0.38)
    neck = [(0, 0.98), (0.1, 1.0), (0.17, 1.1)]
    p.prism(twofold([*neck, (w, 1.05), (w + 0.32, 0.74), (w + 0.13, 0.56), (w, 0.68), (w + 0.01, 0)]), 0.16)
    p.rod(
        standing([(-0.17, 1.08), *[(-x, y - 0.02) for x, y in reversed(neck[:2])], (0.1, 0.98), (0.17, 1.08)], 0.09),
        0.025,
        "second",
        lift=0.4,
    )
    for s in (-1, 1):
        p.mark(
            [(s * (w + 0.31), 0.74), (s * (w + 0.13), 0.57), (s * (w + 0.09), 0.61), (s * (w + 0.27), 0.78)],
            "second",
            at=(0, 0, 0.081),
        )
    if p.pick(True, False):
        p.mark(star(0, 0.62, 0.17, 0.08), "second", at=(0, 0, 0.081))


@kind("sweater")
def _sweater(p: Product) -> None:
    w = p.vary(0.3, 0.34)
    for s in (-1, 1):
        arm = [
            (s * w, 1.08),
            (s * (w + 0.16), 0.96),
            (s * (w + 0.36), 0.24),
            (s * (w + 0.16), 0.18),
            (s * (w - 0.04), 0.8),
        ]
        p.prism(arm, 0.18, lift=-0.1)
        p.prism(
            [(s * (w + 0.37), 0.25), (s * (w + 0.39), 0.12), (s * (w + 0.17), 0.06), (s * (w + 0.15), 0.19)],
            0.2,
            "second",
        )
    p.prism(twofold([(0.14, 1.1), (w, 1.08), (w + 0.02, 0.0)]), 0.22, lift=0.1)
    p.prism(rounded(-w - 0.03, 0, w + 0.03, 0.14, 0.03), 0.25, "second", lift=0.4)
    p.turned([(0.17, 0), (0.15, 0.16)], "second", at=(0, 1.04, 0), hollow=True, inside="dark", lift=0.4)
    for i in range(-2, 3):
        p.mark(
            [(i * 0.12 - 0.06, 0.68), (i * 0.12, 0.78), (i * 0.12 + 0.06, 0.68), (i * 0.12, 0.58)],
            "second",
            at=(0, 0, 0.111),
            lift=0.5,
        )


@kind("trousers")
def _trousers(p: Product) -> None:
    w, c = p.vary(0.3, 0.34), p.vary(0.74, 0.82)
    p.prism(twofold([(w, 1.3), (w + 0.05, 1.0), (w + p.vary(-0.02, 0.08), 0), (0.09, 0), (0.03, c), (0, c)]), 0.2)
    p.prism(rounded(-w - 0.02, 1.18, w + 0.02, 1.3, 0.02), 0.23, "second", lift=0.4)
    p.mark(rounded(-0.05, 1.19, 0.05, 1.29, 0.01), "gold", at=(0, 0, 0.117), lift=0.6)
    p.mark([(-0.015, 1.18), (0.015, 1.18), (0.015, c), (-0.015, c)], "second", at=(0, 0, 0.101))
    for s in (-1, 1):
        p.mark(
            [(s * 0.16, 1.18), (s * 0.2, 1.18), (s * (w + 0.03), 1.02), (s * (w + 0.03), 0.96)],
            "second",
            at=(0, 0, 0.101),
        )


@kind("dress")
def _dress(p: Product) -> None:
    r, h = p.vary(0.5, 0.6), p.vary(1.25, 1.4)
    for s in (-1, 1):
        p.ball((0.15, 0.13, 0.15), at=(s * 0.25, h - 0.1, 0), lift=-0.1)
    p.turned([(r, 0), (r * 0.82, 0.2), (0.27, 0.6), (0.17, 0.75)])
    p.turned([(0.16, 0.75), (0.24, h - 0.14), (0.22, h), (0.14, h + 0.02)], lift=0.2)
    p.mark(disc(0, h - 0.04, 0.13, 0.8), "light", at=(0, 0, 0.22), lift=0.5)
    p.turned([(0.185, 0.71), (0.17, 0.82)], "second", band=True, lift=0.6)
    p.turned([(r * 1.01, 0), (r * 0.96, 0.08)], "second", band=True, lift=0.3)


# -- for the neck, hands and head --------------------------------------------------------------------------------------


@kind("cap")
def _cap(p: Product) -> None:
    s, h, r = p.pick(-1, 1), p.vary(0.42, 0.5), 0.46
    tip = smooth([(0.2, 0.42), (0.6, 0.4), (0.98, 0.24), (1.06, 0), (0.98, -0.24), (0.6, -0.4), (0.2, -0.42)], steps=3)
    p.prism([(s * x, z) for x, z in tip], 0.07, plane="floor", turn=-s * 25, lift=-0.3)
    up = [0, 0.3, 0.6, 0.9, 1.2, 1.4, 1.57]
    p.turned([(r, 0), *[(r * math.cos(a), 0.1 + h * math.sin(a)) for a in up]], lift=0.1)
    for lap in range(-3, 3):
        a = s * 65 + 60 * lap
        if p.sees(around(a, 1, 0.3), 0.1):
            path = [around(a, r * math.cos(t), 0.1 + h * math.sin(t)) for t in up]
            p.rod([around(a, r, 0), *path], 0.015, "second", lift=0.4)
    p.ball((0.06, 0.03, 0.06), "second", at=(0, h + 0.1, 0), lift=0.5)


@kind("top hat")
def _top_hat(p: Product) -> None:
    h, r = p.vary(0.75, 0.95), p.vary(0.36, 0.42)
    p.turned([(r + 0.26, 0), (r + 0.28, 0.05), (r + 0.24, 0.07)], lift=-0.5)
    p.turned([(r, 0.06), (r * 0.94, h * 0.5), (r * 1.08, h)])
    p.turned([(r + 0.012, 0.07), (r - 0.005, 0.24)], "second", band=True, lift=0.4)


@kind("sun hat")
def _sun_hat(p: Product) -> None:
    h, r = p.vary(0.32, 0.4), p.vary(0.82, 0.92)
    p.turned([(r, 0), (r - 0.02, 0.04), (0.42, 0.14)], lift=-0.5)
    p.turned([(0.41, 0.12), (0.4, 0.22), (0.36, h), (0.24, h + 0.11), (0.08, h + 0.14), (0.01, h + 0.14)])
    p.turned([(0.425, 0.12), (0.415, 0.24)], "second", band=True, lift=0.4)
    for dx, dy in ((-0.13, 0.04), (0.13, 0.04)):
        p.ball((0.13, 0.09, 0.05), "second", at=(dx, 0.18 + dy, 0.44), lift=1)


@kind("crown")
def _crown(p: Product) -> None:
    n, h = 8, p.vary(0.62, 0.76)
    for i in range(n):
        a = 360 * i / n + 8
        p.sheet([around(a - 22, 0.47, 0.2), around(a + 22, 0.47, 0.2), around(a, 0.58, h)])
        p.ball(0.065, "second", at=around(a, 0.58, h), lift=0.05)
    p.turned([(0.46, 0), (0.48, 0.26)], hollow=True, inside="dark", lift=-0.02)
    p.turned([(0.48, 0), (0.485, 0.07)], "second", band=True, lift=0.4)
    for i in range(n):
        if p.sees(around(45 * i + 8, 1, 0)):
            p.ball((0.06, 0.06, 0.06), "second", at=around(45 * i + 8, 0.47, 0.19), lift=0.6)


# -- for the eyes, wrists and fingers ----------------------------------------------------------------------------------


@kind("sunglasses")
def _sunglasses(p: Product) -> None:
    h = p.vary(0.46, 0.54)
    half = [
        (0.0, h - 0.02),
        (0.3, h + 0.02),
        (0.82, h + 0.06),
        (0.84, h - 0.08),
        (0.74, 0.1),
        (0.6, 0),
        (0.3, 0),
        (0.14, 0.12),
        (0.08, h - 0.2),
        (0, h - 0.17),
    ]
    for s in (-1, 1):
        p.prism(
            [(-0.04, h - 0.16), (0, h - 0.06), (0.8, h - 0.06), (0.95, 0.12), (0.88, 0.08), (0.72, h - 0.2)],
            0.06,
            at=(s * 0.81, 0, 0),
            plane="side",
            turn=180,
            lift=-0.2,
        )
    p.prism(twofold(half), 0.08)
    for s in (-1, 1):
        lens = [
            (s * x, y)
            for x, y in smooth(
                [
                    (0.16, h - 0.08),
                    (0.5, h - 0.05),
                    (0.74, h - 0.06),
                    (0.72, 0.2),
                    (0.58, 0.07),
                    (0.34, 0.07),
                    (0.19, 0.2),
                ],
                steps=3,
            )
        ]
        p.mark(lens, "dark", at=(0, 0, 0.042))
        p.mark(
            [(s * 0.3 - 0.05, h - 0.12), (s * 0.3 + 0.04, h - 0.12), (s * 0.3 - 0.02, 0.2), (s * 0.3 - 0.09, 0.2)],
            "screen",
            at=(0, 0, 0.043),
            lift=0.4,
        )


@kind("watch")
def _watch(p: Product) -> None:
    r, h = p.vary(0.34, 0.38), p.vary(0.7, 0.78)
    p.prism([(-0.2, h), (-0.16, 2 * h), (0.16, 2 * h), (0.2, h), (0.16, 0.06), (0.1, 0), (-0.1, 0), (-0.16, 0.06)], 0.1)
    p.mark(rounded(-0.17, 2 * h - 0.12, 0.17, 2 * h, 0.03), "metal", at=(0, 0, 0.06), lift=0.3)
    for y in (0.1, 0.2, 0.3):
        p.mark(disc(0, y, 0.025), "dark", at=(0, 0, 0.06))
    p.rod([(r - 0.02, h, 0.06), (r + 0.07, h, 0.06)], 0.05, "metal", lift=0.3)
    p.turned([(r, -0.08), (r, 0.1), (r * 0.9, 0.13)], "main", at=(0, h, 0.04), axis=FRONT, lift=0.5)
    p.mark(disc(0, h, r * 0.76), "paper", at=(0, 0, 0.175), lift=1)
    for a in range(0, 360, 90):
        x, y = r * 0.66 * math.cos(math.radians(a)), r * 0.66 * math.sin(math.radians(a))
        p.mark(disc(x, h + y, 0.03), "dark", at=(0, 0, 0.176), lift=1.2)
    p.rod(standing([(-0.1, h + 0.12), (0, h), (0.06, h + 0.2)], 0.19), 0.022, "dark", lift=1.3)


@kind("gem")
def _gem(p: Product) -> None:
    r = p.vary(0.52, 0.6)
    for i in range(10):
        a, b, mid = 36 * i, 36 * i + 36, 36 * i + 18
        if p.sees(around(mid, 1, -0.75), 0):
            p.sheet([around(a, r, 0.62), around(b, r, 0.62), (0, 0, 0)])
        if p.sees(around(mid, 1, 0.95), 0):
            p.sheet([around(a, r, 0.62), around(b, r, 0.62), around(mid, r * 0.66, 0.86)], lift=0.3)
            p.sheet([around(a - 18, r * 0.66, 0.86), around(mid, r * 0.66, 0.86), around(a, r, 0.62)], lift=0.3)
    p.prism(
        [
            (r * 0.66 * math.sin(math.radians(36 * i + 18)), r * 0.66 * math.cos(math.radians(36 * i + 18)))
            for i in range(10)
        ],
        0.0,
        at=(0, 0.86, 0),
        plane="floor",
        lift=1,
    )


# -- to carry ----------------------------------------------------------------------------------------------------------


@kind("handbag")
def _handbag(p: Product) -> None:
    w, h = p.vary(0.52, 0.6), p.vary(0.6, 0.7)
    for z in (-0.1, 0.1):
        p.rod(
            standing([(-0.26, h - 0.05), *arc(0, h + 0.16, 0.26, 170, 10), (0.26, h - 0.05)], z),
            0.045,
            "second",
            lift=-0.2,
        )
    p.prism([(-w, 0.06), (-w + 0.06, 0), (w - 0.06, 0), (w, 0.06), (w - 0.1, h), (-w + 0.1, h)], 0.36)
    p.prism(
        [(-w + 0.08, h + 0.01), (w - 0.08, h + 0.01), (w - 0.12, h * 0.62), (0, h * 0.46), (-w + 0.12, h * 0.62)],
        0.03,
        at=(0, 0, 0.2),
        lift=0.4,
    )
    p.mark(disc(0, h * 0.54, 0.08), "gold", at=(0, 0, 0.22), lift=0.7)


@kind("backpack")
def _backpack(p: Product) -> None:
    w, h = p.vary(0.38, 0.44), p.vary(1.0, 1.15)
    p.rod(standing(arc(0, h - 0.01, 0.12, 180, 0)), 0.04, "dark", lift=-0.2)
    for s in (-1, 1):
        p.rod(
            [(s * 0.2, h - 0.12, -0.22), (s * 0.24, h * 0.62, -0.42), (s * 0.26, 0.12, -0.24)], 0.05, "dark", lift=-0.4
        )
        p.prism(rounded(-0.14, 0.06, 0.14, 0.46, 0.06), 0.12, "second", at=(s * (w + 0.04), 0, 0), plane="side")
    p.prism([*rounded(-w, 0.5, w, h, 0.3)[:10], (-w, 0.08), (-w + 0.08, 0), (w - 0.08, 0), (w, 0.08)], 0.42)
    p.prism(rounded(-w + 0.08, 0.05, w - 0.08, 0.5, 0.1), 0.14, at=(0, 0, 0.25), lift=0.4)
    p.prism(
        [(-w + 0.06, 0.5), (w - 0.06, 0.5), (w - 0.1, 0.34), (-w + 0.1, 0.34)],
        0.17,
        "second",
        at=(0, 0, 0.26),
        lift=0.6,
    )
    p.rod(
        standing(
            [
                (-w + 0.06, 0.62),
                (-w + 0.06, h - 0.22),
                *arc(0, h - 0.24, w - 0.08, 160, 20, 7, 0.5),
                (w - 0.06, h - 0.22),
                (w - 0.06, 0.62),
            ],
            0.22,
        ),
        0.02,
        "dark",
        lift=0.4,
    )


@kind("suitcase")
def _suitcase(p: Product) -> None:
    w, h = p.vary(0.36, 0.44), p.vary(0.9, 1.05)
    p.rod(standing([(-0.16, h), (-0.16, h + 0.36), (0.16, h + 0.36), (0.16, h)], -0.1), 0.035, "metal", lift=-0.3)
    for x in (-w + 0.1, w - 0.1):
        for z in (-0.12, 0.12):
            p.turned([(0.07, -0.05), (0.07, 0.05)], "dark", at=(x, 0.07, z), axis=FRONT, lift=-0.2)
    p.prism(rounded(-w, 0.1, w, h + 0.1, 0.1), 0.36)
    for x in (-0.5, 0, 0.5):
        p.prism(rounded(x * w - 0.04, 0.2, x * w + 0.04, h, 0.04), 0.02, "second", at=(0, 0, 0.19), lift=0.4)
    p.rod(
        standing([(-0.1, h + 0.1), (-0.08, h + 0.16), (0.08, h + 0.16), (0.1, h + 0.1)], 0.06), 0.03, "dark", lift=0.2
    )


@kind("umbrella")
def _umbrella(p: Product) -> None:
    r, y = p.vary(0.7, 0.8), 0.95
    p.rod([(0, 0.16, 0), (0, 1.3, 0)], 0.03, "metal", lift=-0.6)
    p.rod(standing([(0, 0.42), (0, 0.16), *arc(-0.12, 0.14, 0.12, 0, -180, 9)]), 0.055, "wood", lift=-0.5)
    dome = [(r, 0), (r * 0.86, 0.2), (r * 0.6, 0.36), (r * 0.3, 0.45), (0.02, 0.48)]
    p.turned([(a, y + b) for a, b in dome])
    for i in range(4):
        a = 90 * i + 30
        if p.sees(around(a, 1, 0.6), 0.1):
            gore = [around(a - 22, q, y + b) for q, b in dome] + [around(a + 22, q, y + b) for q, b in reversed(dome)]
            p.sheet(gore, "second", lift=0.5, bare=True)
    p.turned([(0.03, y + 0.46), (0.02, y + 0.6)], "metal", lift=0.8)
