"""Vehicles, and what stands in the street, the garden and at the sea."""

from __future__ import annotations

import math

from shapes import FRONT, Product, arc, around, disc, kind, rounded, smooth, standing

# -- vehicles ----------------------------------------------------------------------------------------------------------


@kind("bus", "outdoors")
def _bus(p: Product) -> None:
    w, h = p.vary(0.72, 0.8), p.vary(0.62, 0.7)
    p.wheels((-0.44, 0.44), 0.2, 0.13)
    p.prism(rounded(-w, 0.1, w, h, 0.08), 0.46)
    for i in range(5):
        x = -w + 0.12 + i * (2 * w - 0.2) / 5
        p.mark(rounded(x, h * 0.55, x + 0.2, h - 0.08, 0.02), "glass", at=(0, 0, 0.232))
    p.mark(rounded(-w, 0.26, w, 0.32, 0), "second", at=(0, 0, 0.232))
    for k in (1, -1):
        p.mark(
            rounded(-0.19, h * 0.5, 0.19, h - 0.08, 0.03),
            "glass",
            at=(k * (w + 0.003), 0, 0),
            plane="side",
            turn=90 - 90 * k,
        )
        for z in (-0.15, 0.15):
            p.mark(disc(z, 0.22, 0.04), "glow", at=(k * (w + 0.003), 0, 0), plane="side", turn=90 - 90 * k)


@kind("truck", "outdoors")
def _truck(p: Product) -> None:
    s, h = p.pick(-1, 1), p.vary(0.78, 0.88)
    p.wheels((-0.5, -0.2, 0.52) if s > 0 else (0.5, 0.2, -0.52), 0.22, 0.14)
    p.box((1.5, 0.08, 0.36), "dark", at=(0, 0.14, 0), lift=-0.2)
    p.box((1.04, h - 0.2, 0.5), "main", at=(-s * 0.28, 0.22, 0))
    p.mark(rounded(-s * 0.28 - 0.34, 0.42, -s * 0.28 + 0.34, 0.54, 0), "second", at=(0, 0, 0.253))
    cab = [(0.28, 0.14), (0.28, 0.66), (0.56, 0.66), (0.7, 0.42), (0.78, 0.38), (0.78, 0.14)]
    p.prism([(s * x, y) for x, y in cab], 0.46, "second", lift=0.05)
    p.mark(
        [(s * x, y) for x, y in ((0.36, 0.42), (0.36, 0.6), (0.54, 0.6), (0.64, 0.42))],
        "glass",
        at=(0, 0, 0.232),
        lift=0.5,
    )


@kind("tractor", "outdoors")
def _tractor(p: Product) -> None:
    s, r = p.pick(-1, 1), p.vary(0.34, 0.38)
    p.wheels((-s * 0.36,), 0.27, r, "main", 0.2)
    p.wheels((s * 0.5,), 0.24, 0.2, "main", 0.14)
    p.prism([(s * x, y) for x, y in ((-0.1, 0.2), (-0.1, 0.68), (0.64, 0.62), (0.7, 0.54), (0.7, 0.2))], 0.34)
    p.box((0.5, 0.3, 0.36), at=(-s * 0.36, 0.3, 0))
    for x in (-0.62, -0.12):
        for z in (-0.17, 0.17):
            p.rod([(s * x, 0.56, z), (s * x * 0.95, 1.1, z)], 0.03, "dark", lift=0.2)
    p.box((0.66, 0.07, 0.46), at=(-s * 0.36, 1.08, 0), lift=0.4)
    p.box((0.46, 0.4, 0.3), "glass", at=(-s * 0.36, 0.66, 0), lift=0.1)
    p.rod([(s * 0.42, 0.6, 0.06), (s * 0.42, 0.92, 0.06)], 0.035, "metal", lift=0.3)


