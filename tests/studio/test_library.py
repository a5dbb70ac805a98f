"""The library and adapter views as plain HTML: filters in a link, and links between parents and children."""

from __future__ import annotations

import re

import httpx

from tests.serve.http.toy import wait_for
from tests.studio.conftest import StudioServer
from tests.studio.page_socket import page_html
from veneer.adapters.mix import add_mix
from veneer.library.library import open_library


def page_of(studio: StudioServer, path: str) -> str:
    return page_html(httpx.get(f"{studio.address}/studio/{path}", timeout=60))


def cards(studio: StudioServer, query: str) -> set[str]:
    return set(re.findall(r'data-id="card ([^"]+)"', page_of(studio, f"?{query}")))


def test_link_filters_the_cards(studio: StudioServer) -> None:
    everything = {"support@2", "acme/tone@1", "globex/tone@1"}
    for query in ("rank=4", "health=unknown", "kind=text", f"rank={'9' * 23}", "rank=²", "rank=-1"):
        assert everything <= cards(studio, query), query  # other tests add cards; malformed ranks are ignored
    assert cards(studio, "rank=64") == set()
    assert "No matches" in page_of(studio, "?rank=64")
    with open_library(studio.library) as library:
        library.tag("acme/tone@1", "tickets")
        wait_for(lambda: cards(studio, "tag=tickets") == {"acme/tone@1"})
        assert cards(studio, "tag=tickets&q=support") == set()
        library.untag("acme/tone@1", "tickets")


def test_parents_and_children_link_to_each_other(studio: StudioServer) -> None:
    with open_library(studio.library) as library:
        add_mix(library, ["support@1", "acme/tone:0.5"], "mixed")
        child, parent = page_of(studio, "adapter?ref=mixed"), page_of(studio, "adapter?ref=support@1")
        library.remove("mixed")
    assert re.search(r"Derived from</dt><dd>.*ref=support%401", child)
    assert re.search(r"Derived adapters</dt><dd>.*ref=mixed%401", parent)
