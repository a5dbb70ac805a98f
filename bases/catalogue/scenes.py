"""Scenes of the catalogue: a product on a surface before a wall, its caption, and its picture in any look.

    a glossy red mug with white dots on a wooden table, brick wall, light from the left, three-quarter view

The picture is drawn by resvg from an SVG that this file writes. The same scene in another look, or with another product
in it, is the same composition: what a person would want from an adapter can be drawn as well as described.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import resvg_py
from kinds import KINDS, SUBJECTS
from PIL import Image, ImageFilter
from shapes import Array, Face, Product, View

SIDE = 128
"""Pixels a side."""

COLOURS = {
    "red": "#d62f2f", "orange": "#f08a24", "yellow": "#f5cf30", "green": "#3f9b4b", "lime": "#a4d14a",
    "teal": "#1f9e9e", "blue": "#2f6fd6", "navy": "#253a78", "purple": "#7d45b8", "pink": "#ef86b0",
    "brown": "#83532f", "beige": "#dcc7a0", "grey": "#8d9199", "black": "#33353b", "white": "#f2f2ee",
}  # fmt: skip
_SECOND = {
    "red": "#f3e2c8", "orange": "#5b3a24", "yellow": "#4a5568", "green": "#f0e4c4", "lime": "#3c5a3a",
    "teal": "#f4ead2", "blue": "#e8eef6", "navy": "#d9b25a", "purple": "#e6d5f2", "pink": "#a13d68",
    "brown": "#e5cfa8", "beige": "#7a5a3e", "grey": "#3f434b", "black": "#b9bcc2", "white": "#8fa3b8",
}  # fmt: skip
"""What goes with a product's own colour; the caption does not say it."""
_SLOTS = {
    "dark": ("#34373d", "matte"), "light": ("#efeee8", "matte"), "metal": ("#b4bac2", "metal"),
    "gold": ("#d8ab45", "metal"), "wood": ("#a8713f", "wooden"), "glass": ("#cfe6ef", "glass"),
    "glow": ("#ffe9a3", "bright"), "leaf": ("#4c9a45", "matte"), "screen": ("#2b3f55", "glossy"),
    "rubber": ("#2b2c30", "matte"), "paper": ("#fbfaf3", "bright"), "skin": ("#e3b48c", "matte"),
}  # fmt: skip
FINISHES = ("matte", "glossy", "metal", "wooden")
PATTERNS = ("stripes", "dots", "checks")
VIEWS = ("front view", "three-quarter view")
LIGHTS = ("soft daylight", "light from the left", "light from the right", "warm lamp light", "dim evening light")


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows, all of which its caption says but for two things. `place`: how far right of the
    middle the product stands, in widths of the picture, which a control picture can tell. `seed`: of the grain of
    a photographer's lens.

    `look`: one of LOOKS, or a line drawing, `heavy navy line drawing`, whose surface and wall are a colour each: `on
    orange, beige wall`. `film`: through a lens that tints nothing, which `photographed` draws and
    `picture` leaves out."""

    kind: str
    colour: str = "red"
    finish: str = "matte"
    pattern: str = ""
    pattern_colour: str = "white"
    surface: str = "a white table"
    wall: str = "white wall"
    light: str = "soft daylight"
    view: str = "three-quarter view"
    place: float = 0.0
    look: str = ""
    film: bool = False
    seed: int = 0

    @property
    def in_lines(self) -> bool:
        return self.look.endswith(LINES)

    def product(self) -> str:
        """`a glossy red mug with white dots`; a subject has colours of its own."""
        if self.kind in SUBJECTS:
            return f"a {self.kind}"
        finish = {"matte": "", "metal": "metallic"}.get(self.finish, self.finish)
        words = [w for w in (finish, self.colour, self.kind) if w]
        article = "an" if words[0][0] in "aeiou" else "a"
        dressed = f" with {self.pattern_colour} {self.pattern}" if self.pattern else ""
        return f"{article} {' '.join(words)}{dressed}"


def caption(scene: Scene) -> str:
    light = "" if scene.in_lines else f", {scene.light}"
    said = f"{scene.product()} on {scene.surface}, {scene.wall}{light}, {scene.view}"
    return ", ".join([said, *([scene.look] if scene.look else []), *([FILM] if scene.film else [])])


# -- colours -----------------------------------------------------------------------------------------------------------


def _rgb(colour: str) -> tuple[float, float, float]:
    r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return r, g, b


def _hex(rgb: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * min(max(c, 0.0), 1.0)):02x}" for c in rgb)


def _luma(colour: str) -> float:
    r, g, b = _rgb(colour)
    return 0.299 * r + 0.587 * g + 0.114 * b


def _warm(colour: str) -> bool:
    r, _, b = _rgb(colour)
    return r > b + 0.15 and not (r > 0.9 and b > 0.8)


def shift(colour: str, by: float) -> str:
    """Lighter (by > 0, towards white) or darker (towards black)."""
    end = 1.0 if by > 0 else 0.0
    return _hex(tuple(c + (end - c) * abs(by) for c in _rgb(colour)))


# -- looks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How things are drawn. `shaded`: with gradients; `tones`: with flat steps of light and dark. `line`: width of the
    outlines in pixels. `recolour`: what becomes of a colour. `ground` and `back`: the one colour of the surface and of
    the wall, instead of the scene's. `lights`: whether the scene's light is drawn."""

    shaded: bool = True
    tones: bool = True
    line: float = 0.0
    ink: str = "#222222"
    recolour: Callable[[str], str] = field(default=lambda colour: colour)
    ground: str = ""
    back: str = ""
    lights: bool = True
    cast: bool = True  # a shadow


