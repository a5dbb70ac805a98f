"""Draw labeled sheets of pictures in rows and columns, with Pillow only.

          0        0.5       1.0        column labels, centered
seed 1  [    ]    [    ]    [    ]      row labels, left, wrapped
seed 2  [    ]    [    ]    [    ]
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 4
_INK, _PAPER, _EMPTY, _FRAME = (30, 30, 30), (255, 255, 255), (235, 235, 235), (205, 205, 205)


def sheet(
    cells: Sequence[Sequence[Image | None]],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    least: int = 128,
    font_size: int = 14,
) -> Image:
    """Draw all cells in one picture; None leaves a cell empty.

    All cells have the size of the largest picture. If the largest picture is smaller than `least` pixels, all
    pictures are enlarged by a whole factor, which keeps them sharp. Raises ConfigError if there is no
    picture, or if the number of labels does not match the rows or columns."""
    from PIL import Image, ImageDraw

    wide = max((len(row) for row in cells), default=0)
    pictures = [cell for row in cells for cell in row if cell is not None]
    if not pictures:
        raise ConfigError("a sheet needs pictures", fix="give at least one")
    for axis, labels, number in (("row", rows, len(cells)), ("column", columns, wide)):
        if labels and len(labels) != number:
            raise ConfigError(f"{len(labels)} {axis} labels for {number} {axis}s")
    times = max(1, -(-least // max(max(p.size) for p in pictures)))
    side = tuple(max(p.size[i] for p in pictures) * times for i in (0, 1))
    font, readable = _font([title, *rows, *columns], font_size)
    title, rows, columns = readable(title), [readable(t) for t in rows], [readable(t) for t in columns]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line = font_size + 4
    left_texts = [_wrapped(draw, text, font, max(side[0], 160)) for text in rows]
    left = max((int(draw.textlength(t, font)) for text in left_texts for t in text), default=0)
    left += 2 * _GAP if rows else 0
    top_texts = [_wrapped(draw, text, font, side[0]) for text in columns]
    width = left + wide * (side[0] + _GAP) + _GAP
    title_text = _wrapped(draw, title, font, width - 2 * _GAP) if title else []
    head = line * len(title_text) + (_GAP if title_text else 0)
    deep = max((len(t) for t in top_texts), default=0)
    top = head + line * deep + _GAP
    heights = [max(side[1], line * len(left_texts[i]) if rows else 0) for i in range(len(cells))]
    out = Image.new("RGB", (width, top + sum(h + _GAP for h in heights)), _PAPER)
    draw = ImageDraw.Draw(out)
    for i, text in enumerate(title_text):
        draw.text((_GAP, _GAP // 2 + i * line), text, _INK, font)
    for j, texts in enumerate(top_texts):
        for i, text in enumerate(texts):
            x = left + _GAP + j * (side[0] + _GAP) + (side[0] - draw.textlength(text, font)) / 2
            draw.text((x, head + (deep - len(texts) + i) * line), text, _INK, font)
    y = top
    for i, row in enumerate(cells):
        for k, text in enumerate(left_texts[i] if rows else []):
            draw.text((_GAP, y + (heights[i] - line * len(left_texts[i])) / 2 + k * line), text, _INK, font)
        for j, cell in enumerate(row):
            box = (left + _GAP + j * (side[0] + _GAP), y)
            corner = (box[0] + side[0], box[1] + side[1])
            draw.rectangle((box[0] - 1, box[1] - 1, *corner), outline=_FRAME)  # visible border for white pictures
            if cell is None:
                draw.rectangle((*box, corner[0] - 1, corner[1] - 1), _EMPTY)
            else:
                grown = cell.convert("RGB").resize((cell.width * times, cell.height * times), Image.Resampling.NEAREST)
                out.paste(grown, (box[0] + (side[0] - grown.width) // 2, box[1] + (side[1] - grown.height) // 2))
        y += heights[i] + _GAP
    return out


WIDE_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "segoeui.ttf"),
    *("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc"),
)


def _font(texts: Sequence[str], size: int) -> tuple[Any, Callable[[str], str]]:
    """Return a font, and a function that replaces the characters that the font lacks.

    Pillow's default font has only English letters. Texts with other letters use the available font that lacks
    the fewest of these letters. A missing letter loses its accents or becomes a question mark."""
    from PIL import ImageFont

    fonts: list[Any] = [ImageFont.load_default(size)]
    if not all(text.isascii() for text in texts):
        for name in WIDE_FONTS:
            with contextlib.suppress(OSError):
                fonts.append(ImageFont.truetype(name, size))
    letters = {c for text in texts for c in text if not c.isascii()}

    def missing_letters(font: Any) -> set[str]:
        box = bytes(font.getmask("\uffff"))  # The font draws this glyph for every missing letter.
        return {c for c in letters if bytes(font.getmask(c)) == box}

    font = min(fonts, key=lambda f: len(missing_letters(f)))
    missing = missing_letters(font)

    def readable(text: str) -> str:
        return "".join(
            unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() or "?" if c in missing else c
            for c in text
        )

    return font, readable


def _wrapped(draw: Any, text: str, font: Any, width: float) -> list[str]:
    """Split a text into lines of at most `width` pixels.

    Lines break after spaces and after the separators used between names and strengths. A word longer than a
    line is split anywhere."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in re.findall(r"[^\s@,+/_:-]*[\s@,+/_:-]?", paragraph):
            if draw.textlength((line + word).rstrip(), font) <= width or not line:
                line += word
            else:
                lines.append(line.rstrip())
                line = word
            while draw.textlength(line.rstrip(), font) > width and len(line) > 1:
                fits = next(
                    n for n in range(len(line) - 1, 0, -1) if n == 1 or draw.textlength(line[:n], font) <= width
                )
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line.rstrip())
    return lines
