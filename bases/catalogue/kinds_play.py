"""Sport, music and games."""

from __future__ import annotations

import itertools
import math

from shapes import FRONT, RIGHT, Flat, Point, Product, arc, disc, kind, rounded, smooth


def _rect(x: float, y: float, w: float, h: float) -> list[Flat]:
    """By its middle."""
    return [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2), (x - w / 2, y + h / 2)]


def _before(at: Point, tilt: float, by: float) -> Point:
    """A point moved along the normal of a front that leans back."""
    return at[0], at[1] + by * math.sin(math.radians(tilt)), at[2] + by * math.cos(math.radians(tilt))


def _unit(p: Point) -> Point:
    length = math.hypot(*p)
    return p[0] / length, p[1] / length, p[2] / length


def _cross(a: Point, b: Point) -> Point:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _round(pole: Point, degrees: float, count: int, start: float = 0.0) -> list[Point]:
    """`count` directions that lie `degrees` from `pole`, all around it."""
    w = _unit(pole)
    u = _unit(_cross(w, (0.31, 0.2, 0.93)))
    v = _cross(w, u)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    out = []
    for i in range(count):
        a = math.radians(start) + 2 * math.pi * i / count
        x, y, z = (c * w[k] + s * (math.cos(a) * u[k] + math.sin(a) * v[k]) for k in range(3))
        out.append((x, y, z))
    return out


def _seam(p: Product, pole: Point, degrees: float, radius: float, at: Point, paint: str, half: float = 2.6) -> None:
    """A line around a ball, `degrees` from `pole`."""
    inner, outer = _round(pole, degrees - half, 36), _round(pole, degrees + half, 36)
    for i in range(36):
        j = (i + 1) % 36
        p.patch([inner[i], inner[j], outer[j], outer[i]], radius, paint, at=at)


@kind("football", "play")
def _football(p: Product) -> None:
    r = 0.5
    p.ball(r, "main", at=(0, r, 0))
    first = _unit((p.vary(-0.3, 0.3), p.vary(0.0, 0.4), 1.0))
    ring = _round(first, 63.4, 5, p.vary(0, 70))
    corners = [first, *ring, *[(-x, -y, -z) for x, y, z in [first, *ring]]]
    for a, b in itertools.combinations(corners, 2):
        if 0.3 < sum(x * y for x, y in zip(a, b, strict=True)) < 0.6:
            across = _unit(_cross(a, b))
            ends = []
            for t, s in ((0.3, 1), (0.7, 1), (0.7, -1), (0.3, -1)):
                ends.append(tuple(a[k] * (1 - t) + b[k] * t + s * 0.025 * across[k] for k in range(3)))
            p.patch([(e[0], e[1], e[2]) for e in ends], r, "second", at=(0, r, 0))
    for c in corners:
        nearest = max((d for d in corners if d != c), key=lambda d: sum(x * y for x, y in zip(c, d, strict=True)))
        side = _round(c, 22, 60)
        start = max(range(60), key=lambda i: sum(x * y for x, y in zip(side[i], nearest, strict=True)))
        p.patch([side[(start + 12 * i) % 60] for i in range(5)], r, "second", at=(0, r, 0), lift=0.6)


@kind("basketball", "play")
def _basketball(p: Product) -> None:
    r = 0.5
    p.ball(r, "main", at=(0, r, 0))
    turn = math.radians(p.vary(-25, 25))
    x, y = (math.cos(turn), math.sin(turn), 0.0), (-math.sin(turn), math.cos(turn), 0.0)
    for pole, degrees in ((x, 90), (y, 90), (x, 48), ((-x[0], -x[1], 0.0), 48)):
        _seam(p, pole, degrees, r, (0, r, 0), "second")


@kind("bowling ball", "play")
def _bowling_ball(p: Product) -> None:
    r = 0.5
    p.ball(r, "main", at=(0, r, 0))
    view = math.radians(-p.view.yaw)
    for lon, lat in ((-16, 50), (10, 52), (-6, 26)):
        a, b = math.radians(lon) + view, math.radians(lat)
        pole = (math.cos(b) * math.sin(a), math.sin(b), math.cos(b) * math.cos(a))
        p.patch(_round(pole, 9.5, 16), r, "dark", at=(0, r, 0))