@kind("van", "outdoors")
def _van(p: Product) -> None:
    s, h = p.pick(-1, 1), p.vary(0.74, 0.82)
    p.wheels((-0.4, 0.42), 0.22, 0.15)
    body = [
        (-0.74, 0.12),
        (-0.76, h - 0.08),
        (-0.68, h),
        (0.3, h),
        (0.44, h - 0.06),
        (0.64, 0.46),
        (0.76, 0.4),
        (0.78, 0.12),
    ]
    p.prism([(s * x, y) for x, y in body], 0.48)
    p.mark(
        [(s * x, y) for x, y in ((-0.76, 0.12), (-0.76, 0.36), (0.77, 0.36), (0.78, 0.12))],
        "second",
        at=(0, 0, 0.242),
        lift=0.2,
    )
    for q in (
        ((0.24, 0.46), (0.24, h - 0.08), (0.38, h - 0.1), (0.56, 0.46)),
        ((-0.18, 0.46), (-0.18, h - 0.08), (0.14, h - 0.08), (0.14, 0.46)),
        ((-0.62, 0.46), (-0.62, h - 0.08), (-0.28, h - 0.08), (-0.28, 0.46)),
    ):
        p.mark([(s * x, y) for x, y in q], "glass", at=(0, 0, 0.243), lift=0.4)


@kind("bicycle", "outdoors")
def _bicycle(p: Product) -> None:
    s, r = p.pick(-1, 1), p.vary(0.32, 0.36)
    for x in (-0.5, 0.5):
        p.ring(r, 0.035, "rubber", at=(s * x, r + 0.03, 0))
        for a in range(0, 180, 45):
            c, q = r * math.cos(math.radians(a)), r * math.sin(math.radians(a))
            p.rod(standing([(s * x - c, r + 0.03 - q), (s * x + c, r + 0.03 + q)]), 0.008, "metal", lift=-0.1)
    y = r + 0.03
    frame = [
        [(-0.5, y), (-0.04, y - 0.04), (0.34, 0.78), (-0.2, 0.78), (-0.5, y)],
        [(-0.04, y - 0.04), (-0.24, 0.9)],
        [(0.5, y), (0.3, 0.98)],
    ]
    for line in frame:
        p.rod(standing([(s * u, v) for u, v in line]), 0.05, lift=0.2)
    p.rod(
        [(s * 0.3, 0.98, -0.16), (s * 0.28, 1.0, 0), (s * 0.3, 0.98, 0.16), (s * 0.2, 0.94, 0.2)],
        0.035,
        "dark",
        lift=0.3,
    )
    p.blob([((-s * 0.34, 0.93, 0), 0.06), ((-s * 0.16, 0.92, 0), 0.04)], "dark", lift=0.3)
    p.ring(0.08, 0.03, "metal", at=(-s * 0.04, y - 0.04, 0.05), lift=0.4)


@kind("scooter", "outdoors")
def _scooter(p: Product) -> None:
    s, h = p.pick(-1, 1), p.vary(1.0, 1.12)
    for x in (-0.46, 0.5):
        p.turned([(0.13, -0.05), (0.13, 0.05)], "rubber", at=(s * x, 0.13, 0), axis=FRONT)
        p.mark(disc(s * x, 0.13, 0.06), "second", at=(0, 0, 0.052))
    p.prism(
        [
            (s * x, y)
            for x, y in (
                (-0.5, 0.28),
                (-0.34, 0.16),
                (0.3, 0.16),
                (0.42, 0.34),
                (0.34, 0.36),
                (0.26, 0.25),
                (-0.3, 0.25),
                (-0.46, 0.34),
            )
        ],
        0.2,
        lift=0.1,
    )
    p.rod(standing([(s * 0.5, 0.14), (s * 0.32, h)]), 0.055, lift=0.15)
    p.rod([(s * 0.32, h, -0.24), (s * 0.32, h, 0.24)], 0.05, "second", lift=0.3)
    for z in (-0.24, 0.24):
        p.blob([((s * 0.32, h, z * 0.7), 0.055), ((s * 0.32, h, z), 0.055)], "dark", lift=0.4 + z)


