"""Live in two browsers: a route is created, changed, promoted and rolled back.

Also compares answers of a shadow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Window, new_window
from tests.studio.conftest import HOSTILE, StudioServer
from veneer.serve.tenancy.store import Store

FIRST, OTHER = "support@2", "acme/tone@1"


@pytest.fixture(scope="module")
def store(trainer: StudioServer) -> Iterator[Store]:
    with closing(Store(str(trainer.home / "tenants.sqlite"))) as found:
        yield found


@pytest.fixture
def windows(chromium: Any, trainer: StudioServer) -> Iterator[tuple[Window, Window]]:
    with new_window(chromium, trainer.address) as one, new_window(chromium, trainer.address) as other:
        yield one.open("live"), other.open("live")


def targets(store: Store) -> dict[str, int]:
    return dict(store.refresh().routes["", "parcels"].targets)


def route(window: Window, name: str) -> Any:
    return window.page.get_by_role("region", name=f"Route {name}")


def weights(window: Window, **values: str) -> None:
    """Wait until the form of the route `parcels` has these weights."""
    for name, value in values.items():
        window.has_value(route(window, "parcels").get_by_label(f"Weight of {name}"), value)


def create(window: Window, name: str) -> None:
    """Create a route whose only target is FIRST."""
    page = window.page
    if not page.locator("details", has_text="New route").first.evaluate("at => at.open"):
        page.get_by_text("New route", exact=True).click()
    form = page.get_by_role("region", name="New route")
    form.get_by_label("Name", exact=True).fill(name)
    form.get_by_label("Add a target").select_option(FIRST)
    form.get_by_role("button", name=f"Promote {FIRST}").click()
    window.until(f"veneer tenant route set {name} {FIRST}")
    window.press("Create route")
    route(window, name).wait_for()


def remove(window: Window, name: str) -> None:
    window.press(f"Remove {name}")
    window.confirm("Remove")
    route(window, name).wait_for(state="detached")


def test_route_is_changed_promoted_and_rolled_back_in_two_browsers(
    windows: tuple[Window, Window], store: Store
) -> None:
    one, other = windows
    create(one, "parcels")
    weights(other, **{FIRST: "100"})

    form = route(one, "parcels")
    form.get_by_label("Add a target").select_option(OTHER)
    one.until(f"Of the users of parcels, 10% move from {FIRST} to {OTHER}; all other users keep their target.")
    one.press("Apply")
    weights(other, **{FIRST: "90", OTHER: "10"})

    for name, weight in ((FIRST, "60"), (OTHER, "40")):
        form.get_by_label(f"Weight of {name}").fill(weight)
    one.until(f"Of the users of parcels, 30% move from {FIRST} to {OTHER}; all other users keep their target.")
    one.until(f"veneer tenant route set parcels {FIRST}=60 {OTHER}=40")
    assert targets(store) == {FIRST: 90, OTHER: 10}, "the change is not applied yet"
    one.press("Cancel")
    weights(one, **{FIRST: "90", OTHER: "10"})
    for name, weight in ((FIRST, "60"), (OTHER, "40")):
        form.get_by_label(f"Weight of {name}").fill(weight)
    one.press("Apply")
    weights(other, **{FIRST: "60", OTHER: "40"})
    assert targets(store) == {FIRST: 60, OTHER: 40}

    other.press(f"Promote {OTHER}")
    other.until(f"60% move from {FIRST} to {OTHER}")
    other.press("Apply")
    weights(one, **{OTHER: "100"})
    assert targets(store).keys() == {OTHER}
    one.press("Roll back")
    one.until(f"60% move from {OTHER} to {FIRST}")
    one.confirm("Roll back")
    weights(other, **{FIRST: "60", OTHER: "40"})
    assert targets(store) == {FIRST: 60, OTHER: 40}
    remove(one, "parcels")
    route(other, "parcels").wait_for(state="detached")


def test_shadow_answers_are_compared(windows: tuple[Window, Window], trainer: StudioServer) -> None:
    window, _ = windows
    page = window.page
    create(window, "quiet")
    route(window, "quiet").get_by_label("Shadow").select_option(OTHER)
    window.until(f"{OTHER} also answers 100% of requests")
    window.press("Apply")
    window.until("quiet changed")
    messages = [{"role": "user", "content": f"Where is my parcel? {HOSTILE}"}]
    body = {"model": "quiet", "messages": messages, "max_tokens": 4}
    httpx.post(f"{trainer.address}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    comparisons = page.get_by_role("group", name="Shadow comparisons")
    comparisons.get_by_text(OTHER).wait_for()
    assert page.get_by_role("group", name="Adapters in memory").get_by_text(OTHER).count() == 1
    remove(window, "quiet")
    comparisons.get_by_role("link", name="Compare both").click()
    window.heading("Compare")
    page.get_by_role("heading", name=OTHER).wait_for()
