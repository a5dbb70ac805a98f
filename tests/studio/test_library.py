"""Library and an adapter's page, as plain HTML: what a card says, how a link narrows them, who is made of whom."""

from __future__ import annotations

import re

import httpx

from tests.serve.http.toy import wait_for
from tests.studio.conftest import Served
from tests.studio.windows import page_html
from veneer.adapters.mix import keep_mix
from veneer.library.library import open_library


def page_of(studio: Served, path: str) -> str:
    return page_html(httpx.get(f"{studio.address}/studio/{path}", timeout=60))


def cards(studio: Served, narrowed: str) -> set[str]:
    return set(re.findall(r'data-id="card ([^"]+)"', page_of(studio, f"?{narrowed}")))


def test_a_link_narrows_the_cards(studio: Served) -> None:
    everything = {"support@2", "acme/tone@1", "globex/tone@1"}
    for narrow in ("rank=4", "health=unknown", "kind=text"):
        assert everything <= cards(studio, narrow), narrow  # other tests of this server keep adapters too
    assert cards(studio, "rank=64") == set()
    assert "No matches" in page_of(studio, "?rank=64")
    for rank in ("9" * 23, "²", "-1"):
        assert everything <= cards(studio, f"rank={rank}"), "what is no rank narrows nothing"
    with open_library(studio.library) as library:
        library.tag("acme/tone@1", "tickets")
        wait_for(lambda: cards(studio, "tag=tickets") == {"acme/tone@1"})
        assert cards(studio, "tag=tickets&q=support") == set()
        library.untag("acme/tone@1", "tickets")


def test_parents_and_children_lead_to_one_another(studio: Served) -> None:
    with open_library(studio.library) as library:
        keep_mix(library, ["support@1", "acme/tone:0.5"], "mixed")
        made, parent = page_of(studio, "adapter?ref=mixed"), page_of(studio, "adapter?ref=support@1")
        library.remove("mixed")
    assert re.search(r"Made from</dt><dd>.*ref=support%401", made)
    assert re.search(r"Derived adapters</dt><dd>.*ref=mixed%401", parent)
