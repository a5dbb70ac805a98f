"""Hostile and very long names and prompts are shown as text in every view, and not cut off."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from tests.browser.conftest import ANSWERED, LONG, Window
from tests.studio.conftest import HOSTILE
from tests.studio.recorded_jobs import parcel_rows

ENDLESS = "x" * 1500
LINKS = [
    f"?q={quote(HOSTILE)}",
    "adapter?ref=acme/tone",
    f"adapter?ref={LONG}",
    f"compare?c={LONG}%401&p={quote(HOSTILE)}",
    f"compare?c=acme/tone%401&p={ENDLESS}",
    f"train?s=data.train%3D{quote(HOSTILE)}&s={quote(HOSTILE)}",
    f"train?s=data.train%3D{ENDLESS}&s={ENDLESS}",
    "run?job={job}&sheet=" + quote(HOSTILE),
    "live",
    f"doctor?file={quote(HOSTILE)}",
    quote(HOSTILE),
]


def assert_harmless(window: Window) -> None:
    assert window.page.locator("img[src='x']").count() == 0
    assert "\u202e" not in window.page.content()
    assert window.page.get_by_text("49", exact=True).count() == 0, "no text is a template"
    window.no_overflow()


def test_hostile_links_are_harmless(window: Window, job: str) -> None:
    for link in LINKS:
        window.open(link.replace("{job}", job), status="404")
        for width in (1280, 390):
            window.page.set_viewport_size({"width": width, "height": 800})
            assert_harmless(window)


def test_hostile_rows_prompts_and_file_names_are_harmless(window: Window, tmp_path: Path) -> None:
    page = window.open("train").page
    page.get_by_label("Data file").fill(str(parcel_rows(tmp_path)))
    page.get_by_label("Steps", exact=True).fill("4")
    page.locator(".rows", has_text="onerror=alert(1)").first.wait_for()
    assert_harmless(window)
    window.open("compare?c=support%401&m=2")
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    window.keys("Control+Enter")
    page.wait_for_function(ANSWERED, arg=4)
    assert_harmless(window)
    window.open("doctor")
    file = {"name": f"{HOSTILE}{LONG}.safetensors", "mimeType": "application/octet-stream", "buffer": b"no adapter"}
    page.set_input_files("input[type=file]", file)
    page.locator(".trouble b").wait_for()
    assert_harmless(window)
    window.ignore("400")
