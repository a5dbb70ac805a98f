"""Compare in a browser, with this machine's language model: answers, strengths, probabilities, votes,
corrections, mixes.

Image bases are tested in test_images.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.browser.conftest import ANSWERED, SMOLLM2, Spent, Window, new_window
from tests.serve.saved_adapters import saved
from tests.studio.conftest import HOSTILE, StudioServer
from tests.tiny_base import tiny_base_dir
from veneer.library.library import open_library
from veneer.models.text.base import load_text

LINK = "compare?c=support%401&c=support%402%3A0.5%2Bacme%2Ftone%3A-0.5&p=Where+is+my+parcel%3F&m=8&t=1&seed=3"
MOVE_SLIDER = """(column) => new Promise((done) => {
  const slider = column.querySelector("input[type=range]");
  let cleared = false;
  new MutationObserver((_, observer) => {
    const token = column.querySelector("[data-k]");
    cleared ||= !token;
    if (!cleared || !token) return;
    observer.disconnect();
    done();
  }).observe(column, { childList: true, subtree: true, characterData: true });
  slider.value = Number(slider.value) - 0.1;
  slider.dispatchEvent(new Event("input"));
})"""
"""JavaScript function that moves a column's slider and waits for the new answer's first token."""
STEP = 0.0155
"""Seconds per decoding step of smollm2-135m in bfloat16, with one thread, on the machine of
docs/notes/studio.md."""


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """Start a server for smollm2-135m if the user has it, otherwise for a tiny base."""
    folder = tmp_path_factory.mktemp("talking")
    base_dir = SMOLLM2 if SMOLLM2.is_dir() else tiny_base_dir(folder)
    base = load_text(str(base_dir))
    with open_library(folder / "library") as library:
        for seed, name in enumerate(["support", "support", "acme/tone"]):
            saved(base, folder / str(seed), seed)
            library.add(folder / str(seed), name)
    options = ["--dtype", "auto"] if base_dir == SMOLLM2 else []  # as in `veneer studio`
    with StudioServer(folder, base_dir, folder / "library", *options) as server:
        yield server


@pytest.fixture
def window(chromium: Any, talking: StudioServer) -> Iterator[Window]:
    with new_window(chromium, talking.address) as made:
        yield made


def test_link_keeps_prompt_columns_and_strengths(window: Window, talking: StudioServer) -> None:
    page = window.open(LINK).page
    page.get_by_label("Prompt", exact=True).focus()
    window.keys("Control+Enter")
    page.wait_for_function(ANSWERED, arg=6)
    answers = page.locator("section.column .answer")
    before = answers.nth(2).inner_text()
    answers.nth(1).focus()
    window.keys("ArrowRight")
    window.until("log-probability")
    assert page.locator("section.column span.other").count(), "differences from the base are marked"

    page.locator("h1").click()
    window.keys("2")
    window.until("Better than")
    (votes,) = talking.home.glob("judged/*/votes.jsonl")
    assert 1 <= votes.read_text().count("\n") <= 2, "a row for each different answer"

    page.locator("section.column").nth(1).get_by_label("Strength", exact=True).focus()
    window.keys("ArrowLeft")
    page.wait_for_function("location.search.includes('support%401%3A0.95')")
    page.wait_for_function(ANSWERED, arg=6)
    assert answers.nth(2).inner_text() == before, "other columns stay"
    page.reload()
    page.locator("section.column").nth(2).wait_for()
    assert page.locator("section.column").count() == 3
    assert page.get_by_label("Prompt", exact=True).input_value() == "Where is my parcel?"


def test_several_answers_equal_those_of_a_client(window: Window, talking: StudioServer) -> None:
    """A vote compares the answers with the same number in each column."""
    page = window.open("compare?c=support%401&p=Where+is+my+parcel%3F&m=8&seed=3").page
    page.get_by_text("Sampling settings").click()
    page.get_by_label("Answers per column").fill("3")
    page.get_by_label("Temperature").fill("1")
    page.wait_for_function("['n=3', 't=1'].every((word) => location.search.includes(word))")
    window.press("Ask")
    page.wait_for_function(ANSWERED, arg=12)
    columns = [page.locator("section.column").nth(n).locator(".answer").all_inner_texts() for n in (0, 1)]
    assert page.get_by_label("Answer 3 of support@1").inner_text() == columns[1][2]
    assert [len(set(texts)) for texts in columns] == [3, 3], "each answer is sampled"
    body = {"messages": [{"role": "user", "content": "Where is my parcel?"}], "n": 3, "seed": 3, "temperature": 1}
    for model, texts in zip(("", "support@1"), columns, strict=True):
        request = body | {"max_tokens": 8} | ({"model": model} if model else {})
        answer = httpx.post(f"{talking.address}/v1/chat/completions", json=request, timeout=120).raise_for_status()
        assert [each["message"]["content"].strip() for each in answer.json()["choices"]] == [t.strip() for t in texts]

    differs = next(n for n in (2, 1) if columns[0][n].strip() != columns[1][n].strip())
    page.get_by_role("button", name="support@1 is better").nth(differs).click()
    window.until("Better than 1 other")
    (votes,) = talking.home.glob("judged/*/votes.jsonl")
    row = json.loads(votes.read_text().splitlines()[-1])
    for key, texts in zip(("rejected", "chosen"), columns, strict=True):
        assert row[key][0]["content"].strip() == texts[differs].strip()


def test_mixed_answer_is_corrected(window: Window, talking: StudioServer) -> None:
    page = window.open("compare?m=4").page
    page.get_by_label("Prompt", exact=True).fill(f"Say {HOSTILE}")
    page.get_by_role("button", name="support@2").click()
    page.wait_for_function("document.querySelectorAll('section.column').length === 2")
    page.get_by_label("Add to").select_option("1")
    page.get_by_role("button", name="acme/tone").click()
    page.get_by_role("heading", name="support@2 + acme/tone@1").wait_for()
    window.press("Ask")
    page.wait_for_function(ANSWERED, arg=4)
    window.press("Correct the answer of support@2 + acme/tone@1")
    page.get_by_label("Corrected answer of support@2 + acme/tone@1").fill(HOSTILE)
    window.press("Save correction")
    window.until("Corrected: row 1")
    (file,) = talking.home.glob("judged/*/corrections.jsonl")
    row = json.loads(file.read_text())["messages"]
    assert [each["content"] for each in row] == [f"Say {HOSTILE}", HOSTILE]
    assert page.locator("img[src='x']").count() == 0


def test_mix_is_saved_as_an_adapter(window: Window, talking: StudioServer) -> None:
    page = window.open(LINK).page
    page.get_by_text("Save mix as adapter").click()
    page.get_by_label("Name").fill("softer")
    window.until("veneer library mix softer support@2:0.5 acme/tone:-0.5")
    window.press("Save")
    window.until("softer@1 saved")
    with open_library(talking.library) as library:
        assert library.find("softer").card["recipe"]["strengths"] == {"support@2": 0.5, "acme/tone@1": -0.5}
        library.remove("softer", with_aliases=True)


def api_time(address: str, strength: float, tokens: int) -> Spent:
    """Return the time of an API request. The server must not have cached a mix of this strength."""
    spent, messages = Spent(), [{"role": "user", "content": "Where is my parcel?"}]
    body = {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "mix": [f"support@1:{strength}"]}
    with spent.measure():
        httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120).raise_for_status()
    return spent


def test_slider_answers_within_a_step_and_100_ms(window: Window, talking: StudioServer) -> None:
    """A new mix only has to process its prompt.

    100 ms is the limit at the speed of docs/notes/studio.md; a slower machine has more time."""
    page = window.open("compare?c=support%401&p=Where+is+my+parcel%3F&m=1").page
    window.press("Ask")
    page.wait_for_function(ANSWERED, arg=4)
    column = page.locator("section.column").nth(1).element_handle()
    first, many, moved = list[Spent](), list[Spent](), list[Spent]()
    for n in range(6):  # alternate, so that other load slows all three measurements
        first.append(api_time(talking.address, 0.31 + n / 100, 1))
        many.append(api_time(talking.address, 0.41 + n / 100, 17))
        moved.append(Spent())
        with moved[-1].measure():
            page.evaluate(MOVE_SLIDER, column)
        page.wait_for_function(ANSWERED, arg=4)
    one, all_tokens, slider = (Spent.least(each[1:]) for each in (first, many, moved))
    step = Spent((all_tokens.clock - one.clock) / 16, (all_tokens.processors - one.processors) / 16)
    slower = max(1.0, step.clock / STEP)
    assert slider.within(0.1 * slower, step), (slower, step, one, slider)
