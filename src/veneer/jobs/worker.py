"""A worker: validates new jobs and trains queued jobs, each in a separate process.

    Worker(library, LocalExecutor(), tenants=store).run()         until SIGTERM or Ctrl-C

A worker holds a lease on each of its jobs and renews the lease regularly. If the worker is killed, its leases
expire, and another worker resumes each job from the last checkpoint. On SIGTERM, the worker's processes save
their state and return their jobs to the queue. The worker regularly checks that it still holds each lease; if
a job was paused or cancelled, the worker stops the job's process. While the database is unavailable, a job
runs only as long as its lease is certain to be valid.

New jobs are validated on this machine while other jobs are trained. A validation has a memory limit and a
time limit, and stops if its job is cancelled. A tenant has at most one validation at a time; the next
validation goes to the tenant that has waited longest.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from veneer.errors import VeneerError, gigabytes
from veneer.jobs.account import TrainingAccount
from veneer.jobs.executors import ExitStatus, LocalExecutor
from veneer.jobs.process import process_environment
from veneer.jobs.store import JobLease, JobStore, LeaseLost, jobs_home
from veneer.jobs.validate import this_device
from veneer.library.library import Library
from veneer.plan.tables import Device
from veneer.serve.tenancy.store import Store
from veneer.serve.transient import is_transient
from veneer.train.signals import signal_handler

_SWEEP = 3600.0
"""Seconds between cleanups of the files of ended jobs."""
KEEP_DAYS = {"failed": 30.0, "cancelled": 30.0, "succeeded": 365.0}
"""End state -> days for which a job's folder is kept."""
_VALIDATIONS = 4
"""Maximum number of concurrent validations."""
_VALIDATION_SECONDS = 1800.0


@dataclass
class _Running:
    """A running process.

    valid_until: monotonic time until which the lease is certain to be valid
    stopping: monotonic time at which the process was asked to stop
    deadline: monotonic time by which a validation must end; None for training
    max_memory: memory limit of a validation, in bytes"""

    lease: JobLease
    handle: str
    valid_until: float
    renewed: float = field(default_factory=time.monotonic)
    stopping: float | None = None
    killed: bool = False
    deadline: float | None = None
    max_memory: int = 0


