"""Pictures, with the mouse, on bases that draw: compared side by side, under strengths, one over another and by a
control picture; learned from, sheet after sheet while it trains; on the card of what came of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

from tests.browser.conftest import seen_in
from tests.image_twins import random_adapter
from tests.studio.conftest import Served
from tests.tiny_image_base import tiny_image_base
from veneer.core.adapter import Card
from veneer.formats import convert
from veneer.library.library import open_library
from veneer.models.image.base import load_image

PACKAGED = "catalogue-flux"
"""The image base that comes along."""
DRAWN = "n => document.querySelectorAll('.drawn img').length === n"


@pytest.fixture(scope="module", params=["tiny", PACKAGED])
def drawing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that draws and trains, with one adapter."""
    folder = tmp_path_factory.mktemp("drawing")
    place = tiny_image_base(folder, "flux1") if request.param == "tiny" else Path(request.param)
    base = load_image(str(place))
    look = random_adapter(base.model, 1, size=0.1)
    look.card = Card(base=base.name, base_fingerprint=base.fingerprint, kind="image")
    convert.write(look, folder / "look.safetensors", "kohya", family="flux1")
    with open_library(folder / "library") as library:
        library.add(folder / "look.safetensors", "look")
    with Served(folder, place, folder / "library", "--open", "--train") as server:
        yield server


def test_pictures_are_drawn_at_five_strengths_and_laid_over_one_another(chromium: Any, drawing: Served) -> None:
    with seen_in(chromium, drawing.address) as window:
        n = 1 if drawing.base.name == PACKAGED else 2  # one is enough of a base that takes its time
        page = window.at(f"compare?p=a+red+cat&steps=1&n={n}").page
        page.get_by_role("button", name="look@1", exact=True).click()
        page.get_by_role("heading", name="look@1").wait_for()
        page.keyboard.press("Control+Enter")
        page.wait_for_function(DRAWN, arg=2 * n)
        page.get_by_role("button", name="The same at five strengths").click()
        page.wait_for_function(DRAWN, arg=6 * n)
        seeds = page.locator(".drawn figcaption").all_inner_texts()
        assert [text.split()[1] for text in seeds] == ["7", "8"][:n] * 6
        drawn = [img.get_attribute("src") for img in page.locator(".drawn img").all()]
        assert len(set(drawn)) == 6 * n, "another strength or seed, another picture"
        assert page.url.count("c=look%401") == 5
        command = page.locator("section.column").last.locator(".command code").inner_text()
        assert "--adapter look@1:1.25 --seed 7" in command

        page.get_by_text("Image settings").click()
        page.get_by_label("First seed").fill("99")
        page.wait_for_url("**seed=99**")
        for column in (0, 5):
            page.locator("section.column").nth(column).get_by_role("button", name="Lay").first.click()
        wipe = page.locator("dialog[open] .over")
        wipe.wait_for()
        assert [img.get_attribute("src") for img in wipe.locator("img").all()] == [drawn[0], drawn[5 * n]]
        names = page.locator("dialog[open] figcaption span").all_inner_texts()
        assert names == [f"{PACKAGED if n == 1 else drawing.base.name}, seed 7", "look@1:1.25, seed 7"], "as drawn"
        edge, before = page.get_by_label("How much of the left picture"), wipe.get_attribute("style")
        edge.focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("was => document.querySelector('.over').getAttribute('style') !== was", arg=before)
        page.keyboard.press("Escape")


def pixels(source: str) -> Any:
    """Of a data: URL."""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float32)


