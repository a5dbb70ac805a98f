"""A worker starts, stops and releases processes, with a fake executor."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tests.jobs.fakes import FakeExecutor, FixedTerms, queued, worker_thread
from tests.jobs.small import small_config
from tests.serve.http.toy import wait_for
from veneer.jobs.executors import ExitStatus, LocalExecutor
from veneer.jobs.store import Job, JobStore
from veneer.jobs.worker import KEEP_DAYS, Worker
from veneer.library.library import Library
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store

pytestmark = pytest.mark.parametrize("library", ["sqlite"], indirect=True)


@contextmanager
def working(library: Library, executor: FakeExecutor, **options: Any) -> Iterator[Worker]:
    settings = {"poll": 0.01, "grace": 0.1, "lease": 5.0, **options}
    with worker_thread(library, executor, 10, **settings) as (worker, _):
        yield worker


def state(store: JobStore, job: Job) -> str:
    return store.get(None, job.id).state


@pytest.mark.parametrize("asked", ["pause", "cancel"])
def test_process_of_a_paused_or_cancelled_job_is_stopped(library: Library, store: JobStore, asked: str) -> None:
    executor, job, other = FakeExecutor(), queued(store), queued(store)
    with working(library, executor):
        wait_for(lambda: executor.running)
        (place,) = executor.running
        wait_for(lambda: store.get(None, job.id).place == place)
        getattr(store, asked)("acme", job.id)
        wait_for(lambda: executor.asked == [(place, False)])
        wait_for(lambda: any(other.id in place for place in executor.running))  # the free slot is used by another job
    assert state(store, job) == {"pause": "paused", "cancel": "cancelled"}[asked]
    assert store.get(None, job.id).faults == 0


def new_job(store: JobStore, tenant: str, file: Path | str = "/data/a.jsonl") -> Job:
    return store.create(tenant, {"base": "tiny", "data": {"train": str(file)}}, name="support")


def small_file(folder: Path, size: int = 4) -> Path:
    file = folder / f"{size}.jsonl"
    with file.open("wb") as opened:
        opened.truncate(size)
    return file


def test_tenant_has_one_validation_at_a_time(library: Library, store: JobStore, tmp_path: Path) -> None:
    executor, file = FakeExecutor(), small_file(tmp_path)
    jobs = [new_job(store, tenant, file) for tenant in ("acme", "acme", "acme", "best")]
    with working(library, executor):
        wait_for(lambda: len(executor.validating) == 2)
        time.sleep(0.1)
        assert {lease.job.id for lease in executor.validating.values()} == {jobs[0].id, jobs[3].id}


def test_tenants_take_turns_at_validation(library: Library, store: JobStore, tmp_path: Path) -> None:
    """A long queue delays another tenant by one validation, not by the whole queue."""
    executor, file = FakeExecutor(), small_file(tmp_path)
    for _ in range(4):
        new_job(store, "acme", file)
    new_job(store, "best", file)
    other = new_job(store, "best", file)
    started: list[str] = []
    with working(library, executor):
        for _ in range(4):
            wait_for(lambda: len(executor.validating) > len(started))
            place = [*executor.validating][len(started)]
            started.append(executor.validating[place].job.tenant)
            store.queue(executor.validating[place], {"tokens": 1, "steps": 1})
            executor.over[place] = ExitStatus("ended with exit code 0")
            wait_for(lambda: state(store, executor.validating[place].job) != "validating")  # noqa: B023
        assert sorted(started) == ["acme", "acme", "best", "best"]
    assert state(store, other) != "validating"


def test_cancelled_job_stops_its_validation(library: Library, store: JobStore) -> None:
    executor, job = FakeExecutor(), new_job(store, "acme")
    with working(library, executor):
        wait_for(lambda: executor.validating)
        store.cancel("acme", job.id)
        wait_for(lambda: executor.asked)
        assert executor.asked == [(f"validation of {job.id}", False)]
    assert state(store, job) == "cancelled"


def test_slow_validation_fails_the_job(library: Library, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, job, clock = FakeExecutor(), new_job(store, "acme"), [0.0]
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + clock[0])
    with working(library, executor, lease=7200.0):
        wait_for(lambda: executor.validating)
        clock[0] = 1801.0
        wait_for(lambda: state(store, job) == "failed")
    assert executor.asked[0] == (f"validation of {job.id}", True)
    assert "takes longer than the limit of 30 minutes" in str(store.get(None, job.id).error)


def test_validation_over_the_memory_limit_fails_the_job(library: Library, store: JobStore) -> None:
    executor, job = FakeExecutor(), new_job(store, "acme")
    with working(library, executor):
        wait_for(lambda: executor.validating)
        executor.over[f"validation of {job.id}"] = ExitStatus("it held 9 GB", memory=True)
        wait_for(lambda: state(store, job) == "failed")
    assert "reading the rows needs more memory than the limit of" in str(store.get(None, job.id).error)


def test_stopped_worker_releases_new_jobs(library: Library, store: JobStore) -> None:
    executor, job = FakeExecutor(), new_job(store, "acme")
    with working(library, executor):
        wait_for(lambda: executor.validating)
    left = store.get(None, job.id)
    assert (left.state, left.worker, left.faults) == ("validating", None, 0)


@pytest.mark.slow
def test_hostile_row_delays_no_other_job(library: Library, store: JobStore, tmp_path: Path) -> None:
    """The row has twenty thousand messages and takes twenty minutes to read."""
    config = small_config(tmp_path)
    turns = [{"role": role, "content": "hello"} for role in ("user", "assistant")] * 10_000
    (tmp_path / "hostile.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    hostile = store.create("acme", config | {"data": {"train": str(tmp_path / "hostile.jsonl")}}, name="support")
    small = store.create("best", config, name="support")
    said: list[str] = []
    worker = Worker(library, LocalExecutor(), poll=0.05, log=said.append)
    worker.account = FixedTerms(store, jobs=0)  # zero jobs: the worker only validates
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        wait_for(lambda: state(store, small) == "queued", 60)
        assert state(store, hostile) == "validating"
        store.cancel("acme", hostile.id)
        wait_for(lambda: f"{hostile.id}: cancelled" in said)  # the validation process has ended
    finally:
        worker.stop()
        thread.join(30)


def test_stubborn_process_is_killed_after_the_grace(library: Library, store: JobStore) -> None:
    executor, job = FakeExecutor(), queued(store)
    executor.stubborn = True
    with working(library, executor):
        wait_for(lambda: executor.running)
        (place,) = executor.running
        store.pause("acme", job.id)
        wait_for(lambda: executor.asked[-1:] == [(place, True)])
    assert executor.asked == [(place, False), (place, True)]


def test_dead_process_is_restarted_three_times(library: Library, store: JobStore) -> None:
    executor, job = FakeExecutor(), queued(store)
    with working(library, executor):
        for attempt in (1, 2, 3):
            place = f"pretended {job.id} {attempt}"
            wait_for(lambda: place in executor.running)  # noqa: B023
            executor.over[place] = ExitStatus("ended by SIGSEGV")
        wait_for(lambda: state(store, job) == "failed")
    assert "died 3 times in a row" in str(store.get(None, job.id).error)


def test_process_over_its_memory_plan_fails_the_job(library: Library, store: JobStore) -> None:
    executor, job = FakeExecutor(), queued(store)
    with working(library, executor):
        wait_for(lambda: executor.running)
        executor.over[next(iter(executor.running))] = ExitStatus("it held 9 GB", memory=True)
        wait_for(lambda: state(store, job) == "failed")
    error = store.get(None, job.id).error or {}
    assert (error["kind"], error["message"]) == ("memory", "it held 9 GB")
    assert "micro_rows" in error["fix"]


def test_failed_start_is_retried(library: Library, store: JobStore) -> None:
    executor, job, said = FakeExecutor(), queued(store), list[str]()
    executor.refuse = True
    with working(library, executor, log=said.append):
        wait_for(lambda: store.get(None, job.id).attempt > 1)
        assert any("there is no room for a process" in text for text in said)
        executor.refuse = False
        wait_for(lambda: executor.running)
        assert store.get(None, job.id).faults == 0


@pytest.mark.parametrize("end", ["succeeded", "cancelled"])
def test_checkpoints_of_succeeded_jobs_are_removed(library: Library, store: JobStore, end: str) -> None:
    executor, job = FakeExecutor(), queued(store)
    kept = job.folder / "attempt-1" / "checkpoints" / "step-00000001"
    kept.mkdir(parents=True)
    (job.folder / "attempt-1" / "log.jsonl").touch()
    with working(library, executor):
        wait_for(lambda: executor.running)
        (place,) = executor.running
        if end == "cancelled":
            store.cancel("acme", job.id)
        else:
            store.finish(executor.running[place], result={"reference": "acme/support@1"})
        executor.over[place] = ExitStatus("ended with exit code 0")
    assert state(store, job) == end
    assert kept.is_dir() == (end == "cancelled")
    assert (job.folder / "attempt-1" / "log.jsonl").is_file()


def test_folders_of_failed_jobs_are_kept_for_days(library, store, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    jobs = [queued(store) for _ in range(3)]
    for job in jobs:
        (job.make_folder() / "process.log").write_text("words")
    store.cancel("acme", jobs[0].id)
    lease = store.acquire("w", 60, only=jobs[1].id)
    store.finish(lease, error={"kind": "data", "message": "a broken line"})
    store.pause("acme", jobs[2].id)
    Worker(library, FakeExecutor()).run(until_idle=True)
    assert all(job.log.exists() for job in jobs)
    monkeypatch.setitem(KEEP_DAYS, "failed", 1e-9)
    monkeypatch.setitem(KEEP_DAYS, "cancelled", 1e-9)
    Worker(library, FakeExecutor()).run(until_idle=True)
    assert [job.folder.exists() for job in jobs] == [False, False, True]
    assert store.get("acme", jobs[1].id).error is not None


def test_stopped_worker_lets_processes_save(library: Library, store: JobStore) -> None:
    """Processes save and release their own jobs.

    The worker releases the job of a process that has just ended."""
    executor, job = FakeExecutor(), queued(store)
    with working(library, executor):
        wait_for(lambda: executor.running)
    assert [hard for _, hard in executor.asked] == [False]
    assert (state(store, job), store.get(None, job.id).faults) == ("queued", 0)


def test_running_jobs_of_a_tenant_are_limited(library: Library, store: JobStore, tmp_path: Path) -> None:
    tenants = Store(str(tmp_path / "tenants.sqlite"))
    for name in ("acme", "best", "gone"):
        manage.add_tenant(tenants, name, actor="test")
    manage.change_settings(tenants, "gone", {"enabled": False}, actor="test")
    manage.change_settings(tenants, "acme", {"training_jobs": 2}, actor="test")
    for tenant in ("acme", "acme", "acme", "best", "gone", ""):
        queued(store, tenant)
    executor = FakeExecutor()
    with working(library, executor, at_once=10, tenants=tenants):
        wait_for(lambda: len(executor.running) == 4)
        time.sleep(0.1)
        assert sorted(lease.job.tenant for lease in executor.running.values()) == ["", "acme", "acme", "best"]
    tenants.close()


def test_outage_while_stopping_is_logged_once(library: Library, store: JobStore) -> None:
    executor, messages = FakeExecutor(), list[str]()
    executor.stubborn = True
    queued(store)

    def unavailable(*arguments: Any, **named: Any) -> None:
        raise OperationalError("SELECT", {}, Exception("the server closed the connection"))

    with working(library, executor, log=messages.append, grace=0.3) as worker:
        wait_for(lambda: executor.running)
        worker.store.get_lease = unavailable
        worker.store.acquire = unavailable
    assert sum("is unavailable" in message for message in messages) == 1


def test_job_outlasts_a_database_outage_within_its_lease(library: Library, store: JobStore) -> None:
    executor, job, away = FakeExecutor(), queued(store), threading.Event()
    with working(library, executor, lease=0.8) as worker:
        wait_for(lambda: executor.running)
        real = worker.store.get_lease, worker.store.renew, worker.store.acquire

        def broken(call: Callable[..., Any]) -> Callable[..., Any]:
            def maybe(*arguments: Any, **named: Any) -> Any:
                if away.is_set():
                    raise OperationalError("SELECT", {}, Exception("the server closed the connection"))
                return call(*arguments, **named)

            return maybe

        worker.store.get_lease, worker.store.renew, worker.store.acquire = map(broken, real)
        away.set()
        time.sleep(0.3)
        assert not executor.asked
        away.clear()
        time.sleep(0.7)
        assert not executor.asked  # the lease was renewed in time
        assert state(store, job) == "running"
        away.set()
        wait_for(lambda: executor.asked)
        away.clear()
