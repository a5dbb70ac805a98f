"""Compare by hand, on the language model that a machine has: columns that answer, a strength that acts at once,
likelihoods by keys, several samples, a vote, a correction, a mix kept. Of bases that draw: test_pictures.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.browser.conftest import SMOLLM2, Spent, Window, seen_in
from tests.serve.saved_adapters import saved
from tests.studio.conftest import HOSTILE, Served
from tests.tiny_base import tiny_base_dir
from veneer.library.library import open_library
from veneer.models.text.base import load_text

LINK = "compare?c=support%401&c=support%402%3A0.5%2Bacme%2Ftone%3A-0.5&p=Where+is+my+parcel%3F&m=8&t=1&seed=3"
WHOLE = "n => document.querySelectorAll('.spoken .chip').length >= n"
STRONGER = """(column) => new Promise((told) => {
  const slider = column.querySelector("input[type=range]");
  let gone = false;
  new MutationObserver((_, own) => {
    const said = column.querySelector("[data-k]");
    gone ||= !said;
    if (!gone || !said) return;
    own.disconnect();
    told();
  }).observe(column, { childList: true, subtree: true, characterData: true });
  slider.value = Number(slider.value) - 0.1;
  slider.dispatchEvent(new Event("input"));
})"""
"""A column's slider is moved, until the first word of its new answer is there."""


STEP = 0.0155
"""Seconds of a decoding step of smollm2-135m in bfloat16 on one thread, where the figures of docs/notes/studio.md are
from."""


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of smollm2-135m where it is there, else of a tiny base."""
    folder = tmp_path_factory.mktemp("talking")
    base_dir = SMOLLM2 if SMOLLM2.is_dir() else tiny_base_dir(folder)
    base = load_text(str(base_dir))
    with open_library(folder / "library") as library:
        for seed, name in enumerate(["support", "support", "acme/tone"]):
            saved(base, folder / str(seed), seed)
            library.add(folder / str(seed), name)
    own = ["--dtype", "auto"] if base_dir == SMOLLM2 else []  # as `veneer studio` runs it
    with Served(folder, base_dir, folder / "library", *own) as server:
        yield server


@pytest.fixture
def window(chromium: Any, talking: Served) -> Iterator[Window]:
    with seen_in(chromium, talking.address) as made:
        yield made


def test_asked_by_a_key_judged_by_a_number_and_the_link_has_it_all(window: Window, talking: Served) -> None:
    page = window.at(LINK).page
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    page.wait_for_function(WHOLE, arg=6)
    answers = page.locator("section.column .answer")
    before = answers.nth(2).inner_text()
    answers.nth(1).focus()
    page.keyboard.press("ArrowRight")
    window.until("log-probability")
    assert page.locator("section.column span.other").count(), "what differs from the base is marked"

    page.locator("h1").click()
    page.keyboard.press("2")
    window.until("Better than")
    (votes,) = talking.home.glob("judged/*/votes.jsonl")
    assert 1 <= votes.read_text().count("\n") <= 2, "against each of the others that says something else"

    page.locator("section.column").nth(1).get_by_label("Strength", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("location.search.includes('support%401%3A0.95')")
    page.wait_for_function(WHOLE, arg=6)
    assert answers.nth(2).inner_text() == before, "the others stay as they are"
    page.reload()
    page.locator("section.column").nth(2).wait_for()
    assert page.locator("section.column").count() == 3
    assert page.get_by_label("Prompt", exact=True).input_value() == "Where is my parcel?"


def test_several_answers_of_a_column_are_those_that_a_client_gets(window: Window, talking: Served) -> None:
    """And a vote for one is over the other column's of the same number."""
    page = window.at("compare?c=support%401&p=Where+is+my+parcel%3F&m=8&seed=3").page
    page.get_by_text("Sampling settings").click()
    page.get_by_label("Answers per column").fill("3")
    page.get_by_label("Temperature").fill("1")
    page.wait_for_function("['n=3', 't=1'].every((word) => location.search.includes(word))")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function(WHOLE, arg=12)
    said = [page.locator("section.column").nth(n).locator(".answer").all_inner_texts() for n in (0, 1)]
    assert page.get_by_label("Answer 3 of support@1").inner_text() == said[1][2]
    assert [len(set(texts)) for texts in said] == [3, 3], "each is drawn anew"
    body = {"messages": [{"role": "user", "content": "Where is my parcel?"}], "n": 3, "seed": 3, "temperature": 1}
    for model, texts in zip(("", "support@1"), said, strict=True):
        given = body | {"max_tokens": 8} | ({"model": model} if model else {})
        answer = httpx.post(f"{talking.address}/v1/chat/completions", json=given, timeout=120).raise_for_status()
        assert [each["message"]["content"].strip() for each in answer.json()["choices"]] == [t.strip() for t in texts]

    differs = next(n for n in (2, 1) if said[0][n].strip() != said[1][n].strip())
    page.get_by_role("button", name="support@1 is better").nth(differs).click()
    window.until("Better than 1 other")
    (votes,) = talking.home.glob("judged/*/votes.jsonl")
    row = json.loads(votes.read_text().splitlines()[-1])
    assert [row[which][0]["content"].strip() for which in ("rejected", "chosen")] == [
        texts[differs].strip() for texts in said
    ]


