"""Routes: shares by weight, sticky users, as few moved users as possible, and rollback."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from veneer.errors import ConfigError
from veneer.library.database import reading
from veneer.serve.access import ShadowAnswer
from veneer.serve.principal import Principal
from veneer.serve.request import Usage
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.routes import BUCKETS, TenantRoutes, assign_buckets, bucket, owner
from veneer.serve.tenancy.store import Store, UnknownName
from veneer.serve.tenancy.tenants import Tenants

Weights = some.dictionaries(some.sampled_from("abcdef"), some.integers(1, 1000), min_size=1).map(lambda d: [*d.items()])


def owners(runs: routes.Runs) -> list[str]:
    return [name for name, count in runs for _ in range(count)]


@settings(max_examples=20, deadline=None)
@given(some.lists(Weights, min_size=1, max_size=5))
def test_splits_are_exact_and_move_few_users(moves: list) -> None:
    before: routes.Runs = ()
    for targets in moves:
        after = assign_buckets(targets, before)
        total, shares = sum(w for _, w in targets), Counter(owners(after))
        assert shares.total() == BUCKETS
        for name, weight in targets:
            assert abs(shares[name] - weight * BUCKETS / total) < 1
        if before:
            old = Counter(owners(before))
            fewest = sum(max(0, shares[name] - old[name]) for name in shares)
            moved = sum(a != b for a, b in zip(owners(before), owners(after), strict=True))
            assert moved == fewest
        before = after


@settings(max_examples=20, deadline=None)
@given(Weights, Weights)
def test_users_move_as_the_description_says(first: list, second: list) -> None:
    now = routes.planned_route(None, "support", first)
    wanted = routes.planned_route(now, "support", second)
    said = routes.route_change(now, wanted)
    moved = Counter((a, b) for n in range(BUCKETS) if (a := owner(now.runs, n)) != (b := owner(wanted.runs, n)))
    for (a, b), count in moved.items():
        assert f"{count / 100:g}% move from {a} to {b}" in said
    assert said.count(" move from ") == len(moved)
    if not moved:
        assert said == "No user of support changes target."
    back = routes.route_change(wanted, now)
    assert all(f"{count / 100:g}% move from {b} to {a}" in back for (a, b), count in moved.items())


def test_route_changes_are_described(store: Store) -> None:
    begun = routes.planned_route(None, "support", [("v1", 90), ("v2", 10)])
    assert routes.route_change(None, begun) == "support begins: 90% of users get v1 and 10% of users get v2."
    routes.set_route(store, "support", [("v1", 90), ("v2", 10)], actor="me")
    now = store.refresh().routes["", "support"]
    assert (now.targets, now.runs) == (begun.targets, begun.runs)
    shadowed = routes.planned_route(now, "support", [("v1", 80), ("v2", 20)], shadow="v3", fraction=0.05)
    assert routes.route_change(now, shadowed) == (
        "Of the users of support, 10% move from v1 to v2; all other users keep their target. "
        "v3 also answers 5% of requests; clients never see these answers."
    )
    assert routes.route_change(shadowed, now).endswith("v3 is no longer a shadow.")
    routes.remove_route(store, "support", actor="me")
    with reading(store.engine) as c:
        gone, back = routes.earlier_route(c, "support")
    assert routes.route_change(now, gone).startswith("support is removed")
    assert routes.route_change(gone, back) == routes.route_change(None, begun)


def test_users_are_spread_by_weight_and_stay() -> None:
    runs = assign_buckets([("v1", 90), ("v2", 10)])
    users = [bucket("support", f"user{n}") for n in range(20_000)]
    first = [owner(runs, b) for b in users]
    assert abs(first.count("v2") / 20_000 - 0.1) < 0.01
    more = assign_buckets([("v1", 80), ("v2", 20)], runs)
    wider = [owner(more, b) for b in users]
    moved = [(a, b) for a, b in zip(first, wider, strict=True) if a != b]
    assert set(moved) == {("v1", "v2")}  # no user moves from v2 to v1
    assert abs(len(moved) / 20_000 - 0.1) < 0.01
    other = [owner(runs, bucket("billing", f"user{n}")) for n in range(20_000)]
    both = sum(a == b == "v2" for a, b in zip(first, other, strict=True))
    assert both < 300  # each route chooses its ten percent of users independently


def test_routes_are_sticky_by_user_or_tenant(store: Store) -> None:
    routes.set_route(store, "support", [("v1", 1), ("v2", 1)], actor="me")
    store.refresh()
    asked = TenantRoutes(store, lambda *a, **k: Future(), pick=random.Random(1))
    for user in ("ana", "bob", "cem"):
        assert len({asked.choose("support", Principal("tenant", "acme", user=user)) for _ in range(20)}) == 1
    by_user = {asked.choose("support", Principal("tenant", "acme", user=f"u{n}")) for n in range(50)}
    assert by_user == {"v1", "v2"}
    by_tenant = {t: {asked.choose("support", Principal("tenant", t)) for _ in range(20)} for t in map(str, range(30))}
    assert all(len(chosen) == 1 for chosen in by_tenant.values())
    assert {next(iter(chosen)) for chosen in by_tenant.values()} == {"v1", "v2"}
    assert {asked.choose("support", Principal("open")) for _ in range(50)} == {"v1", "v2"}
    assert asked.choose("suport", Principal("open")) is None


def test_a_tenants_own_route_precedes_a_shared_one(store: Store) -> None:
    for tenant in ("acme", "globex"):
        manage.add_tenant(store, tenant, actor="me")
    routes.set_route(store, "support", [("everybodys", 1)], actor="me")
    routes.set_route(store, "support", [("acmes", 1)], tenant="acme", actor="me")
    visibility = store.refresh().visibility
    asked = TenantRoutes(store, lambda *a, **k: Future())
    acme, globex = (Principal("tenant", t, visibility[t]) for t in ("acme", "globex"))
    assert asked.choose("support", acme) == "acmes"
    assert acme.sees("support")
    assert not acme.sees("acmes")  # the target is not visible under its own name
    assert asked.choose("support", globex) is None  # the shared route is hidden from this tenant
    assert (asked.names(acme), asked.names(globex), asked.names(Principal("open"))) == (["support"], [], ["support"])
    manage.change_settings(store, "globex", {"adapters": ["support"]}, actor="me")
    globex = Principal("tenant", "globex", store.refresh().visibility["globex"])
    assert asked.choose("support", globex) == "everybodys"
    with pytest.raises(UnknownName, match="no tenant acne") as lost:
        routes.set_route(store, "support", [("v1", 1)], tenant="acne", actor="me")
    assert "acme" in str(lost.value.fix)


def test_rollback_restores_users_and_keeps_the_history(store: Store) -> None:
    first = routes.set_route(store, "support", [("v1", 1)], actor="ana")
    second = routes.set_route(store, "support", [("v1", 50), ("v2", 50)], actor="ana")
    third = routes.set_route(store, "support", [("v3", 1)], shadow="v2", fraction=0.5, actor="bob")
    assert routes.rollback_route(store, "support", actor="ana") == second
    assert store.refresh().routes["", "support"] == second  # equality includes the target that owns each bucket
    assert routes.rollback_route(store, "support", actor="ana") == first
    with pytest.raises(ConfigError, match="no earlier revision"):
        routes.rollback_route(store, "support", actor="ana")
    fourth = routes.set_route(store, "support", [("v4", 1)], actor="ana")
    assert routes.rollback_route(store, "support", actor="ana") == first  # the state before v4 was set
    routes.remove_route(store, "support", actor="ana")
    assert ("", "support") not in store.refresh().routes
    assert routes.rollback_route(store, "support", actor="ana") == first
    with reading(store.engine) as c:
        moves = routes.route_history(c, "support")
        assert routes.route_history(c, "support", limit=2) == moves[:2]
        lines = manage.audit_lines(c, action="route", subject="all:support")
    assert [m["move"] for m in moves] == [5, 4, 3, 2, 1]
    assert [m["move"] for m in moves if m["current"]] == [1]
    assert moves[2]["who"] == "bob"
    assert moves[2]["targets"] == dict(third.targets)
    assert moves[1]["targets"] == dict(fourth.targets)
    what = [x["what"].removeprefix("route.") for x in reversed(lines)]
    assert what == ["set", "set", "set", "rollback", "rollback", "set", "rollback", "remove", "rollback"]
    assert (lines[0]["before"]["targets"], lines[0]["after"]["targets"]) == ({}, {"v1": 1})


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([], "at least one target"), ([("v1", 1), ("v1", 2)], "each target only once"), ([("support", 1)], "itself"),
        ([("../v1", 1)], "cannot name"), ([("v1", -1)], "weight"),
    ],
)  # fmt: skip
def test_invalid_routes_are_refused(store: Store, targets: list, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        routes.set_route(store, "support", targets, actor="me")
    with pytest.raises(ConfigError):
        routes.set_route(store, "../support", [("v1", 1)], actor="me")
    with pytest.raises(ConfigError, match="fraction"):
        routes.set_route(store, "support", [("v1", 1)], fraction=1.5, actor="me")
    with pytest.raises(UnknownName, match="no route"):
        routes.rollback_route(store, "support", actor="me")


def test_shadows_get_their_fraction_and_are_logged_without_texts(tenants: Tenants) -> None:
    store = tenants.store
    routes.set_route(store, "support", [("v1", 1)], shadow="v2", fraction=0.25, actor="me")
    store.refresh()
    asked = TenantRoutes(store, tenants.ledger.writer.put, keep=5, pick=random.Random(0))
    drawn = [asked.shadow("support", Principal("open")) for _ in range(2000)]
    assert abs(drawn.count("v2") / 2000 - 0.25) < 0.04
    assert asked.shadow("other") is None
    texts = [("Paris.", "Paris."), ("Paris.", "Parma"), ("abc", "abcd"), ("", "x")]
    for n in range(8):
        one, other = texts[n % 4]
        took = Usage(9, 0, 3, prefill=0.1, decode=0.4), Usage(9, 0, 4, prefill=0.1, decode=0.6)
        asked.record_shadow(ShadowAnswer(f"r{n}", "acme", "support", "v2", "v1", one, other, *took)).result(10)
    with reading(store.engine) as c:
        log = routes.shadow_log(c, route="support")
    assert [row["request"] for row in log] == ["r7", "r6", "r5", "r4", "r3"]
    found = [(row["same"], row["first_difference"]) for row in log[:4]]
    assert found == [(False, 0), (False, 3), (False, 3), (True, None)]
    assert (log[3]["target_sha256"] == log[3]["shadow_sha256"], log[0]["shadow_tokens"]) == (True, 4)
    assert "Paris" not in str(log)
