"""From settings to an adapter in use, with the mouse: planned as it is typed, begun, watched, asked while it trains,
paused, resumed, one of its steps used and another gone on from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Window, seen_in
from tests.studio.conftest import Served
from tests.studio.lessons import parcel_rows
from veneer.jobs.store import Job, JobStore
from veneer.library.library import open_library

ASKED = "document.querySelectorAll('.two .panel:not([aria-busy])').length === 2"
PATIENCE = 300_000
"""Milliseconds: a run is a process of its own that stands back behind all others."""
CURVE = "document.querySelector('.chart svg')?.outerHTML"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parcel_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def window(chromium: Any, training: Served) -> Iterator[Window]:
    with seen_in(chromium, training.address) as made:
        made.page.set_default_timeout(PATIENCE)
        yield made


@pytest.fixture
def jobs(training: Served) -> Iterator[JobStore]:
    with open_library(training.library) as library:
        store = JobStore(library)
        yield store
        for job in store.jobs(None)[0]:
            if job.state in ("queued", "running", "paused"):
                store.cancel(None, job.id)


def newest(jobs: JobStore) -> Job:
    return jobs.jobs(None, limit=1)[0][0]


def test_from_settings_to_an_adapter_in_use(window: Window, training: Served, rows: Path, jobs: JobStore) -> None:
    page = window.at("train").page
    typed = page.get_by_label("Other settings")
    page.get_by_label("File of rows").fill(str(rows))
    page.get_by_label("Steps", exact=True).fill("50000")
    page.get_by_label("Name", exact=True).fill("parcels")
    typed.fill("adapter.rank=2\ndata.split=4\nadapter.rnak=3")
    window.until("did you mean")
    assert page.get_by_role("button", name="Start").is_disabled()
    typed.fill("adapter.rank=2\ndata.split=4\ncheckpoint.every=100\nevaluation.every=100")
    page.locator(".found li").first.wait_for()
    assert "50,000 steps" in page.get_by_label("Plan", exact=True).inner_text()
    assert page.locator("pre.sample mark").first.inner_text().startswith("Shelf")

    page.get_by_role("button", name="Start").click()
    window.heading("parcels")
    page.wait_for_function(f"{CURVE} !== undefined")
    drawn = page.evaluate(CURVE)
    page.wait_for_function(f"was => {CURVE} !== was", arg=drawn)

    page.wait_for_function("/^[0-9]+$/.test(document.querySelector('.talk select').value)")
    page.locator(".talk").get_by_label("Prompt", exact=True).fill("Where is parcel 3?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function(ASKED)
    assert newest(jobs).state == "running", "it was asked while it trained"

    page.get_by_role("button", name="Pause").click()
    page.locator(".chip.on", has_text="paused").wait_for()
    page.reload()
    page.get_by_role("button", name="Resume").click()
    page.locator(".chip.on", has_text="running").wait_for()
    rested = newest(jobs).step
    page.wait_for_function(
        """was => [...document.querySelectorAll('.figures .number')].some(
        (at) => parseInt(at.textContent.replaceAll(',', '')) > was && / of 50,000/.test(at.textContent))""",
        arg=rested,
    )

    page.get_by_role("link", name="Steps", exact=True).click()
    window.heading("Steps of parcels")
    page.wait_for_function("document.querySelectorAll('.asked .panel:not([aria-busy])').length >= 2")
    assert page.locator(".chip.on", has_text="lowest").count() == 1
    page.get_by_role("button", name="Use this step").last.click()
    page.locator("dialog[open]").get_by_role("button", name="Use this step").click()
    page.locator(".steps .chip.on", has_text="parcels@prod").wait_for()
    (first,) = (point for point in jobs.checkpoints(None, newest(jobs).id) if point.step == 100)
    with open_library(training.library) as library:
        assert library.find("parcels@prod").digest == library.find(str(first.reference)).digest

    page.get_by_role("button", name="Continue from here").last.click()
    window.heading("Train")
    assert f"adapter.start={first.reference}" in page.get_by_label("Other settings").input_value()
    page.locator(".found li").first.wait_for()
    page.get_by_role("button", name="Start").click()
    window.heading("parcels")
    assert newest(jobs).config["adapter"]["start"] == first.reference
    page.get_by_role("button", name="Stop…").click()
    page.locator("dialog[open]").get_by_role("button", name="Stop", exact=True).click()
    page.locator(".chip.on", has_text="cancelled").wait_for()
    assert page.locator("img[src='x']").count() == 0


def test_from_a_dropped_file_to_a_run(window: Window, tmp_path: Path, jobs: JobStore) -> None:
    file = tmp_path / "doors.csv"
    file.write_text("question,says\n" + "".join(f"Where is door {n}?,Left {n}.\n" for n in range(30)))
    page = window.at("train").page
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a file…").click()
    chooser.value.set_files(str(file))
    page.get_by_label("Answer (completion)").select_option("says")
    row = page.locator(".examples tbody tr").first
    row.wait_for()
    assert row.locator("mark").inner_text() == "Left 0."
    page.get_by_label("Name of the adapter").fill("doors")
    page.get_by_label("Rank").first.fill("2")
    page.get_by_role("button", name="Train", exact=True).click()
    page.wait_for_function("document.querySelector('h1')?.textContent.includes('doors')")
    job = newest(jobs)
    assert job.config["data"]["columns"] == {"completion": "says"}
    assert job.config["adapter"]["rank"] == 2
