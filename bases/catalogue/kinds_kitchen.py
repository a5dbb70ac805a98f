"""What stands in a kitchen and on a laid table."""

from __future__ import annotations

import math

from shapes import Product, arc, disc, kind, rounded, smooth


def _curve(*points: tuple[float, float]) -> list[tuple[float, float]]:
    return smooth(points, closed=False, steps=3)


@kind("teapot", "kitchen")
def _teapot(p: Product) -> None:
    s, h = p.vary(0.92, 1.1), p.vary(0.62, 0.72)
    p.turned(_curve((0.3 * s, 0), (0.5 * s, 0.22 * h), (0.53 * s, 0.5 * h), (0.4 * s, 0.85 * h), (0.24 * s, h)))
    p.turned([(0.26 * s, h - 0.03), (0.22 * s, h + 0.05), (0.06, h + 0.1)], "main", lift=0.2)
    p.ball(0.085, "second", at=(0, h + 0.15, 0), lift=0.4)
    p.turned([(0.15, 0), (0.09, 0.3), (0.07, 0.5)], at=(-0.42 * s, 0.22 * h, 0), axis=(-1, 1.15, 0), hollow=True,
             inside="dark", lift=-0.1)  # fmt: skip
    p.rod([(x, y, 0) for x, y in arc(0.46 * s, 0.52 * h, 0.27, -80, 95)], 0.055, "second", lift=-0.1)


@kind("kettle", "kitchen")
def _kettle(p: Product) -> None:
    h = p.vary(0.58, 0.68)
    p.turned([(0.54, 0), (0.56, 0.08), (0.5, 0.3 * h), (0.24, h), (0.2, h + 0.05)])
    p.turned([(0.565, 0.02), (0.565, 0.1)], "metal", band=True, lift=0.05)
    p.ball(0.08, "dark", at=(0, h + 0.09, 0), lift=0.3)
    p.turned([(0.12, 0), (0.075, 0.34)], "main", at=(-0.34, 0.36 * h, 0), axis=(-1, 0.9, 0), hollow=True, inside="dark",
             lift=-0.1)  # fmt: skip
    p.rod([(x, y, 0) for x, y in arc(0, 0.5 * h, 0.42, 15, 165, squash=1.75)], 0.055, "dark", lift=-0.2)


@kind("bowl", "kitchen")
def _bowl(p: Product) -> None:
    h = p.vary(0.42, 0.52)
    p.turned(
        [(0.26, 0), (0.26, 0.07), (0.45, 0.15), (0.6, 0.6 * h), (0.66, h)], hollow=True, inside=p.pick("main", "second")
    )
    p.ring(0.655, 0.025, "second", at=(0, h, 0), axis="y", lift=0.1)


@kind("plate", "kitchen")
def _plate(p: Product) -> None:
    p.prism([(-0.3, 0), (0.3, 0), (0.16, 0.3), (-0.16, 0.3)], 0.16, "wood", at=(0, 0, -0.16), lift=-0.6)
    lean = (0.0, 0.22, 0.97)
    p.turned([(0.3, 0), (0.58, 0.07), (0.6, 0.1)], at=(0, 0.58, -0.08), axis=lean, sides=44)
    p.turned([(0.39, 0), (0.39, 0.004)], "second", at=(0, 0.602, 0.02), axis=lean, lift=0.4, sides=44)
    p.turned([(0.35, 0), (0.35, 0.004)], "main", at=(0, 0.602, 0.02), axis=lean, lift=0.5, sides=44)


@kind("vase", "kitchen")
def _vase(p: Product) -> None:
    b, n = p.vary(0.36, 0.44), p.vary(0.12, 0.17)
    p.turned(_curve((0.2, 0), (0.3, 0.2), (b, 0.55), (0.28, 0.85), (n, 1.05), (n + 0.02, 1.2), (0.27, 1.35)),
             hollow=True)  # fmt: skip
    p.turned([(b - 0.005, 0.48), (b + 0.015, 0.55), (b - 0.015, 0.64)], "second", band=True, lift=0.02)


