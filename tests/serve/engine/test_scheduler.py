"""The scheduler neither loses nor starves a row, and a flood from one tenant does not slow other tenants."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.serve.engine.cache import Cache
from veneer.serve.engine.scheduler import Scheduler, Sequence
from veneer.serve.request import DigestMix, Request, Sampling


def request(prompt: int, new: int, tenant: str = "", weight: float = 1.0, salt: int = 0) -> Request:
    tokens = tuple(salt * 1000 + i for i in range(prompt))
    return Request(tokens, Sampling(max_tokens=new), tenant=tenant, weight=weight)


def advance(scheduler: Scheduler) -> list[Sequence]:
    """Run one step with a model that always samples token 7. Return the finished sequences."""
    chunks = scheduler.step()
    assert sum(c.end - c.start for c in chunks) <= scheduler.budget
    assert len({id(c.sequence) for c in chunks}) == len(chunks)
    done = []
    for chunk in chunks:
        s = chunk.sequence
        assert s in scheduler.running
        assert chunk.start == s.computed < chunk.end <= len(s.table.blocks) * scheduler.cache.block
        scheduler.mark_computed(chunk)
        if chunk.last:
            scheduler.appended(s, 7)
            if s.generated == s.request.sampling.max_tokens:
                scheduler.remove(s)
                done.append(s)
    return done


def run(scheduler: Scheduler, steps: int) -> Counter[str]:
    """Run the given number of steps. Return how many sequences of each tenant finished."""
    return Counter(s.request.tenant for _ in range(steps) for s in advance(scheduler))


def fill(scheduler: Scheduler, n: int, *how: Any, first: int = 0) -> list[Sequence]:
    """Add n requests with different prompts."""
    return [scheduler.add(request(*how, salt=first + i)) for i in range(n)]


def test_a_long_prompt_does_not_stop_other_rows() -> None:
    scheduler = Scheduler(Cache(1000, 4), rows=8, budget=16)
    first = scheduler.add(request(4, 40))
    advance(scheduler)
    scheduler.add(request(200, 1, salt=1))
    for step in range(2, 12):
        advance(scheduler)
        assert first.generated == step


def test_a_prompt_that_waits_for_memory_is_counted_once() -> None:
    scheduler = Scheduler(Cache(6, 4), rows=4, budget=64)
    prompts = [scheduler.add(request(12, 8)) for _ in range(3)]
    steps = 0
    while any(s.generated < 8 for s in prompts):
        steps += 1
        advance(scheduler)
    assert steps > 16  # the sequences run one after the other
    assert scheduler.looked_up == 36
    assert scheduler.found == sum(s.cached for s in prompts) == 16


def test_a_flooding_tenant_does_not_slow_another() -> None:
    def steps_of_the_other(flood: int) -> int:
        scheduler = Scheduler(Cache(4000, 4), rows=4, budget=64)
        fill(scheduler, flood, 20, 10, "flood")
        run(scheduler, 30)
        waiting = {id(scheduler.add(request(20, 10, "calm", salt=1000 + i))) for i in range(4)}
        steps = 0
        while waiting:
            waiting -= {id(s) for s in advance(scheduler)}
            steps += 1
        return steps

    assert steps_of_the_other(400) <= 1.1 * steps_of_the_other(40)
    assert steps_of_the_other(400) <= 3 * steps_of_the_other(0)


def steps_to_first(scheduler: Scheduler, sequence: Sequence) -> int:
    steps = 0
    while not sequence.generated:
        advance(scheduler)
        steps += 1
    return steps


def test_long_rows_of_one_tenant_yield_to_another() -> None:
    scheduler = Scheduler(Cache(8000, 4), rows=32, budget=64)
    flood = fill(scheduler, 40, 20, 600, "flood")
    run(scheduler, 60)
    assert len(scheduler.running) == 32
    assert steps_to_first(scheduler, scheduler.add(request(20, 50, "calm", salt=100))) == 1
    assert scheduler.preemptions == 1
    fill(scheduler, 40, 20, 100, "calm", first=200)
    run(scheduler, 20)
    assert Counter(s.request.tenant for s in scheduler.running) == {"flood": 16, "calm": 16}
    run(scheduler, 40)  # from now on, each tenant keeps its share
    assert scheduler.preemptions == 16
    while scheduler.running or scheduler.waiting:
        advance(scheduler)
    assert all(s.generated == 600 for s in flood)


def test_rows_are_shared_by_weight() -> None:
    scheduler = Scheduler(Cache(8000, 4), rows=8, budget=64)
    fill(scheduler, 20, 8, 500, "three", 3.0)
    advance(scheduler)
    fill(scheduler, 20, 8, 500, "one", 1.0, first=100)
    run(scheduler, 10)
    assert Counter(s.request.tenant for s in scheduler.running) == {"three": 6, "one": 2}


def test_one_tenants_blocks_are_released_for_another() -> None:
    scheduler = Scheduler(Cache(100, 4), rows=32, budget=64)
    fill(scheduler, 4, 80, 19, "flood")
    run(scheduler, 8)
    assert scheduler.cache.available < 60 // 4 + 4
    assert steps_to_first(scheduler, scheduler.add(request(60, 5, "calm", salt=100))) == 1


def test_long_prompts_wait_for_another_tenants_first_token() -> None:
    def steps(flood: int) -> tuple[int, int]:
        """Return (steps until the other tenant's first token, number of tokens in that step)."""
        scheduler = Scheduler(Cache(40_000, 4), rows=32, budget=512)
        fill(scheduler, flood, 4000, 10, "flood")
        run(scheduler, 3)
        mine, n = scheduler.add(request(100, 10, "calm", salt=1000)), 0
        while True:
            n += 1
            chunks = scheduler.step()
            for chunk in chunks:
                scheduler.mark_computed(chunk)
                if chunk.last:
                    scheduler.appended(chunk.sequence, 7)
            if mine.generated:
                return n, sum(c.end - c.start for c in chunks)

    assert steps(0) == (1, 100)
    assert steps(31) == (1, 200)


def test_tokens_are_shared_by_weight() -> None:
    scheduler = Scheduler(Cache(4000, 4), rows=6, budget=64)
    for i in range(300):
        scheduler.add(request(8, 8, "one", 1.0, i))
        scheduler.add(request(8, 8, "three", 3.0, 1000 + i))
    done = run(scheduler, 240)
    assert 2.5 < done["three"] / done["one"] < 3.5


def test_idle_tenants_earn_no_credit() -> None:
    scheduler = Scheduler(Cache(4000, 4), rows=2, budget=64)
    fill(scheduler, 100, 8, 8, "busy")
    run(scheduler, 200)
    fill(scheduler, 50, 8, 8, "late", first=1000)
    done = run(scheduler, 100)
    assert abs(done["busy"] - done["late"]) <= 4


def test_rows_that_wait_for_an_adapter_are_skipped() -> None:
    slow = request(4, 2, salt=1)
    scheduler = Scheduler(Cache(100, 4), rows=1, budget=16, loaded=lambda s: s.request is not slow)
    scheduler.add(slow)
    scheduler.add(request(4, 2, salt=2))
    done = advance(scheduler) + advance(scheduler)
    assert [s.request.prompt[0] for s in done] == [2000]
    assert scheduler.waiting == 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.sampled_from("abc"), st.integers(0, 3)), max_size=25),
    st.integers(11, 40),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_every_row_finishes_or_is_removed(wanted, blocks, rows, seed):
    dice = random.Random(seed)
    scheduler = Scheduler(Cache(blocks, 4), rows=rows, budget=max(rows, 16))
    open_ones = {}
    left = list(wanted)
    for _ in range(5000):
        if left and dice.random() < 0.4:
            prompt, new, tenant, salt = left.pop()
            sequence = scheduler.add(request(prompt, new, tenant, salt=salt))
            open_ones[id(sequence)] = sequence
        for sequence in advance(scheduler):
            del open_ones[id(sequence)]
        if open_ones and dice.random() < 0.02:
            scheduler.remove(open_ones.pop(dice.choice(list(open_ones))))
        if not left and not open_ones:
            break
    assert not left
    assert not open_ones
    assert scheduler.cache.in_use == 0
    assert not scheduler.running
    assert scheduler.waiting == 0


