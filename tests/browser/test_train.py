"""From settings to a kept checkpoint, with the mouse: a run is planned, started, watched and compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import ANSWERED, Window, new_window
from tests.studio.conftest import StudioServer
from tests.studio.recorded_jobs import parcel_rows
from veneer.jobs.store import Job, JobStore
from veneer.library.library import open_library

TIMEOUT = 300_000
"""Milliseconds to wait for an element; long, because runs have low priority."""
CHART = "document.querySelector('.chart svg')?.outerHTML"


@pytest.fixture
def window(chromium: Any, trainer: StudioServer) -> Iterator[Window]:
    with new_window(chromium, trainer.address) as made:
        made.page.set_default_timeout(TIMEOUT)
        yield made


@pytest.fixture
def jobs(trainer: StudioServer) -> Iterator[JobStore]:
    with open_library(trainer.library) as library:
        store = JobStore(library)
        yield store
        for job in store.jobs(None)[0]:
            if job.state in ("queued", "running", "paused"):
                store.cancel(None, job.id)


def newest(jobs: JobStore) -> Job:
    return jobs.jobs(None, limit=1)[0][0]


def test_run_is_started_watched_and_a_step_kept(
    window: Window, trainer: StudioServer, tmp_path: Path, jobs: JobStore
) -> None:
    page = window.open("train").page
    other = page.get_by_label("Other settings")
    page.get_by_label("Data file").fill(str(parcel_rows(tmp_path)))
    page.get_by_label("Steps", exact=True).fill("50000")
    page.get_by_label("Name", exact=True).fill("parcels")
    other.fill("adapter.rank=2\ndata.split=4\nadapter.rnak=3")
    window.until("did you mean")
    assert page.get_by_role("button", name="Start").is_disabled()
    other.fill("adapter.rank=2\ndata.split=4\ncheckpoint.every=100\nevaluation.every=100")
    page.locator(".found li").first.wait_for()
    assert "50,000 steps" in page.get_by_label("Plan", exact=True).inner_text()
    assert page.locator("pre.sample mark").first.inner_text().startswith("Shelf")

    window.press("Start")
    window.heading("parcels")
    page.wait_for_function(f"{CHART} !== undefined")
    chart = page.evaluate(CHART)
    page.wait_for_function(f"was => {CHART} !== was", arg=chart)

    page.get_by_role("link", name="Compare checkpoints").click()
    window.heading("Compare")
    assert page.get_by_label("Prompt", exact=True).input_value().startswith("Where is parcel")
    window.press("Ask")
    page.wait_for_function(ANSWERED, arg=4)
    assert newest(jobs).state == "running", "checkpoints answer during training"
    page.go_back()

    window.press("Pause")
    page.locator(".chip.on", has_text="paused").wait_for()
    page.reload()
    window.press("Resume")
    page.locator(".chip.on", has_text="running").wait_for()
    page.wait_for_function(
        """was => [...document.querySelectorAll('.figures .number')].some(
        (at) => parseInt(at.textContent.replaceAll(',', '')) > was && / of 50,000/.test(at.textContent))""",
        arg=newest(jobs).step,
    )

    assert page.locator(".chip.on", has_text="lowest").count() == 1
    page.locator("[data-id='use-100']").click()
    window.confirm("Use this step")
    window.heading("parcels@1")
    (first,) = (point for point in jobs.checkpoints(None, newest(jobs).id) if point.step == 100)
    with open_library(trainer.library) as library:
        assert library.find("parcels@1").digest == library.find(str(first.reference)).digest
    page.get_by_role("link", name="Training run").click()
    window.heading("parcels")
    window.press("Stop…")
    window.confirm("Stop")
    page.locator(".chip.on", has_text="cancelled").wait_for()
    assert page.locator("img[src='x']").count() == 0


def test_run_trains_on_an_uploaded_file(window: Window, tmp_path: Path, jobs: JobStore) -> None:
    file = tmp_path / "doors.csv"
    file.write_text("question,says\n" + "".join(f"Where is door {n}?,Left {n}.\n" for n in range(30)))
    page = window.open("train").page
    with page.expect_file_chooser() as chooser:
        window.press("Upload a file…")
    chooser.value.set_files(str(file))
    page.get_by_label("Answer column").select_option("says")
    row = page.locator(".examples tbody tr").first
    row.wait_for()
    assert row.locator("mark").inner_text() == "Left 0."
    page.get_by_label("Adapter name").fill("doors")
    page.get_by_label("Rank").last.fill("2")
    window.press("Train")
    page.wait_for_function("document.querySelector('h1')?.textContent.includes('doors')")
    job = newest(jobs)
    assert job.config["data"]["columns"] == {"completion": "says"}
    assert job.config["adapter"]["rank"] == 2