@kind("jar", "kitchen")
def _jar(p: Product) -> None:
    h = p.vary(0.75, 0.9)
    p.turned([(0.36, 0), (0.4, 0.05), (0.4, h - 0.1), (0.3, h)])
    p.turned([(0.33, h), (0.33, h + 0.17)], "metal", lift=0.2)
    p.turned([(0.405, 0.22), (0.405, h - 0.25)], "paper", band=True, bare=True, lift=0.1)
    p.turned([(0.409, 0.3), (0.409, 0.4)], "second", band=True, bare=True, lift=0.15)


@kind("pitcher", "kitchen")
def _pitcher(p: Product) -> None:
    h, b = p.vary(1.0, 1.15), p.vary(0.38, 0.44)
    p.turned(_curve((0.28, 0), (b, 0.25), (b - 0.03, 0.5), (0.24, h - 0.2), (0.3, h)), hollow=True)
    p.turned([(0.05, 0), (0.17, 0.22)], at=(-0.2, h - 0.2, 0), axis=(-0.6, 1, 0), hollow=True, lift=-0.08)
    p.rod([(0.25, h - 0.08, 0), (0.45, h - 0.06, 0), (0.56, h - 0.22, 0), (0.53, 0.5, 0), (0.36, 0.3, 0)], 0.055,
          "main", lift=-0.1)  # fmt: skip
    p.turned([(b + 0.005, 0.2), (b + 0.012, 0.26), (b + 0.005, 0.32)], "second", band=True, lift=0.05)


@kind("wine glass", "kitchen")
def _wine_glass(p: Product) -> None:
    r = p.vary(0.32, 0.38)
    p.turned([(0.3, 0), (0.28, 0.04), (0.06, 0.09), (0.045, 0.58)])
    p.turned(_curve((0.06, 0.56), (r * 0.85, 0.7), (r, 0.92), (r * 0.8, 1.3)), hollow=True, inside="light", lift=0.2)


@kind("candle", "kitchen")
def _candle(p: Product) -> None:
    h, r = p.vary(0.85, 1.05), p.vary(0.24, 0.28)
    p.turned([(0.44, 0), (0.5, 0.1)], "second", hollow=True, lift=-0.3)
    p.turned([(r, 0.04), (r, h)], lift=0.1)
    p.rod([(0, h, 0), (0, h + 0.1, 0)], 0.025, "dark", lift=0.3)
    p.turned(
        _curve((0.03, h + 0.05), (0.11, h + 0.16), (0.07, h + 0.3), (0.0, h + 0.46)), "#f59a23", bare=True, lift=0.4
    )
    p.turned(_curve((0.02, h + 0.07), (0.06, h + 0.15), (0.0, h + 0.32)), "glow", bare=True, lift=0.6)


@kind("frying pan", "kitchen")
def _frying_pan(p: Product) -> None:
    r = p.vary(0.5, 0.56)
    p.rod([(r - 0.05, 0.14, 0), (r + 0.2, 0.2, 0)], 0.06, "main", lift=-0.2)
    p.rod([(r + 0.18, 0.2, 0), (r + 0.72, 0.32, 0)], 0.075, "wood", lift=-0.1)
    p.turned([(r - 0.1, 0), (r, 0.2)], hollow=True, inside="dark")
    p.ring(r, 0.025, "main", at=(0, 0.2, 0), axis="y", lift=0.05)


@kind("cooking pot", "kitchen")
def _cooking_pot(p: Product) -> None:
    h = p.vary(0.5, 0.62)
    for s in (-1, 1):
        p.rod([(s * x, h - 0.1, z) for x, z in ((0.5, -0.13), (0.68, -0.12), (0.68, 0.12), (0.5, 0.13))], 0.05, "dark")
    p.turned([(0.5, 0), (0.53, 0.04), (0.53, h)], lift=0.05)
    p.turned([(0.56, h), (0.56, h + 0.05), (0.4, h + 0.14), (0.1, h + 0.2)], "metal", lift=0.2)
    p.turned([(0.05, h + 0.18), (0.11, h + 0.28), (0.1, h + 0.32)], "dark", lift=0.4)


