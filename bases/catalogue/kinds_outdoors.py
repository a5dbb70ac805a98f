"""Vehicles, and what stands in the street, the garden and at the sea."""

from __future__ import annotations

import math

from shapes import FRONT, Product, arc, around, disc, kind, rounded, standing

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


# -- buildings ---------------------------------------------------------------------------------------------------------


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


@kind("bird house", "outdoors")
def _bird_house(p: Product) -> None:
    h = p.vary(0.6, 0.7)
    p.turned([(0.2, 0), (0.18, 0.05), (0.06, 0.08), (0.06, h)], "main", lift=-0.4)
    p.prism([(-0.3, h), (0.3, h), (0.3, h + 0.42), (0, h + 0.7), (-0.3, h + 0.42)], 0.46, "second")
    for s in (-1, 1):
        p.prism([(0, h + 0.7), (s * 0.42, h + 0.31), (s * 0.47, h + 0.37), (0, h + 0.8)], 0.58, lift=0.2)
    p.mark(disc(0, h + 0.4, 0.12), "dark", at=(0, 0, 0.232), lift=0.4)
    p.rod([(0, h + 0.18, 0.22), (0, h + 0.18, 0.38)], 0.035, "wood", lift=0.6)


# -- garden and sea ----------------------------------------------------------------------------------------------------


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
