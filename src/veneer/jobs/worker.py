"""A worker: it takes jobs, looks at new ones, has others trained where its executor says, and watches over them.

    Worker(library, LocalExecutor(), tenants=store).run()         until SIGTERM or Ctrl-C

It holds a lease of each of its jobs and renews it; when it is killed, its leases run out, and another worker goes on
from the last checkpoint of each. Asked to end, it has its jobs' processes save their state and give the jobs back. It
looks all the time whether a job is still its own: one that was paused or cancelled is not, and its process is stopped.
While the database is away jobs go on as long as their leases are sure to be its own.

New jobs are looked at by a thread beside, so that nobody hears of a bad file only when a long run is over.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from veneer.errors import VeneerError
from veneer.jobs.executors import Executor
from veneer.jobs.process import environment_of
from veneer.jobs.store import JobLease, JobStore, LeaseLost
from veneer.jobs.validate import device_of, terms_of, validated
from veneer.library.library import Library
from veneer.plan.tables import Device
from veneer.serve.outage import is_outage
from veneer.serve.tenancy.store import Store
from veneer.train.signals import heard


@dataclass
class _Running:
    """`sure`: until when the lease is this worker's, by this machine's clock. `stopping`: since when it is to end."""

    lease: JobLease
    place: str
    sure: float
    renewed: float = field(default_factory=time.monotonic)
    stopping: float | None = None
    killed: bool = False
    ours: bool = True


class Worker:
    """One for a process. `at_once`: jobs that it has running. In seconds, `lease`: how long its leases hold without it;
    `poll`: how often it looks; `grace`: how long a process may take to save its state. `device`: what jobs are planned
    for, by default what this machine has. `say`: hears what it does, in sentences."""

    def __init__(
        self, library: Library, executor: Executor, *, tenants: Store | None = None, name: str = "", at_once: int = 1,
        device: Device | None = None, lease: float = 60.0, poll: float = 0.5, grace: float = 60.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.library, self.executor, self.say = library, executor, say
        self.store, self.terms = JobStore(library), terms_of(tenants)
        self.environment = environment_of(library, None if tenants is None else tenants.where)
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self.at_once, self.device = at_once, device
        self.lease, self.poll, self.grace = lease, poll, grace
        self._running: list[_Running] = []
        self._stop = threading.Event()
        self._away = False

    def stop(self) -> None:
        """Have `run` end, from another thread or a signal's handler."""
        self._stop.set()

    def run(self, *, until_idle: bool = False) -> None:
        """Works until it is stopped, or until there is nothing to do."""
        with heard(lambda number: self.stop(), signal.SIGINT, signal.SIGTERM, once=True):
            looking = threading.Thread(target=self._look_at_new_ones, name="veneer-jobs-validate", daemon=True)
            if not until_idle:
                looking.start()
            try:
                while not self._stop.is_set():
                    busy = self._round() or (until_idle and self._look_at_one())
                    if until_idle and not busy and not self._running:
                        return
                    self._stop.wait(0.0 if busy else self.poll)
            finally:
                self._stop.set()
                self._end()
                if looking.is_alive():
                    looking.join(self.grace)

    # -- new jobs ------------------------------------------------------------------------------------------------------

    def _look_at_new_ones(self) -> None:
        while not self._stop.is_set():
            if not self._look_at_one():
                self._stop.wait(self.poll)

    def _look_at_one(self) -> bool:
        """Whether there was one."""
        try:
            lease = self.store.take(self.name, 10 * self.lease, "validating")
            if lease is None:
                return False
            self.device = self.device or device_of()
            job = validated(self.store, lease, self.terms(lease.job.tenant), self.device)
            self.say(f"{job.id} of {job.tenant or 'nobody'}: {job.state}")
        except LeaseLost:
            return True
        except Exception as error:
            if not is_outage(error):
                raise
            self._lost(error)
            return False
        return True

    # -- jobs that are trained -----------------------------------------------------------------------------------------

    def _round(self) -> bool:
        """Looks after all that runs, and takes one more job if there is room; whether it did."""
        try:
            for running in [*self._running]:
                self._watch(running)
            if len(self._running) >= self.at_once:
                return False
            lease = self.store.take(self.name, self.lease, at_once=lambda tenant: self.terms(tenant).jobs)
            self._away = False
            if lease is None:
                return False
            self._begin(lease)
        except LeaseLost:
            return True
        except Exception as error:
            if not is_outage(error):
                raise
            self._lost(error)
            self._stop.wait(10 * self.poll)
            return False
        return True

    def _begin(self, lease: JobLease) -> None:
        sure = time.monotonic() + self.lease
        if lease.job.place:  # of a lease before this one, where that may still be
            self.executor.stop(lease.job.place, hard=True)
        try:
            place = self.executor.start(lease.job, lease.token, self.environment)
        except VeneerError as error:
            self.store.release(lease, f"could not be started: {error.what}")
            raise
        self._running.append(_Running(lease, place, sure))
        self.say(f"{lease.job.id} of {lease.job.tenant or 'nobody'}: {place}")
        self.store.note(lease, place=place)

    def _watch(self, running: _Running) -> None:
        job, now = running.lease.job, time.monotonic()
        ended = self.executor.look(running.place)
        if ended is not None:
            self._running.remove(running)
            with suppress(LeaseLost):  # it has ended the job, or given it back
                if ended.memory:
                    fix = "smaller batches (batching.micro_rows), shorter rows, or another plan"
                    self.store.finish(running.lease, error={"kind": "memory", "message": ended.why, "fix": fix})
                elif running.stopping is not None:  # before it could save anything
                    self.store.release(running.lease, "stopped, to go on from its last checkpoint")
                else:
                    self.store.died(running.lease, ended.why)
            now_is = self.store.get(None, job.id).state
            self.say(f"{job.id}: {now_is}")
            if now_is == "succeeded":  # its adapter is in the library
                for folder in job.folder.glob("attempt-*/checkpoints"):
                    shutil.rmtree(folder, ignore_errors=True)
            return
        if running.ours:
            self._keep(running, now)
        if running.stopping is not None and not running.killed and now - running.stopping > self.grace:
            running.killed = True
            self.executor.stop(running.place, hard=True)

    def _keep(self, running: _Running, now: float) -> None:
        """Looks whether the lease is still this worker's, and renews it in good time."""
        try:
            if now - running.renewed > self.lease / 4:
                self.store.renew(running.lease, self.lease)
                running.renewed, running.sure, self._away = now, now + self.lease, False
            else:
                self.store.held(running.lease.job.id, running.lease.token)
        except LeaseLost:
            running.ours = False
            self._ask_to_end(running)
        except Exception as error:
            if not is_outage(error):
                raise
            self._lost(error)
            if now > running.sure and running.stopping is None:
                self._ask_to_end(running)

    def _ask_to_end(self, running: _Running) -> None:
        if running.stopping is None:
            running.stopping = time.monotonic()
            self.executor.stop(running.place)

    def _end(self) -> None:
        """Everything that runs saves its state and is given back."""
        for running in self._running:
            self._ask_to_end(running)
        while self._running:
            for running in [*self._running]:
                try:
                    self._watch(running)
                except Exception as error:
                    if not is_outage(error):
                        raise
                    self._lost(error)
            if self._running:
                time.sleep(min(self.poll, 0.1))

    def _lost(self, error: Exception) -> None:
        if not self._away:
            what = error.what if isinstance(error, VeneerError) else type(error).__name__
            self.say(f"the database, a disk or the executor is away; it is tried again: {what}")
        self._away = True
