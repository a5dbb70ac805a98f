"""Redrawing a view after another user's change loses no click and no input."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import veneer
from tests.browser.conftest import LONG, ROUTE, Window
from tests.studio.conftest import StudioServer
from veneer.jobs.store import JobStore
from veneer.library.library import open_library
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import Store

TARGETS = [("support@2", 90), (f"{LONG}@1", 10)]


@contextmanager
def mouse_down(page: Any, button: Any) -> Iterator[None]:
    """Press the mouse on a button, run the block, and release the mouse."""

    def hover() -> None:
        at = button.bounding_box()
        page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)

    button.scroll_into_view_if_needed()
    hover()
    page.mouse.down()
    yield
    hover()
    page.mouse.up()


def test_library_keeps_a_click(window: Window, server: StudioServer) -> None:
    page = window.open().page
    with open_library(server.library) as library:
        with mouse_down(page, page.get_by_role("button", name="Select support@2")):
            library.alias("support@2", "meanwhile")
            page.locator(".chip", has_text="meanwhile").wait_for()
        window.until("1 selected")
        library.remove("support@meanwhile")
    page.locator(".chip", has_text="meanwhile").wait_for(state="detached")


def test_adapter_view_keeps_a_click_and_typed_text(window: Window, server: StudioServer) -> None:
    page = window.open("adapter?ref=support@2").page
    page.get_by_label("New tag").fill("half typed")
    window.until("veneer library tag support@2 'half typed'")
    with open_library(server.library) as library:
        with mouse_down(page, page.get_by_role("button", name="Remove…")):
            library.alias("support@2", "meanwhile")
            page.locator(".chip", has_text="meanwhile").first.wait_for()
        window.until("and its aliases meanwhile")
        library.remove("support@meanwhile")
    page.locator(".chip", has_text="meanwhile").first.wait_for(state="detached")
    assert page.locator("dialog[open]").count() == 1
    assert page.get_by_label("New tag").input_value() == "half typed"


def test_run_keeps_a_click(window: Window, server: StudioServer, job: str) -> None:
    page = window.open(f"run?job={job}").page
    with open_library(server.library) as library:
        jobs = JobStore(library)
        with mouse_down(page, page.get_by_role("button", name="Use this step")):
            jobs.pause(None, job)
            page.get_by_role("button", name="Resume").wait_for()
        page.get_by_role("heading", name="Use step 2").wait_for()
        jobs.resume(None, job)
    page.get_by_role("button", name="Resume").wait_for(state="hidden")
    assert page.locator("dialog[open]").count() == 1


def test_live_keeps_a_click_and_changes_of_other_routes(window: Window, store: Store) -> None:
    page = window.open("live").page
    form = page.get_by_label(f"Route {ROUTE}", exact=True)
    weight = form.get_by_label("Weight of support@2")

    with mouse_down(page, form.get_by_role("button", name="Roll back")):
        routes.set_route(store, ROUTE, [("support@2", 70), (f"{LONG}@1", 30)], actor="test")
        form.locator("td", has_text="70%").first.wait_for(state="attached")
    window.until(f"20% move from {LONG}@1 to support@2")
    window.keys("Escape")
    page.locator("dialog[open]").wait_for(state="detached")

    weight.fill("20")
    window.until("move from support@2")
    routes.set_route(store, "another", TARGETS, actor="test")
    other = page.get_by_label("Route another", exact=True)
    other.wait_for()
    assert weight.input_value() == "20"
    routes.remove_route(store, "another", actor="test")
    other.wait_for(state="detached")
    routes.set_route(store, ROUTE, TARGETS, actor="test")
    window.has_value(weight, "90")
    assert page.get_by_text("move from support@2").count() == 0, "a change of the same route resets the form"


def test_key_acts_right_after_a_dialog_closes(window: Window) -> None:
    """A closed dialog's field keeps the focus until the next frame."""
    page = window.open("live").page
    window.keys("Control+k")
    page.locator("dialog[open]").wait_for()
    page.evaluate("""() => {
      document.querySelector("dialog[open]").close();
      document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "r", bubbles: true }));
    }""")
    window.until(f"Roll {ROUTE} back")


def random_tree(rng: random.Random, depth: int = 0) -> str:
    def node() -> str:
        if depth == 3 or rng.random() < 0.3:
            return rng.choice(("text", " ", "more "))
        attributes = rng.choice(("", ' class="a"', ' class="b"', " hidden", f' data-id="{rng.randrange(9)}"'))
        return f"<div{attributes}>{random_tree(rng, depth + 1)}</div>"

    return "".join(node() for _ in range(rng.randrange(5)))


def test_patched_html_equals_the_new_html(window: Window) -> None:
    page, source = window.page, Path(veneer.__file__).parent / "studio" / "fragment.js"
    page.add_script_tag(content=source.read_text().partition("export default")[0])
    pairs = [(random_tree(random.Random(n)), random_tree(random.Random(1000 + n))) for n in range(300)]
    pairs += [(before, before.replace("<div", "<div title='x'", 1)) for before, _ in pairs]
    patch = """pairs => pairs.filter(([before, after]) => {
      const at = document.createElement("div"), expected = document.createElement("div");
      const then = document.createElement("template");
      at.innerHTML = before;
      then.innerHTML = expected.innerHTML = after;
      fill(at, then.content);
      return !at.isEqualNode(expected);
    })"""
    assert page.evaluate(patch, pairs) == []
