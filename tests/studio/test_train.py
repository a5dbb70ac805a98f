"""Training on the page.

Settings are planned while the user types, jobs are queued, and a run's page is built from the run's events.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.studio.conftest import StudioServer
from tests.studio.page_socket import open_page
from tests.studio.recorded_jobs import parcel_rows, recorded_job
from tests.tiny_image_base import tiny_image_base
from veneer.jobs.store import Job, JobStore
from veneer.library.library import open_library

OTHER = "Other settings, one per line"
ESCAPED = "&lt;img src=x onerror=alert(1)&gt;"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = parcel_rows(tmp_path_factory.mktemp("rows"))
    file.write_text(file.read_text() + json.dumps({"prompt": "", "completion": "x"}) + "\n")
    return file


@pytest.fixture(scope="module")
def store(tiny: tuple[Path, Path]) -> Iterator[JobStore]:
    with open_library(tiny[1]) as library:
        yield JobStore(library)


@pytest.fixture(scope="module")
def job(studio: StudioServer, tiny: tuple[Path, Path], rows: Path, store: JobStore) -> Job:
    return recorded_job(store, tiny[0], rows, studio.home)


def test_settings_are_planned_and_rows_shown_while_typing(studio: StudioServer, rows: Path) -> None:
    settings = f"data.train={rows}\nadapter.rank=2\nschedule.steps=4"
    with open_page(f"{studio.address}/studio/train") as page:
        page.fill(OTHER, f"{settings}\nadapter.rnak=3")
        page.until("did you mean <code>adapter.rank</code>?")
        page.fill(OTHER, settings)
        received = page.until("rows.jsonl:31", "<code>prompt</code> is empty", "veneer jobs submit")
        assert "this run cannot start" not in received
        lines = rows.read_text().splitlines(keepends=True)
        rows.write_text("".join(lines[:-1]))
        page.fill(OTHER, f"{settings}\nseed=1")
        words = ("<mark>Shelf", "read as prompt-completion", "trained 28", ESCAPED, "free now")
        received = page.until("is learned in", *words)
        assert "onerror=alert(1)>" not in received.replace(ESCAPED, "")
        rows.write_text("".join(lines))


def test_queued_run_publishes_checkpoints(studio: StudioServer, tmp_path: Path, store: JobStore) -> None:
    file = parcel_rows(tmp_path)
    with open_page(f"{studio.address}/studio/train") as page:
        page.press("Start")
        page.until("this run cannot start yet")
        for label, value in {"Data file": str(file), "Steps": "40", "Name": "parcels"}.items():
            page.fill(label, value)
        page.until("read as prompt-completion")
        for _ in range(3):  # repeated clicks
            page.press("Start")
        page.until("parcels is queued")
    assert "this run cannot start" not in studio.log.read_text(), "a user's error is not logged"
    job, *earlier = store.jobs(None, limit=5)[0]
    assert "parcels" not in [each.name for each in earlier]
    assert (job.name, job.state, job.steps) == ("parcels", "queued", 40)
    assert job.config["checkpoint"] == {"adapters": True, "every": 5}
    assert job.config["evaluation"] == {"every": 5}


@pytest.mark.parametrize("by", ["click", "key"])
def test_start_uses_the_settings_typed_last(studio: StudioServer, tmp_path: Path, store: JobStore, by: str) -> None:
    """The job gets the settings typed last, even if the preview of these settings is not complete yet."""
    with open_page(f"{studio.address}/studio/train") as page:
        page.fill("Data file", str(parcel_rows(tmp_path)))
        page.fill("Name", by)
        if by == "click":
            page.press("Start")
        else:
            page.enter(OTHER, "schedule.steps=3")
        page.until(f"{by} is queued")
    job = store.jobs(None, limit=1)[0][0]
    assert job.name == by
    assert by == "click" or job.steps == 3


def test_caption_is_edited_in_the_grid(studio: StudioServer, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, color in enumerate(("red", "blue")):
        Image.new("RGB", (40, 32), color).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a {color} cat")
    base = tiny_image_base(tmp_path, "flux1")
    settings = (f"base={base}", f"data.pictures={folder}", "adapter.rank=2", "schedule.steps=4", "data.resolution=32")
    with open_page(f"{studio.address}/studio/train") as page:
        page.fill(OTHER, "\n".join(settings))
        received = page.until('data-act=\\"caption\\"', "a red cat", "a blue cat", "trained at 32")
        id = re.findall(r'data-act=\\"caption\\" data-id=\\"([^"\\]+)\\"[^>]*>a red cat', received)[-1]
        page.act("caption", id=id)
        page.until("Caption")
        page.fill("Caption", "a green cat")
        page.press("Save")
        page.until("Saved the caption of")
    assert (folder / "0.txt").read_text().strip() == "a green cat"
    assert (folder / "1.txt").read_text() == "a blue cat"


def test_run_is_drawn_from_its_events_and_paused(studio: StudioServer, job: Job, store: JobStore) -> None:
    with open_page(f"{studio.address}/studio/run?job={job.id}") as page:
        text = html.unescape(str(page.elements))
        for words in ("2 of 4", "500 MB", "tokens per second", ">40<", "<svg", "Held-out loss", "step 2", ESCAPED):
            assert words in text
        table = text.partition("<h2>Checkpoints")[2]
        words = ("lowest", "1.5000", "support@1", "2.5000", "not published")  # the newest step comes first
        assert sorted(words, key=table.index) == [*words]
        assert page.values("html")
        assert not any("<img src=x onerror" in each for each in page.values("html"))
        page.press("Pause")
        page.until("Pausing: the run saves its state", "paused")
        assert store.get(None, job.id).state == "paused"
        page.press("Resume")
        page.until("Resuming from the last checkpoint")
    assert httpx.get(f"{studio.address}/studio/run?job=ftjob-{'x' * 24}").status_code == 404


def test_reinforcement_run_shows_rewards_and_no_loss(studio, tiny, tmp_path, store):
    rewards = {"reward": 0.75, "reward_label": 0.5, "reward_length": 1.0, "reward_failed": 0.0}
    job = recorded_job(store, tiny[0], parcel_rows(tmp_path), tmp_path, rewards=rewards)
    with open_page(f"{studio.address}/studio/run?job={job.id}") as page:
        text = html.unescape(str(page.elements))
    for words in ("Held-out reward", ">0.750<", "0.750 before training", "label 0.500, length 1.000", "0.7500"):
        assert words in text
    assert "Held-out loss" not in text
    assert text.count("highest") == 1
    assert "loss" not in text.lower().partition("<h2>checkpoints")[2].partition("</table>")[0]


def test_sample_images_are_found_by_job_and_step_only(studio: StudioServer, job: Job) -> None:
    url = f"{studio.address}/v1/jobs"
    response = httpx.get(f"{url}/{job.id}/samples/2")
    assert response.headers["content-type"] == "image/png"
    assert response.content[:4] == b"\x89PNG"
    assert httpx.get(f"{studio.address}/studio/api/v1/jobs/{job.id}/samples/2").content == response.content
    for path in (f"{job.id}/samples/3", f"ftjob-{'x' * 24}/samples/2"):
        assert httpx.get(f"{url}/{path}").status_code == 404
    assert httpx.get(f"{url}/{job.id}/samples/..%2f2").status_code in (400, 404, 422)