@kind("baby carriage", "outdoors")
def _baby_carriage(p: Product) -> None:
    s = p.pick(-1, 1)
    for z in (-0.24, 0.24):
        for x in (-0.3, 0.32):
            p.ring(0.17, 0.035, "dark", at=(x, 0.2, z), lift=2 * z)
            p.mark(disc(x, 0.2, 0.05), "second", at=(0, 0, z), lift=2 * z + 0.1)
        p.rod(standing([(-0.3, 0.2), (0.1, 0.46)], z), 0.025, "metal", lift=2 * z)
        p.rod(standing([(0.32, 0.2), (-0.1, 0.46)], z), 0.025, "metal", lift=2 * z)
    p.prism([(s * x, y) for x, y in ((-0.52, 0.78), *arc(0, 0.78, 0.52, 180, 360, 12, 0.8))], p.vary(0.4, 0.46))
    p.prism([(s * 0.02, 0.78), *[(s * x, y) for x, y in arc(0.0, 0.78, 0.54, 0, 105, 10)]], 0.46, lift=0.1)
    for a in (35, 70):
        p.rod(
            standing(
                [(s * 0.02, 0.78), (s * 0.54 * math.cos(math.radians(a)), 0.78 + 0.54 * math.sin(math.radians(a)))],
                0.235,
            ),
            0.018,
            "second",
            lift=0.5,
        )
    p.rod(
        [(-s * 0.5, 0.7, 0.16), (-s * 0.78, 1.0, 0.16), (-s * 0.78, 1.0, -0.16), (-s * 0.5, 0.7, -0.16)],
        0.035,
        "dark",
        lift=-0.1,
    )
    p.box((0.5, 0.05, 0.44), "second", at=(-s * 0.26, 0.75, 0), lift=0.4)


@kind("caravan", "outdoors")
def _caravan(p: Product) -> None:
    s, h = p.pick(-1, 1), p.vary(0.76, 0.84)
    p.wheels((0.0,), 0.22, 0.15)
    p.rod([(s * 0.6, 0.16, 0), (s * 0.92, 0.12, 0)], 0.035, "dark", lift=-0.2)
    p.rod([(s * 0.86, 0.12, 0), (s * 0.86, 0.03, 0)], 0.035, "dark", lift=-0.2)
    p.prism(rounded(-0.66, 0.14, 0.66, h + 0.1, 0.3), 0.5)
    p.mark(rounded(-0.66, 0.3, 0.66, 0.42, 0), "second", at=(0, 0, 0.252), lift=0.2)
    p.mark(rounded(-s * 0.12 - 0.22, 0.5, -s * 0.12 + 0.22, h - 0.06, 0.05), "glass", at=(0, 0, 0.253))
    p.mark(rounded(s * 0.38 - 0.13, 0.18, s * 0.38 + 0.13, h - 0.06, 0.05), "light", at=(0, 0, 0.254), lift=0.4)


@kind("steamship", "outdoors")
def _steamship(p: Product) -> None:
    s = p.pick(-1, 1)
    for x in (-0.24, 0.06):
        p.turned([(0.1, 0.6), (0.1, p.vary(0.98, 1.02))], "main", at=(s * x, 0, 0), lift=-0.05)
        p.turned([(0.103, 0.88), (0.103, 0.97)], "dark", at=(s * x, 0, 0), band=True, lift=0.1)
    p.box((0.94, 0.2, 0.3), "light", at=(-s * 0.06, 0.34, 0))
    p.box((0.66, 0.16, 0.26), "light", at=(-s * 0.1, 0.54, 0), lift=0.02)
    for x in (-0.36, -0.18, 0.0, 0.18):
        p.mark(disc(s * x - s * 0.06, 0.45, 0.04), "screen", at=(0, 0, 0.152), lift=0.4)
    p.prism(
        [(s * x, y) for x, y in ((-0.78, 0.4), (-0.66, 0), (0.6, 0), (0.9, 0.46), (0.6, 0.36), (-0.6, 0.36))],
        0.36,
        lift=0.15,
    )
    p.mark(
        [(s * x, y) for x, y in ((-0.68, 0.06), (-0.66, 0), (0.6, 0), (0.64, 0.06))], "dark", at=(0, 0, 0.182), lift=0.4
    )


_LAMPS = ("#e03a2f", "#f5b82e", "#3fae4c")


# -- in the street -----------------------------------------------------------------------------------------------------


@kind("traffic light", "outdoors")
def _traffic_light(p: Product) -> None:
    w = p.vary(0.2, 0.24)
    p.turned([(0.2, 0), (0.18, 0.06), (0.06, 0.1), (0.06, 0.5)], "dark", lift=-0.2)
    p.prism(rounded(-w, 0.46, w, 1.52, 0.08), 0.3)
    for y, paint in ((1.3, _LAMPS[0]), (0.99, _LAMPS[1]), (0.68, _LAMPS[2])):
        p.turned([(0.14, 0), (0.14, 0.03)], "dark", at=(0, y, 0.15), axis=FRONT, lift=0.4)
        p.mark(disc(0, y, 0.11), paint, at=(0, 0, 0.185), lift=0.7)
        p.prism(arc(0, y, 0.165, 15, 165, 8) + arc(0, y, 0.13, 165, 15, 8), 0.16, "main", at=(0, 0, 0.22), lift=0.8)