class Worker:
    """Validates and trains the jobs of a queue. Create one worker per process.

    at_once: maximum number of concurrent training processes
    lease: seconds until a lease expires unless renewed
    poll: seconds between polls
    grace: seconds that a process has to save its state when asked to stop
    log: called with log messages"""

    def __init__(
        self,
        library: Library,
        executor: LocalExecutor,
        *,
        tenants: Store | None = None,
        at_once: int = 1,
        lease: float = 60.0,
        poll: float = 0.5,
        grace: float = 60.0,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.library, self.executor, self.log = library, executor, log
        self.store = JobStore(library)
        self.account = TrainingAccount(self.store, tenants)
        self.environment = process_environment(library, None if tenants is None else tenants.where)
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.at_once, self.lease, self.poll, self.grace = at_once, lease, poll, grace
        self._device: Device | None = None
        self._swept: float | None = None
        self._running: list[_Running] = []
        self._served: dict[str, float] = {}
        """Tenant -> monotonic time at which this worker last started a validation for the tenant."""
        self._stop = threading.Event()
        self._away = False

    def stop(self) -> None:
        """Make `run` stop. Can be called from another thread or a signal handler."""
        self._stop.set()

    def run(self, *, until_idle: bool = False) -> None:
        """Process jobs until stopped or, with `until_idle`, until no job is left."""
        with signal_handler(lambda number: self.stop(), signal.SIGINT, signal.SIGTERM, once=True):
            try:
                while not self._stop.is_set():
                    busy = self._round(validate_first=until_idle)
                    if until_idle and not busy and not self._running:
                        return
                    self._stop.wait(0.0 if busy else self.poll)
            finally:
                self._stop.set()
                self._end_all()

    # -- new jobs ------------------------------------------------------------------------------------------------------

    def _validate_next(self) -> bool:
        """Start one validation if a slot is free; return whether one was started."""
        if self._validating() >= _VALIDATIONS:
            return False
        limit, order = lambda tenant: 1, lambda tenant: self._served.get(tenant, 0.0)
        lease = self.store.acquire(self.name, self.lease, "validating", at_once=limit, order=order)
        if lease is None:
            return False
        import psutil

        begun = time.monotonic()
        self._served[lease.job.tenant] = begun
        max_memory = max(1 << 30, int(psutil.virtual_memory().available) // 2)
        self._device = self._device or self.executor.device or this_device()
        handle = self.executor.start(lease, self.environment, self._device, max_memory)
        valid_until, deadline = begun + self.lease, begun + _VALIDATION_SECONDS
        self._running.append(_Running(lease, handle, valid_until, deadline=deadline, max_memory=max_memory))
        return True

    def _validating(self) -> int:
        return sum(each.deadline is not None for each in self._running)

    def _validation_ended(self, running: _Running, deadline: float, status: ExitStatus) -> None:
        """Record the end of a validation that exceeded a limit or was stopped.

        A process that ended on its own has already recorded its result. If the process could not do so
        because the database or a disk was unavailable, the lease expires and the job is validated again."""
        if status.memory:
            message = f"reading the rows needs more memory than the limit of {gigabytes(running.max_memory)}"
            fix = "use fewer or shorter rows"
        elif time.monotonic() > deadline:
            message = f"reading the rows takes longer than the limit of {_VALIDATION_SECONDS / 60:g} minutes"
            fix = "use fewer rows, or fewer messages per row: each answer is read with all messages before it"
        else:
            if running.stopping is not None:
                self.store.release(running.lease, "")
            return
        error = {"kind": "preflight", "where": "data.train", "message": message, "fix": fix}
        self.store.finish(running.lease, error=error)

    # -- training ------------------------------------------------------------------------------------------------------

    def _round(self, *, validate_first: bool = False) -> bool:
        """Poll running jobs; start a job if a slot is free, and return whether one started.

        validate_first: do not start training while jobs are being validated."""
        with self._tolerate_outages():
            for running in [*self._running]:
                self._check_process(running)
            self._sweep()
            if self._validate_next():
                return True
            validating = self._validating()
            if len(self._running) - validating >= self.at_once or (validate_first and validating):
                return False
            lease = self.store.acquire(self.name, self.lease, at_once=lambda tenant: self.account.terms(tenant).jobs)
            self._away = False
            if lease is None:
                return False
            self._start_training(lease)
            return True
        self._stop.wait(10 * self.poll)
        return False

    def _sweep(self) -> None:
        """Once an hour, remove the folders and metrics of jobs that ended long ago."""
        now = time.monotonic()
        if self._swept is None or now - self._swept > _SWEEP:
            self._swept = now
            for state, days in KEEP_DAYS.items():
                for job in self.store.ended_before(days * 86400, state):
                    shutil.rmtree(jobs_home() / job, ignore_errors=True)
            self.store.delete_old_metrics(KEEP_DAYS["succeeded"] * 86400)

    def _start_training(self, lease: JobLease) -> None:
        valid_until, job = time.monotonic() + self.lease, lease.job
        if job.place:  # a process started under an earlier lease may still be running
            self.executor.stop(job.place, hard=True)
        try:
            handle = self.executor.start(lease, self.environment)
        except (VeneerError, OSError) as error:
            with suppress(LeaseLost):
                self.store.release(lease, "could not be started", str(getattr(error, "what", error)))
            raise
        self._running.append(_Running(lease, handle, valid_until))
        self.log(f"{job.id} of {job.tenant or 'no tenant'}: {handle}")
        with suppress(LeaseLost):
            self.store.record(lease, place=handle)

    def _check_process(self, running: _Running) -> None:
        now = time.monotonic()
        status = self.executor.poll(running.handle)
        if status is not None:
            self._running.remove(running)
            with suppress(LeaseLost):  # raised if the process itself ended the job or returned it to the queue
                self._process_ended(running, status)
            self._finish_job(running.lease)
            return
        if running.deadline is not None and now > running.deadline:
            self.executor.stop(running.handle, hard=True)
        self._renew(running, now)
        if running.stopping is not None and not running.killed and now - running.stopping > self.grace:
            running.killed = True
            self.executor.stop(running.handle, hard=True)

    def _process_ended(self, running: _Running, status: ExitStatus) -> None:
        """Record the end of a job's process."""
        lease = running.lease
        if running.deadline is not None:
            self._validation_ended(running, running.deadline, status)
        elif status.memory:
            fix = "smaller batches (batching.micro_rows), shorter rows, or another plan"
            self.store.finish(lease, error={"kind": "memory", "message": status.why, "fix": fix})
        elif running.stopping is not None:  # the process was killed before it saved its state
            self.store.release(lease, "stopped; resumes from the last checkpoint")
        else:
            self.store.died(lease, status.why)

    def _finish_job(self, lease: JobLease) -> None:
        """Log a job's state after its process ended; remove checkpoints on success."""
        now_is = self.store.get(None, lease.job.id).state
        self.log(f"{lease.job.id}: {now_is}")
        if now_is == "succeeded":  # the checkpoints are not needed: the adapter is in the library
            for folder in lease.job.folder.glob("attempt-*/checkpoints"):
                shutil.rmtree(folder, ignore_errors=True)

    def _renew(self, running: _Running, now: float) -> None:
        """Check that the lease is still valid; renew it after a quarter of its duration."""
        late = now - running.renewed > self.lease / 4
        with self._tolerate_outages():
            try:
                if late:
                    self.store.renew(running.lease, self.lease)
                    running.renewed, running.valid_until = now, now + self.lease
                    self._away = False
                else:
                    self.store.get_lease(running.lease.job.id, running.lease.token)
            except LeaseLost:
                self._request_stop(running)  # the job's state is logged once the process has ended
            return
        if now > running.valid_until:
            self._request_stop(running)

    def _request_stop(self, running: _Running) -> None:
        if running.stopping is None:
            running.stopping = time.monotonic()
            self.executor.stop(running.handle)

    def _end_all(self) -> None:
        """Ask all processes to save their state and return their jobs to the queue.

        Returns when every process has exited."""
        for running in self._running:
            self._request_stop(running)
        while self._running:
            for running in [*self._running]:
                with self._tolerate_outages():
                    self._check_process(running)
            if self._running:
                time.sleep(min(self.poll, 0.1))

    @contextmanager
    def _tolerate_outages(self) -> Iterator[None]:
        """Suppress outages in the `with` block; log only the first of consecutive outages."""
        try:
            yield
        except Exception as error:
            if not is_transient(error):
                raise
            if not self._away:
                message = error.what if isinstance(error, VeneerError) else type(error).__name__
                self.log(f"the database, a disk or the executor is unavailable; trying again: {message}")
            self._away = True