def test_prefixes_need_equal_mixes_and_salts() -> None:
    """Only full blocks are shared. A request with a different salt finds no cached prefix, whatever its mix."""
    scheduler = Scheduler(Cache(1000, 4), rows=8, budget=64)
    tokens = tuple(range(17))
    mixes: list[DigestMix] = [(), (("sha256:a", 1.0),), (("sha256:b", 1.0),)]
    found = {}
    for turn in range(2):
        for mix in mixes:
            for salt in ("", "acme", "globex", "b", str(mixes[2])):
                sequence = scheduler.add(Request(tokens, Sampling(max_tokens=1), mix, salt=salt))
                while not sequence.generated:
                    advance(scheduler)
                found[turn, mix, salt] = sequence.cached
    assert {cached for (turn, _, _), cached in found.items() if turn == 0} == {0}
    assert {cached for (turn, _, _), cached in found.items() if turn == 1} == {16}


def test_rejected_drafts_are_discarded_and_preempt_no_sequence() -> None:
    scheduler = Scheduler(Cache(10, 4), rows=2, budget=64)
    sequence = scheduler.add(request(6, 50))
    advance(scheduler)
    sequence.drafts = tuple(range(9))
    (chunk,) = scheduler.step()
    assert (chunk.start, chunk.end, len(chunk.drafts), chunk.last) == (6, 7, 9, True)
    assert scheduler.cache.in_use == 4
    scheduler.mark_computed(chunk, 2)
    scheduler.appended(sequence, 7)
    assert sequence.tokens[6:] == [7, 0, 1, 7]
    assert (sequence.computed, scheduler.cache.in_use, sequence.drafts) == (9, 3, ())
    other = scheduler.add(request(16, 50, salt=1))
    advance(scheduler)
    sequence.drafts = tuple(range(40))  # more than the cache holds
    assert [chunk.drafts for chunk in scheduler.step()] == [(), ()]
    assert other in scheduler.running
    assert scheduler.preemptions == 0


