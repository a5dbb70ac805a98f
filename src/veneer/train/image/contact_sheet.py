"""A contact sheet of the training views, with masks shaded and captions below.

    contact_sheet(plan.rows, settings, seed=0, path="pictures.png")

Each view has its bucket's shape. Source images are to the left of the edited image. The area outside a mask
has red hatching. Captions use Pillow's built-in font, which has Latin letters only; other letters are shown
as boxes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from veneer.files.atomic import atomic_write
from veneer.files.pictures import picture_bytes
from veneer.train.config.image import ImageDataSection
from veneer.train.image.augmentation import PictureRow, View, ViewTensors, prepare, sample_row, source_view

_FONT = 12
_LINES = 4
_MOST_ROWS, _COLUMNS = 24, 6
_GAP = 4  # pixels between a source image and the edited image
_RED = np.array([220.0, 30.0, 30.0])


def contact_sheet(
    rows: Sequence[PictureRow],
    settings: ImageDataSection,
    *,
    seed: int,
    path: str | Path,
    cell: int = 192,
) -> int:
    """Write a PNG of at most 24 rows, evenly spaced, and return their number.

    The views are the views that training uses in the first epoch. Small images are enlarged by integer
    factors without smoothing, so that every training pixel is visible."""
    count = min(_MOST_ROWS, len(rows))
    shown_rows = [rows[i * len(rows) // count] for i in range(count)]
    pictures_per_row = 1 + max((len(row.picture.sources) for row in shown_rows), default=0)
    columns = max(1, min(_COLUMNS // pictures_per_row, count))
    wide_cell = (cell + _GAP) * pictures_per_row - _GAP
    font = ImageFont.load_default(size=_FONT)
    line = _FONT + 3
    height, margin = cell + line * (_LINES + 2) + 8, 8
    down = -(-count // columns)
    size = (columns * (wide_cell + margin) + margin, down * (height + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(shown_rows):
        x = margin + number % columns * (wide_cell + margin)
        y = margin + number // columns * (height + margin)
        view, caption = sample_row(row, settings, seed=seed, epoch=0)
        pairs = [*((source, source_view(view, source)) for source in row.picture.sources), (row.picture, view)]
        for column, (source, part) in enumerate(pairs):
            picture = _fitted(shaded(prepare(source, part, settings)), cell)
            at = (x + (cell + _GAP) * column + (cell - picture.width) // 2, y + (cell - picture.height) // 2)
            sheet.paste(picture, at)
            pen.rectangle((at[0] - 1, at[1] - 1, at[0] + picture.width, at[1] + picture.height), outline="#888888")
        characters = max(8, int(wide_cell / (_FONT * 0.52)))
        pen.text((x, y + cell + 4), _describe_view(row, view), fill="#0044aa", font=font)
        name = row.picture.name  # the end of a name identifies the file better than its beginning
        name = name if len(name) <= characters else "…" + name[-characters + 1 :]
        pen.text((x, y + cell + 4 + line), name, fill="#888888", font=font)
        absent = "(caption dropped)" if row.picture.caption else "(no caption)"
        words = textwrap.wrap(caption, characters, max_lines=_LINES, placeholder=" …") or [absent]
        for n, words_of_line in enumerate(words):
            pen.text((x, y + cell + 4 + line * (n + 2)), words_of_line, fill="black", font=font)
    atomic_write(path, [picture_bytes(sheet)])
    return count


def shaded(tensors: ViewTensors) -> Image.Image:
    """Return the pixels as an image with red stripes where the mask is below 1.

    The stripes are strongest where the mask is 0."""
    pixels = ((tensors.pixels.permute(1, 2, 0).double() + 1) * 127.5).round().clamp(0, 255).numpy()
    if tensors.mask is not None:
        height, width = pixels.shape[:2]
        stripes = (np.add.outer(np.arange(height), np.arange(width)) // max(2, min(height, width) // 32)) % 2
        share = (1 - tensors.mask[0].double().numpy()) * (0.35 + 0.4 * stripes)
        pixels = pixels * (1 - share[..., None]) + _RED * share[..., None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def _describe_view(row: PictureRow, view: View) -> str:
    text = f"{view.width} x {view.height}" + (f", {view.cut:.0%} cut" if view.cut >= 0.005 else "")
    return text + (", mirrored" if view.flip else "") + (", class" if row.picture.is_class else "")


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    largest = max(image.size)
    if largest <= cell:
        factor = cell // largest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = cell / largest
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
