"""One thread that writes: what comes while a transaction is being committed goes together into the next one.

A commit waits for the disk; hundreds of rows in one cost as much as one row. The event loop never waits for a database,
only coroutines that need to know that their row is there, and those wait for the end of one commit, or of two.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from veneer.errors import ResourceError
from veneer.serve.outage import is_outage

__all__ = ["Job", "Writer"]

_MOST = 1000  # jobs in one transaction
_log = logging.getLogger("veneer.serve.tenancy")

C = TypeVar("C")


@dataclass(eq=False)
class Job(Generic[C]):
    """`write` is called in a transaction, perhaps several times, of which one is committed; so it must be idempotent.
    `done`: after the commit; or with the error that kept it from being committed."""

    write: Callable[[C], Any]
    done: Future[Any] = field(default_factory=Future)


class Writer(Generic[C]):
    """Call `put` from any thread; jobs are committed in the order they came. `transaction`: gives what they write with,
    and commits at its end."""

    def __init__(self, transaction: Callable[[], AbstractContextManager[C]], name: str) -> None:
        self._transaction = transaction
        self._jobs: queue.SimpleQueue[Job[C] | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, write: Callable[[C], Any]) -> Future[Any]:
        """The future's result, that of `write`, comes when the job is committed."""
        job = Job(write)
        job.done.set_running_or_notify_cancel()  # from here on nobody can cancel it
        if self._closing:
            job.done.set_exception(ResourceError("the ledger is closed"))
        else:
            self._jobs.put(job)
        return job.done

    def close(self, seconds: float = 10.0) -> None:
        """Write what has come so far and stop."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._commit([job, *self._more(_MOST - 1)])
        while not self._jobs.empty():  # came while it closed
            late = self._jobs.get()
            if late is not None:
                late.done.set_exception(ResourceError("the ledger is closed"))

    def _more(self, most: int) -> list[Job[C]]:
        """What else has come, in its order."""
        found: list[Job[C]] = []
        while len(found) < most:
            try:
                more = self._jobs.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._jobs.put(None)  # the end comes again after this batch
                break
            found.append(more)
        return found

    def _commit(self, batch: list[Job[C]]) -> None:
        """All of it in one transaction; where that cannot be, one by one, so that a job fails for itself alone."""
        try:
            self._together(batch)
        except Exception as error:
            if len(batch) > 1 and not is_outage(error):
                for job in batch:
                    self._commit([job])
                return
            for job in batch:  # where the database is away, it is for all of them
                job.done.set_exception(error)

    def _together(self, batch: list[Job[C]]) -> None:
        with self._transaction() as c:
            results = [job.write(c) for job in batch]
        for job, result in zip(batch, results, strict=True):
            job.done.set_result(result)