def test_forced_tokens_are_computed_in_the_next_step() -> None:
    scheduler = Scheduler(Cache(1000, 4), rows=2, budget=16)
    sequence = scheduler.add(request(6, 99))
    scheduler.add(request(6, 99, salt=1))
    advance(scheduler)
    for token in range(12):
        scheduler.appended(sequence, token, forced=True)
    sizes = []
    for _ in range(3):
        chunks = scheduler.step()
        sizes.append([c.end - c.start for c in chunks])
        for chunk in chunks:
            scheduler.mark_computed(chunk)
            if chunk.last:
                scheduler.appended(chunk.sequence, 7)
    assert sizes == [[8, 1], [5, 1], [1, 1]]  # half the budget each


def test_a_prompt_is_charged_although_drafts_follow_it() -> None:
    scheduler = Scheduler(Cache(1000, 4), rows=3, budget=128)
    for tenant, prompt, drafts in (("a", 40, (1,) * 8), ("b", 30, ())):
        scheduler.add(request(prompt, 99, tenant)).drafts = drafts
    for chunk in scheduler.step():
        scheduler.mark_computed(chunk, len(chunk.drafts))
        scheduler.appended(chunk.sequence, 7)
    for salt, tenant in ((2, "a"), (3, "b")):
        scheduler.add(request(4, 99, tenant, salt=salt))
    scheduler.step()
    assert [s.request.tenant for s in scheduler.running][2] == "b"


def test_drafts_are_charged_to_their_tenant() -> None:
    for drafts, first in (((), "a"), ((1,) * 8, "b")):
        scheduler = Scheduler(Cache(1000, 4), rows=3, budget=64)
        running = scheduler.add(request(4, 99, "a"))
        scheduler.add(request(4, 99, "b", salt=1))
        for _ in range(5):
            advance(scheduler)
            running.drafts = drafts
        for salt, tenant in ((2, "a"), (3, "b")):
            scheduler.add(request(4, 99, tenant, salt=salt))
        advance(scheduler)
        assert [s.request.tenant for s in scheduler.running][2] == first
