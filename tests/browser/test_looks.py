"""Every view as somebody sees it who does not see it well, light and dark, wide and narrow: axe finds nothing serious,
and nothing is cut off or wider than the window."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.conftest import LONG, seen_in
from tests.studio.conftest import Served

VIEWS = ["", "?q=nothing-has-this", "adapter?ref=support@1", f"adapter?ref={LONG}"]
VIEWS += ["compare", f"compare?c=support%401&c={LONG}%401%2Bacme/tone%401:-0.5", "live", "doctor"]
VIEWS += ["train", "train?q=teach%20tiny-base%20rnak%203", "run?job={job}", "steps?job={job}"]


@pytest.mark.parametrize("path", VIEWS)
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_window(
    chromium: Any, served: Served, lesson: str, path: str
) -> None:
    with seen_in(chromium, served.address) as window:
        window.at(path.format(job=lesson))
        for width in (1280, 390):
            window.page.set_viewport_size({"width": width, "height": 800})
            for scheme in ("light", "dark"):
                window.page.emulate_media(color_scheme=scheme)
                window.sound()


def test_the_windows_over_a_page(chromium: Any, served: Served) -> None:
    with seen_in(chromium, served.address) as window:
        page = window.at("live").page
        for key in ("?", "Control+k", "r"):
            page.keyboard.press(key)
            page.locator("dialog[open]").wait_for()
            for scheme, width in (("light", 1280), ("dark", 390)):
                page.set_viewport_size({"width": width, "height": 800})
                page.emulate_media(color_scheme=scheme)
                window.sound()
            page.keyboard.press("Escape")
            page.locator("dialog[open]").wait_for(state="detached")
