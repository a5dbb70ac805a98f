"""In every view, light or dark, wide or narrow, axe finds no serious problem and nothing is cut off."""

from __future__ import annotations

import pytest

from tests.browser.conftest import LONG, Window

VIEWS = ["", "?q=nothing-has-this", "adapter?ref=support@1", f"adapter?ref={LONG}"]
VIEWS += ["compare", f"compare?c=support%401&c={LONG}%401%2Bacme/tone%401:-0.5", "live", "objectives", "doctor"]
VIEWS += ["train", "train?s=adapter.rnak%3D3", "run?job={job}"]


@pytest.mark.parametrize("path", VIEWS)
def test_view_is_accessible(window: Window, job: str, path: str) -> None:
    window.open(path.format(job=job))
    for width in (1280, 390):
        window.page.set_viewport_size({"width": width, "height": 800})
        for scheme in ("light", "dark"):
            window.page.emulate_media(color_scheme=scheme)
            window.accessible()


def test_dialogs_are_accessible(window: Window) -> None:
    page = window.open("live").page
    for key in ("?", "Control+k", "r"):
        window.keys(key)
        page.locator("dialog[open]").wait_for()
        for scheme, width in (("light", 1280), ("dark", 390)):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme)
            window.accessible()
        window.keys("Escape")
        page.locator("dialog[open]").wait_for(state="detached")
