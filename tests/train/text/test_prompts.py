"""Batches with several completions of a prompt: completions are adjacent and share the prompt's tokens."""

from __future__ import annotations

import random

import pytest
import torch

from veneer.train.config.load import config_from
from veneer.train.text.prompts import collate_shared, shared_groups
from veneer.train.text.rollouts import Rollout


def answers(count: int = 40) -> list[Rollout]:
    rng = random.Random(0)
    prompts = [tuple(range(10 * n, 10 * n + 5 + n)) for n in range(6)]
    texts = [tuple(rng.randrange(100, 200) for _ in range(rng.randint(1, 9))) for _ in range(count)]
    return [Rollout(rng.choice(prompts), text, (-1.0,) * len(text), (-1.0,) * len(text), "", False) for text in texts]


@pytest.mark.parametrize(("most", "rows"), [(1000, None), (40, None), (40, 3), (1, None)])
def test_micro_batches_keep_completions_of_a_prompt_together(most: int, rows: int | None) -> None:
    batching = {"micro_tokens": most, "micro_rows": rows}
    values = {"base": "b", "data": {"train": "t"}, "output": "o", "batching": batching}
    rollouts = answers()
    groups = shared_groups([(r.prompt, len(r.tokens)) for r in rollouts], config_from(values, [])[0])
    assert sorted(i for group in groups for i in group) == list(range(len(rollouts)))
    for group in groups:
        prompts = [rollouts[i].prompt for i in group]
        changes = [a for a, b in zip(prompts, [*prompts[1:], None], strict=True) if a != b]
        assert len(changes) == len(set(prompts))
        tokens = sum(map(len, changes)) + sum(len(rollouts[i].tokens) for i in group)
        assert len(group) == 1 or (tokens <= most and len(group) <= (rows or len(rollouts)))
    assert (len(groups) == 1) == (most == 1000)
    assert (len(groups) == len(rollouts)) == (most == 1)


def test_batches_with_shared_prompts_contain_the_same_rows() -> None:
    rollouts = answers()
    batch, shared = collate_shared(rollouts)
    assert len(batch.input_ids) == sum(map(len, {r.prompt for r in rollouts})) + sum(len(r.tokens) for r in rollouts)
    rows = batch.input_ids[shared.places].split(batch.lengths)
    message = batch.trained[shared.places].split(batch.lengths)
    for r, ids, trained in zip(rollouts, rows, message, strict=True):
        assert tuple(ids.tolist()) == (*r.prompt, *r.tokens)
        assert torch.equal(trained, torch.arange(len(ids)) >= len(r.prompt))
