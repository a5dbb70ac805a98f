"""Image bases in a browser: images at several strengths, a run's samples, and a card's image."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from safetensors import safe_open

from tests.browser.conftest import new_window
from tests.image_twins import random_adapter
from tests.studio.conftest import StudioServer
from tests.tiny_image_base import tiny_image_base
from veneer.core.adapter import Card
from veneer.formats import convert
from veneer.library.library import open_library
from veneer.models.image.base import load_image

PACKAGED = "catalogue-flux"
"""The built-in image base."""
GENERATED = "n => document.querySelectorAll('.drawn img').length === n"


@pytest.fixture(scope="module", params=["tiny", PACKAGED])
def drawing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """Start a server that generates images and trains adapters; its library has one adapter."""
    folder = tmp_path_factory.mktemp("drawing")
    base_dir = tiny_image_base(folder, "flux1") if request.param == "tiny" else Path(request.param)
    base = load_image(str(base_dir))
    look = random_adapter(base.model, 1, size=0.1)
    look.card = Card(base=base.name, base_fingerprint=base.fingerprint, kind="image")
    convert.write(look, folder / "look.safetensors", "kohya", family="flux1")
    with open_library(folder / "library") as library:
        library.add(folder / "look.safetensors", "look")
    with StudioServer(folder, base_dir, folder / "library", "--open", "--train") as server:
        yield server


def test_five_strengths_generate_different_images(chromium: Any, drawing: StudioServer) -> None:
    with new_window(chromium, drawing.address) as window:
        n = 1 if drawing.base.name == PACKAGED else 2  # the packaged base is slow
        page = window.open(f"compare?p=a+red+cat&steps=1&n={n}").page
        window.press("look@1")
        page.get_by_role("heading", name="look@1").wait_for()
        window.keys("Control+Enter")
        page.wait_for_function(GENERATED, arg=2 * n)
        window.press("Compare five strengths")
        page.wait_for_function(GENERATED, arg=6 * n)
        seeds = page.locator(".drawn figcaption").all_inner_texts()
        assert [text.split()[1] for text in seeds] == ["7", "8"][:n] * 6
        images = [img.get_attribute("src") for img in page.locator(".drawn img").all()]
        assert len(set(images)) == 6 * n, "each strength and seed has its image"
        assert page.url.count("c=look%401") == 5
        command = page.locator("section.column").last.locator(".command code").inner_text()
        assert "--adapter look@1:1.25 --seed 7" in command


LOADED = "[...document.querySelectorAll('img.samples, img.thumb')].every((at) => at.complete && at.naturalWidth > 0)"


@pytest.mark.parametrize("drawing", ["tiny"], indirect=True)
def test_run_shows_samples_and_adapter_shows_an_image(chromium: Any, drawing: StudioServer, tmp_path: Path) -> None:
    for n, color in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"a {color} cat")
    settings = ["adapter.rank=2", "schedule.steps=4", "samples.every=2", "samples.prompts=[a red cat]"]
    with new_window(chromium, drawing.address) as window:
        page = window.open("train").page
        page.get_by_label("Image folder").fill(str(tmp_path))
        page.get_by_label("Name", exact=True).fill("cats")
        page.get_by_label("Other settings").fill("\n".join([*settings, "checkpoint.every=2"]))
        page.locator(".sheet li").nth(3).wait_for()
        window.press("Start")
        window.heading("cats")
        page.get_by_role("button", name="step 4", exact=True).wait_for(timeout=300_000)
        page.get_by_role("link", name="Open cats@1").wait_for(timeout=300_000)
        sample = page.get_by_alt_text("Sample images after step 4")
        assert sample.count() == 1, "the newest is shown first"
        page.wait_for_function(LOADED)
        (folder,) = drawing.home.glob("jobs/*/attempt-1/samples")
        with Image.open(folder / "step-00000004.png") as written:
            size = list(written.size)
        assert sample.evaluate("at => [at.naturalWidth, at.naturalHeight]") == size
        window.press("before")
        page.get_by_alt_text("Sample images of the base, before training").wait_for()
        page.wait_for_function(LOADED)
        assert "sheet=0" in page.url
        page.get_by_role("link", name="Compare checkpoints").click()
        window.heading("Compare")
        page.locator("section.column").nth(2).wait_for()
        assert page.get_by_label("Prompt", exact=True).input_value() == "a red cat"

        window.open()
        page.get_by_alt_text("Sample image of cats").wait_for()
        page.wait_for_function(LOADED)
        shown = httpx.get(str(page.locator("img.thumb").evaluate("at => at.src"))).content
    with open_library(drawing.library) as library, safe_open(library.resolve("cats"), "pt") as file:
        thumbnail = file.metadata()["modelspec.thumbnail"]
    assert shown == base64.b64decode(thumbnail.partition(",")[2]), "the file's own thumbnail"
