"""What others change is drawn anew under the hands of whoever looks: no click of theirs is lost, and nothing that they
have begun."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.browser.conftest import LONG, ROUTE, Window
from tests.studio.conftest import Served
from veneer.jobs.step_actions import keep_step
from veneer.jobs.store import JobStore
from veneer.library.library import open_library
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import Store

BEFORE = [("support@2", 90), (f"{LONG}@1", 10)]


@contextmanager
def pressed(page: Any, button: Any) -> Iterator[None]:
    """What is done in it happens between the press of the mouse on a button and its release there."""

    def over() -> None:
        at = button.bounding_box()
        page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)

    button.scroll_into_view_if_needed()
    over()
    page.mouse.down()
    yield
    over()
    page.mouse.up()


@pytest.fixture
def store(served: Served) -> Iterator[Store]:
    with closing(Store(str(served.home / "tenants.sqlite"))) as found:
        yield found
        routes.set_route(found, ROUTE, BEFORE, who="test")


def test_in_the_library(window: Window, served: Served) -> None:
    page = window.at().page
    with open_library(served.library) as library:
        with pressed(page, page.get_by_role("button", name="Mark support@2")):
            library.alias("support@2", "meanwhile")
            page.locator(".chip", has_text="meanwhile").wait_for()
        window.until("1 marked")
        library.remove("support@meanwhile")
    page.locator(".chip", has_text="meanwhile").wait_for(state="detached")


def test_on_the_page_of_an_adapter(window: Window, served: Served) -> None:
    page = window.at("adapter?ref=support@2").page
    page.get_by_label("Another tag").fill("half typed")
    window.until("veneer library tag support@2 'half typed'")
    with open_library(served.library) as library:
        with pressed(page, page.get_by_role("button", name="Remove…")):
            library.alias("support@2", "meanwhile")
            page.locator(".chip", has_text="meanwhile").first.wait_for()
        window.until("Its aliases meanwhile go with it.")
        library.remove("support@meanwhile")
    page.locator(".chip", has_text="meanwhile").first.wait_for(state="detached")
    assert page.locator("dialog[open]").count() == 1
    assert page.get_by_label("Another tag").input_value() == "half typed"


def test_among_the_steps_of_a_run(window: Window, served: Served, lesson: str) -> None:
    page = window.at(f"steps?job={lesson}").page
    with open_library(served.library) as library:
        with pressed(page, page.get_by_role("button", name="Use this step")):
            keep_step(JobStore(library), lesson, 2, alias="meanwhile")
            page.get_by_role("link", name="Go live").wait_for()
        page.get_by_role("heading", name="Use step 2").wait_for()
        library.remove("lesson", with_aliases=True)
    page.get_by_role("link", name="Go live").wait_for(state="detached")
    assert page.locator("dialog[open]").count() == 1


def test_in_live(window: Window, store: Store) -> None:
    page = window.at("live").page
    shares = page.get_by_label(f"The route {ROUTE}").locator(".share b")
    with pressed(page, page.get_by_role("button", name="Roll back")):
        routes.set_route(store, ROUTE, [("support@2", 70), (f"{LONG}@1", 30)], who="test")
        shares.filter(has_text="70 %").wait_for()
    window.until(f"20 % move from {LONG}@1 to support@2")
    page.keyboard.press("Escape")
    page.locator("dialog[open]").wait_for(state="detached")

    page.get_by_label(f"support@2 against {LONG}@1").press("Shift+ArrowLeft")
    window.until("10 % move from support@2")
    routes.set_route(store, "another", BEFORE, who="test")
    page.get_by_label("The route another").wait_for()
    assert shares.all_inner_texts() == ["60 %", "40 %"], "another route's move is no reason to lose it"
    routes.remove_route(store, "another", who="test")
    page.get_by_label("The route another").wait_for(state="detached")
    routes.set_route(store, ROUTE, BEFORE, who="test")
    shares.filter(has_text="90 %").wait_for()
    assert page.get_by_text("10 % move from support@2").count() == 0, "this one's is"


def test_a_key_right_after_a_window_over_the_page(window: Window) -> None:
    """Its field has the focus until the next frame, though nobody sees it any more."""
    page = window.at("live").page
    page.keyboard.press("Control+k")
    page.locator("dialog[open]").wait_for()
    page.evaluate("""() => {
      document.querySelector("dialog[open]").close();
      document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "r", bubbles: true }));
    }""")
    window.until(f"Roll {ROUTE} back")


def tree(random: random.Random, depth: int = 0) -> str:
    def one() -> str:
        if depth == 3 or random.random() < 0.3:
            return random.choice(("text", " ", "more "))
        said = random.choice(("", ' class="a"', ' class="b"', " hidden", f' data-id="{random.randrange(9)}"'))
        return f"<div{said}>{tree(random, depth + 1)}</div>"

    return "".join(one() for _ in range(random.randrange(5)))


def test_whatever_is_drawn_in_place_of_whatever_is_there_afterwards(window: Window) -> None:
    page, source = window.page, Path(veneer.__file__).parent / "studio" / "fragment.js"
    page.add_script_tag(content=source.read_text().partition("export default")[0])
    pairs = [(tree(random.Random(n)), tree(random.Random(1000 + n))) for n in range(300)]
    pairs += [(before, before.replace("<div", "<div title='x'", 1)) for before, _ in pairs]
    assert (
        page.evaluate(
            """pairs => pairs.filter(([before, after]) => {
          const at = document.createElement("div"), said = document.createElement("div");
          const then = document.createElement("template");
          at.innerHTML = before;
          then.innerHTML = said.innerHTML = after;
          fill(at, then.content);
          return !at.isEqualNode(said);
        })""",
            pairs,
        )
        == []
    )