def test_an_answer_is_corrected_and_two_adapters_are_mixed_with_the_mouse(window: Window, talking: Served) -> None:
    page = window.at("compare?m=4").page
    page.get_by_label("Prompt", exact=True).fill(f"Say {HOSTILE}")
    page.get_by_role("button", name="support@2").click()
    page.wait_for_function("document.querySelectorAll('section.column').length === 2")
    page.get_by_label("Add to").select_option("1")
    page.get_by_role("button", name="acme/tone").click()
    page.get_by_role("heading", name="support@2 + acme/tone@1").wait_for()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function(WHOLE, arg=4)
    page.get_by_role("button", name="Correct the answer of support@2 + acme/tone@1").click()
    page.get_by_label("What support@2 + acme/tone@1 should have said").fill(HOSTILE)
    page.get_by_role("button", name="Keep as a row").click()
    window.until("Corrected: row 1")
    (file,) = talking.home.glob("judged/*/corrections.jsonl")
    row = json.loads(file.read_text())["messages"]
    assert [each["content"] for each in row] == [f"Say {HOSTILE}", HOSTILE]
    assert page.locator("img[src='x']").count() == 0


def test_a_mix_is_kept_as_an_adapter(window: Window, talking: Served) -> None:
    page = window.at(LINK).page
    page.get_by_text("Save mix as adapter").click()
    page.get_by_label("Name").fill("softer")
    page.get_by_label("Alias").fill("prod")
    window.until("veneer library mix softer support@2:0.5 acme/tone:-0.5 --alias prod")
    page.get_by_role("button", name="Save", exact=True).click()
    window.until("softer@1 kept")
    with open_library(talking.library) as library:
        assert library.find("softer@prod").card["recipe"]["strengths"] == {"support@2": 0.5, "acme/tone@1": -0.5}
        library.remove("softer", with_aliases=True)


def answered(address: str, strength: float, tokens: int) -> Spent:
    """What an answer takes, under a strength of which nothing is known yet, as the API has it."""
    spent, messages = Spent(), [{"role": "user", "content": "Where is my parcel?"}]
    body = {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "mix": [f"support@1:{strength}"]}
    with spent.counting():
        httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120).raise_for_status()
    return spent


def test_a_slider_s_answer_begins_within_a_decoding_step_and_a_tenth_of_a_second(
    window: Window, talking: Served
) -> None:
    """A tenth of a second where a step takes what it takes in docs/notes/studio.md, and as much more as it takes longer
    here. A new mix reads its prompt, and nothing else is done for it."""
    page = window.at("compare?c=support%401&p=Where+is+my+parcel%3F&m=1").page
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function(WHOLE, arg=4)
    column, moved = page.locator("section.column").nth(1).element_handle(), list[Spent]()
    first, many = list[Spent](), list[Spent]()
    for n in range(6):  # in turn, so that whoever else computes here is in the way of all
        first.append(answered(talking.address, 0.31 + n / 100, 1))
        many.append(answered(talking.address, 0.41 + n / 100, 17))
        moved.append(Spent())
        with moved[-1].counting():
            page.evaluate(STRONGER, column)
        page.wait_for_function(WHOLE, arg=4)
    one, all_of, slider = (Spent.least(each[1:]) for each in (first, many, moved))
    step = Spent((all_of.clock - one.clock) / 16, (all_of.processors - one.processors) / 16)
    slower = max(1.0, step.clock / STEP)
    assert slider.within(0.1 * slower, step), (slower, step, one, slider)