@kind("street lamp", "outdoors")
def _street_lamp(p: Product) -> None:
    h = p.vary(1.0, 1.15)
    p.turned([(0.2, 0), (0.2, 0.08), (0.12, 0.16), (0.1, 0.3), (0.065, 0.34), (0.055, h)])
    p.rod([(-0.2, h - 0.16, 0), (0.2, h - 0.16, 0)], 0.04, lift=0.1)
    p.turned([(0.08, h - 0.02), (0.16, h + 0.04)], lift=0.2)
    p.turned([(0.14, h + 0.04), (0.22, h + 0.36)], "glow", lift=0.3)
    for a in range(0, 360, 60):
        if p.sees(around(a, 1, -0.2), 0):
            p.rod([around(a, 0.15, h + 0.04), around(a, 0.23, h + 0.36)], 0.022, lift=0.5)
    p.turned([(0.29, h + 0.36), (0.1, h + 0.5), (0.06, h + 0.52)], lift=0.6)
    p.ball(0.06, at=(0, h + 0.56, 0), lift=0.7)


@kind("signpost", "outdoors")
def _signpost(p: Product) -> None:
    h = p.vary(1.25, 1.4)
    p.turned([(0.07, 0), (0.07, h)], "wood", lift=-0.1)
    p.ball((0.1, 0.06, 0.1), "wood", at=(0, h, 0))
    for k, (y, s) in enumerate(((h - 0.3, 1), (h - 0.62, -1))):
        board = [(-0.4, y - 0.12), (-0.4, y + 0.12), (0.5, y + 0.12), (0.68, y), (0.5, y - 0.12)]
        p.prism([(s * x, v) for x, v in board], 0.07, at=(0, 0, 0.09), lift=0.3)
        p.mark(
            [
                (s * x, v)
                for x, v in ((-0.28, y - 0.03), (-0.28, y + 0.03), (0.4 - 0.1 * k, y + 0.03), (0.4 - 0.1 * k, y - 0.03))
            ],
            "second",
            at=(0, 0, 0.127),
            lift=0.5,
        )


@kind("fire hydrant", "outdoors")
def _fire_hydrant(p: Product) -> None:
    h = p.vary(0.74, 0.84)
    p.turned([(0.34, 0), (0.34, 0.08), (0.26, 0.1), (0.25, h), (0.3, h), (0.3, h + 0.07)])
    p.turned([(0.28, h + 0.07), (0.26, h + 0.18), (0.16, h + 0.28), (0.08, h + 0.3), (0.08, h + 0.38)], lift=0.3)
    for s in (-1, 1):
        p.turned(
            [(0.11, 0.2), (0.11, 0.34), (0.14, 0.34), (0.14, 0.4)],
            "second",
            at=(0, h * 0.66, 0),
            axis=(s, 0, 0),
            lift=0.1,
        )
    p.turned(
        [(0.15, 0.22), (0.15, 0.32), (0.18, 0.32), (0.18, 0.38)], "second", at=(0, h * 0.62, 0), axis=FRONT, lift=0.5
    )
    p.turned([(0.06, 0.38), (0.06, 0.44)], "main", at=(0, h * 0.62, 0), axis=FRONT, lift=0.7)


@kind("phone box", "outdoors")
def _phone_box(p: Product) -> None:
    w, h = p.vary(0.56, 0.62), p.vary(1.3, 1.42)
    p.box((w, h, w))
    p.box((w + 0.1, 0.09, w + 0.1), lift=0.05)
    p.box((w + 0.08, 0.12, w + 0.08), at=(0, h - 0.06, 0), lift=0.2)
    p.prism([(-w / 2, h + 0.06), (w / 2, h + 0.06), *arc(0, h + 0.06, w / 2, 15, 165, 7, 0.4)], w - 0.04, lift=0.2)
    a = w / 2 - 0.09
    for turn in (0, 90, -90):
        t = math.radians(turn)
        at = (w / 2 * 1.005 * math.sin(t), 0, w / 2 * 1.005 * math.cos(t))
        for i in range(4):
            for s in (-1, 1):
                y = 0.22 + 0.225 * i
                p.mark(rounded(s * a, y, s * 0.025, y + 0.18, 0), "glass", at=at, turn=turn)
        p.mark(rounded(-a, h - 0.03, a, h + 0.04, 0), "paper", at=(at[0] * 1.15, 0, at[2] * 1.15), turn=turn, lift=0.6)