@kind("rugby ball", "play")
def _rugby_ball(p: Product) -> None:
    k, r = p.vary(0.95, 1.05), 0.42
    profile = [(r * math.sqrt(max(1 - t * t, 0)) ** 1.15, 0.72 * k * t) for t in [i / 9 - 1 for i in range(19)]]
    axis, at = (1.0, 0.14, 0.15), (0, r, 0)
    p.turned(profile, at=at, axis=axis)
    for low, high in ((4, 6), (12, 14)):
        p.turned([(a + 0.004, b) for a, b in profile[low : high + 1]], "light", at=at, axis=axis, band=True, lift=1)
    for i in range(5):
        x = (i - 2) * 0.09
        y, z = r * 0.55, r * 0.86
        p.rod([(x, y + r + 0.06, z), (x, y + r - 0.06, z + 0.03)], 0.022, "light", lift=1.5)
    p.rod([(-0.24, y + r - 0.02, z), (0.24, y + r + 0.03, z + 0.02)], 0.022, "light", lift=1.5)


@kind("dumbbell", "play")
def _dumbbell(p: Product) -> None:
    r, w = p.vary(0.32, 0.38), p.vary(0.5, 0.58)
    axis = (1.0, 0.0, 0.2)
    at = (0.0, r, 0.0)
    p.turned([(0.09, -w), (0.09, w)], "metal", at=at, axis=axis)
    for s in (-1, 1):
        end = (s * w * 0.98, r, s * w * 0.196)
        p.turned([(r, -0.2), (r, 0.2)], at=end, axis=axis, sides=6 if w < 0.54 else 22, lift=0.3 * s)
        outer = (end[0] + s * 0.2, r, end[2] + s * 0.04)
        p.turned([(r * 0.66, -0.06), (r * 0.66, 0.08)], "main", at=outer, axis=axis, lift=0.3 * s + 0.05 * s)


@kind("kettlebell", "play")
def _kettlebell(p: Product) -> None:
    r = p.vary(0.42, 0.47)
    loop = smooth([(-0.24, 0.72), (-0.33, 1.0), (-0.2, 1.2), (0.2, 1.2), (0.33, 1.0), (0.24, 0.72)], closed=False)
    p.rod([(x, y, 0) for x, y in loop], 0.085, "main", lift=-0.2)
    p.ball(r, "main", at=(0, r - 0.03, 0))
    p.turned([(r * 0.6, 0), (r * 0.66, 0.06)], "main", lift=-0.1)
    p.mark(disc(0, r, r * 0.5), "light", at=(0, 0, r * 0.93), turn=0, lift=0.6)
    p.mark(_rect(0, r, r * 0.12, r * 0.5), "dark", at=(0, 0, r * 0.94), lift=0.7)
    p.mark(_rect(0, r, r * 0.5, r * 0.12), "dark", at=(0, 0, r * 0.94), lift=0.7)


@kind("skateboard", "play")
def _skateboard(p: Product) -> None:
    w = p.vary(0.85, 0.95)
    for s in (-1, 1):
        for z in (-0.17, 0.17):
            p.turned([(0.13, -0.06), (0.13, 0.06)], "second", at=(s * w * 0.56, 0.13, z), axis=FRONT, lift=0.1 * z)
        p.box((0.16, 0.12, 0.24), "metal", at=(s * w * 0.56, 0.16, 0), lift=-0.02)
    deck = [
        (-w, 0.44), (-w * 0.72, 0.25), (w * 0.72, 0.25), (w, 0.44), (w * 0.98, 0.54), (w * 0.7, 0.36), (-w * 0.7,
        0.36), (-w * 0.98, 0.54)
    ]  # fmt: skip
    p.prism(deck, 0.52, lift=0.6)


@kind("racket", "play")
def _racket(p: Product) -> None:
    k = p.vary(0.95, 1.05)
    y, rx, ry = 1.08, 0.4 * k, 0.5
    for i in range(-1, 2):
        x = i * rx / 2
        d = ry * math.sqrt(1 - (x / rx) ** 2)
        p.rod([(x, y - d, 0), (x, y + d, 0)], 0.016, "light")
    for i in range(-2, 3):
        b = i * ry / 3
        d = rx * math.sqrt(1 - (b / ry) ** 2)
        p.rod([(-d, y + b, 0), (d, y + b, 0)], 0.016, "light")
    p.rod(
        [(rx * math.cos(a), y + ry * math.sin(a), 0) for a in [math.pi * i / 18 for i in range(36)]], 0.065, "main",
        closed=True, lift=0.1
    )  # fmt: skip
    p.rod([(-0.2, 0.68, 0), (0, 0.42, 0), (0.2, 0.68, 0)], 0.05, "main", lift=0.1)
    p.turned([(0.1, 0), (0.1, 0.04), (0.08, 0.4), (0.07, 0.48)], lift=0.2)
    p.ball(0.15, "#d9e84a", at=(0.36, 0.15, 0.1), lift=0.2)


