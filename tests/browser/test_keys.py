"""Every view's main path by keys alone; the Library's is in test_library.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.browser.conftest import LONG, ROUTE, Window
from tests.formats.image_adapters import random_adapter
from tests.studio.conftest import Served
from tests.studio.lessons import parcel_rows
from veneer.formats import convert
from veneer.formats.topology import families
from veneer.library.library import open_library
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import Store

WHOLE = "n => document.querySelectorAll('.spoken .chip').length >= n"


def test_compare(window: Window) -> None:
    page = window.at().page
    for key in "gc":
        page.keyboard.press(key)
    window.heading("Compare")
    page.keyboard.press("/")
    page.keyboard.type("support")
    window.tab_to("support@2")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('section.column').length === 2")
    page.keyboard.press("p")
    page.keyboard.type("Where is my parcel?")
    page.keyboard.press("Control+Enter")
    page.wait_for_function(WHOLE, arg=4)
    window.tab_to("Strength")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("location.search.includes('support%402%3A0.95')")
    page.wait_for_function(WHOLE, arg=4)
    window.tab_to("The answer of support@2")
    page.keyboard.press("ArrowRight")
    window.until("log-probability")
    page.keyboard.press("2")
    window.until("Better than 1 other")


def test_train_a_run_and_its_steps(window: Window, lesson: str, tmp_path: Path) -> None:
    page = window.at().page
    for key in "gt":
        page.keyboard.press(key)
    window.heading("Train")
    page.keyboard.press("/")
    page.keyboard.type(str(parcel_rows(tmp_path)))
    for label, value in {"Name": "by-keys", "Rank": "2", "Steps": "40"}.items():
        window.tab_to(label)
        page.keyboard.type(value)
    page.keyboard.press("Control+Enter")
    window.heading("by-keys")
    page.keyboard.press("p")
    page.locator(".chip.on", has_text="paused").wait_for()
    page.keyboard.press("p")
    page.locator(".chip.on", has_text="queued").wait_for()
    window.tab_to("Stop…")
    page.keyboard.press("Enter")
    window.tab_to("Stop")
    page.keyboard.press("Enter")
    page.locator(".chip.on", has_text="cancelled").wait_for()

    window.at(f"run?job={lesson}")
    window.tab_to("Ask")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.two .panel:not([aria-busy])').length === 2")
    window.at(f"steps?job={lesson}")
    window.tab_to("Use this step")
    page.keyboard.press("Enter")
    window.until("veneer jobs keep")
    page.keyboard.press("Escape")
    window.tab_to("Continue from here")
    page.keyboard.press("Enter")
    window.heading("Train")
    assert "adapter.start=support@1" in page.get_by_label("Other settings").input_value()


@pytest.fixture
def store(served: Served) -> Iterator[Store]:
    with closing(Store(str(served.home / "tenants.sqlite"))) as found:
        yield found


def test_live(window: Window, store: Store) -> None:
    page = window.at().page
    for key in "gv":
        page.keyboard.press(key)
    window.heading("Live")
    window.tab_to(f"support@2 against {LONG}@1")
    page.keyboard.press("Shift+ArrowLeft")
    window.until(f"Of the users of {ROUTE}, 10 % move from support@2 to {LONG}@1; nobody else changes.")
    window.tab_to("Apply")
    page.keyboard.press("Enter")
    window.until(f"{ROUTE} moved")
    assert dict(store.look().routes["", ROUTE].targets) == {"support@2": 80, f"{LONG}@1": 20}
    page.keyboard.press("r")
    window.until(f"10 % move from {LONG}@1 to support@2")
    window.tab_to("Roll back")
    page.keyboard.press("Enter")
    window.until("is as it was before")
    assert dict(store.look().routes["", ROUTE].targets) == {"support@2": 90, f"{LONG}@1": 10}
    routes.set_route(store, ROUTE, [("support@2", 90), (f"{LONG}@1", 10)], who="test")


def test_doctor(window: Window, served: Served, tmp_path: Path) -> None:
    file = tmp_path / "drawn.safetensors"
    convert.write(random_adapter(families()["sdxl"], lambda m: m.startswith("unet.")), file, "kohya", family="sdxl")
    page = window.at().page
    for key in "gd":
        page.keyboard.press(key)
    window.heading("What is this file?")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("o")
    chooser.value.set_files(file)
    window.heading("drawn.safetensors")
    window.tab_to("Download for ComfyUI")
    with page.expect_download():
        page.keyboard.press("Enter")
    window.tab_to("Save to library")
    page.keyboard.press("Enter")
    window.heading("drawn@1")
    with open_library(served.library) as library:
        library.remove("drawn")
