"""Limits: windows, released reservations and Retry-After."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.serve.tenancy.conftest import Clock
from veneer.serve.request import Refused
from veneer.serve.tenancy.limits import DAY, MINUTE, LimitHold, Limits, Window
from veneer.serve.tenancy.store import ALL, EACH, Limit


def taken(limits: Limits, rules: dict, tenant: str, adapter: str, prompt: int, most: int) -> LimitHold | Refused:
    try:
        return limits.take(rules, tenant, [adapter], prompt, most)
    except Refused as refused:
        return refused


Steps = some.lists(
    some.tuples(
        some.floats(0, 40),  # seconds between requests
        some.sampled_from(["acme", "globex"]),
        some.sampled_from(["one", "two"]),
        some.integers(0, 60),  # prompt tokens
        some.integers(1, 60),  # max_tokens
        some.floats(0, 1),  # share of the reservation that the request uses
        some.integers(0, 4),  # number of later requests that start before this request ends
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(Steps)
def test_no_window_exceeds_its_limit(steps: list) -> None:
    clock = Clock(0.0)
    limits = Limits(clock)
    rules = {
        ("acme", ALL): Limit(requests_per_minute=5, tokens_per_minute=200, concurrency=3),
        (ALL, "one"): Limit(tokens_per_minute=150),
        (EACH, "two"): Limit(requests_per_minute=3),
        (ALL, ALL): Limit(requests_per_minute=9, concurrency=4),
    }
    admitted: list[list] = []  # [time, tenant, adapter, counted tokens]
    running: list[tuple[int, LimitHold, list, int]] = []

    def inside(rule: tuple[str, str], one: list) -> bool:
        return rule[0] in (ALL, EACH, one[1]) and rule[1] in (ALL, one[2])

    for number, (pause, tenant, adapter, prompt, most, share, length) in enumerate(steps):
        clock.now += pause
        for ended in [r for r in running if r[0] <= number]:
            running.remove(ended)
            ended[1].used(ended[3])
            ended[2][3] = ended[3]
            ended[1].end()
        held = taken(limits, rules, tenant, adapter, prompt, most)
        if isinstance(held, Refused):
            assert (held.status, held.code) in ((429, "rate_limited"), (400, "invalid_request"))
            assert (held.retry_after is not None) == (held.status == 429)
            continue
        one = [clock.now, tenant, adapter, prompt + most]
        admitted.append(one)
        running.append((number + 1 + length, held, one, math.floor((prompt + most) * share)))
        for rule, limit in rules.items():
            for name in {"acme", "globex"} if rule[0] == EACH else {""}:
                same = [o for o in admitted if inside(rule, o) and name in ("", o[1])]
                last = [o for o in same if o[0] > clock.now - MINUTE]
                assert len(last) <= (limit.requests_per_minute or len(last))
                assert sum(o[3] for o in last) <= (limit.tokens_per_minute or math.inf)
                now_running = [r for r in running if r[2] in same]
                assert len(now_running) <= (limit.concurrency or len(now_running))
    for _, held, _, used in running:
        held.used(used)
        held.end()
        held.end()  # ending a second time releases nothing
    assert all(c.running == 0 for c in limits.counters.values())
    clock.now += MINUTE * 2
    assert all(c.windows["tokens_per_minute"].used(clock.now) == 0 for c in limits.counters.values())


@settings(max_examples=50, deadline=None)
@given(some.lists(some.tuples(some.floats(0, 30), some.integers(1, 50)), max_size=40), some.integers(1, 100))
def test_retry_after_is_long_enough_and_tight(steps: list, most: int) -> None:
    clock = Clock(0.0)
    limits, rules = Limits(clock), {("acme", ALL): Limit(tokens_per_minute=most)}
    for pause, tokens in steps:
        clock.now += pause
        if tokens > most:
            with pytest.raises(Refused, match="max_tokens"):
                limits.take(rules, "acme", ["x"], 0, tokens)
            continue
        refused = taken(limits, rules, "acme", "x", 0, tokens)
        if isinstance(refused, Refused):
            asked, clock.now = clock.now, clock.now + refused.retry_after * (1 + 1e-9)
            limits.take(rules, "acme", ["x"], 0, tokens)
            assert clock.now - asked <= MINUTE * 62 / 60


@settings(max_examples=60, deadline=None)
@given(some.lists(some.tuples(some.floats(0, 90), some.integers(0, 100), some.integers(-100, 50)), max_size=50))
def test_a_window_agrees_with_a_list_of_amounts(steps: list) -> None:
    """The reference keeps a list of all amounts and sums those within the window."""
    window, kept, now = Window(60.0), [], 0.0
    for pause, amount, change in steps:
        now += pause
        slot = window.add(now, amount)
        kept.append([slot, amount])
        of = kept[len(kept) // 2]  # change one of the amounts afterwards
        if change > 0 or -change <= of[1]:
            window.put(of[0], change)
            of[1] += change
        expected = sum(a for s, a in kept if (s + 1) * 1.0 + 60.0 > now)
        assert window.used(now) == expected
        assert expected >= sum(a for s, a in kept if s * 1.0 > now - 60.0)


def test_a_tenants_own_limit_replaces_the_default() -> None:
    limits = Limits(Clock(0.0))
    rules = {(EACH, ALL): Limit(concurrency=1), ("acme", ALL): Limit(concurrency=2)}
    held = [limits.take(rules, tenant, ["x"], 1, 1) for tenant in ("acme", "acme", "globex")]
    for tenant in ("acme", "globex"):
        with pytest.raises(Refused, match=f"tenant {tenant}"):
            limits.take(rules, tenant, ["x"], 1, 1)
    held[0].end()
    limits.take(rules, "acme", ["x"], 1, 1)


def test_requests_of_other_servers_count() -> None:
    clock = Clock(500.0)
    limits = Limits(clock)
    rules = {("acme", ALL): Limit(tokens_per_minute=100, requests_per_day=10)}
    minute = [("acme", ALL, 10.0, 2, 60), ("acme", "x", 10.0, 2, 60), ("globex", ALL, 1.0, 1, 1000)]
    limits.set_other_servers(rules, MINUTE, minute)
    limits.set_other_servers(rules, DAY, [("acme", ALL, 10.0, 7, 60), ("acme", "x", 10.0, 7, 60)])
    limits.take(rules, "acme", ["x"], 20, 20)
    with pytest.raises(Refused, match="tokens a minute") as refused:
        limits.take(rules, "acme", ["x"], 5, 5)
    assert 50 <= (refused.value.retry_after or 0) <= 52  # by then, the other server's amounts have expired
    limits.set_other_servers(rules, MINUTE, [])
    for _ in range(2):
        limits.take(rules, "acme", ["x"], 5, 5)
    with pytest.raises(Refused, match="10 requests a day"):
        limits.take(rules, "acme", ["x"], 5, 5)
