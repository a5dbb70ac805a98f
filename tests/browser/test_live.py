"""Live with the mouse, by two people at once: a route begun, dragged, promoted, rolled back, each said before it is
done; a shadow beside what was sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Window, seen_in
from tests.studio.conftest import HOSTILE, Served
from veneer.serve.tenancy.store import Store

FIRST, OTHER = "support@2", "acme/tone@1"
ROUTE = "[aria-label^='The route']"
SHARES = (
    f"""shares => [...document.querySelectorAll("{ROUTE} .share b")].map((at) => at.textContent).join() === shares"""
)


@pytest.fixture(scope="module")
def store(training: Served) -> Iterator[Store]:
    found = Store(str(training.home / "tenants.sqlite"))
    yield found
    found.close()


@pytest.fixture
def people(chromium: Any, training: Served) -> Iterator[tuple[Window, Window]]:
    with seen_in(chromium, training.address) as one, seen_in(chromium, training.address) as other:
        yield one.at("live"), other.at("live")


def targets(store: Store) -> dict[str, int]:
    return dict(store.look().routes["", "parcels"].targets)


def named(page: Any, name: str) -> None:
    """A new route, which stands there where there is none yet, and is a click away where there are some."""
    if not page.locator("details", has_text="A new route").evaluate("at => at.open"):
        page.get_by_text("A new route", exact=True).click()
    page.get_by_label("Name", exact=True).fill(name)


def dragged(window: Window, share: float) -> None:
    """The edge between the first two shares, to a share of the bar's width."""
    page = window.page
    bar, edge = (page.locator(f"{ROUTE} {each}").bounding_box() for each in (".weights", ".edge"))
    y = edge["y"] + edge["height"] / 2
    page.mouse.move(edge["x"] + edge["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(bar["x"] + bar["width"] * 0.8, y)
    page.mouse.move(bar["x"] + bar["width"] * share, y)
    page.mouse.up()


def test_a_route_is_begun_dragged_promoted_and_rolled_back_before_the_eyes_of_another(
    people: tuple[Window, Window], store: Store
) -> None:
    one, other = people
    page = one.page
    named(page, "parcels")
    page.get_by_label("First target").select_option(FIRST)
    one.until(f"veneer tenant route set parcels {FIRST}")
    page.get_by_role("button", name="Create route").click()
    other.page.wait_for_function(SHARES, arg="100 %")
    page.wait_for_function("at => at.value === ''", arg=page.get_by_label("Name", exact=True).element_handle())

    page.get_by_text("Add a version or a shadow").click()
    page.get_by_label("Another version").select_option(OTHER)
    one.until(f"Of the users of parcels, 10 % move from {FIRST} to {OTHER}; nobody else changes.")
    page.get_by_role("button", name="Apply", exact=True).click()
    other.page.wait_for_function(SHARES, arg="90 %,10 %")

    dragged(one, 0.6)
    one.until(f"Of the users of parcels, 30 % move from {FIRST} to {OTHER}; nobody else changes.")
    one.until(f"veneer tenant route set parcels {FIRST}=60 {OTHER}=40")
    assert targets(store) == {FIRST: 90, OTHER: 10}, "it is said, not done"
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.wait_for_function(SHARES, arg="90 %,10 %")
    dragged(one, 0.6)
    page.get_by_role("button", name="Apply", exact=True).click()
    other.page.wait_for_function(SHARES, arg="60 %,40 %")
    assert targets(store) == {FIRST: 60, OTHER: 40}

    other.page.get_by_role("button", name=f"Promote {OTHER}").click()
    other.until(f"60 % move from {FIRST} to {OTHER}")
    other.page.locator("dialog[open]").get_by_role("button", name="Promote", exact=True).click()
    page.wait_for_function(SHARES, arg="100 %")
    assert targets(store).keys() == {OTHER}
    page.get_by_role("button", name="Roll back", exact=True).click()
    one.until(f"60 % move from {OTHER} to {FIRST}")
    page.locator("dialog[open]").get_by_role("button", name="Roll back").click()
    other.page.wait_for_function(SHARES, arg="60 %,40 %")
    assert targets(store) == {FIRST: 60, OTHER: 40}

    page.get_by_role("button", name="Remove parcels").click()
    page.locator("dialog[open]").get_by_role("button", name="Remove", exact=True).click()
    other.page.locator(ROUTE).wait_for(state="detached")


def test_a_shadow_s_answer_stands_beside_the_one_that_was_sent(people: tuple[Window, Window], training: Served) -> None:
    window, _ = people
    page = window.page
    named(page, "shadowed")
    page.get_by_label("First target").select_option(FIRST)
    page.get_by_role("button", name="Create route").click()
    page.get_by_text("Add a version or a shadow").click()
    page.get_by_label("Shadow version").select_option(OTHER)
    window.until(f"{OTHER} answers 100 % of requests too")
    page.get_by_role("button", name="Apply", exact=True).click()
    window.until("shadowed moved")

    def ask() -> None:
        asked = [{"role": "user", "content": f"Where is my parcel? {HOSTILE}"}]
        body = {"model": "shadowed", "messages": asked, "max_tokens": 4}
        httpx.post(f"{training.address}/v1/chat/completions", json=body, timeout=60).raise_for_status()

    ask()
    page.get_by_role("group", name="Shadows in sum").get_by_text(OTHER).wait_for()
    page.get_by_role("button", name="Keep answers for 7 days").click()
    window.until("veneer tenant set all feedback_days=7")
    page.get_by_role("button", name="Keep them").click()
    page.locator("dialog[open]").wait_for(state="detached")
    ask()
    page.get_by_label("An answer and its shadow's").first.get_by_role("button", name="Better").last.click()
    window.until("Kept as a row of preferences")
    assert page.locator("img[src='x']").count() == 0
    assert page.get_by_role("group", name="Adapters in memory").get_by_text(OTHER).count() == 1
    page.get_by_role("button", name="Remove shadowed").click()
    page.locator("dialog[open]").get_by_role("button", name="Remove", exact=True).click()
    page.locator(ROUTE).wait_for(state="detached")
