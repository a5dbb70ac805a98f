"""What stands on a table."""

from __future__ import annotations

from shapes import Product, arc, kind


@kind("mug")
def _mug(p: Product) -> None:
    h, r = p.vary(0.85, 1.15), p.vary(0.4, 0.5)
    p.turned([(r * 0.94, 0), (r, 0.06), (r, h)], hollow=True)
    p.rod([(x, y, 0.0) for x, y in arc(r - 0.02, h * 0.5, h * 0.29, -78, 78)], 0.065, "main", lift=-0.1)


@kind("table lamp")
def _table_lamp(p: Product) -> None:
    h = p.vary(0.7, 0.9)
    p.turned([(0.34, 0), (0.34, 0.06), (0.08, 0.12), (0.05, h)], "metal")
    p.turned(
        [(p.vary(0.52, 0.6), h - 0.05), (p.vary(0.26, 0.34), h + 0.55)], "main", hollow=True, inside="glow", lift=0.2
    )


@kind("wine bottle")
def _wine_bottle(p: Product) -> None:
    p.turned([(0.26, 0), (0.28, 0.05), (0.28, 0.85), (0.2, 1.05), (0.1, 1.18), (0.09, 1.5)])
    p.turned([(0.285, 0.28), (0.285, 0.66)], "paper", band=True, bare=True, lift=1)
    p.turned([(0.105, 1.36), (0.105, 1.54)], "second", lift=1)


@kind("padlock")
def _padlock(p: Product) -> None:
    w, h = p.vary(0.85, 1.0), p.vary(0.7, 0.85)
    p.rod(
        [(x, y, 0) for x, y in [(-w * 0.3, h - 0.1), *arc(0, h + 0.25, w * 0.3, 180, 0), (w * 0.3, h - 0.1)]],
        0.075,
        "metal",
        lift=-0.2,
    )
    p.box((w, h, 0.34))
    p.mark(arc(0, h * 0.55, 0.1, 0, 345, 18), "dark", at=(0, 0, 0.175))
    p.mark([(-0.04, h * 0.52), (0.04, h * 0.52), (0.07, h * 0.25), (-0.07, h * 0.25)], "dark", at=(0, 0, 0.176))