@pytest.mark.parametrize("drawing", [PACKAGED], indirect=True)
def test_a_control_picture_says_where_things_are(chromium: Any, drawing: Served, tmp_path: Path) -> None:
    lines = Image.new("RGB", (128, 128))
    ImageDraw.Draw(lines).rectangle((20, 70, 108, 100), outline="white")
    lines.save(tmp_path / "lines.png")
    with seen_in(chromium, drawing.address) as window:
        page = window.at("compare?p=a+red+suitcase&steps=2&seed=3&control=canny").page

        def drawn(before: str = "") -> str:
            page.get_by_role("button", name="Draw", exact=True).click()
            page.wait_for_function(
                "was => ![undefined, '', was].includes(document.querySelector('.drawn img')?.src)", arg=before
            )
            return str(page.locator(".drawn img").get_attribute("src"))

        alone = drawn()
        page.get_by_text("Image settings").click()
        page.get_by_label("Control picture").set_input_files(tmp_path / "lines.png")
        given = page.get_by_alt_text("The control picture")
        page.wait_for_function("at => at.complete && at.naturalWidth === 128", arg=given.element_handle())
        held = drawn(alone)
        assert "--control canny=PICTURE:1" in page.locator("section.column .command code").inner_text()
        body = {
            "prompt": "a red suitcase",
            "seed": 3,
            "num_inference_steps": 2,
            "response_format": "b64_json",
            "control": [{"type": "canny", "image": given.get_attribute("src")}],
        }
        asked = httpx.post(f"{drawing.address}/v1/images/generations", json=body, timeout=120).json()["data"][0]
        wanted = pixels(f",{asked['b64_json']}")
        assert np.abs(pixels(held) - wanted).mean() < 4, "what a client draws by it, but for what webp loses"
        assert np.abs(pixels(alone) - wanted).mean() > 8
        page.get_by_role("button", name="Take away").click()
        assert drawn(held) == alone


SEEN = "[...document.querySelectorAll('img.samples, img.thumb')].every((at) => at.complete && at.naturalWidth > 0)"


@pytest.mark.parametrize("drawing", ["tiny"], indirect=True)
def test_a_run_s_sheets_stand_on_it_and_beside_its_steps_and_a_picture_on_its_adapter_s_card(
    chromium: Any, drawing: Served, tmp_path: Path
) -> None:
    for n, colour in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"a {colour} cat")
    settings = (
        "adapter.rank=2",
        "schedule.steps=4",
        "samples.every=2",
        "samples.prompts=[a red cat]",
        "checkpoint.every=2",
    )
    with seen_in(chromium, drawing.address) as window:
        page = window.at("train").page
        page.get_by_label("Folder of pictures").fill(str(tmp_path))
        page.get_by_label("Name", exact=True).fill("cats")
        page.get_by_label("Other settings").fill("\n".join(settings))
        page.locator(".sheet li").nth(3).wait_for()
        page.get_by_role("button", name="Start").click()
        window.heading("cats")
        page.get_by_role("button", name="step 4", exact=True).wait_for(timeout=300_000)
        page.get_by_role("link", name="Choose a step").wait_for(timeout=300_000)
        assert page.get_by_alt_text("Sample pictures after step 4").count() == 1, "the newest, of itself"
        page.get_by_role("button", name="before", exact=True).click()
        page.get_by_alt_text("Sample pictures of the base, before training").wait_for()
        page.wait_for_function(SEEN)
        assert "sheet=0" in page.url

        page.get_by_role("link", name="Choose a step").click()
        window.heading("Steps of cats")
        sheets = page.locator("img.samples")
        assert [each.get_attribute("alt") for each in sheets.all()] == ["After step 4", "After step 2", "Of the base"]
        (folder,) = drawing.home.glob("jobs/*/attempt-1/samples")
        for sheet, step in zip(sheets.all(), (4, 2, 0), strict=True):
            sheet.scroll_into_view_if_needed()
            with Image.open(folder / f"step-{step:08d}.png") as written:
                size = list(written.size)
            page.wait_for_function(SEEN)
            assert sheet.evaluate("at => [at.naturalWidth, at.naturalHeight]") == size

        window.at()
        page.get_by_alt_text("A picture that came with cats").wait_for()
        page.wait_for_function(SEEN)
        shown = httpx.get(str(page.locator("img.thumb").evaluate("at => at.src"))).content
    with open_library(drawing.library) as library, safe_open(library.resolve("cats"), "pt") as file:
        kept = file.metadata()["modelspec.thumbnail"]
    assert shown == base64.b64decode(kept.partition(",")[2]), "as a file has it that any tool shows"
