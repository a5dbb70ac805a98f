"""Sizes of a step's work: few of them, little above what is needed; and a plan counts what attention has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from veneer.ops.attention import RowLayout
from veneer.ops.sizes import ROW_STEP, few_sizes
from veneer.plan.memory import Load
from veneer.plan.tables import Device


@given(st.integers(1, 1 << 20))
def test_sizes_are_few_and_little_above_what_is_needed(n: int) -> None:
    size = few_sizes(n)
    assert n <= size <= max(n + ROW_STEP - 1, n * 17 / 16 + 1)
    assert few_sizes(size) == size
    assert few_sizes(n + 1) >= size


def test_there_are_at_most_sixteen_sizes_from_each_power_of_two_to_the_next() -> None:
    assert len({few_sizes(n) for n in range(1025, 2049)}) == 16


@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.sampled_from(["float32", "bfloat16"]))
def test_a_plan_counts_the_places_that_attention_has(lengths: list[int], dtype: str) -> None:
    groups = RowLayout(lengths, step=1 if dtype == "float32" else ROW_STEP).groups
    places = Load(tuple(lengths), dtype=dtype).attended(Device("cpu", "cpu", 16 << 30, 1e12, 2e10))
    assert places == tuple(g.length for g in groups for _ in range(g.rows))
