"""The Objectives view in Chromium: a new answer appears without a reload."""

from __future__ import annotations

import httpx

from tests.browser.conftest import Window
from tests.studio.conftest import StudioServer


def test_a_new_answer_appears_and_the_view_stays_accessible(window: Window, server: StudioServer) -> None:
    window.open("objectives")
    body = {"model": "support@2", "prompt": "Where is my parcel?", "max_tokens": 3}
    httpx.post(f"{server.address}/v1/completions", json=body, timeout=60).raise_for_status()
    window.until("100.0% met")
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        window.page.set_viewport_size({"width": width, "height": 800})
        window.page.emulate_media(color_scheme=scheme)
        window.accessible()
