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
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from veneer.ops.device_transfer import sent
from veneer.train.config.text import BatchingSection
from veneer.train.devices import balance
from veneer.train.lazy import Lazy
from veneer.train.text.encode import TOKEN_BITS, Example

_Integers = npt.NDArray[Any]


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


class StepPlan(Lazy[list[list[int]]]):
    """The plan of one epoch: step -> micro-batch -> indices of rows.

    order: (rows,) the indices of all rows, in the order of the plan. micros: (micro-batches + 1,) the position
    in `order` where each micro-batch begins. steps: (steps + 1,) the index of each step's first micro-batch."""

    def __init__(self, order: _Integers, micros: _Integers, steps: _Integers) -> None:
        self.order, self.micros, self.steps = order, micros, steps
        super().__init__(len(steps) - 1, lambda step: [self.rows(m) for m in range(steps[step], steps[step + 1])])

    def rows(self, micro: int) -> list[int]:
        """Return the indices of a micro-batch's rows."""
        rows: list[int] = self.order[self.micros[micro] : self.micros[micro + 1]].tolist()
        return rows

    def sums(self, values: _Integers) -> _Integers:
        """Return the sum of `values`, one number per row, for each micro-batch."""
        return np.diff(np.concatenate([[0], np.cumsum(values[self.order])])[self.micros])


def plan_steps(
    lengths: Sequence[int] | _Integers, batching: BatchingSection, *, seed: int, epoch: int, pieces: int = 1
) -> StepPlan:
    """Return the plan of one epoch.

    Each index occurs exactly once. The same arguments give the same plan on every machine, so a resumed run
    computes the plan again. A micro-batch has at most `micro_rows` rows and `micro_tokens` tokens; a longer
    row forms its own micro-batch.

    lengths: tokens of each row. pieces: number of devices. If a step has enough rows, its rows are first
    divided into one part per device, with about the same number of tokens. With `longest_first`, the step
    with the longest row runs first in epoch 0."""
    return _planned(np.asarray(lengths, np.int32).tobytes(), batching, seed, epoch, pieces)


@lru_cache(maxsize=4)  # the preflight, the test of the largest micro-batch and the run need the same plans
def _planned(lengths_bytes: bytes, batching: BatchingSection, seed: int, epoch: int, pieces: int) -> StepPlan:
    """Return the plan of `plan_steps`.

    Within the part of each device, rows are sorted from long to short and divided at the limits. The largest
    micro-batch comes first, so that a step that does not fit in memory fails in its first micro-batch."""
    lengths = np.frombuffer(lengths_bytes, np.int32)
    order, steps = _step_order(lengths, batching, seed, epoch)
    step = np.repeat(np.arange(len(steps) - 1), np.diff(steps))
    part = np.zeros_like(step)
    if pieces > 1:
        for start, end in itertools.pairwise(steps.tolist()):
            for piece, members in enumerate(balance(lengths[order[start:end]].tolist(), pieces)):
                part[start + np.array(members, np.int64)] = piece
    by_length = np.lexsort((order, -lengths[order], part, step))
    order, step, part = order[by_length], step[by_length], part[by_length]
    starts: list[int] = []
    last, free, rows = -1, 0, 0
    for i, (group, n) in enumerate(zip((step * pieces + part).tolist(), lengths[order].tolist(), strict=True)):
        if group != last or n > free or rows == batching.micro_rows:
            starts.append(i)
            last, free, rows = group, batching.at_once, 0
        free, rows = free - n, rows + 1
    first = np.array(starts, np.int64)
    sizes = np.diff([*starts, len(order)])
    sequence = np.lexsort((order[first], -lengths[order[first]], step[first]))
    if pieces > 1:  # a single part already has this order
        order = np.concatenate([order[first[m] : first[m] + sizes[m]] for m in sequence] or [order])
    micros = np.concatenate([[0], np.cumsum(sizes[sequence])])
    return StepPlan(order, micros, np.searchsorted(step[first], np.arange(len(steps))))


def step_rows(lengths: Sequence[int], batching: BatchingSection, *, seed: int, epoch: int) -> list[list[int]]:
    """Return the rows of each step, from a seeded shuffle.

    In mode `bucket`, each step has `batching.rows` rows. In mode `pack`, each step has as many rows as fit in
    `batching.tokens` tokens. micro_rows and micro_tokens do not affect the result."""
    order, steps = _step_order(np.array(lengths, np.int32), batching, seed, epoch)
    return [order[start:end].tolist() for start, end in itertools.pairwise(steps)]


def _step_order(lengths: _Integers, batching: BatchingSection, seed: int, epoch: int) -> tuple[_Integers, _Integers]:
    """Return (all rows in the order of the steps, the position where each step begins, and at last their number)."""
    order = _shuffled(len(lengths), seed, epoch)
    if batching.mode == "bucket":
        sizes = np.diff([*range(0, len(order), batching.rows), len(order)])
    else:
        sizes = np.array(
            [len(step) for step in _fill(order.tolist(), lengths.tolist(), batching.tokens or 0)], np.int64
        )
    steps = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    if batching.longest_first and epoch == 0 and len(order):
        position = np.flatnonzero(order == lengths.argmax())[0]
        at = int(np.searchsorted(steps, position, side="right")) - 1
        order = np.concatenate([order[steps[at] : steps[at + 1]], order[: steps[at]], order[steps[at + 1] :]])
        steps = np.concatenate([[0], np.cumsum([sizes[at], *sizes[:at], *sizes[at + 1 :]])])
    return order, steps


def collate(examples: Sequence[Example]) -> Batch:
    """Return a batch of these rows, concatenated in the given order."""
    coded = np.concatenate([e.coded for e in examples])
    ids = torch.from_numpy((coded & TOKEN_BITS).astype(np.int64))
    return Batch(ids, [e.tokens for e in examples], torch.from_numpy(coded < 0))


def grouped(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Return the indices of all rows, longest row first, in groups of at most `micro_tokens` tokens.

    Used for batches outside of training steps."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return _fill(order, lengths, micro_tokens)


def _shuffled(n: int, seed: int, epoch: int) -> _Integers:
    """Return 0..n-1 ordered by a hash.

    Unlike the shuffle of a random generator, the order does not depend on library versions."""
    key = f"{seed}|{epoch}|".encode()
    hashes = b"".join(hashlib.blake2b(key + str(i).encode(), digest_size=8).digest() for i in range(n))
    return np.argsort(np.frombuffer(hashes, ">u8"), kind="stable").astype(np.int32)


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
