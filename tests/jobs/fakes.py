"""Jobs with a fake plan, and an executor that starts no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from veneer.errors import ResourceError
from veneer.jobs.account import TrainingAccount
from veneer.jobs.executors import ExitStatus, LocalExecutor
from veneer.jobs.store import Job, JobLease, JobStore
from veneer.jobs.worker import Worker
from veneer.library.library import Library
from veneer.plan.tables import Device
from veneer.serve.tenancy.store import Store, TrainingTerms

CONFIG = {"base": "tiny", "data": {"train": "/data/a.jsonl"}, "output": "elsewhere"}
PLAN = {"tokens": 1_000_000, "steps": 10}


def taken(store: JobStore, seconds: float = 60, worker: str = "w", **how: Any) -> JobLease:
    return store.acquire(worker, seconds, **how)


def queued(store: JobStore, tenant: str = "acme", *, about: Any = None, plan: Any = None, **terms: Any) -> Job:
    """Create and queue a job with a fake plan.

    `terms`: the price, and the tenant's budget."""
    job = store.create(tenant, CONFIG, name="support", about=about)
    return store.queue(taken(store, state="validating", only=job.id), PLAN | (plan or {}), **terms)


class FixedTerms(TrainingAccount):
    """A training account with the same terms for every tenant."""

    def __init__(self, store: JobStore, tenants: Store | None = None, **terms: Any) -> None:
        super().__init__(store, tenants)
        self.fixed = TrainingTerms(**terms)

    def terms(self, tenant: str) -> TrainingTerms:
        return self.fixed


class FakeExecutor(LocalExecutor):
    """An executor whose simulated processes run until a test ends them.

    `stubborn`: only a hard stop ends a process; `refuse`: processes fail to start. `validating`: handle ->
    lease of each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[str, JobLease] = {}
        self.validating: dict[str, JobLease] = {}
        self.over: dict[str, ExitStatus] = {}
        self.asked: list[tuple[str, bool]] = []
        self.stubborn = self.refuse = False

    def start(
        self, lease: JobLease, environment: Mapping[str, str], device: Device | None = None, max_memory: int = 0
    ) -> str:
        if self.refuse:
            raise ResourceError("there is no room for a process", fix="wait")
        trains = device is None
        handle = f"pretended {lease.job.id} {lease.job.attempt}" if trains else f"validation of {lease.job.id}"
        (self.running if trains else self.validating)[handle] = lease
        return handle

    def poll(self, handle: str) -> ExitStatus | None:
        is_running = handle in self.running or handle in self.validating
        return self.over.get(handle) if is_running else ExitStatus("it is gone")

    def stop(self, handle: str, *, hard: bool = False) -> None:
        if handle in self.running or handle in self.validating:
            self.asked.append((handle, hard))
            if hard or not self.stubborn:
                self.over[handle] = ExitStatus("ended by a signal")


@contextmanager
def worker_thread(
    library: Library, executor: LocalExecutor, seconds: float, **options: Any
) -> Iterator[tuple[Worker, Callable[[], None]]]:
    """Run a worker in a thread; yield it, and a function that fails if the worker has failed.

    At the end, the worker must stop within `seconds` without a failure."""
    worker, failed = Worker(library, executor, **options), list[BaseException]()

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:
            failed.append(error)

    def check() -> None:
        assert not failed, failed

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield worker, check
    finally:
        worker.stop()
        thread.join(seconds)
    assert not thread.is_alive()
    check()
