"""Vehicles, and what stands in the street, the garden and at the sea."""

from __future__ import annotations

import math

from shapes import Product, around, kind

# -- vehicles ----------------------------------------------------------------------------------------------------------


_LAMPS = ("#e03a2f", "#f5b82e", "#3fae4c")


# -- in the street -----------------------------------------------------------------------------------------------------


# -- buildings ---------------------------------------------------------------------------------------------------------


# -- garden and sea ----------------------------------------------------------------------------------------------------


@kind("beach ball")
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
