"""How many threads a step of the engine is given on a CPU: one, or all.

A step of few rows is hundreds of parallel regions of some microseconds each. Where waking a second thread takes as long
as its half of the work, all threads together are slower than one alone: on two cores of a virtual machine 35 ms a token
instead of 24 (docs/notes/serving.md). Where that ends is a matter of the machine and of the model, so it is measured:
for each size of step (numbers of tokens between two powers of two) the first few steps are given one thread and all by
turns, and those that follow what was faster; after some thousand steps it is tried again. For bases in bfloat16, whose
products by our kernels have the same bits either way; in float32 they have not.

Knows numbers and the clock; no tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

ALWAYS_ALL = 64
"""Tokens from which a step always gets all threads."""
_TRIALS, _AGAIN = 4, 2000


@dataclass
class _Size:
    """Seconds of the steps of one size that were tried, by threads; `steps`: those since then."""

    tried: dict[int, list[float]]
    steps: int = 0


class ThreadTuner:
    """`use`: sets the threads of the calling thread; None where that cannot be. `most`: all of them."""

    def __init__(
        self, use: Callable[[int], None] | None, most: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._use, self._most, self._clock = use, most, clock
        self._sizes: dict[int, _Size] = {}

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """A step of so many tokens runs inside, with the threads it should have; all of them again after it."""
        if self._use is None or self._most == 1 or tokens >= ALWAYS_ALL:
            yield
            return
        size = self._sizes.setdefault(tokens.bit_length(), _Size({self._most: [], 1: []}))
        threads = min(size.tried, key=lambda n: len(size.tried[n]))
        trying = len(size.tried[threads]) < _TRIALS
        if not trying:
            threads = min(size.tried, key=lambda n: median(size.tried[n]))
        self._use(threads)
        start = self._clock()
        try:
            yield
        finally:
            self._use(self._most)
        if trying:
            size.tried[threads].append(self._clock() - start)
            return
        size.steps += 1
        if size.steps == _AGAIN:
            del self._sizes[tokens.bit_length()]