def _bows(low: float, waist: float, high: float, h: float) -> list[Flat]:
    """The body of a guitar: half widths below, in the middle and above."""
    half = [(0.0, 0.0), (low * 0.7, h * 0.05), (low, h * 0.28), (waist, h * 0.58), (high, h * 0.82), (high * 0.6, h)]
    return smooth([*half, *[(-x, y) for x, y in half[:0:-1]]])


@kind("guitar", "play")
def _guitar(p: Product) -> None:
    k, h = p.vary(0.94, 1.06), 0.82
    p.prism(_bows(0.44 * k, 0.27 * k, 0.34 * k, h), 0.2)
    p.prism(_rect(0, 1.12, 0.12, 0.74), 0.1, "wood", at=(0, 0, 0.08), lift=0.3)
    p.prism([(-0.08, 1.46), (0.08, 1.46), (0.13, 1.74), (-0.13, 1.74)], 0.08, "dark", at=(0, 0, 0.06), lift=0.2)
    for s in (-1, 1):
        for y in (1.54, 1.66):
            p.ball(0.04, "light", at=(s * 0.16, y, 0.06), lift=0.2)
    p.mark(disc(0, h * 0.6, 0.14), "dark", at=(0, 0, 0.101), lift=0.4)
    p.mark(_rect(0, h * 0.24, 0.3, 0.07), "dark", at=(0, 0, 0.101), lift=0.4)
    for x in (-0.035, 0.035):
        p.rod([(x, h * 0.24, 0.12), (x, 1.5, 0.14)], 0.01, "light", lift=0.8)


@kind("electric guitar", "play")
def _electric_guitar(p: Product) -> None:
    k = p.vary(0.95, 1.06)
    body = smooth(
        [(-0.1, 0), (0.28, 0.02), (0.42, 0.24), (0.28, 0.46), (0.46, 0.86), (0.3, 0.82), (0.1, 0.62), (-0.1, 0.62),
        (-0.3, 0.92), (-0.46, 1.0), (-0.3, 0.5), (-0.42, 0.2)]
    )  # fmt: skip
    p.prism([(k * x, y) for x, y in body], 0.14)
    plate = smooth([(-0.06, 0.16), (0.22, 0.12), (0.26, 0.3), (0.14, 0.44), (0.2, 0.58), (-0.1, 0.56), (-0.16, 0.36)])
    p.mark(plate, "light", at=(0, 0, 0.071), lift=0.3)
    p.prism(_rect(0, 1.06, 0.12, 0.9), 0.08, "wood", at=(0, 0, 0.07), lift=0.4)
    p.prism(
        [(-0.08, 1.48), (0.08, 1.48), (0.16, 1.66), (-0.02, 1.82), (-0.12, 1.7)], 0.07, "main", at=(0, 0, 0.07),
        lift=0.5
    )  # fmt: skip
    for y in (0.28, 0.46):
        p.mark(_rect(0, y, 0.24, 0.07), "dark", at=(0, 0, 0.072), lift=0.6)
    p.mark(disc(0.22, 0.2, 0.05), "dark", at=(0, 0, 0.072), lift=0.6)


@kind("trumpet", "play")
def _trumpet(p: Product) -> None:
    y, w = 0.46, p.vary(0.95, 1.05)
    loop = [
        (-0.35, y, 0), (0.42, y, 0), *[(a, b, 0.0) for a, b in arc(0.42, y - 0.16, 0.16, 90, -90, 8)], (-0.35, y -
        0.32, 0), *[(a, b, 0.0) for a, b in arc(-0.35, y - 0.16, 0.16, 270, 90, 8)]
    ]  # fmt: skip
    p.rod(loop, 0.06, "main", lift=-0.1)
    p.rod([(-0.4, y, 0), (w, y, 0)], 0.055, "main", lift=0.0)
    p.turned([(0.05, 0), (0.1, 0.06), (0.1, 0.1)], "main", at=(w - 0.02, y, 0), axis=RIGHT, lift=0.1)
    for i in range(3):
        x = -0.14 + 0.2 * i
        p.turned([(0.085, y - 0.42), (0.085, y + 0.12)], "main", at=(x, 0, 0.02), lift=0.3)
        p.turned(
            [(0.035, y + 0.12), (0.035, y + 0.22), (0.08, y + 0.23), (0.08, y + 0.27)], "second", at=(x, 0, 0.02),
            lift=0.35
        )  # fmt: skip
    bell = [(0.06, 0), (0.08, 0.25), (0.14, 0.42), (0.26, 0.54), (p.vary(0.4, 0.45), 0.6)]
    p.turned(bell, at=(-0.35, y, 0), axis=(-1, 0, 0.12), hollow=True, lift=0.2)


