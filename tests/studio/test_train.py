"""A run from its settings to its steps, on the page: settings are read, planned and looked at; what a job has said is
drawn, step by step, whoever said it; what is in rows and names is text alone."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.studio.conftest import Served
from tests.studio.lessons import parcel_rows, told_lesson
from tests.studio.windows import opened
from tests.tiny_image_base import tiny_image_base
from veneer.errors import shown
from veneer.jobs.store import Job, JobStore
from veneer.library.library import open_library

OTHER = "Other settings, one a line"
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
def lesson(studio: Served, tiny: tuple[Path, Path], rows: Path, store: JobStore) -> Job:
    return told_lesson(store, tiny[0], rows, studio.home)


def test_settings_are_planned_as_they_are_typed_and_their_rows_shown(studio: Served, rows: Path) -> None:
    settings = f"data.train={rows}\nadapter.rank=2\nschedule.steps=4"
    with opened(f"{studio.address}/studio/train") as window:
        window.fill(OTHER, f"{settings}\nadapter.rnak=3")
        window.until("did you mean <code>adapter.rank</code>?")
        window.fill(OTHER, settings)
        heard = window.until("rows.jsonl:31", "<code>prompt</code> is empty", "veneer jobs submit")
        assert "this run cannot begin" not in heard
        lines = rows.read_text().splitlines(keepends=True)
        rows.write_text("".join(lines[:-1]))
        window.fill(OTHER, f"{settings}\nseed=1")
        heard = window.until(
            "is learned in", "<mark>Shelf", "read as prompt-completion", "learned 28", ESCAPED, "free now"
        )
        assert "onerror=alert(1)>" not in heard.replace(ESCAPED, "")
        rows.write_text("".join(lines))


def test_it_is_queued_with_what_lets_its_steps_be_asked(studio: Served, tmp_path: Path, store: JobStore) -> None:
    file = parcel_rows(tmp_path)
    with opened(f"{studio.address}/studio/train") as window:
        window.press("Start")
        window.until("this run cannot begin yet")
        window.fill("File of rows", str(file))
        window.fill("Steps", "40")
        window.fill("Name", "asked")
        window.until("read as prompt-completion")
        for _ in range(3):  # whoever is in a hurry
            window.press("Start")
        window.until("asked is queued")
    assert "this run cannot begin" not in studio.log.read_text(), "what the page says is no fault of the server's"
    job, *before = store.jobs(None, limit=5)[0]
    assert "asked" not in [each.name for each in before]
    assert (job.name, job.state, job.steps) == ("asked", "queued", 40)
    assert job.config["checkpoint"] == {"adapters": True, "every": 5}
    assert job.config["evaluation"] == {"every": 5}


def test_it_starts_with_what_was_typed_last(studio: Served, tmp_path: Path, store: JobStore) -> None:
    """Though nothing of it has been looked at when Start is pressed, by a click or by a key in a field."""
    file = parcel_rows(tmp_path)
    with opened(f"{studio.address}/studio/train") as window:
        window.fill("File of rows", str(file))
        window.fill("Name", "clicked")
        window.press("Start")
        window.until("clicked is queued")
    with opened(f"{studio.address}/studio/train") as window:
        window.fill("File of rows", str(file))
        window.fill("Name", "entered")
        window.tell(lambda e: e.get("props", {}).get("label") == OTHER, "entered", "schedule.steps=3")
        window.until("entered is queued")
    entered, clicked, *_ = store.jobs(None, limit=5)[0]
    assert (clicked.name, entered.name, entered.steps) == ("clicked", "entered", 3)


def test_a_caption_is_changed_where_it_stands(studio: Served, tmp_path: Path) -> None:
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for n, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 32), colour).save(pictures / f"{n}.png")
        (pictures / f"{n}.txt").write_text(f"a {colour} cat")
    base = tiny_image_base(tmp_path, "flux1")
    with opened(f"{studio.address}/studio/train") as window:
        more = ("adapter.rank=2", "schedule.steps=4", "data.resolution=32")
        window.fill(OTHER, "\n".join((f"base={base}", f"data.pictures={pictures}", *more)))
        sheet = window.until('data-act=\\"caption\\"', "a red cat", "a blue cat", "learned at 32")
        (red,) = re.findall(r'data-act=\\"caption\\" data-id=\\"([^"\\]+)\\"[^>]*>a red cat', sheet)[-1:]
        window.act("caption", id=red)
        window.until("Caption")
        window.tell(lambda e: e.get("props", {}).get("label") == "Caption", "changed", "a green cat")
        window.press("Keep")
        window.until("has another caption")
    assert (pictures / "0.txt").read_text().strip() == "a green cat"
    assert (pictures / "1.txt").read_text() == "a blue cat"


def test_a_run_is_drawn_from_what_it_said_and_obeys(studio: Served, lesson: Job, store: JobStore) -> None:
    with opened(f"{studio.address}/studio/run?job={lesson.id}") as window:
        page = html.unescape(str(window.elements))
        for words in ("2 of 4", "500 MB", "tokens a second", ">40<", "<svg", "Held-out loss", "step 2", ESCAPED):
            assert words in page
        markup = [each["props"]["html"] for each in window.elements.values() if "html" in each.get("props", {})]
        assert markup
        assert not any("<img src=x onerror" in each for each in markup)  # a field's value is text, whatever is in it
        window.press("Pause")
        window.until("Pausing: the run saves its state", "paused")
        assert store.get(None, lesson.id).state == "paused"
        window.press("Resume")
        window.until("Resuming from the last checkpoint")
    assert httpx.get(f"{studio.address}/studio/run?job=ftjob-{'x' * 24}").status_code == 404


def test_a_run_that_is_rewarded_shows_rewards_and_no_loss(
    studio: Served, tiny: tuple[Path, Path], tmp_path: Path, store: JobStore
) -> None:
    rewards = {"reward": 0.75, "reward_label": 0.5, "reward_length": 1.0, "reward_failed": 0.0}
    job = told_lesson(store, tiny[0], parcel_rows(tmp_path), tmp_path, rewards=rewards)
    with opened(f"{studio.address}/studio/run?job={job.id}") as window:
        page = html.unescape(str(window.elements))
    for words in ("Held-out reward", ">0.750<", "0.750 before", "label 0.500, length 1.000"):
        assert words in page
    assert "Held-out loss" not in page
    with opened(f"{studio.address}/studio/steps?job={job.id}") as window:
        page = html.unescape(str(window.elements))
    assert "Held-out reward" in page
    assert "0.7500" in page
    assert page.count("highest") == 1
    assert "loss" not in page.lower().partition("held-out reward")[2].partition("</table>")[0]


def test_a_step_is_kept_and_gone_on_from(studio: Served, lesson: Job, store: JobStore) -> None:
    address = f"{studio.address}/studio/steps?job={lesson.id}&p=Where%3F"
    with opened(address) as window:
        page = str(window.elements)
        assert "support@1" in page
        assert "not published" in page  # the first has no adapter
        assert page.index("lowest") < page.index("1.5000") < page.index("2.5000")
        window.until("step 2", "aria-busy")
        window.act("use", step="2")
        window.until("Use step 2", "veneer jobs keep")
    with opened(address) as window:
        window.act("go", step="2")
        heard = window.until("adapter.start=support@1")
        assert "checkpoint.adapters" not in heard.partition("adapter.start=support@1")[0]


@pytest.fixture(scope="module")
def told(studio: Served, tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, store: JobStore) -> Job:
    """A lesson whose rows have a system message."""
    file = tmp_path_factory.mktemp("told") / "rows.jsonl"
    turns = [{"role": "user", "content": "Read door 5."}, {"role": "assistant", "content": "{}"}]
    row = {"messages": [{"role": "system", "content": "Answer in JSON."}, *turns]}
    file.write_text(3 * (json.dumps(row) + "\n"))
    return told_lesson(store, tiny[0], file, studio.home)


def answered(studio: Served, model: str, tokens: int) -> str:
    """What the API answers to the rows' prompt with their system message."""
    messages = [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "Read door 5."}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    answer = httpx.post(f"{studio.address}/v1/chat/completions", json=body, timeout=60).json()
    return str(answer["choices"][0]["message"]["content"])


