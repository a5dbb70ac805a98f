"""The page on the real server: its socket, its paths beside the API's, what comes before the base is loaded."""

from __future__ import annotations

import html
import re
from pathlib import Path

import httpx
import pytest

from tests.studio.conftest import Served
from tests.studio.windows import opened, page_html
from tests.test_readme import parse
from veneer.jobs.store import JobStore
from veneer.library.library import open_library


def test_a_page_hears_and_answers_through_the_real_front_and_door(studio: Served) -> None:
    with opened(f"{studio.address}/studio/") as window:
        window.type("tone")
        heard = window.until("globex/tone", "q=tone")
        assert "support@2" not in heard


def test_the_api_is_as_it_is_without_the_page(studio: Served) -> None:
    with httpx.Client(base_url=studio.address) as client:
        assert client.get("/v1/nope").json()["error"]["type"] == "invalid_request_error"
        assert client.get("/v1/chat/completions").status_code == 405
        assert client.get("/studio").headers["location"].endswith("/studio/")
        assert client.get("/studio/nope").status_code == 404
        page = client.get("/studio/")
        for path in set(re.findall(r'"(/studio/_nicegui/[^"]+\.(?:js|css))"', page.text)):
            asset = client.get(path)
            assert (asset.status_code, "immutable" in asset.headers["cache-control"]) == (200, True), path


@pytest.mark.parametrize(
    "path", ["", "?q=tone&tag=x&rank=4&health=unknown&order=gain", "adapter?ref=support@2", "train"]
)
def test_every_command_on_a_page_is_one(studio: Served, path: str) -> None:
    page = page_html(httpx.get(f"{studio.address}/studio/{path}"))
    commands = [html.unescape(each) for each in re.findall(r'data-copy="(veneer [^"]*)"', page)]
    assert commands or path == "train"
    for each in commands:
        parse(each)


def test_a_view_that_cannot_be_drawn_says_so_in_the_page(studio: Served, tiny: tuple[Path, Path]) -> None:
    with open_library(tiny[1]) as library:
        odd = JobStore(library).create("", {}, name="odd")  # a job without a configuration
    page = httpx.get(f"{studio.address}/studio/run?job={odd.id}")
    assert page.status_code == 500
    for words in ("Run", "Internal error", "the server&#39;s log has"):
        assert words in page_html(page)
    assert "KeyError" in studio.log.read_text()
    assert httpx.get(f"{studio.address}/studio/train").status_code == 200