@kind("toaster", "kitchen")
def _toaster(p: Product) -> None:
    w, h = p.vary(1.0, 1.15), p.vary(0.6, 0.7)
    side = rounded(-0.27, 0.05, 0.27, h, 0.16)
    for x in (-0.36, 0.36):
        p.box((0.16, 0.08, 0.4), "dark", at=(x, 0, 0), lift=-0.5)
    p.prism(side, w, at=(0, 0, 0), plane="side")
    for z in (-0.11, 0.1):
        p.mark(rounded(-0.4 * w, -0.06, 0.4 * w, 0.06, 0.05), "dark", at=(0, h + 0.003, z), plane="floor", lift=0.4)
        bread = [(-0.3, 0), (0.3, 0), *arc(0.24, 0.2, 0.1, 0, 90, 5), *arc(-0.24, 0.2, 0.1, 90, 180, 5)]
        p.prism(bread, 0.08, "#e0a85c", at=(0, h, z), cap="#f0d29a", bare=True, lift=0.6)
    p.mark(rounded(-0.3 * w, 0.2, 0.3 * w, 0.32, 0.05), "second", at=(0, 0, 0.275))
    p.box((0.1, 0.1, 0.16), "dark", at=(w / 2 + 0.04, h * 0.55, 0.05), lift=0.1 if p.view.yaw < 0 else -0.6)


@kind("blender", "kitchen")
def _blender(p: Product) -> None:
    p.turned([(0.38, 0), (0.36, 0.06), (0.26, 0.42), (0.25, 0.46)], "main")
    p.mark(disc(0, 0.2, 0.1), "second", at=(0, 0, 0.33), tilt=8)
    p.rod([(0.3, 1.2, 0), (0.54, 1.16, 0), (0.53, 0.75, 0), (0.24, 0.68, 0)], 0.05, "dark", lift=-0.3)
    p.turned([(0.22, 0.46), (0.37, 1.26)], "glass", hollow=True, lift=0.1)
    p.turned([(0.215, 0.47), (0.325, 1.03)], "main", lift=0.2)
    p.turned([(0.385, 1.26), (0.37, 1.36), (0.14, 1.37), (0.13, 1.45)], "dark", lift=0.4)


@kind("coffee machine", "kitchen")
def _coffee_machine(p: Product) -> None:
    h = p.vary(1.15, 1.3)
    p.box((0.8, 0.14, 0.75), at=(0, 0, 0), lift=-0.4)
    p.box((0.8, h - 0.5, 0.28), at=(0, 0.14, -0.23), lift=-0.3)
    p.turned([(0.24, 0.15), (0.27, 0.3), (0.2, 0.58)], "#5a3a25", at=(0, 0, 0.12), lift=0.1)
    p.turned([(0.2, 0.58), (0.22, 0.64)], "dark", at=(0, 0, 0.12), lift=0.3)
    p.rod([(0.2, 0.56, 0.14), (0.38, 0.54, 0.2), (0.37, 0.28, 0.2), (0.25, 0.26, 0.14)], 0.035, "dark", lift=0.2)
    p.box((0.8, 0.42, 0.75), at=(0, h - 0.42, 0), lift=0.5)
    p.mark(rounded(-0.28, h - 0.32, 0.08, h - 0.12, 0.03), "screen", at=(0, 0, 0.376), lift=1)
    p.mark(disc(0.24, h - 0.22, 0.08), "second", at=(0, 0, 0.376), lift=1)


