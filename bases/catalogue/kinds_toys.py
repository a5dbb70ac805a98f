"""What children play with."""

from __future__ import annotations

import math

from shapes import FRONT, Product, around, disc, kind, rounded, smooth, standing


def _face(p: Product, x: float, y: float, z: float, apart: float, eye: float) -> None:
    for s in (-1, 1):
        p.ball((eye, eye, eye * 0.6), "dark", at=(x + s * apart, y, z), lift=1.2)


# -- animals and figures -----------------------------------------------------------------------------------------------


@kind("teddy bear")
def _teddy_bear(p: Product) -> None:
    b = p.vary(0.36, 0.42)
    for s in (-1, 1):
        p.ball((0.14, 0.14, 0.08), at=(s * 0.24, 1.18, -0.02), lift=-0.2)
        p.ball((0.08, 0.08, 0.04), "second", at=(s * 0.24, 1.18, 0.06), lift=-0.15)
        p.blob([((s * b * 0.8, 0.66, 0.05), 0.12), ((s * (b + 0.16), 0.42, 0.2), 0.12)], lift=0.2)
        p.blob([((s * 0.2, 0.14, 0.1), 0.15), ((s * 0.32, 0.16, 0.4), 0.16)], lift=0.3)
        p.ball((0.1, 0.11, 0.04), "second", at=(s * 0.33, 0.17, 0.54), lift=0.4)
    p.ball((b, 0.4, 0.32), at=(0, 0.4, 0))
    p.ball((b * 0.6, 0.24, 0.06), "second", at=(0, 0.42, 0.28), lift=0.1)
    p.ball((0.35, 0.32, 0.3), at=(0, 0.96, 0.04), lift=0.3)
    p.ball((0.15, 0.12, 0.12), "second", at=(0, 0.87, 0.29), lift=0.7)
    p.ball((0.06, 0.045, 0.03), "dark", at=(0, 0.92, 0.41), lift=1)
    _face(p, 0, 1.03, 0.31, 0.13, 0.04)


@kind("rubber duck")
def _rubber_duck(p: Product) -> None:
    s, h = p.pick(-1, 1), p.vary(0.3, 0.35)
    p.ball((0.52, 0.34, 0.4), at=(0, 0.32, 0))
    p.blob([((-s * 0.38, 0.4, 0), 0.2), ((-s * 0.62, 0.6, 0), 0.05)], lift=-0.1)
    p.ball(h, at=(s * 0.24, 0.78, 0), lift=0.2)
    p.ball((0.26, 0.16, 0.06), "main", at=(-s * 0.1, 0.36, 0.36), lift=0.3)
    p.blob([((s * (0.26 + h), 0.74, 0), 0.07), ((s * (0.4 + h), 0.74, 0), 0.05)], "#f08a24", lift=0.1)
    p.ball((0.05, 0.06, 0.03), "dark", at=(s * 0.36, 0.88, h * 0.86), lift=1)


@kind("piggy bank")
def _piggy_bank(p: Product) -> None:
    s = p.pick(-1, 1)
    for x in (-0.26, 0.26):
        for z in (-0.18, 0.18):
            p.turned([(0.09, 0), (0.11, 0.24)], at=(x, 0, z), lift=z - 0.2)
    p.ball((0.54, 0.42, 0.42), at=(0, 0.52, 0))
    p.blob([((s * 0.46, 0.5, 0.02), 0.17), ((s * 0.6, 0.5, 0.03), 0.14)], lift=0.2)
    p.turned([(0.14, 0), (0.14, 0.05)], "second", at=(s * 0.7, 0.5, 0.03), axis=(s, 0, 0.15), lift=0.3)
    for z in (-0.18, 0.2):
        p.prism([(s * 0.22, 0.78), (s * 0.42, 0.78), (s * 0.42, 1.04)], 0.1, "second", at=(0, 0, z), lift=z)
    p.rod(
        standing(
            smooth(
                [
                    (-s * 0.5, 0.6),
                    (-s * 0.62, 0.7),
                    (-s * 0.7, 0.6),
                    (-s * 0.66, 0.54),
                    (-s * 0.62, 0.64),
                    (-s * 0.74, 0.74),
                ],
                closed=False,
            )
        ),
        0.035,
        lift=-0.2,
    )
    p.ball((0.045, 0.055, 0.03), "dark", at=(s * 0.4, 0.66, 0.28), lift=0.8)
    p.box((0.26, 0.02, 0.06), "dark", at=(-s * 0.05, 0.93, 0), lift=0.3)
    p.turned([(0.13, -0.02), (0.13, 0.02)], "gold", at=(-s * 0.05, 1.04, 0), axis=FRONT, lift=0.2)


