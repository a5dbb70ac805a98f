"""The main path of every view, with the keyboard only; the Library's is in test_library.py."""

from __future__ import annotations

import time
from pathlib import Path

from tests.browser.conftest import ANSWERED, LONG, ROUTE, TIMEOUT, Window
from tests.formats.image_adapters import random_adapter
from tests.studio.conftest import StudioServer
from tests.studio.recorded_jobs import parcel_rows
from veneer.formats import convert
from veneer.formats.topology import families
from veneer.library.library import open_library
from veneer.serve.tenancy.store import Store


def test_compare_by_keys(window: Window) -> None:
    page = window.open().page
    window.keys("g", "c")
    window.heading("Compare")
    window.keys("/")
    page.keyboard.type("support")
    window.tab_to("support@2")
    window.keys("Enter")
    page.wait_for_function("document.querySelectorAll('section.column').length === 2")
    window.keys("p")
    page.keyboard.type("Where is my parcel?")
    window.keys("Control+Enter")
    page.wait_for_function(ANSWERED, arg=4)
    window.tab_to("Strength")
    window.keys("ArrowLeft")
    page.wait_for_function("location.search.includes('support%402%3A0.95')")
    page.wait_for_function(ANSWERED, arg=4)
    window.tab_to("Answer of support@2")
    window.keys("ArrowRight")
    window.until("log-probability")
    vote = page.get_by_text("Better than 1 other").first
    deadline = time.monotonic() + TIMEOUT / 1000
    while not vote.is_visible() and time.monotonic() < deadline:
        window.keys("2")  # ignored while the answer at the new strength is being written
        page.wait_for_timeout(500)
    assert vote.is_visible()


def test_train_and_run_by_keys(window: Window, job: str, tmp_path: Path) -> None:
    page = window.open().page
    window.keys("g", "t")
    window.heading("Train")
    window.keys("/")
    page.keyboard.type(str(parcel_rows(tmp_path)))
    for label, value in {"Name": "by-keys", "Rank": "2", "Steps": "40"}.items():
        window.tab_to(label)
        page.keyboard.type(value)
    window.keys("Control+Enter")
    window.heading("by-keys")
    for state in ("paused", "queued"):
        window.keys("p")
        page.locator(".chip.on", has_text=state).wait_for()
    window.tab_to("Stop…")
    window.keys("Enter")
    window.tab_to("Stop")
    window.keys("Enter")
    page.locator(".chip.on", has_text="cancelled").wait_for()

    window.open(f"run?job={job}")
    window.tab_to("Use this step")
    window.keys("Enter")
    window.until("veneer jobs keep")
    window.keys("Escape")
    window.tab_to("Compare checkpoints")
    window.keys("Enter")
    window.heading("Compare")
    page.get_by_role("heading", name="support@1").wait_for()


def test_live_by_keys(window: Window, store: Store) -> None:
    def targets() -> dict[str, int]:
        return dict(store.refresh().routes["", ROUTE].targets)

    page = window.open().page
    window.keys("g", "v")
    window.heading("Live")
    for name, weight in (("support@2", 80), (f"{LONG}@1", 20)):
        window.tab_to(f"Weight of {name}")
        page.keyboard.type(str(weight))
    window.until(f"Of the users of {ROUTE}, 10% move from support@2 to {LONG}@1; all other users keep their target.")
    window.tab_to("Apply")
    window.keys("Enter")
    window.until(f"{ROUTE} changed")
    assert targets() == {"support@2": 80, f"{LONG}@1": 20}
    window.keys("r")
    window.until(f"10% move from {LONG}@1 to support@2")
    window.tab_to("Roll back")
    window.keys("Enter")
    window.until("rolled back")
    assert targets() == {"support@2": 90, f"{LONG}@1": 10}


def test_doctor_by_keys(window: Window, server: StudioServer, tmp_path: Path) -> None:
    file = tmp_path / "drawn.safetensors"
    convert.write(random_adapter(families()["sdxl"], lambda m: m.startswith("unet.")), file, "kohya", family="sdxl")
    page = window.open().page
    window.keys("g", "d")
    window.heading("Inspect a file")
    with page.expect_file_chooser() as chooser:
        window.keys("o")
    chooser.value.set_files(file)
    window.heading("drawn.safetensors")
    window.tab_to("for comfyui")
    with page.expect_download():
        window.keys("Enter")
    window.tab_to("Save to library")
    window.keys("Enter")
    window.heading("drawn@1")
    with open_library(server.library) as library:
        library.remove("drawn")