def test_steps_are_asked_with_the_system_message_of_the_rows(studio: Served, told: Job) -> None:
    answer = shown(answered(studio, "support@1", 60), lines=True)
    with opened(f"{studio.address}/studio/steps?job={told.id}") as window:
        while answer not in html.unescape("".join(window.values("html"))):
            window.until("update")
        assert "Answer in JSON." in window.values("value")


def test_talk_asks_with_the_system_message_of_the_rows(studio: Served, told: Job) -> None:
    with opened(f"{studio.address}/studio/run?job={told.id}") as window:
        assert "Answer in JSON." in window.values("value")
        window.press("Ask")
        window.until("--system &#39;Answer in JSON.&#39;")


def test_talk_selects_the_adapter_that_the_run_made(
    studio: Served, tiny: tuple[Path, Path], tmp_path: Path, store: JobStore
) -> None:
    job = told_lesson(store, tiny[0], parcel_rows(tmp_path), tmp_path, made="support@2")
    address = f"{studio.address}/studio/run?job={job.id}"
    with opened(address) as window:
        assert "made" in window.values("value")
        window.press("Ask")
        window.until("--adapter support@2")
    with opened(f"{address}&step=2") as window:
        window.press("Ask")
        window.until("--adapter support@1")


def test_sample_pictures_come_by_job_and_step_and_by_no_path(studio: Served, lesson: Job) -> None:
    found = httpx.get(f"{studio.address}/v1/jobs/{lesson.id}/samples/2")
    assert found.headers["content-type"] == "image/png"
    assert found.content[:4] == b"\x89PNG"
    assert httpx.get(f"{studio.address}/studio/api/v1/jobs/{lesson.id}/samples/2").content == found.content
    for path in (f"{lesson.id}/samples/3", f"ftjob-{'x' * 24}/samples/2"):
        assert httpx.get(f"{studio.address}/v1/jobs/{path}").status_code == 404
    assert httpx.get(f"{studio.address}/v1/jobs/{lesson.id}/samples/..%2f2").status_code in (400, 404, 422)
