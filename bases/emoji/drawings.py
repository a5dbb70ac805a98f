"""The drawings that the emoji bases learn from: four openly licensed sets, named alike, drawn at 64 × 64 on white.

    drawings = load_drawings("work")        fetches the npm packages once (`npm pack`), draws them, caches the result
    drawings.select(held_out=False)         the rows that training may see
    load_drawings("work", outlined=True)    the same drawings with a black line along the edge of every shape

Large bases have seen line drawings of everything. The outlined drawings, in styles `outlined noto` and so on, give
these small ones that much: that lines are a matter of style, and go around any thing.

A name is kept when at least three sets draw it, so that style and thing can be told apart. Flags and skin tones are
left out: they are hundreds of near-copies that a model of this size can only memorise. One name in ten is held out of
everything that is trained here, in all four styles, chosen by the name's hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["SETS", "SIZE", "Drawings", "caption", "draw", "is_held_out", "lined", "load_drawings"]

SIZE = 64
SETS = {  # style: (npm package, licence)
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
    "fluent": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "emojione": ("@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
}
_LEFT_OUT = {"Flags", "Modifiers"}


@dataclass(frozen=True)
class Drawings:
    """`pixels`: (n, 64, 64, 3) uint8, RGB on white; `names`, `styles`: n texts each."""

    pixels: NDArray[np.uint8]
    names: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, indices: list[int]) -> Drawings:
        return Drawings(self.pixels[indices], [self.names[i] for i in indices], [self.styles[i] for i in indices])

    def select(self, *, held_out: bool) -> Drawings:
        return self.rows([i for i, name in enumerate(self.names) if is_held_out(name) == held_out])


def caption(name: str, style: str | None = None) -> str:
    """`grinning face, noto style`; without a style the thing alone."""
    return f"{name}, {style} style" if style else name


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def draw(svg: str, size: int = SIZE) -> NDArray[np.uint8]:
    """One SVG as (size, size, 3) uint8 on white. Drawn at twice the size, so that thin lines keep their weight."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB").resize((size, size), Image.Resampling.BOX))


def load_drawings(work: str | Path, *, outlined: bool = False) -> Drawings:
    """All four sets, from the cache under `work` or drawn now (a minute). `outlined`: the same rows, with lines."""
    cache = Path(work) / ("outlined.npz" if outlined else "drawings.npz")
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        sets = {style: _icons(package, cache.parent) for style, (package, _) in SETS.items()}
        counts: dict[str, int] = {}
        for icons in sets.values():
            for name in icons:
                counts[name] = counts.get(name, 0) + 1
        rows = [(n, style) for style, icons in sets.items() for n in sorted(icons) if counts[n] >= 3]
        svgs = [sets[style][name] for name, style in rows]
        np.savez_compressed(
            cache,
            pixels=np.stack([draw(lined(svg) if outlined else svg) for svg in svgs]),
            names=[name.replace("-", " ") for name, _ in rows],
            styles=[f"outlined {style}" if outlined else style for _, style in rows],
        )
    held = np.load(cache)
    return Drawings(held["pixels"], held["names"].tolist(), held["styles"].tolist())


def lined(svg: str, width: float = 1.6) -> str:
    """The SVG with a black line of `width` pixels (of 64) along every shape that has no line of its own."""
    found = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)">', svg)
    assert found is not None
    left, top, w, h = map(float, found.groups())
    line = width * w / SIZE
    box = f'viewBox="{left - line} {top - line} {w + 2 * line} {h + 2 * line}">'
    style = f'<g stroke="#000" stroke-width="{line}" stroke-linejoin="round" stroke-linecap="round">'
    return svg[: found.start()] + box + style + svg[found.end() :].replace("</svg>", "</g></svg>")


def _icons(package: str, work: Path) -> dict[str, str]:
    """{name: SVG text} of an iconify package, flags and skin tones left out."""
    archive = work / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not archive.is_file():
        subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:

        def read(name: str) -> dict[str, dict[str, object]]:
            member = tar.extractfile(f"package/{name}")
            assert member is not None
            content: dict[str, dict[str, object]] = json.load(member)
            return content

        icons, about = read("icons.json"), read("metadata.json")
    categories = {n for c, names in about.get("categories", {}).items() if c in _LEFT_OUT for n in names}  # type: ignore[attr-defined]
    default = (icons.get("width", 16), icons.get("height", 16))
    found = {}
    for name, icon in icons["icons"].items():
        if "skin-tone" in name or name in categories or name.startswith("flag"):
            continue
        width, height = icon.get("width", default[0]), icon.get("height", default[1])  # type: ignore[attr-defined]
        left, top = icon.get("left", 0), icon.get("top", 0)  # type: ignore[attr-defined]
        found[name] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'  # type: ignore[index]
        )
    return found
