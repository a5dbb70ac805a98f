"""Grids: positions of the pictures; each cell equals the same picture generated separately."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from tests.image_twins import levels
from veneer.errors import ConfigError
from veneer.imaging.adapters import ImagePipeline, parse_use
from veneer.imaging.generate import Options, generate
from veneer.imaging.grid import draw_grid, layout
from veneer.imaging.sheet import sheet
from veneer.models.image.base import ImageBase

BRAND, LOOK = parse_use("brand.safetensors:0.8"), parse_use("look.safetensors")


def test_layout_places_every_request() -> None:
    strength = layout("strength", ["a cat"], [BRAND, LOOK], seeds=[1, 2], strengths=[0, 0.5])
    assert (strength.rows, strength.columns) == (("seed 1", "seed 2"), ("strength 0", "strength 0.5"))
    assert strength.title == "a cat\nbrand:0.8 + look"
    assert [(request.seed, [(n, s.strength) for n, s in request.uses]) for request in strength.requests] == [
        (seed, mix) for seed in (1, 2) for mix in ([], [("brand.safetensors", 0.4), ("look.safetensors", 0.5)])
    ]
    several = layout("strength", ["a cat", "a dog"], [BRAND], seeds=[3], strengths=[0, 1])
    assert several.rows == ("a cat\nseed 3", "a dog\nseed 3")
    assert several.requests[3].uses == (BRAND,)
    adapters = layout("adapters", ["a cat", "a dog"], [BRAND, LOOK])
    assert adapters.columns == ("base", "brand:0.8", "look")
    assert (adapters.rows, adapters.title) == (("a cat", "a dog"), "seed 0")
    assert [(request.prompt, request.uses) for request in adapters.requests[3:]] == [
        ("a dog", ()),
        ("a dog", (BRAND,)),
        ("a dog", (LOOK,)),
    ]


@pytest.mark.parametrize(("kind", "uses", "says"), [("stength", [BRAND], "no sheet"), ("adapters", [], "an adapter")])
def test_invalid_sheet_is_refused(kind: str, uses: list, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        layout(kind, ["a"], uses)


def test_cells_equal_separately_generated_pictures(base: ImageBase) -> None:
    options = Options(steps=3)
    with ImagePipeline(base) as pipeline:
        plan = layout("strength", ["a cat"], [BRAND], seeds=[1, 2], strengths=[0, 1])
        image, pictures = draw_grid(pipeline, plan, options)
        alone = [generate(pipeline, [request], options)[0] for request in plan.requests]
    assert max(levels(a.image, b.image) for a, b in zip(pictures, alone, strict=True)) <= 1
    assert pictures[3].record["rows"][3]["adapters"] == [["brand.safetensors", "0.8"]]
    times = 4  # a picture of 32 pixels is enlarged to 128
    for i, made in enumerate(pictures):
        shown = made.image.resize((32 * times, 32 * times), Image.Resampling.NEAREST)
        right, bottom = image.size
        x = right - 4 - (128 + 4) * (2 - i % 2) + 4
        y = bottom - (128 + 4) * (2 - i // 2)
        assert levels(image.crop((x, y, x + 128, y + 128)), shown) == 0


@pytest.mark.parametrize("machines", [True, False])
def test_labels_break_at_separators_and_are_readable(machines: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageDraw, ImageFont

    if not machines:
        monkeypatch.setattr("veneer.imaging.sheet.WIDE_FONTS", ())
    drawn: list[str] = []
    real = ImageDraw.ImageDraw.text

    def text(self: Any, at: Any, words: str, *more: Any) -> None:
        drawn.append(words)
        assert self.textlength(words, more[1]) <= 128
        real(self, at, words, *more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    cell = Image.new("RGB", (128, 128))
    sheet([[cell, cell]], columns=["brand-flux:0.5@double.0-2=0.5,single.3=0", "ein Kapitän 狐"])
    names = drawn[: -1 if len(drawn[-1]) < 20 else -2]
    assert "".join(names).replace(" ", "").startswith("brand-flux:0.5@double.0-2=0.5,single.3=0")
    assert all(line[-1] in "@,+-:_" for line in names[:-1] if "Kapit" not in line)
    label = "".join(line for line in drawn if "Kapit" in line or "?" in line or "狐" in line)
    assert label.replace("ein ", "")[:7] in ("Kapitän", "Kapitan")
    if not machines and isinstance(ImageFont.load_default(14), ImageFont.FreeTypeFont):
        assert label == "ein Kapitan ?", "no boxes, whatever the machine has"


def test_sheet_has_labels_and_frames() -> None:
    cells = [[Image.new("RGB", (64, 32), "red"), None], [Image.new("L", (16, 16)), Image.new("RGB", (8, 8))]]
    plain = sheet(cells, least=1)
    assert plain.size == (2 * 68 + 4, 4 + 2 * 36)
    labelled = sheet(cells, least=1, rows=["one", "two"], columns=["a very long label of many words", "b"], title="t")
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    frame = labelled.getpixel((labelled.width - 4, labelled.height - 4))
    assert frame not in [(255, 255, 255), labelled.getpixel((labelled.width - 1, labelled.height - 1))]
    with pytest.raises(ConfigError, match="3 row labels for 2"):
        sheet(cells, rows=["a", "b", "c"])
    with pytest.raises(ConfigError, match="needs pictures"):
        sheet([])
