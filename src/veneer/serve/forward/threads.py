"""Choose the number of CPU threads for an engine step: one, or all.

A step of few rows is hundreds of parallel regions of a few microseconds each. If waking a second thread takes
as long as its half of the work, all threads are slower than one: 35 ms a token instead of 24 on a 2-core VM
(docs/notes/serving.md). The threshold depends on the machine and the model, so it is measured: for each size
of step (token counts between two powers of two) the first few steps alternate between one thread and all,
later steps use the faster, and after some thousand steps the trial repeats. For bases in bfloat16, whose
products by our kernels have the same bits either way; float32 products do not.

Depends on numbers and the clock only; no tensors.
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
    """Trial times of one step size, in seconds by thread count.

    `steps`: steps since the trial.
    """

    tried: dict[int, list[float]]
    steps: int = 0


class ThreadTuner:
    """Tunes the thread count.

    `use`: sets it for the calling thread, None if unsupported; `most`: all threads.
    """

    def __init__(
        self, use: Callable[[int], None] | None, most: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._use, self._most, self._clock = use, most, clock
        self._sizes: dict[int, _Size] = {}

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Run a step of `tokens` tokens inside with the chosen thread count.

        Restore all threads after it.
        """
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
