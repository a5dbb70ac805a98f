"""A server's tenancy: keys, visible names, limits, bills, prices, and several servers with one database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.serve.tenancy.conftest import Clock, set_price
from veneer.errors import ConfigError
from veneer.library.database import reading
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.keys import hash_key, make_key
from veneer.serve.tenancy.ledger import as_csv, usage
from veneer.serve.tenancy.store import EACH, Store, UnknownName, line_table, pattern_matcher
from veneer.serve.tenancy.tenants import Tenants

ADMIN = "an admin key of some length"


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def refused(work: Coroutine[Any, Any, Any]) -> Refused:
    with pytest.raises(Refused) as error:
        run(work)
    return error.value


async def ask(
    tenants: Tenants,
    caller: Principal,
    request: str,
    took: Usage | None,
    *,
    prompt: int = 10,
    most: int = 10,
    target: str = "v1",
    adapters: tuple[str, ...] = (),
) -> None:
    served = ResolvedModel(tuple((f"d-{name}", 0.5) for name in adapters), "support", target, adapters=adapters)
    async with tenants.admitted(caller, served, request=request, prompt_tokens=prompt, max_tokens=most) as bill:
        if took is not None:
            bill.used(took)


def rows(tenants: Tenants) -> dict[str, Any]:
    """Flush the ledger and return its rows."""
    assert tenants.ledger.flush()
    with reading(tenants.store.engine) as c:
        return {r.request: r for r in c.execute(select(line_table).order_by(line_table.c.part.desc()))}


# -- keys --------------------------------------------------------------------------------------------------------------


def test_only_the_hash_of_a_key_is_stored(tenants: Tenants, where: str) -> None:
    manage.add_tenant(tenants.store, "acme", weight=2.5, adapters=["acme/*"], actor="me")
    row, key = manage.make_tenant_key(tenants.store, "acme", label="web", actor="me")
    caller = run(tenants.authenticate(key, "ana"))
    assert (caller.tenant, caller.user, caller.weight, caller.kind) == ("acme", "ana", 2.5, "tenant")
    assert key.startswith(f"vnr-{row.id}-")
    assert row.hash == hash_key(key)
    assert "hash" not in manage.show_key(row)
    if not where.startswith("postgresql"):
        everything = b"".join(p.read_bytes() for p in Path(where).parent.glob("tenants.sqlite*") if p.is_file())
        assert row.id.encode() in everything
        assert key.rpartition(row.id)[2].encode() not in everything
    assert row.hash not in repr(row)


def test_all_invalid_keys_get_the_same_error(tenants: Tenants) -> None:
    manage.add_tenant(tenants.store, "acme", actor="me")
    row, key = manage.make_tenant_key(tenants.store, "acme", actor="me")
    other = make_key()[1]
    wrong = [None, "", "x", key[:-1], key[:-1] + ("A" if key[-1] != "A" else "B"), f"vnr-{row.id}{other[14:]}"]
    wrong += [other, f" {key}", f"{key}\n", "vnr-\ud800", ADMIN]
    seen = {(e.status, e.code, e.what) for e in (refused(tenants.authenticate(k)) for k in wrong)}
    assert seen == {(401, "unauthorized", "no valid API key")}


def test_expiry_and_revocation_of_keys(tenants: Tenants, clock: Clock) -> None:
    store, now = tenants.store, 1_800_000_000.0 + clock()
    manage.add_tenant(store, "acme", actor="me")
    _, key = manage.make_tenant_key(store, "acme", expires=now + 100, actor="me", now=now)
    row, other = manage.make_tenant_key(store, "acme", label="web", actor="me", now=now)
    assert run(tenants.authenticate(key)).tenant == "acme"
    clock.now += 100
    assert refused(tenants.authenticate(key)).status == 401
    assert run(tenants.authenticate(other)).tenant == "acme"
    with pytest.raises(UnknownName, match="no key"):
        manage.revoke_key(store, row.id, tenant="globex", actor="me")
    manage.revoke_key(store, row.id, actor="me")
    assert refused(tenants.authenticate(other)).status == 401
    assert sorted(k.state(now + 150) for k in manage.list_keys(store, "acme")) == ["expired", "revoked"]
    with pytest.raises(ConfigError, match="in the past"):
        manage.make_tenant_key(store, "acme", expires=now - 1, actor="me", now=now)


def test_changes_of_other_processes_apply_at_the_next_request(tenants: Tenants, where: str) -> None:
    other = Store(where)
    manage.add_tenant(other, "acme", actor="cli")
    row, key = manage.make_tenant_key(other, "acme", actor="cli")
    routes.set_route(other, "support", [("v1", 1)], tenant="acme", actor="cli")
    routes.set_route(other, "support", [("v2", 1)], tenant="acme", actor="cli")

    def target() -> str | None:
        caller = run(tenants.authenticate(key))
        return tenants.routes.choose("support", caller)

    assert target() == "v2"
    routes.rollback_route(other, "support", tenant="acme", actor="cli")
    assert target() == "v1"
    manage.change_settings(other, "acme", {"enabled": False}, actor="cli")
    assert refused(tenants.authenticate(key)).status == 401
    manage.change_settings(other, "acme", {"enabled": True, "weight": 7}, actor="cli")
    assert run(tenants.authenticate(key)).weight == 7.0
    manage.revoke_key(other, row.id, actor="cli")
    assert refused(tenants.authenticate(key)).status == 401
    manage.remove_tenant(other, "acme", actor="cli")
    assert not tenants.store.refresh().keys
    other.close()


def test_an_admin_key_can_be_a_hash(quick: Path) -> None:
    for given in (ADMIN, f"sha256:{hash_key(ADMIN)}"):
        tenants = Tenants(str(quick / "t.sqlite"), admin_key=given, watch=False)
        caller = run(tenants.authenticate(ADMIN))
        assert (caller.can("operate"), caller.tenant, caller.sees("anything")) == (True, "", True)
        assert ADMIN not in str(vars(tenants))
        assert refused(tenants.authenticate(f"sha256:{hash_key(ADMIN)}")).status == 401
        tenants.close()
    for short in ("secret", "sha256:12"):
        with pytest.raises(ConfigError, match="admin key"):
            Tenants(str(quick / "t.sqlite"), admin_key=short)


# -- visibility --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        (["acme/*"], "acme/x", True), (["acme/*"], "acme", False), (["acme/*"], "globex/acme/x", False),
        (["support"], "support@2", True), (["support"], "support@prod", True), (["support@2"], "support", False),
        (["support@2"], "support@2", True), (["support@2"], "support@3", False), (["support"], "supports", False),
        (["*"], "anything@1", True), (["*"], "sha256:3fa9", False), (["sha256:3fa9*"], "sha256:3fa9c1", True),
        (["a.c"], "abc", False), ([], "x", False), (["*-v2"], "acme/x-v2", True), (["x"], "x\n", False),
    ],
)  # fmt: skip
def test_patterns_match_names(patterns: list[str], name: str, expected: bool) -> None:
    assert pattern_matcher(patterns)(name) is expected


def test_a_tenant_sees_its_own_and_shared_names(tenants: Tenants) -> None:
    for name in ("acme", "globex"):
        manage.add_tenant(tenants.store, name, adapters=[f"{name}/*"], actor="me")
    manage.change_settings(tenants.store, "", {"adapters": ["base", "public/*"]}, actor="me")
    _, key = manage.make_tenant_key(tenants.store, "acme", actor="me")
    sees = run(tenants.authenticate(key)).sees
    assert [n for n in ("acme/a", "globex/a", "public/b", "base", "other") if sees(n)] == ["acme/a", "public/b", "base"]
    assert manage.change_settings(tenants.store, "acme", {"adapters": ["x"]}, actor="me")["adapters"] == ("x",)
    assert sees("acme/a")  # a request keeps the permissions that it had at admission
    assert not run(tenants.authenticate(key)).sees("acme/a")


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a//b", "a/../b", "a/./b", ".x", "-x", "x y", "x\0", "", "a" * 201, "é"]
)
def test_invalid_names_are_refused_everywhere(quick: Path, name: str) -> None:
    store = Store(str(quick / "t.sqlite"))
    if name not in ("a/./b",):
        with pytest.raises(ConfigError):
            manage.add_tenant(store, name, actor="me")
    for change in (
        lambda: manage.change_settings(store, "", {"adapters": [name]}, actor="me"),
        lambda: manage.change_settings(store, "", {"concurrency": 1}, adapter=name or "..", actor="me"),
        lambda: routes.set_route(store, name, [("v1", 1)], actor="me"),
    ):
        with pytest.raises(ConfigError):
            change()
    store.close()


# -- limits and bills --------------------------------------------------------------------------------------------------


def test_unused_reservations_are_returned(tenants: Tenants, clock: Clock) -> None:
    store = tenants.store
    manage.add_tenant(store, "acme", actor="me")
    manage.change_settings(store, "acme", {"tokens_per_minute": 100, "concurrency": 1}, actor="me")
    store.refresh()
    acme = Principal("tenant", "acme")

    async def work() -> None:
        served = ResolvedModel((), "support", "v1")
        async with tenants.admitted(acme, served, request="a", prompt_tokens=40, max_tokens=60) as bill:
            with pytest.raises(Refused, match="1 requests running"):
                await ask(tenants, acme, "b", None)
            bill.used(Usage(40, 0, 5))
        await ask(tenants, acme, "c", Usage(20, 0, 15), prompt=20, most=35)  # 45 used + 55 reserved = 100, the limit
        with pytest.raises(RuntimeError):
            async with tenants.admitted(acme, served, request="d", prompt_tokens=10, max_tokens=10):
                raise RuntimeError
        await ask(tenants, acme, "e", Usage(10, 0, 10))  # the failed request "d" holds no reservation
        with pytest.raises(Refused) as over:
            await ask(tenants, acme, "f", None)
        assert (over.value.status, over.value.code) == (429, "rate_limited")
        clock.now += over.value.retry_after
        await ask(tenants, acme, "f", Usage(1, 0, 1))

    run(work())
    found = {name: row.state for name, row in rows(tenants).items()}
    assert found == {"a": "done", "c": "done", "d": "interrupted", "e": "done", "f": "done"}
    assert all(c.running == 0 for c in tenants.limits.counters.values())


def test_changed_limits_apply_to_mixes_and_tenants(tenants: Tenants) -> None:
    store = tenants.store
    for name in ("acme", "globex"):
        manage.add_tenant(store, name, actor="me")
    manage.change_settings(store, EACH, {"requests_per_minute": 2}, actor="me")
    manage.change_settings(store, "", {"requests_per_day": 1}, adapter="big", actor="me")
    store.refresh()
    took = Usage(1, 0, 1)
    run(ask(tenants, Principal("tenant", "acme"), "1", took, target="big@3"))
    assert "adapter big" in refused(ask(tenants, Principal("tenant", "globex"), "2", took, target="big")).what
    mixed = ask(tenants, Principal("tenant", "globex"), "3", took, adapters=("small", "big@1"))
    assert "adapter big" in refused(mixed).what
    run(ask(tenants, Principal("tenant", "acme"), "4", took))
    assert "tenant acme" in refused(ask(tenants, Principal("tenant", "acme"), "5", took)).what
    run(ask(tenants, Principal("tenant", "globex"), "6", took))
    manage.change_settings(store, EACH, {"requests_per_minute": None}, actor="me")
    store.refresh()
    run(ask(tenants, Principal("tenant", "acme"), "7", took))
    with pytest.raises(ConfigError, match="request_per_minute"):
        manage.change_settings(store, "acme", {"request_per_minute": 2}, actor="me")
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        manage.change_settings(store, "acme", {"concurrency": 0}, actor="me")
    with pytest.raises(ConfigError, match="one version"):
        manage.change_settings(store, "acme", {"concurrency": 1}, adapter="big@3", actor="me")


def test_two_servers_share_windows_and_a_restart_forgets_nothing(where: str, quick: Path) -> None:
    first, second = (Tenants(where, ledger=LedgerSettings(folder=quick / f"j{n}"), watch=False) for n in (1, 2))
    manage.add_tenant(first.store, "acme", actor="me")
    manage.change_settings(first.store, "acme", {"requests_per_day": 5, "tokens_per_minute": 1000}, actor="me")
    for server in (first, second):
        server.store.refresh()
    for n in range(3):
        run(ask(first, Principal("tenant", "acme"), str(n), Usage(50, 0, 50), prompt=50, most=200))
    assert len(rows(first)) == 3
    second.count_other_servers(60.0)
    assert "tokens a minute" in refused(ask(second, Principal("tenant", "acme"), "x", None, prompt=1, most=700)).what
    second.count_other_servers(86400.0)
    for n in range(2):
        run(ask(second, Principal("tenant", "acme"), str(n), Usage(1, 0, 1)))
    assert "requests a day" in refused(ask(second, Principal("tenant", "acme"), "y", None)).what
    for server in (first, second):
        server.close()
    third = Tenants(where, ledger=LedgerSettings(folder=quick / "j3"), watch=False)
    assert "requests a day" in refused(ask(third, Principal("tenant", "acme"), "z", None)).what
    third.close()


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_the_most_specific_price_applies(tenants: Tenants) -> None:
    store = tenants.store
    manage.add_tenant(store, "acme", actor="me")
    set_price(store, 150_000, 15_000, 600_000)
    set_price(store, 1_000_000, 0, 2_000_000, adapter="big")
    set_price(store, 1, 1, 1, tenant="acme")
    set_price(store, 3_000_000, 1_000_000, 5_000_000, tenant="acme", adapter="big")
    store.refresh()
    took = Usage(1000, 200, 300, 0.5, 0.25, 2.0)
    for n, (tenant, target) in enumerate([("x", "v1"), ("x", "big@2"), ("acme", "v1"), ("acme", "big")]):
        run(ask(tenants, Principal("tenant", tenant), str(n), took, target=target))
    found = rows(tenants)
    assert [found[str(n)].cost for n in range(4)] == [303, 1400, 0, 4100]
    with reading(store.engine) as c:
        by_tenant = usage(c, by=("tenant",))
        (total,) = usage(c, by=())
        assert [r["adapter"] for r in usage(c, by=("adapter",), adapter="big")] == ["big", "big@2"]
        day = found["0"].day
        assert usage(c, since=day, until=day) == usage(c)
        assert usage(c, until="2001-01-01") == []
        table = as_csv(usage(c, tenant="acme"))
        with pytest.raises(ConfigError, match="'tenants'") as near:
            usage(c, by=("tenants",))
        with pytest.raises(ConfigError, match="not a date"):
            usage(c, since="yesterday")
    assert "did you mean tenant?" in str(near.value.fix)
    assert [(r["tenant"], r["cost"]) for r in by_tenant] == [("acme", 4100), ("x", 1703)]
    assert (total["requests"], total["prompt"], total["cached"], total["decode"]) == (4, 4000, 800, 8.0)
    assert table.splitlines()[1] == f"acme,big,{day},1,1,0,0,1000,200,300,0.5,0.25,2.0,4100"


def test_an_id_is_admitted_once_and_billed_once(tenants: Tenants, caplog: pytest.LogCaptureFixture) -> None:
    acme = Principal("tenant", "acme")

    async def work() -> None:
        served = ResolvedModel((), "support", "v1")
        async with tenants.admitted(acme, served, request="a", prompt_tokens=1, max_tokens=1) as bill:
            asked = (ask(tenants, acme, name, None) for name in "ab")
            again = await asyncio.gather(*asked, return_exceptions=True)
            assert again[0].status == 400
            bill.used(Usage(5, 0, 5))
            bill.used(Usage(500, 0, 500))
        tenants.ledger.settle("a", Usage(6, 0, 6))

    run(work())
    found = rows(tenants)
    assert (found["a"].state, found["a"].prompt, found["b"].state) == ("done", 5, "interrupted")
    assert "billed twice" in caplog.text


def test_a_cancelled_admission_leaves_no_open_row(tenants: Tenants) -> None:
    slow = tenants.ledger.journal.writer.put(lambda c, _: time.sleep(0.2))

    async def work() -> None:
        asking = asyncio.create_task(ask(tenants, Principal("tenant", "acme"), "a", None))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    run(work())
    slow.result(10)
    assert rows(tenants)["a"].state == "interrupted"


def test_writes_are_committed_in_groups(one_door: Tenants) -> None:
    writer: Any = one_door.ledger.journal.writer
    commits, transaction = [], writer.transaction

    @contextmanager
    def slowly() -> Iterator[Any]:
        commits.append(time.monotonic())
        time.sleep(0.05)
        with transaction() as c:
            yield c

    writer.transaction = slowly

    async def work() -> None:
        await asyncio.gather(*(ask(one_door, Principal("tenant", "t"), f"r{n}", Usage(1, 0, 1)) for n in range(100)))

    run(work())
    assert len(rows(one_door)) == 100
    assert len(commits) < 20


def test_invalid_database_addresses_are_refused(quick: Path) -> None:
    for where in ("sqlite://", "nonsense://x", f"sqlite:///{quick}"):
        with pytest.raises(ConfigError):
            Store(where)
    Store(str(quick / "t.sqlite")).close()
