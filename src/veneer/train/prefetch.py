"""The next batch is made, and on its way to the device, while the step before it runs there.

    with Ahead(send) as ahead:
        batch = ahead.take(make, following)     what make() gives, sent; following() is begun in the thread

A thread makes one batch at a time, in the order in which they are asked for: beside the one that was taken there is
never more than one. It has the context of whoever asks; what it raises is
raised where its batch is taken. It draws nothing at random, so a run's numbers do not depend on it.
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
        """The batch of `make`, which may have been begun as `following` of the call before; it is waited for."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] is not make:  # another turn was taken than was foreseen
            begun[1].cancel()
            begun = None
        batch = (self._asked(make) if begun is None else begun[1]).result()
        if following is not None:
            self.begin(following)
        return batch

    def begin(self, following: _Make) -> None:
        """Has the thread make what is going to be taken next."""
        self._begun = following, self._asked(following)

    def settle(self) -> None:
        """Waits until nothing is being made; what was begun is there to be taken."""
        if self._begun is not None:
            wait([self._begun[1]])

    def _asked(self, make: _Make) -> Future[Any]:
        return self._thread.submit(copy_context().run, lambda: self._send(make()))

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the thread, after the batch that it is at; that one is nobody's."""
        self._begun, self.ended = None, True
        self._thread.shutdown(wait=True, cancel_futures=True)
