"""Roles of keys, and the routes with which a tenant manages its own keys and reads its own records."""

from __future__ import annotations

import asyncio
import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
from sqlalchemy import update

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText, responses, toy_app
from tests.serve.tenancy.conftest import Clock, open_tenants
from veneer.errors import ConfigError
from veneer.jobs.http.tuning import tuning_routes
from veneer.library.upload_stage import UploadStage
from veneer.serve.access import ResolvedModel
from veneer.serve.http.surfaces.adapters import adapter_routes
from veneer.serve.http.surfaces.feedback import feedback_routes
from veneer.serve.principal import ROLES, Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.admin import admin_router, tenant_router
from veneer.serve.tenancy.keys import matches_hash
from veneer.serve.tenancy.store import key_table
from veneer.serve.tenancy.tenants import Tenants

Call = Callable[..., httpx.Response]
ADMIN = "an-admin-key-of-some-length"


@pytest.fixture
def tenants(quick: Path) -> Iterator[Tenants]:
    opened = Tenants(str(quick / "tenants.sqlite"), admin_key=ADMIN, watch=False)
    for name in ("acme", "globex"):
        manage.add_tenant(opened.store, name, adapters=[f"{name}/*"], actor="me")
    yield opened
    opened.close()


@pytest.fixture
def call(tenants: Tenants) -> Call:
    routers = [admin_router(tenants, ToyCatalog()), tenant_router(tenants)]
    app = toy_app(ToyEngine(ToyText()), ToyCatalog(), tenants, routers=routers)

    def ask(key: str, method: str, path: str, body: Any = None, **query: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        how = {} if body is None else {"json": body}
        return responses(app, [{"method": method, "url": path, "params": query, "headers": headers, **how}])[0]

    return ask


def key_of(tenants: Tenants, role: Any, tenant: str = "acme") -> str:
    return manage.make_tenant_key(tenants.store, tenant, role=role, actor="me")[1]


def test_an_owner_lists_makes_and_revokes_keys_of_its_tenant(call: Call, tenants: Tenants) -> None:
    owner, other = key_of(tenants, "owner"), key_of(tenants, "owner", "globex")
    made = call(owner, "POST", "/v1/tenant/keys", {"role": "caller", "label": "web", "expires": "90d"})
    assert (made.status_code, made.json()["role"], made.json()["tenant"]) == (201, "caller", "acme")
    web = made.json()["key"]
    assert call(web, "GET", "/v1/models").status_code == 200
    assert call(web, "GET", "/v1/tenant/keys").status_code == 403
    listed = call(owner, "GET", "/v1/tenant/keys").json()["keys"]
    assert [(each["role"], each["state"]) for each in listed] == [("owner", "active"), ("caller", "active")]
    assert not any("hash" in each or "key" in each for each in listed)
    assert call(other, "DELETE", f"/v1/tenant/keys/{made.json()['id']}").status_code == 404
    assert call(owner, "DELETE", f"/v1/tenant/keys/{made.json()['id']}").json()["revoked"]
    assert call(web, "GET", "/v1/models").status_code == 401
    wrong = call(owner, "POST", "/v1/tenant/keys", {"role": "operator"})
    assert (wrong.status_code, "role" in wrong.text) == (400, True)
    assert call(ADMIN, "GET", "/v1/tenant/keys").status_code == 400  # the operator uses /admin
    assert call(ADMIN, "POST", "/admin/tenants/acme/keys", {"role": "auditor"}).json()["role"] == "auditor"


DOCUMENTED = {
    "use models": ("POST", "/v1/completions"),
    "browse adapters": ("GET", "/v1/models"),
    "give feedback": ("POST", "/v1/feedback"),
    "change the tenant's adapters": ("PATCH", "/v1/adapters/acme/support"),
    "train": ("POST", "/v1/fine_tuning/jobs"),
    "read the tenant's usage": ("GET", "/v1/tenant/usage"),
    "audit log": ("GET", "/v1/tenant/audit"),
    "manage the tenant's keys": ("GET", "/v1/tenant/keys"),
}
"""Phrases of the page's table of roles, and a request that needs what they say."""


def test_roles_can_do_what_the_page_says_and_nothing_else(tenants: Tenants) -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "tenants.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)`[^|]*\| (.+) \|$", page[page.index("| `--role` |") :], flags=re.M)[:4]
    assert [role for role, _ in table] == ["caller", "trainer", "auditor", "owner"]
    allowed: dict[str, set[str]] = {}
    for role, text in table:
        own = {phrase for phrase in DOCUMENTED if phrase in text}
        earlier = set().union(*allowed.values()) if text.startswith("all of these") else set()
        allowed[role] = own | earlier | (allowed["caller"] if text.startswith("also") else set())
    assert allowed["owner"] == set(DOCUMENTED)
    nothing, staging = MagicMock(), UploadStage(1 << 20)  # placeholders: no request with invalid JSON reaches them
    routers = [each(nothing) for each in (feedback_routes, tuning_routes)]
    routers += [tenant_router(tenants), adapter_routes(nothing, staging, tenants)]
    app = toy_app(ToyEngine(ToyText()), ToyCatalog(), tenants, routers=routers)
    for role, can in allowed.items():
        headers = {"authorization": f"Bearer {key_of(tenants, role)}", "content-type": "application/json"}
        requests = [
            {"method": method, "url": path, "headers": headers} | ({} if method == "GET" else {"content": b"{not json"})
            for method, path in DOCUMENTED.values()
        ]
        statuses = dict(zip(DOCUMENTED, (answer.status_code for answer in responses(app, requests)), strict=True))
        done = {
            phrase: 403 if phrase not in can else 200 if DOCUMENTED[phrase][0] == "GET" else 400 for phrase in statuses
        }
        assert statuses == done, role
    staging.close()