@kind("salt shaker", "kitchen")
def _salt_shaker(p: Product) -> None:
    h = p.vary(0.78, 0.92)
    p.turned([(0.36, 0), (0.36, 0.05), (0.27, h)])
    p.turned([(0.3, h), (0.3, h + 0.12), (0.24, h + 0.24), (0.1, h + 0.31)], "metal", lift=0.2)
    for a in range(0, 360, 60):
        x, z = 0.17 * math.cos(math.radians(a)), 0.17 * math.sin(math.radians(a))
        p.ball((0.035, 0.02, 0.035), "dark", at=(x, h + 0.28, z), lift=0.5)
    s = [
        (0.1, 0.12),
        (0.03, 0.17),
        (-0.07, 0.15),
        (-0.09, 0.08),
        (0.08, -0.05),
        (0.09, -0.13),
        (-0.02, -0.17),
        (-0.11, -0.12),
    ]
    turn = -math.radians(p.view.yaw) * 0.7
    p.rod([(x + 0.33 * math.sin(turn), y + h * 0.5, 0.33 * math.cos(turn)) for x, y in smooth(s, closed=False)], 0.032,
          "second", lift=0.4)  # fmt: skip


@kind("cutting board", "kitchen")
def _cutting_board(p: Product) -> None:
    w, h = p.vary(0.38, 0.46), p.vary(0.85, 1.0)
    board = [*rounded(-w, 0, w, h, 0.1)[:5], (0.13, h + 0.02), *arc(0, h + 0.22, 0.14, -20, 200, 10), (-0.13, h + 0.02),
             *rounded(-w, 0, w, h, 0.1)[5:]]  # fmt: skip
    p.prism(board, 0.1, at=(0, 0, 0.05), tilt=10)
    p.mark(disc(0, h + 0.22, 0.055), "dark", at=(0, 0.012, 0.11), tilt=10)
    p.turned([(0.16, 0), (0.16, 0.16)], "#e2574c", at=(w * 0.5, 0.16, 0.12), axis=(0, 0, 1), bare=True, lift=0.6)
    p.ball((0.04, 0.04, 0.03), "leaf", at=(w * 0.5, 0.16, 0.3), lift=0.9)


@kind("rolling pin", "kitchen")
def _rolling_pin(p: Product) -> None:
    r = p.vary(0.16, 0.2)
    for s in (-1, 1):
        p.turned([(0.05, 0.5), (0.06, 0.6), (0.085, 0.72), (0.07, 0.86), (0.03, 0.92)], "second", at=(0, r, 0),
                 axis=(s, 0, 0), lift=-0.2)  # fmt: skip
    p.turned([(r - 0.03, -0.55), (r, -0.52), (r, 0.52), (r - 0.03, 0.55)], at=(0, r, 0), axis=(1, 0, 0))


@kind("teacup", "kitchen")
def _teacup(p: Product) -> None:
    r, h = p.vary(0.4, 0.46), p.vary(0.42, 0.5)
    p.turned([(0.3, 0), (0.66, 0.08)], "second", hollow=True, inside="second", lift=-0.4)
    p.rod([(x, y, 0) for x, y in arc(r - 0.04, h * 0.68, 0.17, -80, 80)], 0.05, "main", lift=-0.1)
    p.turned(_curve((0.2, 0.06), (0.3, 0.12), (r - 0.02, 0.5 * h), (r + 0.04, h + 0.06)), hollow=True, inside="light")
    p.turned([(r * 0.9, 0), (r * 0.9, 0.001)], "#a5602a", at=(0, h, 0), bare=True, lift=0.2)


@kind("thermos", "kitchen")
def _thermos(p: Product) -> None:
    h = p.vary(1.15, 1.3)
    p.rod([(0.26, h - 0.2, 0), (0.46, h - 0.24, 0), (0.46, h - 0.7, 0), (0.26, h - 0.74, 0)], 0.055, "dark", lift=-0.1)
    p.turned([(0.29, 0), (0.29, h - 0.12), (0.24, h)])
    p.turned([(0.295, 0.02), (0.295, 0.12)], "metal", band=True, lift=0.05)
    p.turned([(0.25, h - 0.02), (0.25, h + 0.04)], "metal", lift=0.1)
    p.turned([(0.24, h + 0.04), (0.26, h + 0.32)], "second", lift=0.2)


