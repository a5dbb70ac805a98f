"""What stands in a kitchen and on a laid table."""

from __future__ import annotations

from shapes import Product, arc, kind, rounded, smooth


def _curve(*points: tuple[float, float]) -> list[tuple[float, float]]:
    return smooth(points, closed=False, steps=3)


@kind("teapot")
def _teapot(p: Product) -> None:
    s, h = p.vary(0.92, 1.1), p.vary(0.62, 0.72)
    p.turned(_curve((0.3 * s, 0), (0.5 * s, 0.22 * h), (0.53 * s, 0.5 * h), (0.4 * s, 0.85 * h), (0.24 * s, h)))
    p.turned([(0.26 * s, h - 0.03), (0.22 * s, h + 0.05), (0.06, h + 0.1)], "main", lift=0.2)
    p.ball(0.085, "second", at=(0, h + 0.15, 0), lift=0.4)
    p.turned([(0.15, 0), (0.09, 0.3), (0.07, 0.5)], at=(-0.42 * s, 0.22 * h, 0), axis=(-1, 1.15, 0), hollow=True,
             inside="dark", lift=-0.1)  # fmt: skip
    p.rod([(x, y, 0) for x, y in arc(0.46 * s, 0.52 * h, 0.27, -80, 95)], 0.055, "second", lift=-0.1)


@kind("kettle")
def _kettle(p: Product) -> None:
    h = p.vary(0.58, 0.68)
    p.turned([(0.54, 0), (0.56, 0.08), (0.5, 0.3 * h), (0.24, h), (0.2, h + 0.05)])
    p.turned([(0.565, 0.02), (0.565, 0.1)], "metal", band=True, lift=0.05)
    p.ball(0.08, "dark", at=(0, h + 0.09, 0), lift=0.3)
    p.turned([(0.12, 0), (0.075, 0.34)], "main", at=(-0.34, 0.36 * h, 0), axis=(-1, 0.9, 0), hollow=True, inside="dark",
             lift=-0.1)  # fmt: skip
    p.rod([(x, y, 0) for x, y in arc(0, 0.5 * h, 0.42, 15, 165, squash=1.75)], 0.055, "dark", lift=-0.2)


@kind("vase")
def _vase(p: Product) -> None:
    b, n = p.vary(0.36, 0.44), p.vary(0.12, 0.17)
    p.turned(_curve((0.2, 0), (0.3, 0.2), (b, 0.55), (0.28, 0.85), (n, 1.05), (n + 0.02, 1.2), (0.27, 1.35)),
             hollow=True)  # fmt: skip
    p.turned([(b - 0.005, 0.48), (b + 0.015, 0.55), (b - 0.015, 0.64)], "second", band=True, lift=0.02)


@kind("jar")
def _jar(p: Product) -> None:
    h = p.vary(0.75, 0.9)
    p.turned([(0.36, 0), (0.4, 0.05), (0.4, h - 0.1), (0.3, h)])
    p.turned([(0.33, h), (0.33, h + 0.17)], "metal", lift=0.2)
    p.turned([(0.405, 0.22), (0.405, h - 0.25)], "paper", band=True, bare=True, lift=0.1)
    p.turned([(0.409, 0.3), (0.409, 0.4)], "second", band=True, bare=True, lift=0.15)


@kind("wine glass")
def _wine_glass(p: Product) -> None:
    r = p.vary(0.32, 0.38)
    p.turned([(0.3, 0), (0.28, 0.04), (0.06, 0.09), (0.045, 0.58)])
    p.turned(_curve((0.06, 0.56), (r * 0.85, 0.7), (r, 0.92), (r * 0.8, 1.3)), hollow=True, inside="light", lift=0.2)


@kind("candle")
def _candle(p: Product) -> None:
    h, r = p.vary(0.85, 1.05), p.vary(0.24, 0.28)
    p.turned([(0.44, 0), (0.5, 0.1)], "second", hollow=True, lift=-0.3)
    p.turned([(r, 0.04), (r, h)], lift=0.1)
    p.rod([(0, h, 0), (0, h + 0.1, 0)], 0.025, "dark", lift=0.3)
    p.turned(
        _curve((0.03, h + 0.05), (0.11, h + 0.16), (0.07, h + 0.3), (0.0, h + 0.46)), "#f59a23", bare=True, lift=0.4
    )
    p.turned(_curve((0.02, h + 0.07), (0.06, h + 0.15), (0.0, h + 0.32)), "glow", bare=True, lift=0.6)


@kind("frying pan")
def _frying_pan(p: Product) -> None:
    r = p.vary(0.5, 0.56)
    p.rod([(r - 0.05, 0.14, 0), (r + 0.2, 0.2, 0)], 0.06, "main", lift=-0.2)
    p.rod([(r + 0.18, 0.2, 0), (r + 0.72, 0.32, 0)], 0.075, "wood", lift=-0.1)
    p.turned([(r - 0.1, 0), (r, 0.2)], hollow=True, inside="dark")
    p.ring(r, 0.025, "main", at=(0, 0.2, 0), axis="y", lift=0.05)


@kind("cooking pot")
def _cooking_pot(p: Product) -> None:
    h = p.vary(0.5, 0.62)
    for s in (-1, 1):
        p.rod([(s * x, h - 0.1, z) for x, z in ((0.5, -0.13), (0.68, -0.12), (0.68, 0.12), (0.5, 0.13))], 0.05, "dark")
    p.turned([(0.5, 0), (0.53, 0.04), (0.53, h)], lift=0.05)
    p.turned([(0.56, h), (0.56, h + 0.05), (0.4, h + 0.14), (0.1, h + 0.2)], "metal", lift=0.2)
    p.turned([(0.05, h + 0.18), (0.11, h + 0.28), (0.1, h + 0.32)], "dark", lift=0.4)


@kind("toaster")
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
