"""Live as the sockets of two browsers see it: what a move would do is said, made, seen by both, and taken back."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.serve.http.toy import wait_for
from tests.serve.tenancy.conftest import set_price
from tests.studio.conftest import Served
from tests.studio.windows import opened, page_html
from veneer.jobs.store import money
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import EACH, Store
from veneer.studio.route import request_texts


@pytest.fixture
def store(studio: Served) -> Iterator[Store]:
    found = Store(str(studio.home / "tenants.sqlite"))
    routes.set_route(found, "parcels", [("support@1", 90), ("support@2", 10)], who="test")
    yield found
    routes.remove_route(found, "parcels", who="test")
    found.close()


def is_bar(element: dict[str, Any]) -> bool:
    """Of the route that there is, not of a new one."""
    return len(element.get("props", {}).get("parts", [])) == 2


def test_a_move_is_said_before_it_is_made_and_seen_by_who_else_looks(studio: Served, store: Store) -> None:
    url = f"{studio.address}/studio/live"
    wait_for(lambda: "support@2" in page_html(httpx.get(url)))
    with opened(url) as one, opened(url) as other:
        one.tell(is_bar, "moved", [80, 20])
        one.until(
            "Of the users of parcels, 10 % move from support@1 to support@2; nobody else changes.",
            "veneer tenant route set parcels support@1=80 support@2=20",
        )
        assert dict(store.look().routes["", "parcels"].targets) == {"support@1": 90, "support@2": 10}
        one.press("Apply")
        wait_for(lambda: dict(store.look().routes["", "parcels"].targets) == {"support@1": 80, "support@2": 20})
        other.until("80.0", "20.0")
        one.tell(is_bar, "moved", [50, 50])  # of a bar that was drawn anew meanwhile: nothing comes of it
    with store.engine.connect() as c:
        newest = routes.route_history(c, "parcels")[0]
    assert newest["who"] == "studio"
    routes.rollback_route(store, "parcels", who="test")
    assert dict(store.look().routes["", "parcels"].targets) == {"support@1": 90, "support@2": 10}


def test_an_older_version_can_be_let_go_live_too(studio: Served, store: Store) -> None:
    """A step that was used before another one was has its link as well."""
    routes.set_route(store, "parcels", [("support@2", 100)], who="test")
    for name in ("support@1", "acme/tone@1"):
        began = f"{name.partition('@')[0]} begins: 90 % of users get {studio.base.name} and 10 % of users get {name}"
        wait_for(
            lambda name=name, began=began: began in page_html(httpx.get(f"{studio.address}/studio/live?ref={name}"))
        )
    for name in ("support@3", "nothing@1", "parcels", "support@prod"):
        assert "begins: 90 %" not in page_html(httpx.get(f"{studio.address}/studio/live?ref={name}")), name


def test_who_used_what_for_how_much_and_what_is_in_memory(studio: Served, store: Store) -> None:
    set_price(store, 3 * 10**11, 0, 7 * 10**11)
    manage.change_settings(store, EACH, {"requests_per_minute": 5000}, who="test")
    wait_for(lambda: "<b>each tenant</b>, all adapters: 5,000 requests a minute" in live(studio))
    asked = {"model": "support@2", "prompt": "Where is my parcel?", "max_tokens": 2}
    httpx.post(f"{studio.address}/v1/completions", json=asked, timeout=60).raise_for_status()

    def used() -> dict[str, Any]:
        with store.engine.connect() as c:
            return next(
                (row for row in usage(c, by=("adapter",), tenant="") if row["adapter"] == "support@2"), {"cost": 0}
            )

    wait_for(lambda: used()["cost"] > 0)
    row = [f"{used()['requests']:,}", f"{used()['prompt']:,}", f"{used()['completion']:,}", money(used()["cost"])]
    assert re.search("".join(f'<td class="n"[^>]*>{re.escape(figure)}</td>' for figure in row), live(studio))
    assert re.search(r"In memory.*<td>support@2</td>", live(studio), re.DOTALL)
    assert "veneer tenant usage" in live(studio)
    cards = page_html(httpx.get(f"{studio.address}/studio/?q=support"))
    assert "live: parcels 10 %" in cards, "of the newest version, which a card is of"
    set_price(store, None, None, None)
    manage.change_settings(store, EACH, {"requests_per_minute": None}, who="test")


def by_tenant(store: Store) -> dict[str, int]:
    with store.engine.connect() as c:
        return {row["tenant"]: row["requests"] for row in usage(c, by=("tenant",))}


def test_trials_are_booked_apart_from_clients(studio: Served, store: Store) -> None:
    routes.set_route(store, "parcels", [("support@2", 1)], shadow="support@1", who="test")
    wait_for(lambda: "support@1 answers 100 % of requests too" in live(studio))
    before = by_tenant(store)
    with opened(f"{studio.address}/studio/compare?c=parcels&p=Where&m=2") as window:
        window.press("Ask")
        window.until("support@2 · 2 tokens")
    wait_for(lambda: by_tenant(store).get("~studio", 0) == before.get("~studio", 0) + 2)
    assert by_tenant(store).get("", 0) == before.get("", 0)
    assert "trials in the Studio" in live(studio)
    with store.engine.connect() as c:
        assert not routes.shadow_log(c), "a trial has no shadow"


def copied(page: str) -> list[str]:
    """What the copy buttons of a page copy, as the browser has it."""
    return [html.unescape(text) for text in re.findall(r'data-copy="([^"]*)" data-id="copy', page, re.DOTALL)]


def test_requests_to_copy_are_answered(studio: Served, store: Store) -> None:
    pytest.importorskip("openai")
    curl, client = copied(live(studio))
    assert curl.startswith(f"curl {studio.address}/v1/chat/completions")
    answer = json.loads(subprocess.run(["sh", "-c", f"{curl} -sS"], capture_output=True, check=True).stdout)
    assert answer["model"] == "parcels"
    said = subprocess.run([sys.executable, "-c", client], capture_output=True, check=True, text=True).stdout
    assert said.strip()


def test_a_request_to_copy_names_the_key_by_its_variable() -> None:
    frame = SimpleNamespace(address="https://veneer.example", visitor=SimpleNamespace(key="secret"))
    service = SimpleNamespace(engine=SimpleNamespace(makes="pictures"))
    curl, client = request_texts(SimpleNamespace(frame=frame, studio=SimpleNamespace(service=service)), "it's")  # type: ignore[arg-type]
    assert shlex.split(curl) == [
        "curl",
        "https://veneer.example/v1/images/generations",
        "-H",
        "Content-Type: application/json",
        "-H",
        "Authorization: Bearer $VENEER_API_KEY",
        "-d",
        json.dumps({"model": "it's", "prompt": "A red apple"}),
    ]
    compile(client, "client", "exec")
    assert 'api_key=os.environ["VENEER_API_KEY"]' in client
    assert "secret" not in curl + client


def live(studio: Served) -> str:
    return page_html(httpx.get(f"{studio.address}/studio/live"))