@kind("piano", "play")
def _piano(p: Product) -> None:
    w, h = p.vary(1.25, 1.4), p.vary(1.0, 1.1)
    p.box((w, h, 0.36), at=(0, 0, -0.2))
    p.box((w + 0.06, 0.07, 0.42), at=(0, h, -0.2), lift=0.1)
    p.box((w * 0.5, 0.28, 0.03), "paper", at=(0, h * 0.62, 0.0), lift=0.1)
    for s in (-1, 1):
        p.box((0.12, 0.44, 0.12), at=(s * (w / 2 - 0.06), 0, 0.32), lift=0.1)
        p.box((0.1, 0.14, 0.44), at=(s * (w / 2 - 0.05), 0.52, 0.18), lift=0.5)
    p.prism([(-0.02, 0.4), (0.42, 0.4), (0.42, 0.46), (-0.02, 0.62)], w, plane="side", lift=0.2)
    lean = math.degrees(math.atan2(0.44, 0.16))
    at = _before((0, 0.545, 0.21), lean, 0.003)
    p.mark(_rect(0, 0, w - 0.22, 0.4), "paper", at=at, tilt=lean, lift=0.6)
    n = 11
    for i in range(n):
        if i % 7 not in (2, 6):
            x = (i - n / 2 + 0.9) * (w - 0.26) / n
            p.mark(_rect(x, 0.07, 0.06, 0.26), "dark", at=at, tilt=lean, lift=0.7)


@kind("tent", "play")
def _tent(p: Product) -> None:
    w, h, d = p.vary(0.62, 0.7), p.vary(0.85, 0.95), p.vary(1.1, 1.3)
    p.prism([(-w, 0), (w, 0), (0, h)], d)
    p.mark([(-w * 0.4, 0), (w * 0.4, 0), (0, h * 0.72)], "dark", at=(0, 0, d / 2 + 0.001))
    for s in (-1, 1):
        flap = [(s * w * 0.5, 0), (s * w * 0.26, 0.0), (0, h * 0.74), (0, h * 0.78)]
        p.mark(flap, "second", at=(0, 0, d / 2 + 0.002), lift=0.4)
        p.rod([(s * w * 0.5, h * 0.5, d / 2), (s * w * 1.2, 0, d / 2 + 0.12)], 0.018, "light", lift=0.5)
    p.rod([(0, h - 0.03, d / 2), (0, h + 0.1, d / 2)], 0.035, "wood", lift=0.5)


@kind("chess pawn", "play")
def _chess_pawn(p: Product) -> None:
    r = p.vary(0.36, 0.41)
    p.turned([(r, 0), (r, 0.12), (r * 0.85, 0.2), (r * 0.9, 0.26), (r * 0.5, 0.42), (r * 0.36, 0.8)])
    p.turned([(r * 0.4, 0.78), (r * 0.68, 0.84), (r * 0.68, 0.89), (r * 0.36, 0.95)], lift=0.2)
    p.ball(0.26, "main", at=(0, 1.12, 0), lift=0.4)


@kind("chess knight", "play")
def _chess_knight(p: Product) -> None:
    r = p.vary(0.38, 0.42)
    p.turned([(r, 0), (r, 0.12), (r * 0.8, 0.2), (r * 0.86, 0.27), (r * 0.7, 0.34)])
    head = [
        (-0.26, 0.3), (0.28, 0.3), (0.33, 0.62), (0.28, 0.95), (0.12, 1.17), (0.03, 1.34), (-0.05, 1.18), (-0.26,
        1.02), (-0.5, 0.82), (-0.46, 0.68), (-0.34, 0.66), (-0.14, 0.74), (-0.1, 0.66), (-0.24, 0.46)
    ]  # fmt: skip
    p.prism(head, 0.28, lift=0.3)
    p.mark(disc(-0.14, 1.0, 0.05), "second", at=(0, 0, 0.141), lift=0.6)
    p.rod([(0.17, 1.08, 0.142), (0.24, 0.86, 0.142), (0.25, 0.6, 0.142), (0.2, 0.4, 0.142)], 0.025, "second", lift=0.8)