def test_audit_lines_name_the_key_and_auditors_see_their_tenant_only(call: Call, tenants: Tenants) -> None:
    owner, auditor = key_of(tenants, "owner"), key_of(tenants, "auditor")
    made = call(owner, "POST", "/v1/tenant/keys", {"role": "trainer"}).json()
    call(made["key"], "POST", "/v1/tenant/keys", {})  # refused, so not a change
    tenants.log_change(asyncio.run(tenants.authenticate(made["key"])).actor, "adapter.add", "acme/support@1")
    manage.change_settings(tenants.store, "globex", {"weight": 3}, actor="me")
    manage.change_settings(tenants.store, "", {"concurrency": 9}, actor="me")
    manage.add_tenant(tenants.store, "acme-2", actor="me")
    lines = call(auditor, "GET", "/v1/tenant/audit").json()["lines"]
    assert {line["subject"] for line in lines} == {"acme", "acme/support@1"}
    by = {line["what"]: line["who"] for line in reversed(lines)}
    assert by["key.add"] == f"acme/key:{owner[4:14]}"
    assert by["adapter.add"] == f"acme/key:{made['id']}"
    assert [line["what"] for line in call(auditor, "GET", "/v1/tenant/audit", what="adapter", limit=1).json()["lines"]]
    assert call(made["key"], "GET", "/v1/tenant/audit").status_code == 403
    assert call(auditor, "GET", "/v1/tenant/audit", tenant="globex").status_code == 400  # not a parameter


def test_usage_is_of_the_own_tenant(call: Call, tenants: Tenants) -> None:
    async def use(tenant: str, request: str) -> None:
        model = ResolvedModel((), "support", f"{tenant}/v1")
        how = {"request": request, "prompt_tokens": 5, "max_tokens": 5}
        async with tenants.admitted(Principal("tenant", tenant), model, **how) as bill:
            bill.used(Usage(5, 0, 3))

    for n, tenant in enumerate(("acme", "acme", "globex")):
        asyncio.run(use(tenant, f"r{n}"))
    assert tenants.ledger.flush()
    auditor = key_of(tenants, "auditor")
    (row,) = call(auditor, "GET", "/v1/tenant/usage", by="adapter").json()["usage"]
    assert (row["adapter"], row["requests"], row["completion"]) == ("acme/v1", 2, 6)
    text = call(auditor, "GET", "/v1/tenant/usage", by="", format="csv").text
    assert [line["requests"] for line in csv.DictReader(text.splitlines())] == ["2"]


def test_the_stored_hash_covers_the_role(tenants: Tenants) -> None:
    """An earlier version, which knows no roles, compares only the key's own hash: it refuses a caller's key."""
    row, key = manage.make_tenant_key(tenants.store, "acme", role="caller", actor="me")
    assert not matches_hash(key, row.hash)
    trainer, trainers_key = manage.make_tenant_key(tenants.store, "acme", actor="me")
    assert matches_hash(trainers_key, trainer.hash)
    assert asyncio.run(tenants.authenticate(key)).roles == ("caller",)
    with tenants.store.change() as c:
        c.execute(update(key_table).where(key_table.c.id == row.id).values(role="owner"))
    with pytest.raises(Refused, match="no valid API key"):
        asyncio.run(tenants.authenticate(key))


@pytest.mark.parametrize("role", ROLES)
def test_every_role_can_be_given_to_a_key(where: str, quick: Path, role: Any) -> None:
    tenants = open_tenants(where, quick / "journals", Clock())
    manage.add_tenant(tenants.store, "acme", actor="me")
    row, key = manage.make_tenant_key(tenants.store, "acme", role=role, actor="me")
    assert asyncio.run(tenants.authenticate(key)).roles == (row.role,) == (role,)
    with pytest.raises(ConfigError, match="auditor"):
        manage.make_tenant_key(tenants.store, "acme", role="auditer", actor="me")  # type: ignore[arg-type]
    tenants.close()


def test_a_tenants_keys_are_bounded_and_old_ones_deleted(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manage, "MOST_KEYS", 3)
    now = 1_800_000_000.0
    first = manage.make_tenant_key(tenants.store, "acme", actor="me", now=now)[0]
    for n in range(2):
        manage.make_tenant_key(tenants.store, "acme", expires=now + 10 + n, actor="me", now=now)
    manage.make_tenant_key(tenants.store, "globex", actor="me", now=now)
    with pytest.raises(ConfigError, match="has 3 keys"):
        manage.make_tenant_key(tenants.store, "acme", actor="me", now=now + 89 * 86400)
    last = manage.make_tenant_key(tenants.store, "acme", actor="me", now=now + 91 * 86400)[0]
    assert [each.id for each in manage.list_keys(tenants.store, "acme")] == [first.id, last.id]
