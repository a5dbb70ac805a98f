"""Batch plans, and independence of packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import llama3
from veneer.train.config.text import BatchingSection
from veneer.train.text.batches import collate, plan_steps, step_rows
from veneer.train.text.encode import Example

LENGTHS = st.lists(st.integers(1, 60), min_size=0, max_size=80)


@st.composite
def batchings(draw: Any) -> BatchingSection:
    values: dict[str, Any] = {
        "micro_rows": draw(st.none() | st.integers(1, 9)),
        "micro_tokens": draw(st.integers(1, 200)),
        "longest_first": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return BatchingSection(mode="bucket", rows=draw(st.integers(1, 20)), **values)
    return BatchingSection(mode="pack", tokens=draw(st.integers(1, 300)), **values)


@given(LENGTHS, batchings(), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_an_epoch_once(lengths: list[int], batching: BatchingSection, seed: int, epoch: int) -> None:
    steps = plan_steps(lengths, batching, seed=seed, epoch=epoch)
    assert sorted(i for step in steps for micro in step for i in micro) == list(range(len(lengths)))
    for step in steps:
        rows = [i for micro in step for i in micro]
        assert rows
        if batching.mode == "bucket":
            assert len(rows) <= batching.rows
        else:
            assert len(rows) == 1 or sum(lengths[i] for i in rows) <= batching.tokens
        for micro in step:
            assert micro
            assert len(micro) == 1 or sum(lengths[i] for i in micro) <= batching.micro_tokens
            assert batching.micro_rows is None or len(micro) <= batching.micro_rows
    if batching.mode == "bucket":
        short = [s for s in steps if sum(map(len, s)) != batching.rows]
        assert len(short) <= 1


@given(LENGTHS, batchings(), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_the_plan_is_a_pure_function(lengths: list[int], batching: BatchingSection, seed: int, epoch: int) -> None:
    once = plan_steps(lengths, batching, seed=seed, epoch=epoch)
    assert [*once] == [*plan_steps(lengths, batching, seed=seed, epoch=epoch)]


@given(LENGTHS, batchings(), st.integers(1, 9), st.integers(1, 400), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_micro_batch_limits_do_not_change_the_rows_of_a_step(
    lengths: list[int], batching: BatchingSection, rows: int, tokens: int, epoch: int
) -> None:
    other = batching.model_copy(update={"micro_rows": rows, "micro_tokens": tokens})
    plans = [plan_steps(lengths, b, seed=0, epoch=epoch) for b in (batching, other)]
    sets = [[sorted(i for micro in step for i in micro) for step in plan] for plan in plans]
    assert sets[0] == sets[1]


@given(LENGTHS.filter(bool), batchings())
@settings(max_examples=100, deadline=None)
def test_longest_first_changes_only_the_order_of_steps(lengths: list[int], batching: BatchingSection) -> None:
    first = batching.model_copy(update={"longest_first": True})
    plain = batching.model_copy(update={"longest_first": False})
    steps = plan_steps(lengths, first, seed=1, epoch=0)
    assert max(lengths) in [lengths[i] for i in steps[0][0]]
    rows = [step_rows(lengths, b, seed=1, epoch=0) for b in (first, plain)]
    assert sorted(map(tuple, rows[0])) == sorted(map(tuple, rows[1]))
    assert [*plan_steps(lengths, first, seed=1, epoch=1)] == [*plan_steps(lengths, plain, seed=1, epoch=1)]


def test_epochs_and_seeds_shuffle_differently() -> None:
    lengths = [5] * 100
    plans = {str(step_rows(lengths, BatchingSection(), seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(plans) == 9
    order = [i for step in step_rows(lengths, BatchingSection(), seed=0, epoch=1) for i in step]
    assert order != list(range(100))


def test_similar_lengths_share_a_micro_batch() -> None:
    lengths = [10, 100] * 8
    steps = plan_steps(lengths, BatchingSection(rows=16, micro_rows=8, micro_tokens=10_000), seed=0, epoch=0)
    assert [{lengths[i] for i in micro} for micro in steps[0]] == [{100}, {10}]


@given(LENGTHS.filter(bool), batchings(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_each_device_gets_a_micro_batch_if_possible(lengths: list[int], batching: BatchingSection, pieces: int) -> None:
    whole = plan_steps(lengths, batching, seed=0, epoch=1)
    cut = plan_steps(lengths, batching, seed=0, epoch=1, pieces=pieces)
    rows = [[sorted(i for micro in step for i in micro) for step in plan] for plan in (whole, cut)]
    assert rows[0] == rows[1]
    for step, own in zip(cut, rows[1], strict=True):
        assert len(step) >= min(pieces, len(own))
        assert all(sum(lengths[i] for i in micro) <= batching.micro_tokens or len(micro) == 1 for micro in step)


def test_collate_concatenates_rows() -> None:
    batch = collate([Example([1, 2, 3], [False, True, False], 0), Example([4, 5], [False, True], 1)])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.input_ids.dtype == torch.long
    assert batch.lengths == [3, 2]
    assert batch.trained.tolist() == [False, True, False, False, True]
    assert (batch.tokens, batch.trained_tokens) == (5, 2)


@pytest.mark.parametrize("swap", [False, True])
def test_rows_of_a_batch_do_not_attend_to_each_other(swap: bool) -> None:
    """Each row has the same logits in the batch as by itself, if attention is limited to the row."""
    model = llama3()
    rows = [Example([3, 7, 9, 11], [False, False, True, True], 0), Example([5, 8, 13], [False, True, True], 1)]
    batch = collate(rows[::-1] if swap else rows)
    of_row = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
    allowed = (of_row[:, None] == of_row[None, :]) & torch.tril(
        torch.ones(batch.tokens, batch.tokens, dtype=torch.bool)
    )
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[None, None]
    positions = torch.cat([torch.arange(n) for n in batch.lengths])[None]
    with torch.no_grad():
        packed = (
            model(batch.input_ids[None], attention_mask=mask, position_ids=positions).logits[0].split(batch.lengths)
        )
        for got, row in zip(packed, rows[::-1] if swap else rows, strict=True):
            torch.testing.assert_close(got, model(torch.tensor([row.input_ids])).logits[0], atol=1e-5, rtol=1e-5)
