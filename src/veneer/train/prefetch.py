"""Make the next batch and copy it to the device while the current step runs.

    with Ahead(send) as ahead:
        batch = ahead.take(make, following)     the result of make(), sent; following() starts in the thread

A thread makes one batch at a time, in the order of the calls, so at most one batch waits. The thread has the
context of the caller, and its errors are raised by `take`. It draws no random numbers, so a run's numbers do
not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from types import TracebackType
from typing import Any

_Make = Callable[[], Any]


class Prefetcher:
    """`send`: what is done with each batch in the thread as soon as it is made: a copy to the device that nobody waits
    for. On CUDA a thread's stream is the same as every other's, so the copy is queued behind the step that runs, and
    what is computed of it behind the copy. `ended`: what is still being made is nobody's any more."""

    def __init__(self, send: Callable[[Any], Any]) -> None:
        self._send = send
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next batch")
        self._begun: tuple[_Make, Future[Any]] | None = None
        self.ended = False

    def take(self, make: _Make, following: _Make | None = None) -> Any:
        """Return the batch of `make`; start `following` for the next call.

        Waits for the batch if the previous call already started it as `following`."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] is not make:  # the order of batches changed
            begun[1].cancel()
            begun = None
        batch = (self._asked(make) if begun is None else begun[1]).result()
        if following is not None:
            self.begin(following)
        return batch

    def begin(self, following: _Make) -> None:
        """Start making the next batch in the thread."""
        self._begun = following, self._asked(following)

    def settle(self) -> None:
        """Wait until the thread is idle; a finished batch stays available."""
        if self._begun is not None:
            wait([self._begun[1]])

    def _asked(self, make: _Make) -> Future[Any]:
        return self._thread.submit(copy_context().run, lambda: self._send(make()))

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the thread after its current batch, which is discarded."""
        self._begun, self.ended = None, True
        self._thread.shutdown(wait=True, cancel_futures=True)