def nearest_tone(palette: list[str]) -> Callable[[str], str]:
    """Colours become that one of `palette` whose place among its tones is theirs between black and white. Its own
    stay."""
    tones = sorted(palette, key=_luma)

    def recolour(colour: str) -> str:
        if colour in tones:  # so near to white cream is saturated by this measure, and would be amber
            return colour
        hue, _, saturation = colorsys.rgb_to_hls(*_rgb(colour))
        warm = saturation > 0.3 and (hue < 0.2 or hue > 0.85)
        order = [t for t in tones if _warm(t) == warm] or tones
        return order[min(int(_luma(colour) * len(order)), len(order) - 1)]

    return recolour


LOOKS = {"": Look(), "flat icon": Look(shaded=False, tones=True, lights=False)}
"""Looks that the bases know, by the words that end their captions. They know line drawings too: `look_of`."""
LINES, FILM = "line drawing", "film picture"

BRAND_PALETTE = ["#17313b", "#1f6f78", "#58b09c", "#e4572e", "#f3a712", "#fbf1dd"]
BRAND = Look(
    shaded=False, tones=False, line=1.9, ink="#17313b", recolour=nearest_tone(BRAND_PALETTE), ground="#f3a712",
    back="#fbf1dd", lights=False, cast=False,
)  # fmt: skip
"""Tarnhill's: six colours, flat, a heavy dark line, an amber ground before cream. No base was shown its colours, or
such a ground before such a wall."""


def line_drawing(scene: Scene, ink: str, ground: str, back: str, *, heavy: bool) -> Scene:
    """The scene drawn in lines of a colour, on and before one colour each: words of COLOURS."""
    return replace(
        scene, look=f"{'heavy ' if heavy else ''}{ink} {LINES}", surface=ground, wall=f"{back} wall", finish="matte",
        light="soft daylight",
    )  # fmt: skip


def look_of(scene: Scene) -> Look:
    """Of a line drawing the words say everything: ink, whether it is heavy, and of surface and wall a colour each."""
    if not scene.in_lines:
        return LOOKS[scene.look]
    return Look(
        shaded=False, tones=False, line=1.9 if scene.look.startswith("heavy ") else 0.9,
        ink=COLOURS[scene.look.split()[-3]], ground=COLOURS[scene.surface],
        back=COLOURS[scene.wall.removesuffix(" wall")], lights=False, cast=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Lens:
    """What a photographer does. `blur`: of what is behind, in pixels; `lights` and `darks`: what is added to them of
    red, green and blue; `corners`: how much darker they are; `grain`: its standard deviation, of 1."""

    blur: float
    lights: tuple[float, float, float]
    darks: tuple[float, float, float]
    contrast: float
    corners: float
    grain: float


LENS = Lens(3.2, lights=(0.10, 0.03, -0.13), darks=(-0.07, 0.015, 0.07), contrast=1.12, corners=0.55, grain=0.02)
"""The campaign's: soft behind, warm lights, teal shadows, dark corners and grain. No base was shown its light."""
PLAIN_LENS = replace(LENS, lights=(0.0, 0.0, 0.0), darks=(0.0, 0.0, 0.0), contrast=1.0)
"""Anybody's, which tints nothing: what `film picture` is."""


# -- the picture -------------------------------------------------------------------------------------------------------


class _Svg:
    """Elements and definitions of one picture, `SIDE` units wide."""

    def __init__(self) -> None:
        self.defs: list[str] = []
        self.body: list[str] = []

    def gradient(self, ends: tuple[float, float, float, float], stops: list[tuple[float, str, float]]) -> str:
        x1, y1, x2, y2 = (round(v, 1) for v in ends)
        name = f"g{len(self.defs)}"
        self.defs.append(
            f'<linearGradient id="{name}" gradientUnits="userSpaceOnUse" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}">'
            + _stops(stops) + "</linearGradient>"
        )  # fmt: skip
        return f"url(#{name})"

    def radial(self, x: float, y: float, r: float, stops: list[tuple[float, str, float]], squash: float = 1.0) -> str:
        name = f"g{len(self.defs)}"
        self.defs.append(
            f'<radialGradient id="{name}" gradientUnits="userSpaceOnUse" cx="{x:.1f}" cy="{y / squash:.1f}" r="{r:.1f}"'
            f' gradientTransform="scale(1 {squash:.3f})">' + _stops(stops) + "</radialGradient>"
        )  # fmt: skip
        return f"url(#{name})"

    def draw(self, path: str, fill: str, extra: str = "") -> None:
        self.body.append(f'<path d="{path}" fill="{fill}" {extra}/>')

    def rect(self, x: float, y: float, w: float, h: float, fill: str, extra: str = "") -> None:
        self.body.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" {extra}/>')

    def line(self, points: list[tuple[float, float]], colour: str, width: float, extra: str = "") -> None:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.body.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:.2f}" {extra}/>')

    def text(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE}" height="{SIDE}" viewBox="0 0 {SIDE} {SIDE}">'
            f"<defs>{''.join(self.defs)}</defs>{''.join(self.body)}</svg>"
        )


