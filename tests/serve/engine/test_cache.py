"""Cache blocks are never lost or wrongly shared, in whatever order sequences open, grow and close."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from veneer.serve.engine.cache import BlockTable, Cache, chain
from veneer.serve.request import make_mix, mix_digest

BLOCK = 4


def filled(cache: Cache, root: bytes, tokens: list[int]) -> BlockTable:
    table = cache.open(root, tokens)
    assert cache.grow(table, len(tokens))
    cache.mark_computed(table, tokens)
    return table


def test_the_last_token_is_always_computed() -> None:
    cache = Cache(16, BLOCK)
    filled(cache, b"", list(range(8)))
    assert len(cache.open(b"", list(range(8))).blocks) == 1
    assert len(cache.open(b"", list(range(9))).blocks) == 2


def test_the_least_recently_used_blocks_are_evicted_first() -> None:
    cache = Cache(4, BLOCK)
    for start in (0, 100):
        cache.close(filled(cache, b"", list(range(start, start + 8))))
    assert cache.available == 4
    assert len(cache.open(b"", [*range(100, 108), 1]).blocks) == 2
    table = cache.open(b"", [50])
    assert cache.grow(table, 8)
    assert not cache.grow(table, 12)
    assert cache.open(b"", [*range(8), 1]).blocks == []


def test_equal_mixes_have_one_digest() -> None:
    a, b = "sha256:aa", "sha256:bb"
    assert make_mix([(b, 0.5), (a, 1.0), (b, 0.25), ("sha256:cc", 0)]) == ((a, 1.0), (b, 0.75))
    assert mix_digest(make_mix([(b, 0.5), (a, 1.0)])) == mix_digest(make_mix([(a, 1), (b, 0.5)]))
    assert mix_digest(make_mix([(a, 1.0)])) != mix_digest(make_mix([(a, 0.5)]))
    assert mix_digest(()) == b""


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.lists(st.integers(0, 2**40), max_size=8))
def test_keys_depend_on_every_token_and_their_order(tokens: list[int], other: list[int]) -> None:
    assert (chain(b"x", tokens) == chain(b"x", other)) == (tokens == other)
    assert chain(b"x", tokens) != chain(b"y", tokens)


class Blocks(RuleBasedStateMachine):
    """Compares the cache with a model that records which tokens each block was computed from."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache(12, BLOCK)
        self.written: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.open_tables: list[tuple[BlockTable, list[int]]] = []

    @rule(target=tables, root=st.sampled_from([b"", b"a"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def open(self, root: bytes, tokens: list[int]) -> tuple[BlockTable, list[int]]:
        table = self.cache.open(root, tokens)
        for i, block in enumerate(table.blocks):  # a cached block was computed from exactly these tokens under this mix
            assert self.written[block] == (root, tuple(tokens[: (i + 1) * BLOCK]))
        found = len(table.blocks)
        if self.cache.grow(table, len(tokens)):
            for i in range(found, len(table.blocks)):
                self.written[table.blocks[i]] = (root, tuple(tokens[: (i + 1) * BLOCK]))
            self.cache.mark_computed(table, tokens)
        entry = (table, tokens)
        self.open_tables.append(entry)
        return entry

    @rule(entry=consumes(tables))
    def close(self, entry: tuple[BlockTable, list[int]]) -> None:
        self.cache.close(entry[0])
        self.open_tables.remove(entry)

    @rule()
    def forget(self) -> None:
        self.cache.forget()

    @invariant()
    def every_block_is_counted_once(self) -> None:
        held = {b for table, _ in self.open_tables for b in table.blocks}
        assert self.cache.in_use == len(held)
        assert self.cache.available + len(held) == self.cache.size

    @invariant()
    def what_is_in_use_is_as_it_was_written(self) -> None:
        for table, tokens in self.open_tables:
            for i, block in enumerate(table.blocks):
                assert self.written[block] == (table.root, tuple(tokens[: (i + 1) * BLOCK]))


def test_any_order_of_opening_and_closing() -> None:
    run_state_machine_as_test(Blocks, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


def test_the_start_of_an_incomplete_block_is_copied() -> None:
    copies: list[tuple[int, int]] = []
    cache = Cache(4, 4, lambda *blocks: copies.append(blocks))
    first = cache.open(b"", [*range(10)])
    assert cache.grow(first, 10)
    cache.mark_computed(first, [*range(10)])
    same, other = cache.open(b"", [*range(10), 99]), cache.open(b"", [*range(9), 98, 99])
    assert (same.cached, same.blocks[:2], other.cached) == (10, first.blocks[:2], 8)  # no block is left for the second
    assert copies == [(first.blocks[2], same.blocks[2])]
    assert cache.open(b"salt", [*range(10)]).cached == 0
    for table in (same, other):
        cache.close(table)
    other = cache.open(b"", [*range(9), 98, 99])
    assert other.cached == 9
    cache.close(other)
    cache.close(first)
    reused = cache.open(b"x", [7])
    assert cache.grow(reused, 8)  # overwrites the incomplete block
    assert cache.open(b"", [*range(10)]).cached == 8
