"""Sheets: which picture is where, and that cells are the pictures one would make alone."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.image_twins import levels
from veneer.errors import ConfigError
from veneer.imaging.adapters import Mixer, parse_use
from veneer.imaging.grid import draw, layout
from veneer.imaging.make import Ask, Options, make
from veneer.models.image import ImageBase
from veneer.models.image_grid import sheet

BRAND, LOOK = parse_use("brand.safetensors:0.8"), parse_use("look.safetensors")


def test_what_is_where() -> None:
    strength = layout("strength", ["a cat"], [BRAND, LOOK], seeds=[1, 2], strengths=[0, 0.5])
    assert (strength.rows, strength.columns) == (("seed 1", "seed 2"), ("0", "0.5"))
    assert [(ask.seed, [(n, s.strength) for n, s in ask.uses]) for ask in strength.asks] == [
        (seed, mix) for seed in (1, 2) for mix in ([], [("brand.safetensors", 0.4), ("look.safetensors", 0.5)])
    ]
    adapters = layout("adapters", ["a cat", "a dog"], [BRAND, LOOK])
    assert adapters.columns == ("base", "brand:0.8", "look")
    assert [(ask.prompt, ask.uses) for ask in adapters.asks[3:]] == [
        ("a dog", ()),
        ("a dog", (BRAND,)),
        ("a dog", (LOOK,)),
    ]
    compare = layout("compare", ["a cat"], [BRAND, LOOK], seeds=[3, 4])
    assert compare.rows == ("a cat\nseed 3", "a cat\nseed 4")
    assert compare.columns == ("base", "brand:0.8 + look")
    assert compare.asks[1].uses == (BRAND, LOOK)


@pytest.mark.parametrize(
    ("kind", "prompts", "uses", "says"),
    [
        ("stength", ["a"], [BRAND], "no sheet"),
        ("strength", ["a", "b"], [BRAND], "one prompt"),
        ("compare", ["a"], [], "an adapter"),
    ],
)
def test_what_is_no_sheet(kind: str, prompts: list[str], uses: list, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        layout(kind, prompts, uses)


def test_cells_are_the_pictures_made_alone(base: ImageBase) -> None:
    options = Options(steps=3)
    with Mixer(base) as mixer:
        plan = layout("strength", ["a cat"], [BRAND], seeds=[1, 2], strengths=[0, 1])
        drawn = draw(mixer, plan, options)
        alone = [make(mixer, [ask], options)[0] for ask in plan.asks]
    assert max(levels(a.image, b.image) for a, b in zip(drawn.made, alone, strict=True)) <= 1
    assert drawn.made[3].record["rows"][3]["adapters"] == [["brand.safetensors", "0.8"]]
    times = 4  # 32 pixels, shown at 128
    for i, made in enumerate(drawn.made):
        shown = made.image.resize((32 * times, 32 * times), Image.Resampling.NEAREST)
        right, bottom = drawn.image.size
        x = right - 4 - (128 + 4) * (2 - i % 2) + 4
        y = bottom - (128 + 4) * (2 - i // 2)
        assert levels(drawn.image.crop((x, y, x + 128, y + 128)), shown) == 0
    assert isinstance(plan.asks[0], Ask)


def test_a_sheet_of_anything() -> None:
    cells = [[Image.new("RGB", (64, 32), "red"), None], [Image.new("L", (16, 16)), Image.new("RGB", (8, 8))]]
    plain = sheet(cells, least=1)
    assert plain.size == (2 * 68 + 4, 4 + 2 * 36)
    labelled = sheet(cells, least=1, rows=["one", "two"], columns=["a very long label of many words", "b"], title="t")
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    with pytest.raises(ConfigError, match="3 row labels for 2"):
        sheet(cells, rows=["a", "b", "c"])
    with pytest.raises(ConfigError, match="no pictures"):
        sheet([])