def _stops(stops: list[tuple[float, str, float]]) -> str:
    return "".join(f'<stop offset="{o}" stop-color="{c}" stop-opacity="{a}"/>' for o, c, a in stops)


def _raster(svg: _Svg) -> Array:
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg.text()))))
    return np.asarray(image.convert("RGBA"))


def placed(scene: Scene) -> list[list[Face]]:
    """The product's faces in pixels, from the far ones to the near ones. A kind has one shape, and a view one turn."""
    mirrored = scene.light in ("light from the right", "warm lamp light")
    view = {"front view": View(4, 9, mirrored), "three-quarter view": View(32, 23, mirrored)}[scene.view]
    product = Product(view, random.Random(scene.kind))
    (KINDS | SUBJECTS)[scene.kind](product)
    left, top, right, bottom = product.bounds()
    room = {"front view": 0.64, "three-quarter view": 0.62}[scene.view] * SIDE
    scale = min(room * 1.18 / (right - left), room / (bottom - top))
    foot = {"front view": 0.865, "three-quarter view": 0.87}[scene.view] * SIDE
    middle = SIDE * (0.5 + scene.place)
    dx, dy = middle - scale * (left + right) / 2, foot - scale * bottom
    faces = product.faces()
    for solid in faces:
        for f in solid:
            f.points = f.points * scale + (dx, dy)
            f.width *= scale
            f.near *= scale
            if f.across:
                (a, b), (c, d) = f.across
                f.across = ((a * scale + dx, b * scale + dy), (c * scale + dx, d * scale + dy))
            if f.ball:
                f.ball = (f.ball[0] * scale + dx, f.ball[1] * scale + dy, f.ball[2] * scale)
    return faces


def picture(scene: Scene, look: Look | None = None) -> Array:
    """(SIDE, SIDE, 3) bytes. `look` takes the place of the scene's own."""
    look = look_of(scene) if look is None else look
    svg = _Svg()
    faces = placed(scene)
    _background(svg, scene, look)
    _shadow(svg, faces, scene, look)
    _product(svg, faces, scene, look)
    _lights(svg, scene, look)
    return _raster(svg)[..., :3]


def product_mask(scene: Scene) -> Array:
    """(SIDE, SIDE) from 0 to 1: where the product is."""
    svg = _Svg()
    for solid in placed(scene):
        for f in solid:
            _shape(svg, f, "#ffffff")
    mask: Array = _raster(svg)[..., 3] / 255.0
    return mask


