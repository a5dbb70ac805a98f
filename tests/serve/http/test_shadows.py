"""Shadows on a server with tenants are counted, logged and billed to the operator."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.library.conftest import quick  # noqa: F401
from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyText, live, wait_for
from tests.serve.tenancy.conftest import new_tenant, set_price
from veneer.library.database import reading
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, make_mix
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.tenants import Tenants


class Shadowed(ToyCatalog):
    """A catalog in which `stable` and `canary` have shadows; `risky` has a shadow that is missing."""

    def resolve(self, model: str, caller: Principal) -> ResolvedModel:
        shadows: dict[str, Any] = {
            "stable": ("polite", make_mix([("d-polite", 1.0)])),
            "canary": ("sql@2", make_mix([("d-sql", 1.0)])),
            "risky": ("gone", Refused("there is no gone", status=404, code="model_not_found")),
        }
        if model not in shadows:
            return super().resolve(model, caller)
        return ResolvedModel(make_mix([("d-sql", 1.0)]), model, "sql", shadows[model], ("sql",))


@pytest.fixture
def tenants(quick: Path) -> Iterator[Tenants]:  # noqa: F811
    opened = Tenants(str(quick / "tenants.sqlite"), watch=False)
    yield opened
    opened.close()


@pytest.fixture
def server(tenants: Tenants) -> Iterator[tuple[Live, str]]:
    key = new_tenant(tenants.store, "acme")
    set_price(tenants.store, 10_000_000, 10_000_000, 10_000_000)
    with live(ToyEngine(ToyText(tools=True)), Shadowed(), tenants) as served:
        yield served, key


def ask(server: Live, key: str, model: str, text: str = "Hi") -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 30}
    answer = server.post("/v1/chat/completions", body, key)
    assert answer.status_code == 200, answer.text
    wait_for(lambda: not server.service.shadows)
    return dict(answer.json()["usage"])


def test_shadows_are_counted_and_billed_to_the_operator(server: tuple[Live, str], tenants: Tenants) -> None:
    live_one, key = server
    used = [ask(live_one, key, model) for model in ("stable", "stable", "canary", "risky")]
    behind = [r for r in live_one.engine.seen if "-shadow" in r.id]
    assert {(r.tenant, r.weight) for r in behind} == {("~shadows", 0.1)}, "a shadow takes no tenant's turn"
    assert len(behind) == 3

    tenants.ledger.writer.flush()
    with reading(tenants.store.engine) as c:
        summary = {r["route"]: r for r in routes.shadow_summary(c)}
        log = routes.shadow_log(c)
    counts = {name: (r["compared"], r["same"], r["different"], r["failed"]) for name, r in summary.items()}
    assert counts == {"stable": (2, 0, 2, 0), "canary": (1, 1, 0, 0), "risky": (1, 0, 0, 1)}
    assert summary["stable"]["shadow_tokens"] == log[-1]["shadow_tokens"] > 0
    assert summary["risky"]["shadow_tokens"] is None
    assert [r["route"] for r in log] == ["risky", "canary", "stable", "stable"]
    assert [r["failed"] for r in log] == [True, False, False, False]

    lines: dict[tuple[str, str], Any] = {}

    def settled() -> bool:
        with reading(tenants.store.engine) as c:
            found = usage(c, by=("tenant", "adapter"))
        lines.clear()
        lines.update({(r["tenant"], r["adapter"]): r for r in found})
        return len(found) == 3 and not any(r["open"] for r in found)

    wait_for(settled)
    assert set(lines) == {("acme", "sql"), ("", "polite"), ("", "sql@2")}
    own = lines["acme", "sql"]
    assert (own["requests"], own["completion"]) == (4, sum(u["completion_tokens"] for u in used))
    shadow = lines["", "polite"]
    assert shadow["requests"] == 2
    assert shadow["cost"] == 10 * (shadow["prompt"] + shadow["completion"]) > 0


def test_a_failed_shadow_is_billed_for_its_tokens(server, tenants, monkeypatch):
    live_one, key = server
    own = live_one.engine.events

    async def events(request: Any) -> Any:
        count = 0
        async for event in own(request):
            yield event
            count += 1
            if "-shadow" in request.id and count == 3:
                raise RuntimeError("secret")

    monkeypatch.setattr(live_one.engine, "events", events)
    ask(live_one, key, "stable")
    tenants.ledger.writer.flush()
    with reading(tenants.store.engine) as c:
        (row,) = routes.shadow_log(c)
    assert (row["failed"], row["same"], row["first_difference"], row["shadow_tokens"]) == (True, False, None, 2)


def test_refused_shadows_are_reported(server: tuple[Live, str], tenants: Tenants) -> None:
    live_one, key = server
    manage.change_settings(tenants.store, "", {"requests_per_minute": 1}, adapter="polite", actor="me")
    asyncio.run(tenants.authenticate(key))
    for _ in range(2):
        ask(live_one, key, "stable")
    tenants.ledger.writer.flush()
    with reading(tenants.store.engine) as c:
        (r,) = routes.shadow_summary(c)
    assert (r["compared"], r["different"], r["failed"]) == (2, 1, 1)
