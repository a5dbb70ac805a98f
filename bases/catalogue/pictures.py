"""What the catalogue bases learn from: scenes by chance and some real drawings, in shards made as they are needed.

    python bases/catalogue/pictures.py WORK 12      makes shards 0 … 11 of 4,096 pictures in WORK/pictures (15 ms each)

Six pictures in a hundred are openly licensed drawings on white, by name: `horse, twemoji style`. They give words beyond
the grammar a meaning, and the autoencoder other shapes. One pair of kind and colour in ten is held
out of everything that is trained: `is_new` names the combinations that fidelity is measured on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import subprocess
import tarfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import resvg_py
from PIL import Image
from scenes import (
    COLOURS,
    PLAIN_LENS,
    SIDE,
    Array,
    Look,
    Scene,
    any_scene,
    caption,
    line_drawing,
    nearest_tone,
    photographed,
    picture,
    product_mask,
)

Kind = Literal["pictures", "placed", "looks"]
SHARD = 4096
DRAWINGS = ("twemoji", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0")
"""Their style, npm package and licence."""
_DRAWINGS = 0.06
_INKS = ("black", "navy", "brown", "white")
_NAMES = Path(__file__).with_name("openmoji.tsv")


@dataclass(frozen=True)
class Item:
    """One picture's words. `scene` is None for a drawing."""

    caption: str
    short: str
    scene: Scene | None


def is_new(kind: str, colour: str) -> bool:
    """Whether this combination is held out."""
    return int(hashlib.sha256(f"{colour} {kind}".encode()).hexdigest(), 16) % 10 == 0


def seen_scene(r: random.Random) -> Scene:
    while True:
        scene = any_scene(r)
        if not is_new(scene.kind, scene.colour):
            return scene


def dressed(scene: Scene, r: random.Random) -> Scene:
    """One in four as a line drawing, one in eight through a lens. Real bases have seen thousands of looks: one that has
    seen two learns from fifty pictures what lines are, not which ones these are."""
    if r.random() < 0.25:
        scene = as_line_drawing(scene, r)
    return replace(scene, film=r.random() < 0.12)


def as_line_drawing(scene: Scene, r: random.Random) -> Scene:
    """In an ink, on and before colours by chance; never on a ground before a wall like the brand's."""
    while True:
        ink, (ground, back) = r.choice(_INKS), r.sample(list(COLOURS), 2)
        if ink not in (ground, back) and not (ground in ("orange", "yellow") and back in ("white", "beige")):
            return line_drawing(scene, ink, ground, back, heavy=r.choice((True, False)))


def shown(scene: Scene) -> Array:
    """What the bases are shown of it."""
    return photographed(scene, lens=PLAIN_LENS) if scene.film else picture(scene)


def make_shard(work: Path, index: int) -> None:
    place = work / "pictures" / f"{index:04d}.npz"
    if place.is_file():
        return
    r = random.Random(1000 + index)
    drawings = load_drawings(work)
    pixels, items, things = [], [], []
    for _ in range(SHARD):
        if r.random() < _DRAWINGS:
            row = r.randrange(len(drawings[1]))
            pixels.append(drawings[0][row])
            things.append(_by_cell((pixels[-1] < 255).any(-1)))
            name = drawings[1][row]
            items.append({"caption": f"{name}, {DRAWINGS[0]} style", "short": name})
        else:
            scene = dressed(seen_scene(r), r)
            pixels.append(shown(scene))
            things.append(_by_cell(product_mask(scene)))
            items.append(_item(scene))
    _write_shard(place, pixels=np.stack(pixels), items=json.dumps(items), things=np.stack(things))


def _item(scene: Scene) -> dict[str, Any]:
    short = f"{scene.product()}, {scene.look}" if scene.look else scene.product()
    return {"caption": caption(scene), "short": short, "scene": asdict(scene)}


def make_placed(work: Path, index: int) -> None:
    """A shard of scenes whose products stand anywhere: what the ControlNets learn from."""
    place = work / "placed" / f"{index:04d}.npz"
    if place.is_file():
        return
    r = random.Random(3000 + index)
    scenes = [replace(dressed(replace(seen_scene(r), look=""), r), place=r.uniform(-0.15, 0.15)) for _ in range(SHARD)]
    items = [_item(s) for s in scenes]
    things = np.stack([_by_cell(product_mask(s)) for s in scenes])
    _write_shard(place, pixels=np.stack([shown(s) for s in scenes]), items=json.dumps(items), things=things)