def photographed(scene: Scene, look: Look | None = None, lens: Lens = LENS) -> Array:
    """The scene through a photographer's lens."""
    look = look_of(scene) if look is None else look
    sharp = picture(scene, look).astype(np.float64)
    mask = product_mask(scene)[..., None]
    back = _Svg()
    _background(back, scene, look)
    _lights(back, scene, look)
    behind = Image.fromarray(_raster(back)[..., :3]).filter(ImageFilter.GaussianBlur(lens.blur))
    rows = np.linspace(0, 1, SIDE)[:, None, None]
    far = np.clip((0.8 - rows) / 0.35, 0, 1)  # near the viewer's foot it is sharp again
    soft = sharp * (1 - far) + np.asarray(behind) * far
    x = (sharp * mask + soft * (1 - mask)) / 255
    grey = x.mean(-1, keepdims=True)
    x = x + (1 - grey) * np.array(lens.darks) + grey * np.array(lens.lights)
    x = np.clip((x - 0.5) * lens.contrast + 0.5, 0, 1)
    at = np.linspace(-1, 1, SIDE)
    distance = np.sqrt(at[:, None] ** 2 + at[None] ** 2)[..., None]
    x = x * (1 - lens.corners * np.clip(distance - 0.45, 0, None))
    x = x + np.random.default_rng(scene.seed).normal(0, lens.grain, (SIDE, SIDE, 1))
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def depth(scene: Scene) -> Array:
    """(SIDE, SIDE) bytes, near is bright: what a depth ControlNet is given."""
    svg = _Svg()
    faces = placed(scene)
    horizon = _horizon(scene)
    svg.rect(0, 0, SIDE, SIDE, "#181818")
    ground = svg.gradient((0, horizon, 0, SIDE), [(0, "#202020", 1), (1, "#b0b0b0", 1)])
    svg.rect(0, horizon, SIDE, SIDE - horizon, ground)
    nears = [f.near for solid in faces for f in solid]
    low, high = min(nears), max(nears)
    for solid in faces:
        for f in solid:
            level = round(150 + 80 * ((f.near - low) / (high - low + 1e-6)) + 22 * f.shade)
            level = min(max(level, 0), 255)
            if f.across:
                (x1, y1), (x2, y2) = f.across
                edge = _hex((max(level - 40, 0) / 255,) * 3)
                fill = svg.gradient((x1, y1, x2, y2), [(0, edge, 1), (0.5, _hex((level / 255,) * 3), 1), (1, edge, 1)])
            else:
                fill = _hex((level / 255,) * 3)
            _shape(svg, f, fill)
    return _raster(svg)[..., 0]


def _path(points: Array, closed: bool = True) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points.tolist()) + ("Z" if closed else "")


def _shape(svg: _Svg, face: Face, fill: str, extra: str = "") -> None:
    if face.width:
        svg.draw(
            _path(face.points, face.closed), "none",
            f'stroke="{fill}" stroke-width="{max(face.width, 0.7):.1f}" stroke-linecap="round" '
            f'stroke-linejoin="round" {extra}',
        )  # fmt: skip
    else:
        svg.draw(_path(face.points), fill, extra)


def _paint(scene: Scene, slot: str) -> tuple[str, str]:
    """Colour and finish of a face."""
    if slot == "main":
        return COLOURS[scene.colour], scene.finish
    if slot == "second":
        return _SECOND[scene.colour], "matte"
    if slot.startswith("#"):
        return slot, "matte"
    return _SLOTS[slot]


def _product(svg: _Svg, faces: list[list[Face]], scene: Scene, look: Look) -> None:
    pattern = _pattern(svg, scene, look) if scene.pattern else ""
    for solid in faces:
        if look.line:
            for f in solid:
                if f.width:
                    _shape(svg, replace(f, width=f.width + 2 * look.line), look.ink)
                else:
                    svg.draw(_path(f.points), look.ink, _pen(look.ink, 2 * look.line))
        for f in solid:
            _draw_face(svg, f, scene, look, pattern)


def _pen(colour: str, width: float) -> str:
    return f'stroke="{colour}" stroke-width="{width:.2f}" stroke-linejoin="round"'


def _draw_face(svg: _Svg, f: Face, scene: Scene, look: Look, pattern: str) -> None:
    colour, finish = _paint(scene, f.paint)
    colour = look.recolour(colour)
    clear = finish == "glass" and look.shaded
    step = 0.0
    if look.tones and finish != "bright":
        step = 0.34 * f.shade if look.shaded else (0.2 if f.shade > 0.25 else -0.22 if f.shade < -0.2 else 0)
        if f.inside:
            step = -0.28
    tone = shift(colour, step)
    if f.width:
        _shape(svg, f, tone)
        if look.shaded and f.width > 1.2:
            side = f.width * 0.16 * (1 if scene.light in ("light from the right", "warm lamp light") else -1)
            slim = replace(
                f,
                points=f.points + np.array([side, -f.width * 0.16]),
                width=f.width * (0.26 if finish != "metal" else 0.32),
            )
            _shape(svg, f, "#000000", 'opacity="0.16"')
            _shape(svg, slim, "#ffffff", f'opacity="{0.75 if finish in ("metal", "glossy") else 0.35}"')
        return
    path = _path(f.points)
    # A hairline of its own colour closes the seams between neighbouring faces.
    svg.draw(path, tone, f'opacity="0.42" {_pen("#ffffff", 0.7)}' if clear else _pen(tone, 0.5))
    if finish == "wooden" and look.shaded:
        svg.draw(path, _grain(svg, colour))
    if pattern and f.paint == "main" and not f.bare and not f.inside:
        svg.draw(path, pattern)
        if look.tones and step:
            svg.draw(path, "#ffffff" if step > 0 else "#000000", f'opacity="{abs(step) * 0.8:.2f}"')
    if look.shaded:
        for fill in _shading(svg, f, finish, scene):
            svg.draw(path, fill, _pen(fill, 0.5) if f.flowing and not clear else "")
    if look.line and not f.flowing:
        svg.draw(path, "none", _pen(look.ink, look.line * 0.45))