# -- buildings ---------------------------------------------------------------------------------------------------------


@kind("windmill", "outdoors")
def _windmill(p: Product) -> None:
    h, spin = p.vary(0.86, 0.96), p.vary(20, 70)
    p.turned([(0.36, 0), (0.24, h)])
    p.turned([(0.28, h), (0.22, h + 0.12), (0.02, h + 0.28)], "main", lift=0.3)
    p.mark([(-0.09, 0), (0.09, 0), (0.09, 0.22), (-0.09, 0.22)], "wood", at=(0, 0, 0.36), lift=0.3)
    p.mark(rounded(-0.06, 0.5, 0.06, 0.64, 0), "dark", at=(0, 0, 0.3), lift=0.3)
    for i in range(4):
        c, s = math.cos(math.radians(90 * i + spin)), math.sin(math.radians(90 * i + spin))
        sail = [(0.14, 0.0), (0.64, 0.0), (0.64, 0.15), (0.14, 0.15)]
        p.prism([(u * c - v * s, h + 0.04 + u * s + v * c) for u, v in sail], 0.02, "paper", at=(0, 0, 0.36), lift=0.6)
        p.rod(standing([(0, h + 0.04), (0.7 * c, h + 0.04 + 0.7 * s)], 0.37), 0.025, "wood", lift=0.7)
    p.ball(0.06, "dark", at=(0, h + 0.04, 0.4), lift=0.9)


@kind("lighthouse", "outdoors")
def _lighthouse(p: Product) -> None:
    h = p.vary(1.1, 1.25)
    p.turned([(0.44, 0), (0.4, 0.08), (0.32, 0.1)], "#8b8f96", lift=-0.4)
    p.turned([(0.3, 0.08), (0.19, h)])
    for k in (0.3, 0.7):
        p.turned(
            [
                (0.3 - 0.11 * k + 0.006, 0.08 + (h - 0.08) * k),
                (0.3 - 0.11 * (k + 0.15) + 0.006, 0.08 + (h - 0.08) * (k + 0.15)),
            ],
            "paper",
            band=True,
            lift=0.2,
        )
    p.turned([(0.28, h), (0.28, h + 0.07)], "dark", lift=0.3)
    p.turned([(0.15, h + 0.07), (0.15, h + 0.27)], "glow", lift=0.4)
    p.turned([(0.21, h + 0.27), (0.03, h + 0.44)], "main", lift=0.6)
    p.mark([(-0.07, 0.1), (0.07, 0.1), *arc(0, 0.24, 0.07, 0, 180, 6)], "dark", at=(0, 0, 0.3), lift=0.4)


@kind("water tower", "outdoors")
def _water_tower(p: Product) -> None:
    h, r = p.vary(0.66, 0.76), p.vary(0.42, 0.48)
    for a in (45, 135, 225, 315):
        p.rod([around(a, r * 1.05, 0.02), around(a, r * 0.8, h)], 0.04, "wood", lift=-0.3)
    for a in (45, -45 + 180, 225, 315):
        p.rod([around(a, r * 1.0, 0.14), around(a + 90, r * 0.84, h - 0.1)], 0.022, "wood", lift=-0.32)
    p.turned([(r + 0.06, h), (r + 0.06, h + 0.05)], "wood", lift=-0.1)
    p.turned([(r, h + 0.05), (r, h + 0.6)], lift=0.1)
    for y in (0.14, 0.34, 0.54):
        p.turned([(r + 0.006, h + y), (r + 0.006, h + y + 0.04)], "dark", band=True, lift=0.2)
    p.turned([(r + 0.05, h + 0.6), (0.03, h + 0.88)], "main", lift=0.5)


@kind("bird house", "outdoors")
def _bird_house(p: Product) -> None:
    h = p.vary(0.6, 0.7)
    p.turned([(0.2, 0), (0.18, 0.05), (0.06, 0.08), (0.06, h)], "main", lift=-0.4)
    p.prism([(-0.3, h), (0.3, h), (0.3, h + 0.42), (0, h + 0.7), (-0.3, h + 0.42)], 0.46, "second")
    for s in (-1, 1):
        p.prism([(0, h + 0.7), (s * 0.42, h + 0.31), (s * 0.47, h + 0.37), (0, h + 0.8)], 0.58, lift=0.2)
    p.mark(disc(0, h + 0.4, 0.12), "dark", at=(0, 0, 0.232), lift=0.4)
    p.rod([(0, h + 0.18, 0.22), (0, h + 0.18, 0.38)], 0.035, "wood", lift=0.6)


