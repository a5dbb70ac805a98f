"""Solids of which products are put together, and how they are seen: each becomes faces of an SVG, with its shading.

A product stands on y = 0 and is about one unit wide and high: x to the right, y up, z towards the viewer. It is turned
by `yaw` around y and seen from `elevation` above the horizon, without perspective:

    x' = x cos yaw + z sin yaw       z' = z cos yaw - x sin yaw
    right = x'                       down = z' sin elevation - y cos elevation
    near  = z' cos elevation + y sin elevation

Solids hide each other by the order of `near` of their middles (the painter's algorithm), with `lift` to help where that
is wrong. A face carries a paint, a slot that the scene fills (`main`, the product's own colour; `second`, its partner;
`dark`, `light`, `metal`, `wood`, `glass`, `glow`, `leaf` or a colour as #rrggbb), and how it is shaded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

Point = tuple[float, float, float]
Flat = tuple[float, float]
Array = np.ndarray

UP: Point = (0.0, 1.0, 0.0)
RIGHT: Point = (1.0, 0.0, 0.0)
FRONT: Point = (0.0, 0.0, 1.0)

_LIGHT = np.array([-0.5, 0.75, 0.55])  # where it comes from, when it comes from the left


@dataclass(frozen=True)
class View:
    """How a product is seen, angles in degrees. `mirrored`: the light comes from the right."""

    yaw: float = 0.0
    elevation: float = 10.0
    mirrored: bool = False

    def matrix(self) -> Array:
        """Rows: right, down, near."""
        cy, sy = math.cos(math.radians(self.yaw)), math.sin(math.radians(self.yaw))
        ce, se = math.cos(math.radians(self.elevation)), math.sin(math.radians(self.elevation))
        return np.array([[cy, 0, sy], [-sy * se, -ce, cy * se], [-sy * ce, se, cy * ce]])

    def light(self) -> Array:
        x, y, z = _LIGHT
        along = np.array([-x if self.mirrored else x, y, z])
        return along / np.linalg.norm(along)


@dataclass
class Face:
    """A closed region in the plane of the picture, or with `width` a line along `points`.

    `shade`: from -1 (turned from the light) to 1, of the whole face. `across`: two points between which a round face
    goes from its lit to its dark side. `ball`: (x, y, radius) of a round highlight."""

    points: Array
    paint: str
    shade: float = 0.0
    across: tuple[Flat, Flat] | None = None
    ball: tuple[float, float, float] | None = None
    width: float = 0.0
    closed: bool = True
    inside: bool = False
    bare: bool = False  # never patterned
    flowing: bool = False  # goes over into its neighbours without an edge: line drawings draw none
    near: float = 0.0


@dataclass
class Part:
    """One solid: its faces from back to front."""

    faces: list[Face]
    near: float
    plane: tuple[Array, float, float] | None = None  # of a mark: normal, distance from the origin, lift


def _hull(points: Array) -> Array:
    order = np.lexsort((points[:, 1], points[:, 0]))
    rows = [tuple(p) for p in points[order].tolist()]

    def half(rows: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        out: list[tuple[float, ...]] = []
        for p in rows:
            while len(out) > 1 and (out[-1][0] - out[-2][0]) * (p[1] - out[-2][1]) <= (out[-1][1] - out[-2][1]) * (
                p[0] - out[-2][0]
            ):
                out.pop()
            out.append(p)
        return out[:-1]

    return np.array(half(rows) + half(rows[::-1]))


def smooth(points: Sequence[Flat], closed: bool = True, steps: int = 5) -> list[Flat]:
    """Points of a curve through `points` (Catmull-Rom)."""
    p = np.array(points, dtype=float)
    n = len(p)
    out: list[Flat] = []
    for i in range(n if closed else n - 1):
        a, b, c, d = (p[(i + k) % n] if closed else p[min(max(i + k, 0), n - 1)] for k in (-1, 0, 1, 2))
        for t in np.linspace(0, 1, steps, endpoint=False):
            v = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
            out.append((float(v[0]), float(v[1])))
    if not closed:
        out.append((float(p[-1][0]), float(p[-1][1])))
    return out


def arc(
    x: float, y: float, radius: float, start: float, end: float, steps: int = 14, squash: float = 1.0
) -> list[Flat]:
    """Points of a part of a circle, angles in degrees from the right, anticlockwise; `squash` scales y."""
    return [
        (x + radius * math.cos(math.radians(a)), y + squash * radius * math.sin(math.radians(a)))
        for a in np.linspace(start, end, steps)
    ]


def disc(x: float, y: float, radius: float, squash: float = 1.0) -> list[Flat]:
    return arc(x, y, radius, 0, 345, 24, squash)


def rounded(x0: float, y0: float, x1: float, y1: float, radius: float) -> list[Flat]:
    """A rectangle with round corners."""
    r = min(radius, abs(x1 - x0) / 2, abs(y1 - y0) / 2)
    return (
        arc(x1 - r, y1 - r, r, 0, 90, 5)
        + arc(x0 + r, y1 - r, r, 90, 180, 5)
        + arc(x0 + r, y0 + r, r, 180, 270, 5)
        + arc(x1 - r, y0 + r, r, 270, 360, 5)
    )


def star(x: float, y: float, outer: float, inner: float, tips: int = 5) -> list[Flat]:
    out = []
    for i in range(2 * tips):
        r, a = (inner if i % 2 else outer), math.pi / 2 + math.pi * i / tips
        out.append((x + r * math.cos(a), y + r * math.sin(a)))
    return out


def moved(outline: Sequence[Flat], x: float = 0.0, y: float = 0.0, degrees: float = 0.0) -> list[Flat]:
    """An outline turned anticlockwise around the origin, then shifted."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x + c * a - s * b, y + s * a + c * b) for a, b in outline]