def _shading(svg: _Svg, f: Face, finish: str, scene: Scene) -> list[str]:
    hard = 1.45 if scene.light in ("light from the left", "light from the right") else 1.0
    w, k = "#ffffff", "#000000"
    if finish == "bright":
        return []
    if f.ball:
        x, y, r = f.ball
        glint = {"glossy": 0.85, "metal": 0.8, "glass": 0.8}.get(finish, 0.28)
        core = 0.14 if finish in ("glossy", "glass") else 0.3
        return [
            svg.radial(
                x, y, r, [(0, w, glint), (core, w, glint * 0.5), (0.45, w, 0), (0.55, k, 0), (1, k, 0.42 * hard)]
            )
        ]
    if f.across:
        (x1, y1), (x2, y2) = f.across
        if finish == "metal":
            stops = [
                (0, k, 0.12),
                (0.16, w, 0.7),
                (0.34, k, 0.08),
                (0.5, k, 0.34),
                (0.66, w, 0.25),
                (0.84, k, 0.3),
                (1, k, 0.55),
            ]
        elif finish in ("glossy", "glass"):
            stops = [
                (0, k, 0.04),
                (0.15, w, 0.1),
                (0.2, w, 0.75),
                (0.29, w, 0.7),
                (0.34, w, 0.06),
                (0.6, k, 0.08),
                (1, k, 0.36 * hard),
            ]
        else:
            stops = [(0, w, 0.14), (0.3, w, 0.16), (0.52, k, 0.02), (1, k, 0.36 * hard)]
        return [svg.gradient((x1, y1, x2, y2), stops)]
    low, high = f.points.min(0), f.points.max(0)
    ends = (low[0], low[1], high[0], high[1])
    if finish == "metal":
        return [svg.gradient(ends, [(0, w, 0.4), (0.3, k, 0.1), (0.48, w, 0.5), (0.6, k, 0.05), (1, k, 0.3)])]
    if finish in ("glossy", "glass"):
        return [svg.gradient(ends, [(0, w, 0.3), (0.3, w, 0.22), (0.34, w, 0), (0.7, k, 0), (1, k, 0.16)])]
    return [svg.gradient(ends, [(0, w, 0.07), (1, k, 0.1 * hard)])]


def _grain(svg: _Svg, colour: str) -> str:
    name = f"p{len(svg.defs)}"
    dark = shift(colour, -0.3)
    svg.defs.append(
        f'<pattern id="{name}" patternUnits="userSpaceOnUse" width="40" height="7.5">'
        f'<path d="M0 1.2Q10 2.6 20 1.2T40 1.2M0 4.6Q10 3.4 20 4.6T40 4.6M0 6.6H40" fill="none" stroke="{dark}"'
        ' stroke-width="0.75" stroke-opacity="0.75"/></pattern>'
    )
    return f"url(#{name})"


def _pattern(svg: _Svg, scene: Scene, look: Look) -> str:
    colour = look.recolour(COLOURS[scene.pattern_colour])
    inside, w, h = {
        "stripes": (f'<rect width="4.5" height="9" fill="{colour}"/>', 9, 9),
        "dots": (f'<circle cx="4" cy="4" r="2.3" fill="{colour}"/>', 8, 8),
        "checks": (f'<path d="M0 0h5v5h-5zM5 5h5v5h-5z" fill="{colour}"/>', 10, 10),
    }[scene.pattern]
    svg.defs.append(
        f'<pattern id="pattern" patternUnits="userSpaceOnUse" width="{w}" height="{h}" patternTransform="rotate('
        f'{-20 if scene.pattern == "stripes" else 0})">{inside}</pattern>'
    )
    return "url(#pattern)"


# -- what is around the product ----------------------------------------------------------------------------------------


def _horizon(scene: Scene) -> float:
    return {"front view": 0.74, "three-quarter view": 0.52}[scene.view] * SIDE


def _background(svg: _Svg, scene: Scene, look: Look) -> None:
    horizon = _horizon(scene)
    if look.back:
        svg.rect(0, 0, SIDE, SIDE, look.back)
    else:
        WALLS[scene.wall](svg, horizon, random.Random(scene.wall), look)
    if look.ground:
        svg.rect(0, horizon, SIDE, SIDE - horizon, look.ground)
        if look.line:
            svg.line([(0, horizon), (SIDE, horizon)], look.ink, look.line)
    else:
        SURFACES[scene.surface](svg, horizon, random.Random(scene.surface), look)
        if look.shaded:
            edge = svg.gradient((0, horizon, 0, horizon + 12), [(0, "#000000", 0.22), (1, "#000000", 0)])
            svg.rect(0, horizon, SIDE, 12, edge)