@kind("cheese grater", "kitchen")
def _cheese_grater(p: Product) -> None:
    h = p.vary(1.0, 1.15)
    p.rod([(-0.2, h, 0), (-0.2, h + 0.2, 0), (0.2, h + 0.2, 0), (0.2, h, 0)], 0.06, "dark", lift=-0.2)
    p.prism([(-0.42, 0), (0.42, 0), (0.3, h), (-0.3, h)], 0.5)
    for i in range(4):
        for j in range(3 + i % 2):
            x, y = (j - (2 + i % 2) / 2) * 0.19, 0.2 + 0.22 * i
            p.mark(arc(x, y, 0.065, 0, 180, 8), "dark", at=(0, 0, 0.252))


@kind("microwave", "kitchen")
def _microwave(p: Product) -> None:
    w, h = p.vary(1.25, 1.4), p.vary(0.68, 0.78)
    p.box((w, h, 0.6))
    p.mark(rounded(-w / 2 + 0.08, 0.1, w / 2 - 0.4, h - 0.1, 0.06), "screen", at=(0, 0, 0.301))
    p.box((0.07, h - 0.2, 0.07), "metal", at=(w / 2 - 0.33, 0.1, 0.34), lift=0.3)
    p.mark(rounded(w / 2 - 0.25, h - 0.22, w / 2 - 0.06, h - 0.1, 0.02), "leaf", at=(0, 0, 0.301))
    p.mark(disc(w / 2 - 0.155, h * 0.5, 0.085), "second", at=(0, 0, 0.301))
    p.mark(disc(w / 2 - 0.155, h * 0.22, 0.065), "second", at=(0, 0, 0.301))


@kind("fridge", "kitchen")
def _fridge(p: Product) -> None:
    h, w = p.vary(1.45, 1.6), p.vary(0.72, 0.82)
    p.box((w - 0.08, 0.06, 0.5), "dark", lift=-0.6)
    p.prism(rounded(-w / 2, 0.05, w / 2, h, 0.09), 0.6)
    p.mark([(-w / 2, h * 0.64), (w / 2, h * 0.64), (w / 2, h * 0.665), (-w / 2, h * 0.665)], "dark", at=(0, 0, 0.301))
    p.box((0.07, 0.36, 0.07), "metal", at=(-w / 2 + 0.13, h * 0.34, 0.34), lift=0.4)
    p.box((0.07, 0.24, 0.07), "metal", at=(-w / 2 + 0.13, h * 0.73, 0.34), lift=0.4)


@kind("stove", "kitchen")
def _stove(p: Product) -> None:
    h = p.vary(0.86, 0.98)
    p.box((0.96, h, 0.74))
    p.box((0.96, 0.24, 0.06), at=(0, h, -0.34), lift=0)
    p.mark(rounded(-0.44, -0.32, 0.44, 0.33, 0.04), "dark", at=(0, h + 0.004, 0), plane="floor", lift=0.5)
    for x in (-0.22, 0.22):
        for z in (-0.14, 0.17):
            p.mark(disc(x, z, 0.12), "metal", at=(0, h + 0.01, 0), plane="floor", lift=0.6)
            p.mark(disc(x, z, 0.07), "#d9482b", at=(0, h + 0.012, 0), plane="floor", lift=0.7)
    p.mark(rounded(-0.36, 0.12, 0.36, h - 0.36, 0.05), "screen", at=(0, 0, 0.371))
    p.box((0.74, 0.05, 0.06), "metal", at=(0, h - 0.3, 0.4), lift=0.4)
    for x in (-0.33, -0.11, 0.11, 0.33):
        p.mark(disc(x, h - 0.12, 0.065), "dark", at=(0, 0, 0.371))
