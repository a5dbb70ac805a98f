"""The tenants' database of an earlier veneer, and the journals beside it: nothing that was in them is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from tests.old_databases import made
from veneer.library.database import reading
from veneer.serve.access import ShadowAnswer
from veneer.serve.request import Usage
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.outbox import day_of
from veneer.serve.tenancy.routes import TenantRoutes, shadow_log
from veneer.serve.tenancy.store import line_table
from veneer.serve.tenancy.tenants import Tenants

LEDGER = (
    "INSERT INTO tenant_ledger (server, request, tenant, name, adapter, opened, closed, day, state, asked_prompt, "
    "asked_completion, prompt, cached, completion, queued, prefill, decode, price_prompt, price_cached, "
    "price_completion, cost) "
    "VALUES ('{server}', '{request}', '{tenant}', 'word', '{adapter}', {opened}, NULL, '{day}', "
    "'{state}', 10, 20, {prompt}, 0, {completion}, 0.5, 0.25, 1.5, 1000000, 0, 2000000, {cost})"
)
SERVER = "00112233aabbccdd"


def row(request: str, adapter: str, state: str, prompt: int, completion: int, tenant: str = "acme") -> str:
    done, opened = state == "done", time.time() - 60
    return LEDGER.format(
        server=SERVER,
        request=request,
        tenant=tenant,
        adapter=adapter,
        opened=opened,
        day=day_of(opened),
        state=state,
        prompt=prompt * done,
        completion=completion * done,
        cost=(prompt + 2 * completion) * done,
    )


@pytest.mark.parametrize("name", ["tenants-d1e3e75", "tenants-f7df853"])
def test_a_ledger_of_before_keeps_every_figure_and_its_journals_are_settled(
    where: str, quick: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    made(
        where,
        name,
        "INSERT INTO tenant_meta VALUES ('schema', '1'), ('revision', '7')",
        row("a", "big@1", "done", 10, 5),
        row("b", "big@1", "done", 1, 1, "globex"),
        row("c", "big:1+small:0", "done", 3, 3),
        row("d", "big@1", "interrupted", 9, 9),
        row("e", "big@1", "open", 9, 9),
        row("f", "big@1", "open", 9, 9),
        row("g", "big@1", "open", 9, 9),
    ).dispose()
    folder = quick / "outbox"  # one request's end is whole in the journal, one is torn by a full disk, one is not there
    folder.mkdir()
    price = {"prompt": 1_000_000, "cached": 0, "completion": 2_000_000}
    took = {"prompt": 4, "cached": 0, "completion": 6, "queued": 0.0, "prefill": 0.0, "decode": 0.0}
    note = json.dumps({"request": "e", "closed": time.time(), "usage": took, "price": price}) + "\n"
    (folder / f"{SERVER}.lock").touch()
    (folder / f"{SERVER}.0.jsonl").write_text(note)
    (folder / f"{SERVER}.1.jsonl").write_text(note.replace('"e"', '"f"')[:40] + "\n" + note[:25])
    tenants = Tenants(where, ledger=LedgerSettings(folder=folder), watch=False)
    with reading(tenants.store.engine) as c:
        states = {r.request: r.state for r in c.execute(select(line_table))}
        (total,) = usage(c, by=())
        by_adapter = {r["adapter"]: (r["requests"], r["cost"]) for r in usage(c, by=("adapter",))}
        by_tenant = {r["tenant"]: r["cost"] for r in usage(c, by=("tenant",), since="2026-11-25")}
    assert states == dict.fromkeys("abce", "done") | dict.fromkeys("dfg", "interrupted")
    assert (total["requests"], total["done"], total["open"], total["cost"]) == (7, 4, 0, 20 + 3 + 9 + 16)
    assert by_adapter == {"big@1": (6, 39), "big:1+small:0": (1, 9)}
    assert by_tenant == {"acme": 45, "globex": 3}
    assert "old journal cannot be understood" in caplog.text
    assert [p.name for p in folder.iterdir() if not p.name.startswith(tenants.ledger.server)] == [f"{SERVER}.1.torn"]
    seen = {(tenant, adapter): n for tenant, adapter, _, n, _ in tenants.ledger.seen_elsewhere(86400.0)}
    assert seen[("acme", "")] == 6  # windows of a day forget nothing
    assert seen[("acme", "big")] == 5
    TenantRoutes(tenants.store, tenants.ledger.writer.put).note_shadow(
        ShadowAnswer("r", "", "a", "v2", "v1", "x", "y", Usage(1, 0, 1), Usage(1, 0, 1), distance=0.5)
    ).result(10)
    with reading(tenants.store.engine) as c:
        assert shadow_log(c)[0]["distance"] == 0.5
    tenants.close()
