"""The routes under /admin: everything there, on a key of their own, with bodies that are read strictly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, toy_app
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.tenancy.admin import admin_router
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
        async def go() -> httpx.Response:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            sent: dict[str, Any] = {"json": body}
            if isinstance(body, bytes):
                sent, headers["content-type"] = {"content": body}, "application/json"
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
                return await client.request(method, f"/admin{path}", params=query, headers=headers, **sent)

        return asyncio.run(go())

    return ask


def test_the_life_of_a_tenant(call: Call, tenants: Tenants) -> None:
    made = call("POST", "/tenants", {"name": "acme", "weight": 2, "adapters": ["acme/*"]})
    assert (made.status_code, made.json()["weight"], made.json()["adapters"]) == (201, 2.0, ["acme/*"])
    assert call("PATCH", "/tenants/acme", {"enabled": False}).json()["enabled"] is False
    assert call("PATCH", "/tenants/acme", {"enabled": True}).json()["weight"] == 2.0
    seen = call("PATCH", "/tenants/acme/adapters", {"add": ["support"], "remove": ["acme/*"]})
    assert seen.json() == {"adapters": ["support"]}
    assert call("PATCH", "/shared", {"add": ["base"]}).json() == {"adapters": ["base"]}
    listed = call("GET", "/tenants").json()
    assert ([t["name"] for t in listed["tenants"]], listed["shared"]) == (["acme"], ["base"])

    key = call("POST", "/tenants/acme/keys", {"label": "web", "expires": "90d"}).json()
    caller = asyncio.run(tenants.caller(key["key"]))
    assert caller.tenant == "acme"
    assert [caller.sees(name) for name in ("support", "acme/x", "base")] == [True, False, True]
    call("POST", "/tenants", {"name": "globex"})  # a key is not another tenant's to change
    assert call("POST", f"/tenants/globex/keys/{key['id']}/rotate", {}).status_code == 404
    assert call("DELETE", f"/tenants/globex/keys/{key['id']}").status_code == 404
    call("DELETE", "/tenants/globex")
    rotated = call("POST", f"/tenants/acme/keys/{key['id']}/rotate", {"grace": "1h"}).json()
    assert rotated["label"] == "web"
    assert call("DELETE", f"/tenants/acme/keys/{rotated['id']}").json()["revoked"]
    keys = call("GET", "/tenants/acme/keys").json()["keys"]
    assert [k["state"] for k in keys] == ["active", "revoked"]
    assert not any("hash" in k or "key" in k for k in keys)
    assert call("DELETE", "/tenants/acme").json() == {"removed": "acme"}
    assert call("GET", "/tenants/acme").status_code == 404


def test_limits_prices_routes_usage_and_audit(call: Call, tenants: Tenants) -> None:
    call("POST", "/tenants", {"name": "acme"})
    limit = call("PUT", "/limits", {"tenant": "acme", "requests_per_minute": 1, "tokens_per_day": 9}).json()
    assert (limit["requests_per_minute"], limit["concurrency"]) == (1, None)
    limit = call("PUT", "/limits", {"tenant": "acme", "tokens_per_day": None}).json()
    assert (limit["requests_per_minute"], limit["tokens_per_day"]) == (1, None)
    assert [x["tenant"] for x in call("GET", "/limits").json()["limits"]] == ["acme"]
    call("PUT", "/prices", {"prompt": 1_000_000, "cached": 0, "completion": 2_000_000})
    assert call("GET", "/prices").json()["prices"][0]["completion"] == 2_000_000

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
    assert call("DELETE", "/prices").status_code == 200
    assert call("GET", "/audit", what="route").json()["lines"][0]["who"] == "admin"
    assert call("GET", "/audit/verify").json()["ok"] is True


def test_what_is_kept_of_a_tenant_is_set_and_taken_away(call: Call, tenants: Tenants) -> None:
    call("POST", "/tenants", {"name": "acme"})
    assert call("PUT", "/tenants/acme/feedback", {"days": 7.0, "names": ["acme/*"]}).json()["names"] == ["acme/*"]
    assert tenants.store.look().feedback["acme"].days == 7.0
    for wrong in ({"days": 0}, {"days": 1, "names": ["../x"]}, {"names": []}):
        assert call("PUT", "/tenants/acme/feedback", wrong).status_code == 400, wrong
    assert call("PUT", "/tenants/gone/feedback", {"days": 7}).status_code == 404
    assert call("DELETE", "/tenants/acme/feedback").status_code == 200
    assert not tenants.store.look().feedback


def test_only_the_admin_key_opens_anything(call: Call, tenants: Tenants) -> None:
    call("POST", "/tenants", {"name": "acme"})
    tenants_key = call("POST", "/tenants/acme/keys", {}).json()["key"]
    routes = [(method, r.path) for r in admin_router(tenants, ToyCatalog()).routes for method in r.methods]  # type: ignore[attr-defined]
    assert len(routes) > 20
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
        ("POST", "/tenants", {"name": "a", "wieght": 2}, {}, "unknown key wieght: did you mean weight?"),
        ("PUT", "/limits", {"tenant": "acme", "request_per_minute": 2}, {}, "did you mean requests_per_minute?"),
        ("PUT", "/limits", {"tenant": "acme", "concurrency": "2"}, {}, "concurrency must be"),
        ("PUT", "/limits", {"tenant": "acme", "concurrency": 0}, {}, "1 or more"),
        ("PUT", "/routes", {"route": "s", "targets": [{"adapter": "v", "wight": 1}]}, {}, "did you mean weight?"),
        ("PUT", "/routes", {"route": "../s", "targets": [{"adapter": "v"}]}, {}, "cannot name"),
        ("DELETE", "/routes", None, {"route": "s", "tennant": "acme"}, "unknown key tennant: did you mean tenant?"),
        ("GET", "/usage", None, {"by": "day,tenants"}, "did you mean tenant?"),
        ("GET", "/usage", None, {"format": "xml"}, "json or csv"),
        ("GET", "/usage", None, {"tennant": "acme"}, "did you mean tenant?"),
        ("GET", "/audit", None, {"limit": 0}, "limit must be"),
        ("POST", "/tenants/acme/keys", {"expires": "soon"}, {}, "not a time"),
        ("POST", "/tenants", {"name": "acme"}, {}, "already"),
        ("POST", "/tenants", b'{"name": "b", "weight": Infinity}', {}, "Infinity is not a number there"),
    ],
)
def test_what_is_wrong_is_said(call: Call, method: str, path: str, body: Any, query: dict, words: str) -> None:
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
        ("PUT", "/limits", {"tenant": "acne", "concurrency": 1}, "did you mean acme?"),
    ],
)
def test_what_is_not_there_is_404(call: Call, method: str, path: str, body: Any, words: str) -> None:
    call("POST", "/tenants", {"name": "acme"})
    answer = call(method, path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert words in answer.json()["error"]["message"]


def test_a_route_is_checked_against_what_the_server_answers_by_before_it_moves(tenants: Tenants) -> None:
    """A target or a shadow that is not there or cannot be served: 400 that says which, and nothing has moved."""
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
    assert tenants.store.look().routes["", "support"].targets == (("v1", 1),)
    assert put("v2").status_code == 200
    there.remove("v1")
    back = call("POST", "/routes/rollback", {"route": "support"})
    assert (back.status_code, "v1 cannot be served" in back.text) == (400, True)
    assert put("v9", force=True).status_code == 200
    assert call("POST", "/routes/rollback", {"route": "support"}).json()["targets"] == {"v2": 1}


def test_what_training_costs_and_how_much_there_may_be(call: Call, tenants: Tenants) -> None:
    call("POST", "/tenants", {"name": "acme"})
    terms = {"tenant": "acme", "price": 4_000_000, "budget": 500_000_000, "jobs": 2}
    assert call("PUT", "/training", terms).json() == terms
    assert call("GET", "/training").json() == {"training": [terms]}
    assert call("PUT", "/training", {"tenant": "nobody"}).status_code == 404
    assert call("PUT", "/training", {**terms, "jobs": -1}).status_code == 400
    assert call("PUT", "/training", {**terms, "price": "4"}).status_code == 400
    call("DELETE", "/training", tenant="acme")
    assert call("GET", "/training").json() == {"training": []}
    assert [line["what"] for line in call("GET", "/audit").json()["lines"]][:2] == ["training.set", "training.set"]
