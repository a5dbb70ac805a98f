"""One thread that writes: what comes while a transaction is being committed goes together into the next one.

A commit waits for the disk; hundreds of rows in one cost as much as one row. The event loop never waits for the
database, only coroutines that need to know that their row is there, and those wait for the end of one commit, or of
two.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import InterfaceError, OperationalError

from veneer.errors import ResourceError
from veneer.library.database import writing

__all__ = ["Job", "Writer"]

_MOST = 1000  # jobs in one transaction
_log = logging.getLogger("veneer.serve.tenancy")


@dataclass(eq=False)
class Job:
    """`write` is called in a transaction, perhaps several times, of which one is committed; so it must be idempotent.
    `patient`: where the database is away, wait for it; else fail at once. `done`: after the commit."""

    write: Callable[[Connection], None]
    patient: bool
    done: Future[None] = field(default_factory=Future)


class Writer:
    """Call `put` from any thread; jobs are committed in the order they came."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = False
        self._give_up = float("inf")
        self._thread = threading.Thread(target=self._run, name="veneer-ledger", daemon=True)
        self._thread.start()

    def put(self, write: Callable[[Connection], None], *, patient: bool = True) -> Future[None]:
        """The future's result comes when the job is committed."""
        job = Job(write, patient)
        job.done.set_running_or_notify_cancel()  # from here on nobody can cancel it
        if self._closing:
            job.done.set_exception(ResourceError("the ledger is closed"))
        else:
            self._jobs.put(job)
        return job.done

    def close(self, seconds: float = 10.0) -> bool:
        """Write what has come so far and stop; True if all of it is committed."""
        self._closing, self._give_up = True, time.monotonic() + seconds
        self._jobs.put(None)
        self._thread.join(seconds + 5)
        return not self._thread.is_alive() and self._jobs.empty()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._commit([job, *self._more(_MOST - 1)])

    def _more(self, most: int) -> list[Job]:
        """What else has come, in its order."""
        found: list[Job] = []
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

    def _commit(self, batch: list[Job]) -> None:
        """All of it in one transaction; where that cannot be, one by one, so that a job fails for itself alone."""
        while batch:
            try:
                self._together(batch)
                return
            except (OperationalError, InterfaceError, ResourceError) as error:  # the database is away, or locked
                for job in batch:
                    if not job.patient:
                        job.done.set_exception(error)
                batch = [job for job in batch if job.patient]
                if batch and time.monotonic() > self._give_up:
                    _log.error("%d rows of the ledger wait for the next start: %s", len(batch), error)
                    for job in batch:
                        job.done.set_exception(error)
                    return
                if batch:
                    _log.warning("the ledger waits for its database: %s", error)
                    time.sleep(0.2)
                    batch += self._more(_MOST)  # those who will not wait are told with the next attempt
            except Exception as error:
                if len(batch) == 1:
                    if batch[0].patient:  # nobody waits for it, so it is said here
                        _log.exception("a row of the ledger was refused")
                    batch[0].done.set_exception(error)
                    return
                for job in batch:
                    self._commit([job])
                return

    def _together(self, batch: list[Job]) -> None:
        with writing(self._engine) as c:
            for job in batch:
                job.write(c)
        for job in batch:
            job.done.set_result(None)