# -- toys that roll and fly --------------------------------------------------------------------------------------------


@kind("toy car")
def _toy_car(p: Product) -> None:
    h = p.vary(0.62, 0.7)
    p.wheels((-0.38, 0.4), 0.24, 0.16)
    p.prism([(-0.72, 0.14), (-0.72, 0.36), (-0.66, 0.42), (0.66, 0.4), (0.74, 0.32), (0.74, 0.14)], 0.48)
    p.prism([(-0.54, 0.41), (-0.38, h), (0.12, h), (0.34, 0.41)], 0.42, lift=0.3)
    for q in (
        [(-0.44, 0.43), (-0.33, h - 0.05), (-0.13, h - 0.05), (-0.13, 0.43)],
        [(-0.06, 0.43), (-0.06, h - 0.05), (0.09, h - 0.05), (0.24, 0.43)],
    ):
        p.mark(q, "glass", at=(0, 0, 0.215), lift=0.5)
    p.mark(rounded(-0.18, 0.02, 0.18, 0.26, 0.04), "glass", at=(0.28, 0.38, 0), plane="side", tilt=38, lift=0.4)
    for z in (-0.15, 0.15):
        p.ball((0.03, 0.06, 0.06), "glow", at=(0.74, 0.3, z), lift=0.3)


@kind("rocket")
def _rocket(p: Product) -> None:
    w = p.vary(0.26, 0.32)
    for a in (0, 90, 180, 270):
        t = math.radians(a + 25)
        c, s = math.cos(t), math.sin(t)
        fin = [(w * 0.7, 0.56), (w + 0.26, 0.2), (w + 0.28, 0), (w * 0.6, 0.16)]
        p.sheet([(r * c, y, r * s) for r, y in fin], "second", bare=True, lift=0.3 * s)
    p.turned([(0.16, 0.08), (0.12, 0.2)], "dark", lift=-0.2)
    p.turned([(w * 0.7, 0.16), (w, 0.44), (w * 1.04, 0.7), (w * 0.92, 1.0)])
    p.turned([(w * 0.92, 1.0), (w * 0.62, 1.26), (w * 0.3, 1.44), (0.01, 1.56)], lift=0.3)
    p.turned([(w * 0.93, 0.98), (w * 0.86, 1.06)], "second", band=True, lift=0.4)
    p.turned([(0.14, 0), (0.13, 0.04)], "metal", at=(0, 0.76, w * 0.96), axis=FRONT, lift=0.5)
    p.mark(disc(0, 0.76, 0.095), "screen", at=(0, 0, w * 0.96 + 0.05), lift=0.8)


@kind("hot air balloon")
def _hot_air_balloon(p: Product) -> None:
    r = p.vary(0.5, 0.56)
    for x in (-0.13, 0.13):
        for z in (-0.1, 0.1):
            p.rod([(x, 0.24, z), (x * 1.6, 0.56, z * 1.6)], 0.018, "dark", lift=z)
    p.box((0.34, 0.28, 0.28), "wood", top="dark")
    profile = [
        (0.16, 0.5),
        (r * 0.62, 0.72),
        (r * 0.92, 0.96),
        (r, 1.16),
        (r * 0.92, 1.38),
        (r * 0.66, 1.56),
        (r * 0.3, 1.66),
        (0.02, 1.68),
    ]
    p.turned(profile, lift=0.1)
    for i in range(5):
        a = 72 * i + 5
        if p.sees(around(a + 12, 1, 0.2), 0.3):
            p.sheet(
                [
                    *[around(a, q * 1.01, y) for q, y in profile],
                    *[around(a + 26, q * 1.01, y) for q, y in reversed(profile)],
                ],
                "second",
                bare=True,
                lift=0.6,
            )
    p.turned([(0.17, 0.48), (0.2, 0.54)], "dark", band=True, lift=0.7)


# -- games -------------------------------------------------------------------------------------------------------------


