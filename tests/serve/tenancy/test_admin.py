"""The /admin routes: tenants, settings, keys, routes and records, with strict bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, responses, toy_app
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.tenancy.admin import admin_router
from veneer.serve.tenancy.store import LIMITS
from veneer.serve.tenancy.tenants import Tenants

ADMIN = "an-admin-key-of-some-length"
Call = Callable[..., httpx.Response]


@pytest.fixture
def tenants(quick: Path) -> Iterator[Tenants]:
    opened = Tenants(str(quick / "tenants.sqlite"), admin_key=ADMIN, watch=False)
    yield opened
    opened.close()


@pytest.fixture
def call(tenants: Tenants) -> Call:
    return caller_of(
        toy_app(ToyEngine(ToyText()), ToyCatalog(), tenants, routers=[admin_router(tenants, ToyCatalog())])
    )


def caller_of(app: Any) -> Call:
    def ask(method: str, path: str, body: Any = None, key: str | None = ADMIN, **query: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        headers = {"content-type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        request = {"method": method, "url": f"/admin{path}", "params": query, "headers": headers, "content": content}
        return responses(app, [request])[0]

    return ask


def test_a_tenant_is_created_changed_and_removed(call: Call, tenants: Tenants) -> None:
    made = call("POST", "/tenants", {"name": "acme", "weight": 2, "adapters": ["acme/*"]})
    assert (made.status_code, made.json()["weight"], made.json()["adapters"]) == (201, 2.0, ["acme/*"])
    assert call("PATCH", "/tenants/acme", {"enabled": False}).json()["enabled"] is False
    assert call("PATCH", "/tenants/acme", {"enabled": True}).json()["weight"] == 2.0
    assert call("PATCH", "/tenants/acme", {"adapters": ["support"]}).json()["adapters"] == ["support"]
    assert call("PATCH", "/settings", {"adapters": ["base"]}).json()["adapters"] == ["base"]
    (listed,) = call("GET", "/tenants").json()["tenants"]
    assert (listed["name"], listed["adapters"]) == ("acme", ["support"])

    key = call("POST", "/tenants/acme/keys", {"label": "web", "expires": "90d"}).json()
    caller = asyncio.run(tenants.authenticate(key["key"]))
    assert caller.tenant == "acme"
    assert [caller.sees(name) for name in ("support", "acme/x", "base")] == [True, False, True]
    call("POST", "/tenants", {"name": "globex"})  # a tenant's key cannot be changed through another tenant
    assert call("DELETE", f"/tenants/globex/keys/{key['id']}").status_code == 404
    call("DELETE", "/tenants/globex")
    other = call("POST", "/tenants/acme/keys", {}).json()
    assert call("DELETE", f"/tenants/acme/keys/{other['id']}").json()["revoked"]
    keys = call("GET", "/tenants/acme/keys").json()["keys"]
    assert [k["state"] for k in keys] == ["active", "revoked"]
    assert not any("hash" in k or "key" in k for k in keys)
    assert call("DELETE", "/tenants/acme").json() == {"removed": "acme"}
    assert call("GET", "/tenants/acme").status_code == 404


def test_settings_of_all_scopes(call: Call, tenants: Tenants) -> None:
    call("POST", "/tenants", {"name": "acme"})
    changed = call("PATCH", "/tenants/acme", {"requests_per_minute": 1, "tokens_per_day": 9}).json()
    assert (changed["requests_per_minute"], changed["concurrency"]) == (1, None)
    changed = call("PATCH", "/tenants/acme", {"tokens_per_day": None}).json()
    assert (changed["requests_per_minute"], changed["tokens_per_day"]) == (1, None)
    call("PATCH", "/tenants/acme", {"concurrency": 2, "prompt_price": 3, "completion_price": 4}, adapter="support")
    own = dict.fromkeys(LIMITS) | {"concurrency": 2, "prompt_price": 3, "cached_price": 3, "completion_price": 4}
    assert call("GET", "/tenants/acme").json() == changed | {"by_adapter": {"support": own}}
    call("PATCH", "/settings", {"tokens_per_day": 7}, tenant="*")
    call("PATCH", "/settings", {"training_price": 4_000_000, "training_jobs": 2, "shared_cache": ["base"]})
    for_all, for_each = call("GET", "/settings").json()["settings"]
    assert (for_all["training_price"], for_all["training_budget"]) == (4_000_000, None)
    assert for_all["shared_cache"] == ["base"]
    assert (for_each["tenant"], for_each["tokens_per_day"]) == ("*", 7)
    call("PATCH", "/settings", {"training_price": None, "training_jobs": None, "training_budget": None})
    settings = tenants.store.refresh()
    assert not settings.training
    assert settings.price("acme", "support").cached == 3
    lines = call("GET", "/audit").json()["lines"]
    assert {line["what"] for line in lines[:-1]} == {"settings.change"}
    prices = [lines[0][when]["training_price"] for when in ("before", "after")]
    assert (lines[0]["subject"], prices) == ("all", [4_000_000, None])


def test_stored_answers_are_set_and_removed(call: Call, tenants: Tenants) -> None:
    call("POST", "/tenants", {"name": "acme"})
    changed = call("PATCH", "/tenants/acme", {"feedback_days": 7.0, "feedback_names": ["acme/*"]}).json()
    assert changed["feedback_names"] == ["acme/*"]
    assert tenants.store.refresh().feedback["acme"].days == 7.0
    call("PATCH", "/tenants/acme", {"feedback_days": None})
    assert not tenants.store.refresh().feedback


def test_routes_usage_and_audit(call: Call, tenants: Tenants) -> None:
    call("POST", "/tenants", {"name": "acme"})
    call("PATCH", "/settings", {"prompt_price": 1_000_000, "cached_price": 0, "completion_price": 2_000_000})

    route = {"route": "acme/support", "tenant": "acme", "targets": [{"adapter": "v1"}, {"adapter": "v2", "weight": 3}]}
    assert call("PUT", "/routes", route).json()["targets"] == {"v1": 1, "v2": 3}
    call("PUT", "/routes", route | {"targets": [{"adapter": "v3"}], "shadow": "v1", "fraction": 0.1})
    assert call("GET", "/routes").json()["routes"][0]["shadow"] == "v1"
    back = call("POST", "/routes/rollback", {"route": "acme/support", "tenant": "acme"}).json()
    assert back["targets"] == {"v1": 1, "v2": 3}
    moves = call("GET", "/routes/history", route="acme/support", tenant="acme").json()["moves"]
    assert [m["current"] for m in moves] == [False, True]
    assert call("DELETE", "/routes", route="acme/support", tenant="acme").status_code == 200
    assert call("GET", "/shadows", route="acme/support").json() == {"summary": [], "comparisons": []}

    async def one() -> None:
        served = ResolvedModel((), "support", "v1")
        async with tenants.admitted(
            Principal("tenant", "acme"), served, request="a", prompt_tokens=1, max_tokens=1
        ) as bill:
            bill.used(Usage(2, 0, 3))

    asyncio.run(one())
    assert tenants.ledger.flush()
    assert call("GET", "/usage", by="tenant").json()["usage"][0]["cost"] == 8
    table = call("GET", "/usage", by="tenant,day", format="csv", tenant="acme")
    assert table.headers["content-type"].startswith("text/csv")
    assert table.text.startswith("tenant,day,requests,done")
    assert call("GET", "/audit", what="route").json()["lines"][0]["who"] == "admin"
    assert call("GET", "/audit/verify").json()["ok"] is True


def test_admin_routes_need_the_admin_key(call: Call, tenants: Tenants) -> None:
    call("POST", "/tenants", {"name": "acme"})
    tenants_key = call("POST", "/tenants/acme/keys", {}).json()["key"]
    routes = [(method, r.path) for r in admin_router(tenants, ToyCatalog()).routes for method in r.methods]  # type: ignore[attr-defined]
    assert len(routes) == 20
    for method, path in routes:
        for key in (None, "", "x", tenants_key, f"sha256:{tenants.admin_hash}"):
            refused = call(
                method, path.removeprefix("/admin").replace("{tenant}", "acme").replace("{key}", "x"), key=key
            )
            expected = (403, "forbidden") if key == tenants_key else (401, "invalid_api_key")
            assert (refused.status_code, refused.json()["error"]["code"]) == expected, (method, path)


@pytest.mark.parametrize(
    ("method", "path", "body", "query", "words"),
    [
        ("POST", "/tenants", {"name": "a", "wieght": 2}, {}, "unknown key 'wieght', did you mean 'weight'?"),
        ("PATCH", "/tenants/acme", {"request_per_minute": 2}, {}, "did you mean 'requests_per_minute'?"),
        ("PATCH", "/tenants/acme", {"concurrency": "2"}, {}, "concurrency must be"),
        ("PATCH", "/tenants/acme", {"concurrency": 0}, {}, "concurrency must be"),
        ("PATCH", "/tenants/acme", {"training_jobs": -1}, {}, "training_jobs must be"),
        ("PATCH", "/tenants/acme", {"feedback_days": 0.0}, {}, "feedback_days must be"),
        ("PATCH", "/tenants/acme", {"adapters": ["../x"]}, {}, "not a valid pattern"),
        ("PATCH", "/tenants/acme", {"prompt_price": 1}, {}, "needs both prompt_price and completion_price"),
        ("PATCH", "/tenants/acme", {"weight": 2.0}, {"adapter": "support"}, "not a setting of adapter support"),
        ("PATCH", "/tenants/acme", {"shared_cache": ["base"]}, {}, "not a setting of a tenant"),
        ("PATCH", "/settings", {"weight": 2.0}, {}, "not a setting of all"),
        ("PATCH", "/settings", {"prompt_price": 1}, {"tenant": "*"}, "not a setting of each tenant"),
        ("PATCH", "/settings", {"concurrency": 1}, {"tenant": "acme"}, "tenant must be"),
        ("PUT", "/routes", {"route": "s", "targets": [{"adapter": "v", "wight": 1}]}, {}, "key 'targets.0.wight'"),
        ("PUT", "/routes", {"route": "../s", "targets": [{"adapter": "v"}]}, {}, "cannot name"),
        ("DELETE", "/routes", None, {"route": "s", "tennant": "acme"}, "unknown key tennant: of route, tenant"),
        ("GET", "/usage", None, {"by": "day,tenants"}, "did you mean tenant?"),
        ("GET", "/usage", None, {"format": "xml"}, "'json' or 'csv'"),
        ("GET", "/usage", None, {"tennant": "acme"}, "unknown key tennant"),
        ("GET", "/audit", None, {"limit": 0}, "limit must be"),
        ("POST", "/tenants/acme/keys", {"expires": "soon"}, {}, "not a time"),
        ("POST", "/tenants", {"name": "acme"}, {}, "already"),
        ("POST", "/tenants", b'{"name": "b", "weight": Infinity}', {}, "Infinity is not a valid JSON number"),
    ],
)
def test_invalid_requests_are_400_with_the_reason(call, method, path, body, query, words):
    call("POST", "/tenants", {"name": "acme"})
    answer = call(method, path, body, **query)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert "None" not in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("GET", "/tenants/acne", None, "did you mean acme?"),
        ("DELETE", "/tenants/acme/keys/0000000000", None, "no key"),
        ("POST", "/routes/rollback", {"route": "support"}, "no route"),
        ("PATCH", "/tenants/acne", {"concurrency": 1}, "did you mean acme?"),
    ],
)
def test_unknown_names_are_404_with_the_nearest(call: Call, method: str, path: str, body: Any, words: str) -> None:
    call("POST", "/tenants", {"name": "acme"})
    answer = call(method, path, body)
    assert answer.status_code == 404
    assert words in answer.json()["error"]["message"]


def test_route_targets_are_checked_before_a_move(tenants: Tenants) -> None:
    """A target or shadow that is missing or cannot be served returns 400 and is named in the message.

    The route does not change.
    """
    there = {"v1", "v2"}

    class Names(ToyCatalog):
        def check(self, name: str) -> None:
            if name == "down":
                raise Refused("the store cannot be used", status=503, code="unavailable")
            if name not in there:
                raise Refused(f"The model {name!r} does not exist.", status=404, code="model_not_found")

    app = toy_app(ToyEngine(ToyText()), ToyCatalog(), tenants, routers=[admin_router(tenants, Names("smol"))])

    call = caller_of(app)

    def put(*names: str, shadow: str | None = None, **more: Any) -> httpx.Response:
        targets = [{"adapter": name} for name in names]
        return call("PUT", "/routes", {"route": "support", "targets": targets, "shadow": shadow, **more})

    own = call("PUT", "/routes", {"route": "smol", "targets": [{"adapter": "v1"}], "force": True})
    assert (own.status_code, "smol is the base" in own.text) == (400, True)
    assert put("v1").status_code == 200
    for wrong, role in ((put("v9"), "target"), (put("v1", "v9"), "target"), (put("v2", shadow="v9"), "shadow")):
        assert wrong.status_code == 400
        assert f"the {role} v9 cannot be served" in wrong.json()["error"]["message"]
    assert put("down").status_code == 503
    assert tenants.store.refresh().routes["", "support"].targets == (("v1", 1),)
    assert put("v2").status_code == 200
    there.remove("v1")
    back = call("POST", "/routes/rollback", {"route": "support"})
    assert (back.status_code, "v1 cannot be served" in back.text) == (400, True)
    assert put("v9", force=True).status_code == 200
    assert call("POST", "/routes/rollback", {"route": "support"}).json()["targets"] == {"v2": 1}