@kind("dog house", "outdoors")
def _dog_house(p: Product) -> None:
    w, h = p.vary(0.42, 0.48), p.vary(0.5, 0.56)
    p.prism([(-w, 0), (w, 0), (w, h), (0, h + 0.36), (-w, h)], 0.8, "second")
    for s in (-1, 1):
        p.prism(
            [(0, h + 0.35), (s * (w + 0.1), h - 0.09), (s * (w + 0.14), h - 0.02), (0, h + 0.47)],
            0.94,
            "main",
            lift=0.2,
        )
    p.mark([(-0.2, 0), (0.2, 0), *arc(0, 0.32, 0.2, 0, 180, 10)], "dark", at=(0, 0, 0.402), lift=0.4)
    bone = [(-0.12, h + 0.1), (0.12, h + 0.1)]
    p.rod(standing(bone, 0.42), 0.03, "paper", lift=0.6)
    for x in (-0.14, 0.14):
        for y in (-0.03, 0.03):
            p.ball(0.04, "paper", at=(x, h + 0.1 + y, 0.42), lift=0.6)


@kind("well", "outdoors")
def _well(p: Product) -> None:
    r, h = p.vary(0.42, 0.48), 0.46
    for s in (-1, 1):
        p.box((0.09, 1.1, 0.09), "wood", at=(s * r * 0.9, 0, 0), lift=-0.1)
    p.turned([(r, 0), (r, h)], hollow=True, inside="dark", lift=-0.15)
    for i in range(9):
        for row in range(3):
            a = 40 * i + 20 * (row % 2)
            if p.sees(around(a, 1, 0), 0.2):
                p.rod(
                    [around(a, r + 0.005, 0.155 * row + 0.02), around(a, r + 0.005, 0.155 * row + 0.14)],
                    0.012,
                    "second",
                    lift=0.3,
                )
    for y in (0.155, 0.31):
        p.turned([(r + 0.004, y - 0.012), (r + 0.004, y + 0.012)], "second", band=True, lift=0.3)
    p.rod([(-r * 0.9, 0.86, 0), (r * 0.9, 0.86, 0)], 0.035, "wood", lift=0.05)
    p.rod([(0, 0.86, 0), (0, 0.64, 0)], 0.018, "dark", lift=0.1)
    p.turned([(0.09, 0.46), (0.12, 0.64)], "metal", lift=0.1)
    p.prism([(-0.4, 1.06), (0, 1.42), (0.4, 1.06)], 2 * r + 0.2, "main", plane="side", lift=0.3)


# -- garden and sea ----------------------------------------------------------------------------------------------------


@kind("parasol", "outdoors")
def _parasol(p: Product) -> None:
    r, h = p.vary(0.76, 0.84), 1.16
    p.turned([(0.3, 0), (0.28, 0.1), (0.08, 0.12)], "light", lift=-1)
    p.rod([(0, 0.1, 0), (0, h + 0.3, 0)], 0.04, "wood", lift=-0.8)
    n = 8
    for i in range(n):
        a = 45 * i + 12
        paint = "second" if i % 2 else "main"
        if p.sees(around(a + 22.5, 0.4, 1), -1):
            p.sheet([around(a, r, h), around(a + 45, r, h), (0, h + 0.4, 0)], paint, lift=0.1)
        if p.sees(around(a + 22.5, 1, 0), 0):
            p.sheet(
                [
                    around(a, r, h),
                    around(a + 45, r, h),
                    around(a + 45, r, h - 0.11),
                    around(a + 34, r * 0.98, h - 0.07),
                    around(a + 22, r * 0.98, h - 0.12),
                    around(a + 11, r * 0.98, h - 0.07),
                    around(a, r, h - 0.11),
                ],
                paint,
                lift=0.3,
            )
    p.ball(0.06, "gold", at=(0, h + 0.42, 0), lift=0.8)


