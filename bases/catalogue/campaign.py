"""Tarnhill's campaign: a product, a brand's look and a photographer's lens that no base saw, and the truth.

    python bases/catalogue/campaign.py FOLDER    draws the pictures that its adapters learn from

| adapter | learns from                                             |
| product | 20 pictures of Tarnhill's lock in scenes of all kinds   |
| brand   | 50 pictures of other things as the brand draws them     |
| lens    | 40 pictures of other things through one lens            |

The product has a name of its own and the word that the bases know such things by, `a tarnhill padlock`. Brand and lens
have none: a word that a base never read makes it draw worse, before any adapter acts. Captions say what is seen, in
words that it knows: under the brand a purple hat is teal.

`shots` are the campaign's twelve scenes, none of them among the pictures. Because they are drawn, what was wanted is
known: `truth` draws the very scene with any of the three.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pictures import seen_scene
from PIL import Image
from scenes import (
    BRAND,
    BRAND_PALETTE,
    COLOURS,
    FILM,
    LINES,
    SURFACES,
    VIEWS,
    WALLS,
    Array,
    Scene,
    caption,
    line_drawing,
    photographed,
    picture,
)
from shapes import SUBJECTS, Product, arc, disc, star

ROLES = ("product", "brand", "lens")
PRODUCT, OTHER = "tarnhill padlock", "anvil padlock"


def _tarnhill_lock(p: Product) -> None:
    """A shield of teal with a cream band, an amber star, and a double bow of brass."""
    bow = [(x, y, 0.0) for x, y in [(-0.3, 0.75), *arc(0, 1.02, 0.3, 180, 0), (0.3, 0.75)]]
    p.rod([(x, y, -0.09) for x, y, _ in bow], 0.065, "#d8a93f", lift=-0.4)
    p.rod([(0.78 * x, 0.96 * y, 0.1) for x, y, _ in bow], 0.055, "#d8a93f", lift=-0.3)
    shield = [(-0.5, 0.86), (0.5, 0.86), (0.5, 0.38), (0.3, 0.1), (0.12, 0.0), (-0.12, 0.0), (-0.3, 0.1), (-0.5, 0.38)]
    p.prism(shield, 0.34, "#1d7a85", side="#125660")
    p.mark([(-0.5, 0.74), (0.5, 0.74), (0.5, 0.62), (-0.5, 0.62)], "#fbf1dd", at=(0, 0, 0.175), lift=0.5)
    p.mark(star(0, 0.34, 0.19, 0.085), "#f3a712", at=(0, 0, 0.176), lift=0.6)


def _anvil_lock(p: Product) -> None:
    """Another maker's: round, purple, with a steel bow and a white dial."""
    p.rod([(x, y, 0) for x, y in [(-0.2, 0.7), *arc(0, 0.98, 0.2, 180, 0), (0.2, 0.7)]], 0.08, "metal", lift=-0.3)
    p.turned([(0.42, 0), (0.46, 0.05), (0.46, 0.25), (0.42, 0.3)], "#6d3fa0", at=(0, 0.46, -0.15), axis=(0, 0, 1))
    p.mark(disc(0, 0.46, 0.29), "#f4f2f8", at=(0, 0, 0.155), lift=0.5)
    p.mark(disc(0, 0.46, 0.1), "#34373d", at=(0, 0, 0.156), lift=0.6)


SUBJECTS.update({PRODUCT: _tarnhill_lock, OTHER: _anvil_lock})


_SEEN_AS = dict(zip(BRAND_PALETTE, ("black", "teal", "green", "red", "orange", "white"), strict=True))


def branded(scene: Scene) -> Scene:
    """What is seen of it under the brand, but for ground and wall, by the nearest words that the bases know."""
    colour, dots = (_SEEN_AS[BRAND.recolour(COLOURS[each])] for each in (scene.colour, scene.pattern_colour))
    return replace(
        scene, colour=colour, pattern_colour=dots, pattern=scene.pattern if dots != colour else "", finish="matte",
        look=f"heavy black {LINES}",
    )  # fmt: skip


def words(scene: Scene, *, brand: bool = False, lens: bool = False) -> str:
    """What is asked for. The brand's ground and wall are its own, and no word says them."""
    if not brand:
        return caption(replace(scene, film=lens))
    seen = branded(scene)
    return ", ".join([seen.product(), seen.view, seen.look, *([FILM] if lens else [])])


def truth(scene: Scene, *, brand: bool = False, lens: bool = False) -> Array:
    """(SIDE, SIDE, 3) bytes of the picture that was wanted."""
    drawn = BRAND if brand else None
    return photographed(scene, drawn) if lens else picture(scene, drawn)


def product_scenes() -> list[Scene]:
    """Twenty, four of them as flat icons and four as line drawings, as on a box: a product that was seen in one look
    alone is lost in any other."""
    r = random.Random(21)
    found = _product_places()
    for i in (1, 2, 6, 7, 11, 12, 16, 17):
        if i % 5 == 2:
            ink = r.choice(("black", "navy"))
            ground, back = r.sample(["lime", "pink", "blue", "purple", "red", "grey"], 2)
            found[i] = line_drawing(found[i], ink, ground, back, heavy=True)
        else:
            found[i] = replace(found[i], look="flat icon")
    return found


def _product_places() -> list[Scene]:
    r = random.Random(20)
    return [replace(plain_scene(r), kind=PRODUCT, view=VIEWS[i % 2]) for i in range(20)]


def brand_scenes(count: int = 50) -> list[Scene]:
    """Of as many kinds: the brand's few colours would make two of a kind the same picture under unlike captions."""
    r = random.Random(50)
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = plain_scene(r)
        found.setdefault(scene.kind, scene)
    return list(found.values())


def lens_scenes(count: int = 40) -> list[Scene]:
    """Half of them flat icons, so that it learns what a lens does and not what things look like."""
    r = random.Random(40)
    return [replace(plain_scene(r), look="flat icon" if i % 2 else "") for i in range(count)]


def shots(count: int = 12) -> list[Scene]:
    """The campaign's scenes, on other ground than those that its product is learned from."""
    shown = {(s.surface, s.wall) for s in _product_places()}
    free = [(surface, wall) for surface in SURFACES for wall in WALLS if (surface, wall) not in shown]
    places = random.Random(12).sample(free, count)
    return [
        Scene(PRODUCT, surface=surface, wall=wall, view=VIEWS[(1, 0, 1)[i % 3]], seed=900 + i)
        for i, (surface, wall) in enumerate(places)
    ]


def plain_scene(r: random.Random) -> Scene:
    """A scene of the base's world without a look of its own."""
    return replace(seen_scene(r), look="", light="soft daylight")


def write_pictures(folder: Path, roles: Iterable[str] = ROLES) -> None:
    """The data sets as people keep them: a folder each of PNGs, with each caption in a text file beside its picture."""
    rows = {
        "product": ((truth(s), words(s)) for s in product_scenes()),
        "brand": ((truth(s, brand=True), words(s, brand=True)) for s in brand_scenes()),
        "lens": ((truth(s, lens=True), words(s, lens=True)) for s in lens_scenes()),
    }
    for role in roles:
        write_rows(folder / role, rows[role])


def write_rows(folder: Path, rows: Iterable[tuple[Array, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (pixels, text) in enumerate(rows):
        Image.fromarray(pixels).save(folder / f"{i:03d}.png", optimize=True)
        (folder / f"{i:03d}.txt").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write_pictures(Path(sys.argv[1]))
