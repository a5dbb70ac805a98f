"""Build the next batch and copy it to the device while the current step runs.

    with Prefetcher(send) as prefetcher:
        batch = prefetcher.get(make_batch, following)     returns send(make_batch()), and starts following()

A thread builds one batch at a time, in the order of the calls, so at most one finished batch is waiting. The
thread runs in the caller's context, and `get` raises the thread's errors. The thread uses no random numbers,
so it does not change the random numbers of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Any

_Make = Callable[[], Any]


class Prefetcher:
    """Builds each batch in a thread, and copies it to the device asynchronously with `send`.

    On CUDA, the copy is queued behind the current step, on the same stream."""

    def __init__(self, send: Callable[[Any], Any]) -> None:
        self._send = send
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next batch")
        self._begun: tuple[_Make, Future[Any]] | None = None

    def get(self, make_batch: _Make, following: _Make | None = None) -> Any:
        """Return the batch that `make_batch` builds, and start `following` for the next call.

        If the previous call already started `make_batch` (as its `following`), this waits for that batch."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] is not make_batch:  # the started batch is not the one that is needed now
            begun[1].cancel()
            begun = None
        batch = (self._submit(make_batch) if begun is None else begun[1]).result()
        if following is not None:
            self._begun = following, self._submit(following)
        return batch

    def _submit(self, make_batch: _Make) -> Future[Any]:
        return self._thread.submit(copy_context().run, lambda: self._send(make_batch()))

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop the thread after its current batch, and discard that batch."""
        self._begun = None
        self._thread.shutdown(wait=True, cancel_futures=True)
