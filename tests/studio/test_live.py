"""The Live view in two browsers.

Changes of a route are described, applied, shown in both browsers, and rolled back.
"""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.serve.http.toy import wait_for
from tests.serve.tenancy.conftest import set_price
from tests.studio.conftest import StudioServer
from tests.studio.page_socket import open_page, page_html
from veneer.jobs.store import money
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import EACH, Store
from veneer.studio.routes import curl_command


@pytest.fixture
def store(studio: StudioServer) -> Iterator[Store]:
    tenant_store = Store(str(studio.home / "tenants.sqlite"))
    routes.set_route(tenant_store, "parcels", [("support@1", 90), ("support@2", 10)], actor="test")
    yield tenant_store
    routes.remove_route(tenant_store, "parcels", actor="test")
    tenant_store.close()


def live(studio: StudioServer, query: str = "") -> str:
    return page_html(httpx.get(f"{studio.address}/studio/live{query}"))


def targets(store: Store) -> dict[str, int]:
    return dict(store.refresh().routes["", "parcels"].targets)


def test_change_is_described_then_applied_and_shown_to_others(studio: StudioServer, store: Store) -> None:
    url = f"{studio.address}/studio/live"
    wait_for(lambda: "history parcels" in live(studio))
    with open_page(url) as first, open_page(url) as second:
        first.fill("Weight of support@1", 80)
        first.fill("Weight of support@2", 20)
        first.until(
            "Of the users of parcels, 10% move from support@1 to support@2; all other users keep their target.",
            "veneer tenant route set parcels support@1=80 support@2=20",
        )
        assert targets(store) == {"support@1": 90, "support@2": 10}
        first.press("Apply")
        wait_for(lambda: targets(store) == {"support@1": 80, "support@2": 20})
        second.until("support@1 80%", "support@2 20%")
    with store.engine.connect() as c:
        assert routes.route_history(c, "parcels")[0]["who"] == "studio"
    routes.rollback_route(store, "parcels", actor="test")
    assert targets(store) == {"support@1": 90, "support@2": 10}


def test_removed_route_can_be_created_again(studio: StudioServer, store: Store) -> None:
    routes.set_route(store, "again", [("support@1", 1)], actor="test")
    routes.remove_route(store, "again", actor="test")
    with open_page(f"{studio.address}/studio/live") as page:
        page.fill("Name", "again")
        page.press("Create route")
        page.until("again is live")
    assert dict(store.refresh().routes["", "again"].targets) == {studio.base.name: 100}
    routes.remove_route(store, "again", actor="test")


def test_linked_version_is_proposed_as_a_canary(studio: StudioServer, store: Store) -> None:
    routes.set_route(store, "parcels", [("support@2", 100)], actor="test")
    for name in ("support@1", "acme/tone@1"):
        route = name.partition("@")[0]
        canary = f"{route} begins: 90% of users get {studio.base.name} and 10% of users get {name}"
        wait_for(lambda name=name, canary=canary: canary in live(studio, f"?ref={name}"))
    for name in ("support@3", "nothing@1", "parcels", "support@prod"):
        assert "begins: 90%" not in live(studio, f"?ref={name}"), name


def test_usage_costs_limits_and_memory_are_shown(studio: StudioServer, store: Store) -> None:
    set_price(store, 3 * 10**11, 0, 7 * 10**11)
    manage.change_settings(store, EACH, {"requests_per_minute": 5000}, actor="test")
    wait_for(lambda: "<b>each tenant</b>, all adapters: 5,000 requests per minute" in live(studio))
    body = {"model": "support@2", "prompt": "Where is my parcel?", "max_tokens": 2}
    httpx.post(f"{studio.address}/v1/completions", json=body, timeout=60).raise_for_status()

    def used() -> dict[str, Any]:
        with store.engine.connect() as c:
            rows = usage(c, by=("adapter",), tenant="")
        return next((row for row in rows if row["adapter"] == "support@2"), {"cost": 0})

    wait_for(lambda: used()["cost"] > 0)
    row = [f"{used()['requests']:,}", f"{used()['prompt']:,}", f"{used()['completion']:,}", money(used()["cost"])]
    page = live(studio)
    assert re.search("".join(f'<td class="n"[^>]*>{re.escape(figure)}</td>' for figure in row), page)
    assert re.search(r"Adapters in memory.*<td>support@2</td>", page, re.DOTALL)
    assert "veneer tenant usage" in page
    assert "live: parcels 10%" in page_html(httpx.get(f"{studio.address}/studio/?q=support"))
    set_price(store, None, None, None)
    manage.change_settings(store, EACH, {"requests_per_minute": None}, actor="test")


def test_trials_are_not_billed_to_clients_and_have_no_shadow(studio: StudioServer, store: Store) -> None:
    def requests() -> dict[str, int]:
        with store.engine.connect() as c:
            return {row["tenant"]: row["requests"] for row in usage(c, by=("tenant",))}

    routes.set_route(store, "parcels", [("support@2", 1)], shadow="support@1", actor="test")
    wait_for(lambda: "support@1 also answers 100% of requests" in live(studio))
    previous = requests()
    with open_page(f"{studio.address}/studio/compare?c=parcels&p=Where&m=2") as page:
        page.press("Ask")
        page.until("support@2 · 2 tokens")
    wait_for(lambda: requests().get("~studio", 0) == previous.get("~studio", 0) + 2)
    assert requests().get("", 0) == previous.get("", 0)
    assert "Studio requests" in live(studio)
    with store.engine.connect() as c:
        assert not routes.shadow_log(c)


def test_example_request_is_answered(studio: StudioServer, store: Store) -> None:
    (curl,) = re.findall(r'data-copy="(curl [^"]*)"', live(studio))
    command = html.unescape(curl)
    assert command.startswith(f"curl {studio.address}/v1/chat/completions")
    answer = json.loads(subprocess.run(["sh", "-c", f"{command} -sS"], capture_output=True, check=True).stdout)
    assert answer["model"] == "parcels"


def test_example_request_does_not_contain_the_key() -> None:
    frame = SimpleNamespace(address="https://veneer.example", visitor=SimpleNamespace(key="secret"))
    page: Any = SimpleNamespace(frame=frame, studio=SimpleNamespace(makes_images=True))
    words = ["curl", "https://veneer.example/v1/images/generations", "-H", "Content-Type: application/json"]
    words += ["-H", "Authorization: Bearer $VENEER_API_KEY", "-d"]
    assert shlex.split(curl_command(page, "it's")) == [*words, json.dumps({"model": "it's", "prompt": "A red apple"})]