@kind("die")
def _die(p: Product) -> None:
    a = p.vary(0.78, 0.86)
    turn, r = p.pick(-1, 1) * p.vary(8, 30), 0.085 * a
    p.prism(rounded(-a / 2, -a / 2, a / 2, a / 2, 0.09), a, plane="floor", turn=turn)
    t = math.radians(turn)
    for spin, spots in (
        (0, ((-1, -1), (1, 1), (0, 0))),
        (90, ((-1, -1), (1, 1), (-1, 1), (1, -1), (0, 0))),
        (-90, ((-1, -1), (1, 1))),
    ):
        q = t + math.radians(spin)
        for u, v in spots:
            at = (math.sin(q) * a * 0.502, a / 2, math.cos(q) * a * 0.502)
            p.mark(disc(u * a * 0.26, v * a * 0.26, r), "second", at=at, turn=turn + spin, lift=0.6)
    for u in (-1, 1):
        for v in (-1, 0, 1):
            p.mark(
                disc(u * a * 0.24, v * a * 0.28, r), "second", at=(0, a + 0.003, 0), plane="floor", turn=turn, lift=0.6
            )


@kind("balloon")
def _balloon(p: Product) -> None:
    r = p.vary(0.4, 0.46)
    y = 0.72 + r
    p.rod(
        standing(smooth([(0, 0.74), (0.07, 0.56), (-0.06, 0.36), (0.05, 0.16), (0, 0.06)], closed=False)),
        0.02,
        "dark",
        lift=-0.1,
    )
    p.turned([(0.16, 0), (0.15, 0.07)], "metal")
    p.turned([(0.09, 0.68), (0.04, 0.78)], lift=-0.1)
    p.turned(
        [
            (0.02, 0.72),
            (r * 0.5, y - r * 0.84),
            (r * 0.88, y - r * 0.4),
            (r, y + 0.1),
            (r * 0.9, y + r * 0.6),
            (r * 0.6, y + r * 0.95),
            (r * 0.25, y + r * 1.12),
            (0.01, y + r * 1.15),
        ]
    )
    p.ball((0.08, 0.14, 0.03), "light", at=(-r * 0.45, y + 0.22, r * 0.72), lift=0.6)


@kind("gift box")
def _gift_box(p: Product) -> None:
    a, h = p.vary(0.72, 0.9), p.vary(0.56, 0.72)
    p.box((a, h, a), lift=-0.4)
    p.box((a + 0.1, 0.16, a + 0.1), at=(0, h - 0.02, 0), lift=-0.1)
    e = a / 2
    for y0, y1, z in ((0, h, e), (h - 0.02, h + 0.14, e + 0.05)):
        p.mark([(-0.08, y0), (0.08, y0), (0.08, y1), (-0.08, y1)], "second", at=(0, 0, z + 0.002), lift=0.5)
        for turn in (0, 180):
            p.mark(
                [(-0.08, y0), (0.08, y0), (0.08, y1), (-0.08, y1)],
                "second",
                at=((z + 0.002) * (1 - turn / 90), 0, 0),
                plane="side",
                turn=turn,
                lift=0.5,
            )
    for q in (
        [(-0.08, -e - 0.05), (0.08, -e - 0.05), (0.08, e + 0.05), (-0.08, e + 0.05)],
        [(-e - 0.05, -0.08), (e + 0.05, -0.08), (e + 0.05, 0.08), (-e - 0.05, 0.08)],
    ):
        p.mark(q, "second", at=(0, h + 0.142, 0), plane="floor", lift=0.5)
    for s in (-1, 1):
        p.prism(
            [(s * x, h + 0.14 + y) for x, y in smooth([(0, 0), (0.2, 0.22), (0.38, 0.2), (0.36, 0.04)], steps=4)],
            0.14,
            "second",
            lift=0.8,
        )
    p.ball(0.09, "second", at=(0, h + 0.2, 0.04), lift=1.2)


@kind("toy house")
def _toy_house(p: Product) -> None:
    w, h = p.vary(0.84, 0.96), p.vary(0.52, 0.6)
    p.box((w, h, 0.66), "second", lift=-0.2)
    p.box((0.14, 0.34, 0.14), "second", at=(w * 0.26, h + 0.14, -0.12), lift=-0.1)
    p.prism([(-0.44, h), (0, h + 0.42), (0.44, h)], w + 0.14, "main", plane="side")
    for z in (-1, 1):
        del z
    p.mark([(-0.1, 0), (0.1, 0), (0.1, 0.32), (-0.1, 0.32)], "wood", at=(0, 0, 0.333))
    for x in (-0.3, 0.3):
        p.mark(rounded(x - 0.09, 0.22, x + 0.09, 0.42, 0), "glass", at=(0, 0, 0.333))
    for turn in (0, 180):
        p.mark(
            rounded(-0.1, 0.2, 0.1, 0.42, 0),
            "glass",
            at=(w / 2 * (1 - turn / 90) * 1.005, 0, 0),
            plane="side",
            turn=turn,
        )
