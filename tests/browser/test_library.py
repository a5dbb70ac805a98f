"""The Library with a mouse, with keys alone, by two people, over a server that goes away."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import LONG, Spent, Window, seen_in
from tests.studio.conftest import HOSTILE, Served
from veneer.library.library import open_library

CARD = ".cards .card"


def cards(window: Window, count: int) -> None:
    window.page.wait_for_function("n => document.querySelectorAll('.cards .card').length === n", arg=count)


def test_it_is_found_as_one_types_and_the_link_keeps_what_was_asked(window: Window) -> None:
    window.at()
    cards(window, 3)
    window.page.get_by_label("Find", exact=True).fill("tone")
    cards(window, 1)
    window.page.wait_for_url("**/studio/?q=tone")
    window.page.reload()
    cards(window, 1)
    assert window.page.get_by_label("Find", exact=True).input_value() == "tone"
    window.at("?q=nothing-has-this")
    window.until("No matches")
    window.page.get_by_text("Show all").click()
    cards(window, 3)


def test_keys_alone_go_from_the_first_screen_to_an_alias_and_back(window: Window, served: Served) -> None:
    page = window.at().page
    page.keyboard.press("/")
    page.keyboard.type("support")
    cards(window, 1)
    for key in ("Escape", "j", "Enter"):
        page.keyboard.press(key)
    window.heading("support@2")
    page.get_by_label("Another alias").focus()
    page.keyboard.type("canary")
    window.until("veneer library alias support@2 canary")
    page.keyboard.press("Enter")
    page.locator(".chip.on", has_text="canary").first.wait_for()
    page.keyboard.press("Escape")
    with open_library(served.library) as library:
        assert library.find("support@canary").version == 2
    page.keyboard.press("g")
    page.keyboard.press("l")
    window.heading("Library")
    page.go_back()
    window.heading("support@2")
    page.get_by_label("Take the alias canary away").click()
    page.locator(".chip.on", has_text="canary").first.wait_for(state="detached")


def test_trigger_words_and_commands_are_copied(window: Window) -> None:
    page = window.at("adapter?ref=acme/tone").page
    page.locator("button.chip", has_text="polite").click()
    assert page.evaluate("navigator.clipboard.readText()") == "polite"
    page.locator("[data-copy^='veneer generate']").click()
    assert "--adapter acme/tone@1" in page.evaluate("navigator.clipboard.readText()")


def test_a_file_that_is_dropped_anywhere_is_kept(window: Window, served: Served) -> None:
    with open_library(served.library) as library:
        file = library.resolve("acme/tone") / "adapter_model.safetensors"
    page = window.at("adapter?ref=support@1").page
    dropped = page.evaluate_handle(
        """bytes => { const t = new DataTransfer(), raw = Uint8Array.from(atob(bytes), c => c.charCodeAt(0));
        t.items.add(new File([raw], "Dropped Style.safetensors")); return t; }""",
        base64.b64encode(file.read_bytes()).decode(),
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": dropped})
    window.until("Drop to add to the library")
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    window.heading("dropped-style@1")
    with open_library(served.library) as library:
        assert library.files(library.find("dropped-style").entry).keys() == {"Dropped_Style.safetensors"}
    page.get_by_role("button", name="Remove…").click()
    window.until("Remove dropped-style@1?")
    page.locator("dialog[open]").get_by_role("button", name="Remove", exact=True).click()
    window.heading("Library")
    cards(window, 3)


def test_one_field_finds_views_and_adapters(window: Window) -> None:
    page = window.at().page
    page.keyboard.press("Control+k")
    page.get_by_label("Find anything", exact=True).last.fill("tone")
    page.get_by_role("option", name="acme/tone@1").wait_for()
    page.keyboard.press("Enter")
    window.heading("acme/tone@1")
    page.keyboard.press("?")
    window.until("Find anything")
    assert page.locator("dialog[open] tr").count() > 4


def test_two_people_see_each_other_s_changes(window: Window, chromium: Any, served: Served) -> None:
    window.at()
    cards(window, 3)
    with open_library(served.library) as library:
        library.alias("support@2", "seen")
    window.page.locator(".chip", has_text="seen").wait_for()
    with open_library(served.library) as library:
        library.remove("support@seen")
    window.page.locator(".chip", has_text="seen").wait_for(state="detached")


def test_names_made_to_do_harm_stand_there_as_text(window: Window) -> None:
    window.at()
    assert window.page.locator(CARD, has_text=LONG).count() == 1
    window.at("adapter?ref=acme/tone")
    window.until("onerror=alert(1)")
    assert window.page.locator("img[src='x']").count() == 0
    window.at(f"adapter?ref={LONG}")
    assert window.page.locator("img[src='x']").count() == 0
    window.at(f"?q={HOSTILE}")
    window.until("No matches")


def test_a_server_that_goes_away_and_comes_back(chromium: Any, kept: Any, tmp_path: Path) -> None:
    first = Served(tmp_path, *kept)
    context = chromium.new_context()
    try:
        first.wait()
        window = Window(context.new_page(), first.address)
        window.at("?q=tone")
        cards(window, 1)
        first.end()
        window.page.locator("#popup[aria-hidden=false]").wait_for(timeout=20_000)
        second = Served(tmp_path, *kept, "--port", first.address.rpartition(":")[2])
        try:
            second.wait()
            window.page.wait_for_function("window.did_handshake === true", timeout=60_000)
            cards(window, 1)
            assert window.page.url.endswith("?q=tone")
        finally:
            second.end()
    finally:
        context.close()
        first.end()


def test_the_first_screen_is_there_within_a_second(chromium: Any, served: Served) -> None:
    """Of a browser that has nothing of it yet, from this machine. The best of three: others compute here, too."""
    times = [Spent() for _ in range(3)]
    for spent in times:
        with seen_in(chromium, served.address) as window:
            with spent.counting():
                window.page.goto(f"{window.address}/studio/")
                window.page.wait_for_selector(CARD)
            window.page.wait_for_function("window.did_handshake === true")
    assert Spent.least(times).within(1.0), times


@pytest.mark.parametrize("width", [1280, 390])
def test_ten_thousand_adapters(chromium: Any, many: Served, width: int) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 800})
    try:
        window = Window(context.new_page(), many.address)
        window.at()
        window.until("10,003 adapters")
        spent = Spent()
        with spent.counting():
            window.page.get_by_label("Find", exact=True).fill("style-777")
            window.page.wait_for_function("document.querySelector('.count').textContent.startsWith('11 adapters')")
        assert spent.within(0.5), spent
        window.page.get_by_label("Find", exact=True).fill("")
        window.until("10,003 adapters")
        window.page.keyboard.press("End")
        window.page.mouse.wheel(0, 100_000)
        window.page.wait_for_function("document.querySelectorAll('.cards .card').length > 60")
        assert not window.wrong, window.wrong
    finally:
        context.close()