def twofold(half: Sequence[Flat]) -> list[Flat]:
    """The outline of something symmetric from its right half, from the top to the bottom."""
    return [*half, *[(-x, y) for x, y in reversed(half)]]


def standing(points: Sequence[Flat], z: float = 0.0) -> list[Point]:
    """Flat points as a path in the plane that faces the viewer."""
    return [(x, y, z) for x, y in points]


def around(angle: float, radius: float, y: float) -> Point:
    """The point at this height and distance from the y axis; angles in degrees, 0 towards the viewer, 90 right."""
    a = math.radians(angle)
    return radius * math.sin(a), y, radius * math.cos(a)


@dataclass
class Product:
    """What a kind's function fills with solids. `vary` and `pick` throw the kind's own dice, which always fall alike: a
    number within bounds that looks right, without one having to be chosen."""

    view: View
    random: random.Random
    parts: list[Part] = field(default_factory=list)

    def vary(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def sees(self, normal: Point, least: float = 0.15) -> bool:
        """Whether a face with this normal is turned towards the viewer."""
        return float(self.view.matrix()[2] @ np.array(normal)) > least * math.hypot(*normal)

    # -- solids ------------------------------------------------------------------------------------------------------

    def turned(
        self, profile: Sequence[Flat], paint: str = "main", *, at: Point = (0, 0, 0), axis: Point = UP,
        hollow: bool = False, inside: str | None = None, band: bool = False, bare: bool = False, lift: float = 0.0,
        sides: int = 22,
    ) -> None:  # fmt: skip
        """A solid of revolution: `profile` is (radius, height along `axis`) from the foot `at` to the end.

        `hollow`: its end is open, and one sees into it (painted `inside`, else the same paint). `band`: only its wall,
        as of a label or a hoop around another solid."""
        m, u = self.view.matrix(), np.array(axis, dtype=float)
        u = u / np.linalg.norm(u)
        along, toward = m[:2] @ u, float(m[2] @ u)
        length = math.hypot(*along)
        side = np.array([-along[1], along[0]]) / length if length > 1e-6 else np.array([1.0, 0.0])
        lit = self.view.light()
        # The side of the axis that the light is on is the lit one.
        if float(side @ (m[:2] @ lit)) < 0:
            side = -side
        angles = np.linspace(0, 2 * math.pi, sides, endpoint=False)
        circle = np.outer(np.cos(angles), side) + np.outer(np.sin(angles), abs(toward) * np.array([side[1], -side[0]]))
        if band:  # the half that faces the viewer
            turns = np.linspace(0, math.pi, sides // 2 + 2)
            circle = np.outer(np.cos(turns), side) - np.outer(np.sin(turns), toward * along / max(length, 1e-6))
        base = m @ np.array(at, dtype=float)
        rings = [(r, base[:2] + h * along, base[:2] + h * along + r * circle) for r, h in profile]
        widest = max(r for r, _ in profile)
        mid = float(base[2] + toward * (profile[0][1] + profile[-1][1]) / 2)
        faces = []
        order = range(len(rings) - 1) if toward >= 0 else range(len(rings) - 2, -1, -1)
        near_end = len(rings) - 1 if toward >= 0 else 0

        slopes = [math.atan2(h1 - h0, r1 - r0) for (r0, h0), (r1, h1) in pairwise(profile)]
        bends = [False, *(abs(b - a) > 0.45 for a, b in pairwise(slopes)), False]

        def across(center: Array, radius: float) -> tuple[Flat, Flat]:
            a, b = center + radius * side, center - radius * side
            return (float(a[0]), float(a[1])), (float(b[0]), float(b[1]))

        for i in order:
            (r0, c0, ring0), (r1, c1, ring1) = rings[i], rings[i + 1]
            rise = profile[i + 1][1] - profile[i][1]
            slope = math.atan2(r0 - r1, abs(rise) + 1e-6)  # 0: a cylinder, up to 90°: a lid seen from its end
            shade = 0.55 * math.sin(slope) * (1 if rise >= 0 else -1) * float(u @ lit)
            if r0 < 1e-3 and r1 < 1e-3:
                continue
            wall = np.concatenate([ring0, ring1[::-1]]) if band else _hull(np.concatenate([ring0, ring1]))
            faces.append(
                Face(wall, paint, shade, across((c0 + c1) / 2, max(r0, r1, 0.3 * widest)),
                     bare=bare, flowing=not (bends[i] or bends[i + 1]), near=mid)
            )  # fmt: skip
        r, c, ring = rings[near_end]
        if r > 1e-3 and abs(toward) > 0.02 and not band:
            up = float(u @ lit) * (1 if toward >= 0 else -1)
            if hollow and near_end:
                dark, light = across(c, r)
                faces.append(Face(ring, inside or paint, -0.25, (light, dark), inside=True, bare=True, near=mid))
            else:
                faces.append(Face(ring, paint, 0.55 * up, bare=bare, near=mid))
        self.parts.append(Part(faces, mid + lift))

    def box(
        self, size: Point, paint: str = "main", *, at: Point = (0, 0, 0), turn: float = 0.0, top: str | None = None,
        front: str | None = None, bare: bool = False, lift: float = 0.0,
    ) -> None:  # fmt: skip
        """A box of (width, height, depth) whose floor's middle is `at`, turned by `turn` degrees around y."""
        w, h, d = size
        self.prism(
            [(-w / 2, -d / 2), (w / 2, -d / 2), (w / 2, d / 2), (-w / 2, d / 2)], h, paint, at=at, plane="floor",
            turn=turn, cap=top, side_front=front, bare=bare, lift=lift,
        )  # fmt: skip

    def prism(
        self, outline: Sequence[Flat], thick: float, paint: str = "main", *, at: Point = (0, 0, 0),
        plane: str = "front", turn: float = 0.0, tilt: float = 0.0, cap: str | None = None, side: str | None = None,
        side_front: str | None = None, bare: bool = False, lift: float = 0.0,
    ) -> None:  # fmt: skip
        """`outline` pulled along its normal by `thick`, half to each side of `at` (plane `floor`: upwards from `at`).

        `plane`: `front` (x right, y up), `side` (x to the viewer, y up) or `floor` (x right, y to the viewer).
        `turn`: degrees around y. `tilt`: degrees by which its top leans back. `cap`: another paint for the face;
        `side`: for the rim."""
        o = np.array(outline, dtype=float)
        zero = np.zeros(len(o))
        if plane == "floor":
            low = np.stack([o[:, 0], zero, o[:, 1]], 1)
            normal = np.array([0.0, 1.0, 0.0])
            start = 0.0
        elif plane == "side":
            low = np.stack([zero, o[:, 1], o[:, 0]], 1)
            normal = np.array([1.0, 0.0, 0.0])
            start = -thick / 2
        else:
            low = np.stack([o[:, 0], o[:, 1], zero], 1)
            normal = np.array([0.0, 0.0, 1.0])
            start = -thick / 2
        turning = _around_y(turn) @ _around_x(-tilt)
        normal = turning @ normal
        low = low @ turning.T + np.array(at, dtype=float) + start * normal
        high = low + thick * normal
        m, lit = self.view.matrix(), self.view.light()
        if float(m[2] @ normal) < 0:
            low, high, normal = high, low, -normal
        p0, p1 = low @ m.T, high @ m.T
        mid = float((p0[:, 2].mean() + p1[:, 2].mean()) / 2)
        faces = []
        rim = high - low
        spin = np.roll(low, -1, axis=0) - low
        outward = np.cross(spin, rim)
        lengths = np.linalg.norm(outward, axis=1, keepdims=True)
        outward = outward / np.maximum(lengths, 1e-9)
        # Which way round the outline goes decides the sign.
        centre = low.mean(0)
        if float(((low - centre) * outward).sum()) < 0:
            outward = -outward
        flows = (outward * np.roll(outward, 1, axis=0)).sum(1) > 0.87  # with the side before it
        sides = []
        for i in range(len(o)):
            j = (i + 1) % len(o)
            facing = float(outward[i] @ m[2])
            if facing > 1e-3 and float(np.linalg.norm(spin[i])) > 1e-6 and thick > 1e-6:
                quad = np.stack([p0[i], p0[j], p1[j], p1[i]])
                tone = side or paint
                if side_front is not None and facing == max(float(n @ m[2]) for n in outward):
                    tone = side_front
                flowing = bool(flows[i] and flows[j])
                face = Face(quad[:, :2], tone, _lambert(outward[i], lit), bare=bare, flowing=flowing, near=mid)
                sides.append((quad[:, 2].mean(), face))
        faces += [f for _, f in sorted(sides, key=lambda s: s[0])]
        if abs(float(m[2] @ normal)) > 0.02:
            faces.append(Face(p1[:, :2], cap or paint, _lambert(normal, lit), bare=bare, near=mid))
        self.parts.append(Part(faces, mid + lift))

    def ball(
        self, radius: float | Point, paint: str = "main", *, at: Point, bare: bool = False, lift: float = 0.0
    ) -> None:
        """A ball, or an ellipsoid by three radii (x, y, z), whose middle is `at`."""
        r = np.array([radius] * 3 if isinstance(radius, int | float) else radius, dtype=float)
        m = self.view.matrix()
        p = m[:2] * r
        values, vectors = np.linalg.eigh(p @ p.T)
        root = vectors * np.sqrt(np.maximum(values, 0))
        angles = np.linspace(0, 2 * math.pi, 26, endpoint=False)
        c = m @ np.array(at, dtype=float)
        points = c[:2] + np.stack([np.cos(angles), np.sin(angles)], 1) @ root.T
        size = float(np.sqrt(values).max())
        glance = m[:2] @ self.view.light()
        spot = c[:2] + 0.45 * glance * float(np.sqrt(values).mean())
        face = Face(points, paint, 0, ball=(float(spot[0]), float(spot[1]), 1.35 * size), bare=bare, near=float(c[2]))
        self.parts.append(Part([face], float(c[2]) + lift))

    def blob(
        self, balls: Sequence[tuple[Point, float]], paint: str = "main", *, at: Point = (0, 0, 0), bare: bool = False,
        lift: float = 0.0,
    ) -> None:  # fmt: skip
        """The hull of balls, each a middle and a radius: a limb, a sausage, a toe cap."""
        m = self.view.matrix()
        c = (np.array([b for b, _ in balls], dtype=float) + np.array(at, dtype=float)) @ m.T
        circle = np.array(disc(0, 0, 1))
        points = _hull(np.concatenate([b[:2] + r * circle for b, (_, r) in zip(c, balls, strict=True)]))
        middle = (points.min(0) + points.max(0)) / 2
        _, axes = np.linalg.eigh(np.cov((points - middle).T))
        side = axes[:, 0] * (1 if float(axes[:, 0] @ (m[:2] @ self.view.light())) > 0 else -1)
        reach = max(r for _, r in balls)
        a, b = middle + reach * side, middle - reach * side
        near = float(c[:, 2].mean())
        across = ((float(a[0]), float(a[1])), (float(b[0]), float(b[1])))
        self.parts.append(Part([Face(points, paint, 0, across, bare=bare, near=near)], near + lift))

    def rod(
        self, path: Sequence[Point], radius: float, paint: str = "main", *, at: Point = (0, 0, 0), closed: bool = False,
        bare: bool = True, lift: float = 0.0,
    ) -> None:  # fmt: skip
        """A round bar along `path`. Bent bars (handles, wires, rings) are paths of many points."""
        m = self.view.matrix()
        p = (np.array(path, dtype=float) + np.array(at, dtype=float)) @ m.T
        near = float(p[:, 2].mean())
        face = Face(p[:, :2], paint, 0, width=2 * radius, closed=closed, bare=bare, near=near)
        self.parts.append(Part([face], near + lift))

    def ring(
        self, radius: float, thick: float, paint: str = "main", *, at: Point, axis: str = "z", squash: float = 1.0,
        lift: float = 0.0,
    ) -> None:  # fmt: skip
        """A closed ring of bar radius `thick` around the axis x, y or z."""
        flat = disc(0, 0, radius, squash)
        to = {"z": lambda a, b: (a, b, 0.0), "y": lambda a, b: (a, 0.0, b), "x": lambda a, b: (0.0, b, a)}[axis]
        self.rod([to(a, b) for a, b in flat], thick, paint, at=at, closed=True, lift=lift)

    def sheet(
        self,
        corners: Sequence[Point],
        paint: str = "main",
        *,
        at: Point = (0, 0, 0),
        bare: bool = False,
        lift: float = 0.0,
    ) -> None:
        """A flat piece without thickness, seen from both sides."""
        c = np.array(corners, dtype=float) + np.array(at, dtype=float)
        m, lit = self.view.matrix(), self.view.light()
        normal = np.cross(c[1] - c[0], c[2] - c[0])
        normal = normal / (np.linalg.norm(normal) + 1e-9)
        if float(normal @ m[2]) < 0:
            normal = -normal
        p = c @ m.T
        near = float(p[:, 2].mean())
        self.parts.append(Part([Face(p[:, :2], paint, _lambert(normal, lit), bare=bare, near=near)], near + lift))

    def mark(self, outline: Sequence[Flat], paint: str, *, at: Point, plane: str = "front", turn: float = 0.0,
             tilt: float = 0.0, lift: float = 0.3) -> None:  # fmt: skip
        """Something flat on another solid's face (a dial, a screen, a label); not seen from behind.

        It lies on the marks that the same plane already has, wherever their middles are."""
        normal = _around_y(turn) @ _around_x(-tilt) @ np.array({"front": FRONT, "side": RIGHT, "floor": UP}[plane])
        if float(self.view.matrix()[2] @ normal) <= 0.03:
            return
        self.prism(outline, 0.0, paint, at=at, plane=plane, turn=turn, tilt=tilt, bare=True, lift=lift)
        mark = self.parts[-1]
        mark.plane = (normal, float(normal @ np.array(at)), lift)
        low, high = mark.faces[0].points.min(0), mark.faces[0].points.max(0)
        for part in self.parts[:-1]:
            if part.plane and np.allclose(part.plane[0], normal) and abs(part.plane[1] - mark.plane[1]) < 0.03:
                points = part.faces[0].points
                if lift >= part.plane[2] and (points.max(0) > low).all() and (points.min(0) < high).all():
                    mark.near = max(mark.near, part.near + 1e-4)

    def patch(
        self, directions: Sequence[Point], radius: float, paint: str, *, at: Point, lift: float = 0.5
    ) -> None:  # fmt: skip
        """A region on a ball (radius, middle `at`) whose corners lie in `directions`; cut off where the ball ends."""
        m = self.view.matrix()
        d = np.array(directions, dtype=float)
        p = (d / np.linalg.norm(d, axis=1, keepdims=True)) @ m.T
        if float(p[:, 2].max()) < 0.05:
            return
        behind = p[:, 2] < 0
        p[behind, :2] /= np.linalg.norm(p[behind, :2], axis=1, keepdims=True)
        c = m @ np.array(at, dtype=float)
        shade = _lambert(d.mean(0) / (np.linalg.norm(d.mean(0)) + 1e-9), self.view.light())
        face = Face(c[:2] + 1.002 * radius * p[:, :2], paint, shade, bare=True, near=float(c[2]))
        self.parts.append(Part([face], float(c[2]) + lift))

    def wheels(
        self, places: Sequence[float], z: float, radius: float, hub: str = "light", thick: float = 0.12
    ) -> None:  # fmt: skip
        """Pairs of wheels that roll along x, at these x and at ±z, on the ground: before and behind all else."""
        for x in places:
            for s in (-1, 1):
                flat = [(radius, -thick / 2), (radius, thick / 2)]
                self.turned(flat, "rubber", at=(x, radius, s * z), axis=FRONT, lift=0.6 * s)
                self.mark(disc(x, radius, radius * 0.5), hub, at=(0, 0, s * z + thick / 2 + 0.002), lift=0.6 * s + 0.1)

    # -- all of it ---------------------------------------------------------------------------------------------------

    def faces(self) -> list[list[Face]]:
        """The faces of every solid, from the far ones to the near ones."""
        return [part.faces for part in sorted(self.parts, key=lambda part: part.near)]

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        for part in self.parts:
            for face in part.faces:
                low = np.minimum(low, face.points.min(0) - face.width / 2)
                high = np.maximum(high, face.points.max(0) + face.width / 2)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _around_y(degrees: float) -> Array:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _around_x(degrees: float) -> Array:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def _lambert(normal: Array, light: Array) -> float:
    """-1 … 1, about 0 for a face that looks at the viewer."""
    return float(np.clip(1.3 * (normal @ light) - 0.55, -1, 1))


# -- kinds -------------------------------------------------------------------------------------------------------------

Maker = Callable[[Product], None]
KINDS: dict[str, Maker] = {}
SUBJECTS: dict[str, Maker] = {}
"""Products that no base was shown, by the words that call them."""


def kind(name: str) -> Callable[[Maker], Maker]:
    """Registers a function under the words that captions call the product by."""

    def register(make: Maker) -> Maker:
        if name in KINDS:
            raise ValueError(f"there are two kinds named {name!r}")
        KINDS[name] = make
        return make

    return register