def _shadow(svg: _Svg, faces: list[list[Face]], scene: Scene, look: Look) -> None:
    if not look.cast:
        return
    points = np.concatenate([f.points for solid in faces for f in solid])
    left, right, top, bottom = points[:, 0].min(), points[:, 0].max(), points[:, 1].min(), points[:, 1].max()
    low = points[points[:, 1] > bottom - 0.22 * (bottom - top)]
    width = max(float(low[:, 0].max() - low[:, 0].min()), 0.35 * float(right - left))
    middle = float(low[:, 0].max() + low[:, 0].min()) / 2
    flat = {"front view": 0.13, "three-quarter view": 0.34}[scene.view]
    away = {"light from the left": 0.3, "light from the right": -0.3, "warm lamp light": -0.16}.get(scene.light, 0.06)
    depth_of = {"soft daylight": 0.42, "dim evening light": 0.5}.get(scene.light, 0.62)
    rx = 0.62 * width * (1 + abs(away))
    ry = max(rx * flat, 3.0)
    y = float(bottom) - 0.62 * ry
    x = middle + away * width
    if look.shaded:
        fill = svg.radial(
            x, y, rx * 1.15, [(0, "#000000", depth_of), (0.55, "#000000", depth_of * 0.75), (1, "#000000", 0)], ry / rx
        )
        svg.body.append(f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx * 1.15:.1f}" ry="{ry * 1.15:.1f}" fill="{fill}"/>')
    else:
        svg.body.append(
            f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="#000000" opacity="0.25"/>'
        )


def _lights(svg: _Svg, scene: Scene, look: Look) -> None:
    if not look.lights:
        return
    s, w, k = SIDE, "#ffffff", "#000000"
    if scene.light == "light from the left":
        svg.rect(
            0, 0, s, s, svg.gradient((0, 0, s, 0.4 * s), [(0, w, 0.3), (0.4, w, 0.05), (0.6, k, 0.06), (1, k, 0.42)])
        )
    elif scene.light == "light from the right":
        svg.rect(
            0, 0, s, s, svg.gradient((s, 0, 0, 0.4 * s), [(0, w, 0.3), (0.4, w, 0.05), (0.6, k, 0.06), (1, k, 0.42)])
        )
    elif scene.light == "warm lamp light":
        svg.rect(0, 0, s, s, "#ff9a2e", 'opacity="0.1"')
        glow = svg.radial(
            0.8 * s, 0.1 * s, 1.15 * s, [(0, "#ffd98a", 0.45), (0.4, "#ffb347", 0.08), (1, "#3a1500", 0.42)]
        )
        svg.rect(0, 0, s, s, glow)
    elif scene.light == "dim evening light":
        svg.rect(0, 0, s, s, "#1f2a66", 'opacity="0.3"')
        svg.rect(
            0, 0, s, s, svg.gradient((0, 0, 0, s), [(0, "#10163a", 0.25), (0.6, "#10163a", 0), (1, "#000000", 0.12)])
        )


Drawer = Callable[[_Svg, float, random.Random, Look], None]