def make_looks(work: Path, index: int) -> None:
    """A shard of scenes in looks by chance, through lenses by chance: what the autoencoder must be able to draw, though
    no base is shown it. None is the campaign's."""
    place = work / "looks" / f"{index:04d}.npz"
    if place.is_file():
        return
    r = random.Random(5000 + index)
    pixels = [graded(picture(replace(seen_scene(r), look=""), any_look(r)), r) for _ in range(SHARD // 2)]
    _write_shard(place, pixels=np.stack(pixels))


def _write_shard(place: Path, **arrays: Any) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(".part")  # a shard that was interrupted is none
    with open(part, "wb") as file:
        np.savez_compressed(file, **arrays)
    part.replace(place)


def any_look(r: random.Random) -> Look:
    """Few colours and a line, or one of both."""
    palette = [f"#{r.randrange(1 << 24):06x}" for _ in range(r.randint(4, 9))]
    few, line = r.random() < 0.6, r.uniform(0.7, 2.6) if r.random() < 0.7 else 0.0
    flat = few or r.random() < 0.5
    return Look(
        shaded=not flat, tones=r.random() < 0.4, line=line, ink=r.choice(("#111111", "#ffffff", "#3a1d12", "#14233f")),
        recolour=nearest_tone(palette) if few else lambda colour: colour, ground=r.choice(palette) if few else "",
        back=r.choice(palette) if few else "", lights=not flat, cast=r.random() < 0.5,
    )  # fmt: skip


def graded(pixels: Array, r: random.Random) -> Array:
    """Two pictures in five through a lens: tints of lights and shadows, contrast, dark or light corners, grain."""
    if r.random() > 0.4:
        return pixels
    x = pixels / 255.0
    grey = x.mean(-1, keepdims=True)
    lights, darks = (np.array([r.uniform(-0.12, 0.12) for _ in range(3)]) for _ in range(2))
    x = (x + grey * lights + (1 - grey) * darks - 0.5) * r.uniform(0.8, 1.25) + 0.5
    at = np.linspace(-1, 1, SIDE)
    distance = np.sqrt(at[:, None] ** 2 + at[None] ** 2)[..., None]
    x = x * (1 - r.uniform(-0.2, 0.6) * np.clip(distance - 0.4, 0, None))
    grain = r.choice((0.0, r.uniform(0, 0.04)))
    x = x + np.random.default_rng(r.randrange(1 << 30)).normal(0, 1, (SIDE, SIDE, 1)) * grain
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def shards(work: Path, kind: Kind = "pictures") -> list[Path]:
    return sorted((work / kind).glob("*.npz"))


def read_shard(place: Path) -> tuple[Array, list[Item]]:
    """(n, SIDE, SIDE, 3) bytes, and what each shows."""
    kept = np.load(place)
    items = [
        Item(i["caption"], i["short"], Scene(**i["scene"]) if "scene" in i else None)
        for i in json.loads(str(kept["items"]))
    ]
    return kept["pixels"], items


def read_things(place: Path) -> Array:
    """(n, 16, 16) bytes: how much of each latent's 8 × 8 pixels is of what the picture is of, not of what is around."""
    things: Array = np.load(place)["things"]
    return things


def _by_cell(mask: Array) -> Array:
    cells: Array = (mask.reshape(SIDE // 8, 8, SIDE // 8, 8).mean((1, 3)) * 255).astype(np.uint8)
    return cells


def load_drawings(work: Path) -> tuple[Array, list[str]]:
    """Twemoji's drawings of the names in openmoji.tsv, (n, SIDE, SIDE, 3), and the names."""
    cache = work / "drawings.npz"
    if not cache.is_file():
        work.mkdir(parents=True, exist_ok=True)
        icons = _icons(DRAWINGS[1], work)
        with open(_NAMES, newline="", encoding="utf-8") as file:
            names = [row["name"] for row in csv.DictReader(file, delimiter="\t")]
        np.savez_compressed(cache, pixels=np.stack([draw_svg(icons[name]) for name in names]), names=names)
    kept = np.load(cache)
    return kept["pixels"], kept["names"].tolist()


def draw_svg(svg: str) -> Array:
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    white.alpha_composite(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
    return np.asarray(white.convert("RGB"))


def _icons(package: str, work: Path) -> dict[str, str]:
    """{name: SVG text} of an iconify package."""
    archive = work / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not archive.is_file():
        subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        icons = json.load(member)
    default = (icons.get("width", 16), icons.get("height", 16))
    found = {}
    for name, icon in icons["icons"].items():
        width, height = icon.get("width", default[0]), icon.get("height", default[1])
        found[name.replace("-", " ")] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
    return found