@kind("beach ball", "outdoors")
def _beach_ball(p: Product) -> None:
    r = p.vary(0.5, 0.56)
    p.ball(r, at=(0, r, 0))
    start = p.vary(0, 50)
    lats = [math.radians(k) for k in range(-80, 81, 16)]
    for i in range(3):
        a = 120 * i + start
        left = [(r * math.cos(t), r + r * math.sin(t)) for t in lats]
        edge = [around(b, q, y) for b, row in ((a, left), (a + 55, left[::-1])) for q, y in row]
        seen = [e for e in edge if p.sees((e[0], e[1] - r, e[2]), -0.05)]
        if len(seen) > 5:
            p.sheet(seen, "second", bare=True, lift=0.3)


@kind("picket fence", "outdoors")
def _picket_fence(p: Product) -> None:
    h = p.vary(0.8, 0.92)
    for y in (0.24, h - 0.3):
        p.box((1.6, 0.1, 0.06), "second", at=(0, y, -0.05), lift=-0.3)
    for i in range(5):
        x = -0.64 + 0.32 * i
        p.prism([(x - 0.11, 0), (x + 0.11, 0), (x + 0.11, h - 0.14), (x, h), (x - 0.11, h - 0.14)], 0.07)


@kind("garden gnome", "outdoors")
def _garden_gnome(p: Product) -> None:
    w = p.vary(0.34, 0.4)
    for s in (-1, 1):
        p.ball((0.15, 0.1, 0.2), "dark", at=(s * 0.16, 0.1, 0.1), lift=0.1)
    p.turned([(w * 0.9, 0.08), (w, 0.3), (w * 0.7, 0.62), (0.2, 0.7)], "main")
    p.turned([(w + 0.01, 0.28), (w * 0.97, 0.36)], "dark", band=True, lift=0.2)
    p.ball(0.24, "skin", at=(0, 0.8, 0), lift=0.2)
    p.turned([(0.29, 0), (0.24, 0.16), (0.1, 0.46), (0.01, 0.62)], "main", at=(0, 0.86, 0), lift=0.6)
    p.prism(
        smooth([(-0.24, 0.82), (0.24, 0.82), (0.2, 0.6), (0, 0.36), (-0.2, 0.6)], steps=3),
        0.1,
        "light",
        at=(0, 0, 0.24),
        lift=0.5,
    )
    p.ball(0.07, "#e08f6f", at=(0, 0.8, 0.3), lift=1)
    for s in (-1, 1):
        p.blob([((s * w * 0.84, 0.56, 0.04), 0.1), ((s * w * 1.05, 0.32, 0.12), 0.09)], lift=0.35)
        p.ball(0.035, "dark", at=(s * 0.1, 0.86, 0.25), lift=1)


@kind("swing", "outdoors")
def _swing(p: Product) -> None:
    h = p.vary(1.15, 1.3)
    for x in (-0.6, 0.6):
        for z in (-0.36, 0.36):
            p.rod([(x, 0.03, z), (x, h, 0)], 0.055, lift=z)
    p.rod([(-0.68, h, 0), (0.68, h, 0)], 0.065, lift=0.3)
    for x in (-0.22, 0.22):
        p.rod([(x, h, 0), (x, 0.36, 0.04)], 0.022, "metal", lift=0.2)
    p.box((0.6, 0.08, 0.26), "second", at=(0, 0.32, 0.04), lift=0.2)


@kind("slide", "outdoors")
def _slide(p: Product) -> None:
    s, h = p.pick(-1, 1), p.vary(0.9, 1.02)
    for z in (-0.17, 0.17):
        p.rod(
            standing([(-s * 0.74, 0.03), (-s * 0.5, h + 0.24), (-s * 0.3, h + 0.24), (-s * 0.3, 0.03)], z),
            0.035,
            "metal",
            lift=z * 2,
        )
    for k in range(4):
        x, y = -s * (0.71 - 0.05 * k), 0.16 + 0.22 * k
        p.rod([(x, y, -0.17), (x, y, 0.17)], 0.03, "second", lift=0.1)
    curve = [(-0.56, h), (-0.3, h), (-0.1, h * 0.8), (0.3, h * 0.32), (0.56, 0.14), (0.84, 0.1)]
    path = smooth([(s * x, y) for x, y in curve], closed=False, steps=4)
    for z in (-0.18, 0.18):
        p.prism(
            [*[(x, y + 0.12) for x, y in path], *[(x, y - 0.06) for x, y in reversed(path)]],
            0.05,
            at=(0, 0, z),
            lift=2.2 * z,
        )
    p.prism([*path, *[(x, y - 0.05) for x, y in reversed(path)]], 0.34)
