"""Names and prompts that somebody made to do harm, in every view where there are any: they are text, and have room."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from tests.browser.conftest import LONG, Window
from tests.studio.conftest import HOSTILE
from tests.studio.lessons import parcel_rows

SAID = "onerror=alert(1)"
ENDLESS = "x" * 1500
LINKS = [
    f"?q={quote(HOSTILE)}",
    "adapter?ref=acme/tone",
    f"adapter?ref={LONG}",
    f"compare?c={LONG}%401&p={quote(HOSTILE)}",
    f"compare?c=acme/tone%401&p={ENDLESS}",
    f"train?s=data.train%3D{quote(HOSTILE)}&s={quote(HOSTILE)}",
    f"train?s=data.train%3D{ENDLESS}&s={ENDLESS}",
    "run?job={job}&p=" + quote(HOSTILE),
    "steps?job={job}&p=" + quote(HOSTILE) + f"&p={ENDLESS}",
    "live",
    f"doctor?file={quote(HOSTILE)}",
    quote(HOSTILE),
]


def harmless(window: Window) -> None:
    assert window.page.locator("img[src='x']").count() == 0
    assert "\u202e" not in window.page.content()
    assert window.page.get_by_text("49", exact=True).count() == 0, "nothing is a template"
    wide = window.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{wide} pixels are cut off"


def test_by_a_link(window: Window, lesson: str) -> None:
    for link in LINKS:
        window.at(link.replace("{job}", lesson), there=False)
        for width in (1280, 390):
            window.page.set_viewport_size({"width": width, "height": 800})
            harmless(window)


def test_in_rows_in_a_prompt_and_in_a_file_s_name(window: Window, tmp_path: Path) -> None:
    page = window.at("train").page
    page.get_by_label("File of rows").fill(str(parcel_rows(tmp_path)))
    page.get_by_label("Steps", exact=True).fill("4")
    page.locator(".rows", has_text=SAID).first.wait_for()
    harmless(window)
    window.at("compare?c=support%401&m=2")
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    page.keyboard.press("Control+Enter")
    page.wait_for_function("document.querySelectorAll('.spoken .chip').length >= 4")
    harmless(window)
    window.at("doctor")
    file = {"name": f"{HOSTILE}{LONG}.safetensors", "mimeType": "application/octet-stream", "buffer": b"no adapter"}
    page.set_input_files("input[type=file]", file)
    page.locator(".trouble b").wait_for()
    harmless(window)
    window.wrong[:] = [line for line in window.wrong if "400" not in line]