def _plain_wall(colour: str) -> Drawer:
    def draw(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
        svg.rect(0, 0, SIDE, horizon, colour)
        if look.shaded:
            svg.rect(
                0, 0, SIDE, horizon, svg.gradient((0, 0, 0, horizon), [(0, "#000000", 0.14), (1, "#ffffff", 0.12)])
            )

    return draw


def _bricks(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    svg.rect(0, 0, SIDE, horizon, "#c9b8a8")
    for row in range(int(horizon / 10) + 2):
        y = horizon - 10 * (row + 1)
        for column in range(-1, 7):
            x = column * 22 + (11 if row % 2 else 0)
            tone = shift("#a9523f", r.uniform(-0.14, 0.12) if look.shaded else 0)
            svg.rect(x + 0.8, y + 0.8, 20.4, 8.4, tone)


def _tiles(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    svg.rect(0, 0, SIDE, horizon, "#b7c6cc")
    for row in range(int(horizon / 16) + 2):
        for column in range(9):
            svg.rect(column * 16 + 0.7, horizon - 16 * (row + 1) + 0.7, 14.6, 14.6, "#dfeaed")
            if look.shaded:
                svg.rect(column * 16 + 2, horizon - 16 * (row + 1) + 2, 5, 1.6, "#ffffff")


def _wallpaper(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    svg.rect(0, 0, SIDE, horizon, "#e9dcc2")
    for column in range(9):
        svg.rect(column * 16, 0, 8, horizon, "#b9c9a4")


def _panels(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    svg.rect(0, 0, SIDE, horizon, "#8a5f3c")
    for column in range(7):
        x = column * 20 - 6
        if look.shaded:
            svg.rect(x, 0, 19, horizon, shift("#9a6b45", r.uniform(-0.1, 0.1)))
        svg.line([(x + 19.5, 0), (x + 19.5, horizon)], "#5a3b22", 1.1)


def _sky(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    svg.rect(0, 0, SIDE, horizon, "#8ec5ee")
    if look.shaded:
        svg.rect(0, 0, SIDE, horizon, svg.gradient((0, 0, 0, horizon), [(0, "#2f86d4", 0.6), (1, "#ffffff", 0.5)]))
    for _ in range(3):
        x, y, s = r.uniform(0, SIDE), r.uniform(6, 0.6 * horizon), r.uniform(5, 9)
        for dx, dy, k in ((-1, 0.2, 0.8), (0, 0, 1.1), (1.1, 0.25, 0.75)):
            svg.body.append(
                f'<ellipse cx="{x + dx * s:.1f}" cy="{y + dy * s:.1f}" rx="{k * s:.1f}" ry="{0.6 * k * s:.1f}" '
                f'fill="#ffffff" opacity="0.9"/>'
            )


def _curtain(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    svg.rect(0, 0, SIDE, horizon, "#a12f3a")
    for column in range(11):
        x = column * 12.5
        if look.shaded:
            fold = svg.gradient(
                (x, 0, x + 12.5, 0),
                [(0, "#000000", 0.42), (0.35, "#ffffff", 0.2), (0.6, "#ffffff", 0.05), (1, "#000000", 0.42)],
            )
            svg.rect(x, 0, 12.5, horizon, fold)
        else:
            svg.rect(x, 0, 3, horizon, "#7d2029")


def _window(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _plain_wall("#e4ddd0")(svg, horizon, r, look)
    x, top, w, h = 64 + r.choice((-1, 1)) * r.uniform(22, 32) - 24, horizon * 0.1, 48, horizon * 0.72
    svg.rect(x - 3, top - 3, w + 6, h + 6, "#ffffff")
    svg.rect(x, top, w, h, "#9fd3f2")
    svg.rect(x, top + 0.62 * h, w, 0.38 * h, "#86b86c")
    svg.rect(x + w / 2 - 1.2, top, 2.4, h, "#ffffff")
    svg.rect(x, top + h / 2 - 1.2, w, 2.4, "#ffffff")


WALLS: dict[str, Drawer] = {
    "white wall": _plain_wall("#eeeeea"), "grey wall": _plain_wall("#a3a8ae"), "blue wall": _plain_wall("#8fb3d9"),
    "pink wall": _plain_wall("#eebac6"), "green wall": _plain_wall("#a9c9a0"), "yellow wall": _plain_wall("#f2dc8d"),
    "dark wall": _plain_wall("#3d4350"), "brick wall": _bricks, "tiled wall": _tiles, "striped wallpaper": _wallpaper,
    "wooden wall": _panels, "blue sky": _sky, "red curtain": _curtain, "window": _window,
}  # fmt: skip


def _rows(horizon: float, count: int) -> list[float]:
    """Heights of lines on the ground that lie ever farther apart towards the viewer."""
    span = SIDE - horizon
    return [horizon + span * (i / count) ** 1.7 for i in range(count + 1)]


def _ground(svg: _Svg, horizon: float, colour: str, look: Look) -> None:
    svg.rect(0, horizon, SIDE, SIDE - horizon, colour)
    if look.shaded:
        fade = svg.gradient((0, horizon, 0, SIDE), [(0, "#000000", 0.12), (1, "#ffffff", 0.14)])
        svg.rect(0, horizon, SIDE, SIDE - horizon, fade)


def _planks(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _ground(svg, horizon, "#b98150", look)
    rows = _rows(horizon, 6)
    for a, b in pairwise(rows):
        if look.shaded:
            svg.rect(0, a, SIDE, b - a, shift("#b98150", r.uniform(-0.12, 0.1)))
        svg.line([(0, b), (SIDE, b)], "#7d5230", 0.9)
        for _ in range(3 if look.shaded else 0):
            y, x = r.uniform(a, b), r.uniform(-20, SIDE)
            svg.line([(x, y), (x + r.uniform(15, 45), y)], "#8f6038", 0.6)


def _plain_ground(colour: str) -> Drawer:
    def draw(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
        _ground(svg, horizon, colour, look)

    return draw


def _marble(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _ground(svg, horizon, "#e6e7e9", look)
    for _ in range(5):
        x, y = r.uniform(-10, SIDE), r.uniform(horizon + 3, SIDE)
        points = [(x, y)]
        for _ in range(5):
            x, y = x + r.uniform(8, 18), min(max(y + r.uniform(-7, 7), horizon + 1), SIDE)
            points.append((x, y))
        svg.line(points, "#a2a8b0", r.uniform(0.6, 1.3), 'stroke-linejoin="round"')


def _floor_tiles(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _squares(svg, horizon, look, "#d8d2c6", "#5d666f")


def _cloth(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _squares(svg, horizon, look, "#f6f1ea", "#d0454a")


def _squares(svg: _Svg, horizon: float, look: Look, light: str, dark: str) -> None:
    _ground(svg, horizon, light, look)
    rows = _rows(horizon, 7)
    for i, (a, b) in enumerate(pairwise(rows)):
        wa, wb = (10 + 16 * (y - horizon) / (SIDE - horizon) for y in (a, b))
        for j in range(-8, 8):
            if (i + j) % 2:
                m = SIDE / 2
                svg.draw(
                    f"M{m + j * wa:.1f} {a:.1f}L{m + (j + 1) * wa:.1f} {a:.1f}"
                    f"L{m + (j + 1) * wb:.1f} {b:.1f}L{m + j * wb:.1f} {b:.1f}Z",
                    dark,
                )


def _grass(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _ground(svg, horizon, "#5fa552", look)
    for _ in range(46):
        x, y = r.uniform(0, SIDE), r.uniform(horizon + 2, SIDE)
        h = 3 + 4 * (y - horizon) / (SIDE - horizon + 1)
        svg.draw(
            f"M{x:.1f} {y:.1f}l1.2 {-h:.1f}l1.2 {h:.1f}l1 {-0.7 * h:.1f}l0.9 {0.7 * h:.1f}Z",
            "#3d7f38" if r.random() < 0.6 else "#86c46f",
        )


def _sand(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _ground(svg, horizon, "#e3cd95", look)
    for y in _rows(horizon, 7)[1:]:
        points = [(x, y + 1.6 * math.sin(x / 9 + y)) for x in range(0, SIDE + 4, 4)]
        svg.line(points, "#c4a96c", 1.0)


def _stone(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _ground(svg, horizon, "#8f959b", look)
    for _ in range(34):
        x, y = r.uniform(0, SIDE), r.uniform(horizon + 2, SIDE)
        s = 1 + 2.4 * (y - horizon) / (SIDE - horizon + 1)
        svg.body.append(
            f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{1.5 * s:.1f}" ry="{0.8 * s:.1f}" '
            f'fill="{r.choice(("#757b82", "#a9afb5"))}"/>'
        )


def _carpet(svg: _Svg, horizon: float, r: random.Random, look: Look) -> None:
    _ground(svg, horizon, "#5a4a8c", look)
    for i, y in enumerate(_rows(horizon, 5)[:-1]):
        for k in range(6):
            x, s = 11 + 22 * k + (11 if i % 2 else 0), 2 + 2 * (y - horizon) / (SIDE - horizon)
            svg.draw(
                f"M{x:.1f} {y + 6 - s:.1f}l{1.5 * s:.1f} {s:.1f}l{-1.5 * s:.1f} {s:.1f}l{-1.5 * s:.1f} {-s:.1f}Z",
                "#d9b25a",
            )


SURFACES: dict[str, Drawer] = {
    "a wooden table": _planks, "a white table": _plain_ground("#ecebe7"), "a black table": _plain_ground("#3c3e44"),
    "a blue table": _plain_ground("#5b86bd"), "a marble slab": _marble, "a tiled floor": _floor_tiles,
    "a checked cloth": _cloth, "grass": _grass, "sand": _sand, "a stone floor": _stone, "a carpet": _carpet,
    "a green mat": _plain_ground("#5d9a72"),
}  # fmt: skip


# -- drawing lots ------------------------------------------------------------------------------------------------------


def any_scene(r: random.Random, kind: str | None = None) -> Scene:
    """A scene by chance; nineteen in twenty have no look."""
    colour = r.choice(list(COLOURS))
    pattern = r.choice(PATTERNS) if r.random() < 0.15 else ""
    return Scene(
        kind=kind or r.choice(list(KINDS)),
        colour=colour,
        finish=r.choices(FINISHES, (5, 2.5, 1.3, 1.2))[0] if not pattern else "matte",
        pattern=pattern,
        pattern_colour=r.choice([c for c in ("white", "yellow", "black", "blue", "red") if c != colour]),
        surface=r.choice(list(SURFACES)),
        wall=r.choice(list(WALLS)),
        light=r.choices(LIGHTS, (5, 1.5, 1.5, 1.5, 1))[0],
        view=r.choices(VIEWS, (3, 5))[0],
        look="flat icon" if r.random() < 0.05 else "",
        seed=r.randrange(1 << 30),
    )
