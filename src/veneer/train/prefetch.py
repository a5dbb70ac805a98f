"""Make the next batch and copy it to the device while the current step runs.

    with Prefetcher(send) as prefetcher:
        batch = prefetcher.get(make_batch, following)     make_batch() after send(); starts following()

The thread makes one batch at a time, in the order of the calls, so at most one batch waits. The thread has
the context of the calling code, and `get` raises the thread's errors. The thread draws no random numbers, so
it does not change the numbers of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Any

_Make = Callable[[], Any]


class Prefetcher:
    """Makes each batch in a thread and copies it to the device asynchronously with `send`.

    On CUDA, the copy is queued behind the current step, on the same stream."""

    def __init__(self, send: Callable[[Any], Any]) -> None:
        self._send = send
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next batch")
        self._begun: tuple[_Make, Future[Any]] | None = None

    def get(self, make_batch: _Make, following: _Make | None = None) -> Any:
        """Return the batch of `make_batch`, and start `following` for the next call.

        If the previous call started `make_batch` as its `following`, waits for that batch."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] is not make_batch:  # the order of the batches has changed
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
        """End the thread after its current batch, and discard the batch."""
        self._begun = None
        self._thread.shutdown(wait=True, cancel_futures=True)
