"""Choose the rows of each step, and divide steps into micro-batches.

    step         one optimizer update; its rows depend only on the seed, the epoch, and `rows` or `tokens`
    micro-batch  part of a step: rows of similar length, concatenated without padding

    plan_steps(lengths, batching, seed=0, epoch=0)[step][micro-batch] -> indices of rows

`Batch.lengths` holds the row lengths, so attention never crosses rows, packed or not. Loss and gradients are
sums over tokens, so the micro-batch size changes memory and speed, never the result. This module does not
depend on tokenizers, files or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from veneer.ops.device_transfer import sent
from veneer.train.config.text import BatchingSection
from veneer.train.devices import balance
from veneer.train.text.encode import Example


@dataclass
class Batch:
    """Rows concatenated without padding.

    input_ids: (N,) int64; lengths: row lengths, summing to N; trained: (N,) bool, whether token i is a
    target. The first token of a row has no context and is never a target (`encode` guarantees this)."""

    input_ids: Tensor
    lengths: list[int]
    trained: Tensor

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())

    def sent(self, device: torch.device) -> Self:
        """Return the batch with its tokens copied to a device asynchronously.

        `trained` remains on the host."""
        return replace(self, input_ids=sent(self.input_ids, device))


def plan_steps(
    lengths: Sequence[int], batching: BatchingSection, *, seed: int, epoch: int, pieces: int = 1
) -> list[list[list[int]]]:
    """Return the plan of one epoch: step -> micro-batch -> indices of rows.

    Each index occurs exactly once. The same arguments give the same plan on every machine, so a resumed run
    computes the plan again. A micro-batch has at most `micro_rows` rows and `micro_tokens` tokens; a longer
    row forms its own micro-batch.

    lengths: tokens of each row. pieces: number of devices. If a step has enough rows, its rows are first
    divided into one part per device, with about the same number of tokens. With `longest_first`, the step
    with the longest row runs first in epoch 0."""
    steps = step_rows(lengths, batching, seed=seed, epoch=epoch)
    return [_cut(step, lengths, batching, pieces) for step in steps]


def step_rows(lengths: Sequence[int], batching: BatchingSection, *, seed: int, epoch: int) -> list[list[int]]:
    """Return the rows of each step, from a seeded shuffle.

    In mode `bucket`, each step has `batching.rows` rows. In mode `pack`, each step has as many rows as fit in
    `batching.tokens` tokens. micro_rows and micro_tokens do not affect the result."""
    order = _shuffled(len(lengths), seed, epoch)
    if batching.mode == "bucket":
        steps = [order[i : i + batching.rows] for i in range(0, len(order), batching.rows)]
    else:
        steps = _fill(order, lengths, batching.tokens or 0)
    if batching.longest_first and epoch == 0 and steps:
        longest = max(range(len(lengths)), key=lambda i: (lengths[i], -i))
        at = next(n for n, step in enumerate(steps) if longest in step)
        steps.insert(0, steps.pop(at))
    return steps


def collate(examples: Sequence[Example]) -> Batch:
    """Return a batch of these rows, concatenated in the given order."""
    ids = [token for e in examples for token in e.input_ids]
    trained = [t for e in examples for t in e.trained]
    return Batch(
        torch.tensor(ids, dtype=torch.long),
        [len(e.input_ids) for e in examples],
        torch.tensor(trained, dtype=torch.bool),
    )


def grouped(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Return the indices of all rows, longest row first, in groups of at most `micro_tokens` tokens.

    Used for batches outside of training steps."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return _fill(order, lengths, micro_tokens)


def _shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """Return 0..n-1 ordered by a hash.

    Unlike the shuffle of a random generator, the order does not depend on library versions."""
    key = f"{seed}|{epoch}|".encode()
    return sorted(range(n), key=lambda i: hashlib.blake2b(key + str(i).encode(), digest_size=8).digest())


def _fill(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide `order` into groups of at most `budget` tokens.

    A row longer than the budget forms its own group."""
    steps: list[list[int]] = []
    free = 0
    for i in order:
        if not steps or lengths[i] > free:
            steps.append([])
            free = budget
        steps[-1].append(i)
        free -= lengths[i]
    return steps


def _cut(rows: Sequence[int], lengths: Sequence[int], batching: BatchingSection, pieces: int) -> list[list[int]]:
    """Return the micro-batches of one step.

    Within the part of each device, rows are sorted from long to short and divided at the limits. The largest
    micro-batch comes first, so that a step that does not fit in memory fails in its first micro-batch."""
    micro: list[list[int]] = []
    for piece in balance([lengths[i] for i in rows], pieces):
        free = -1
        for i in sorted((rows[at] for at in piece), key=lambda i: (-lengths[i], i)):
            if lengths[i] > free or len(micro[-1]) == batching.micro_rows:
                micro.append([])
                free = batching.at_once
            micro[-1].append(i)
            free -= lengths[i]
    return sorted(micro, key=lambda members: (-lengths[members[0]], members[0]))