@kind("chess rook", "play")
def _chess_rook(p: Product) -> None:
    r = p.vary(0.38, 0.43)
    p.turned([(r, 0), (r, 0.12), (r * 0.82, 0.2), (r * 0.86, 0.27), (r * 0.62, 0.38), (r * 0.54, 0.85)])
    p.turned([(r * 0.6, 0.84), (r * 0.85, 0.92), (r * 0.85, 1.06)], lift=0.2)
    for i in range(6):
        a = math.pi * (i + 0.5) / 3 + math.radians(p.view.yaw)
        at = (r * 0.66 * math.sin(a), 1.05, r * 0.66 * math.cos(a))
        p.box((0.19, 0.17, 0.14), at=at, turn=math.degrees(a), lift=0.4)


@kind("domino", "play")
def _domino(p: Product) -> None:
    w, h, lean = p.vary(0.62, 0.68), p.vary(1.2, 1.3), 5.0
    p.prism(rounded(-w / 2, 0, w / 2, h, 0.08), 0.2, tilt=lean)
    at = _before((0, 0, 0), lean, 0.101)
    p.mark(_rect(0, h / 2, w * 0.8, 0.04), "second", at=at, tilt=lean, lift=0.9)
    spots = {
        2: ((-1, -1), (1, 1)), 3: ((-1, -1), (0, 0), (1, 1)), 4: ((-1, -1), (1, 1), (-1, 1), (1, -1)), 5: ((-1, -1),
        (1, 1), (-1, 1), (1, -1), (0, 0))
    }  # fmt: skip
    for middle in (h * 0.25, h * 0.75):
        for x, y in spots[p.pick(2, 3, 4, 5)]:
            p.mark(disc(x * w * 0.25, middle + y * w * 0.25, 0.07), "second", at=at, tilt=lean, lift=0.9)


@kind("boxing glove", "play")
def _boxing_glove(p: Product) -> None:
    k = p.vary(0.95, 1.06)
    p.turned([(0.32, 0), (0.28, 0.4)])
    p.turned([(0.325, 0.06), (0.305, 0.26)], "light", band=True, lift=0.6)
    p.ball((0.42 * k, 0.46, 0.36), "main", at=(0.05, 0.84, 0), lift=0.3)
    p.turned([(0.28, 0.34), (0.4, 0.7)], at=(0.03, 0, 0), lift=0.25)
    p.rod([(-0.12, 1.0, 0.3), (-0.1, 0.78, 0.34), (-0.16, 0.58, 0.3)], 0.03, "dark", lift=0.6)
    p.ball((0.17, 0.27, 0.18), "main", at=(-0.32, 0.76, 0.2), lift=0.7)


@kind("arcade machine", "play")
def _arcade_machine(p: Product) -> None:
    w = p.vary(0.7, 0.78)
    side = [
        (-0.4, 0), (0.3, 0), (0.3, 0.62), (0.46, 0.7), (0.46, 0.78), (0.16, 0.9), (0.04, 1.3), (0.26, 1.36), (0.26,
        1.6), (-0.4, 1.6)
    ]  # fmt: skip
    p.prism(side, w, plane="side")
    lean = math.degrees(math.atan2(0.12, 0.4))
    p.mark(_rect(0, 0, w * 0.8, 0.36), "screen", at=(0, 1.1, 0.103), tilt=lean, lift=0.5)
    for x, y, paint in ((-0.12, 0.08, "#f5cf30"), (0.12, 0.08, "#d62f2f"), (0, -0.08, "#6fd06f")):
        p.mark(_rect(x, y, 0.1, 0.08), paint, at=(0, 1.1, 0.104), tilt=lean, lift=0.6)
    p.mark(_rect(0, 1.48, w * 0.86, 0.17), "glow", at=(0, 0, 0.261), lift=0.5)
    p.rod([(-0.16, 0.82, 0.32), (-0.17, 0.94, 0.34)], 0.025, "dark", lift=0.8)
    p.ball(0.06, "#d62f2f", at=(-0.17, 0.97, 0.34), lift=0.9)
    for x in (0.04, 0.17):
        p.ball((0.045, 0.03, 0.045), "light", at=(x, 0.85, 0.32), lift=0.8)
    p.mark(_rect(0, 0.3, w * 0.5, 0.32), "second", at=(0, 0, 0.301), lift=0.5)
