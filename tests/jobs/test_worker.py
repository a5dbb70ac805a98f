"""A worker: what it starts, stops and gives back, with processes that are not there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tests.jobs.pretended import Pretended, queued, until
from veneer.jobs.executors import Ended
from veneer.jobs.store import Job, JobStore
from veneer.jobs.worker import Worker
from veneer.library.library import Library
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store, TrainingTerms

pytestmark = pytest.mark.parametrize("library", ["sqlite"], indirect=True)


@contextmanager
def working(library: Library, executor: Pretended, **options: Any) -> Iterator[Worker]:
    settings = {"poll": 0.01, "grace": 0.1, "lease": 5.0, **options}
    worker = Worker(library, executor, name="worker", **settings)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(10)
    assert not thread.is_alive()
    assert not failed, failed


def state(store: JobStore, job: Job) -> str:
    return store.get(None, job.id).state


@pytest.mark.parametrize("asked", ["pause", "cancel"])
def test_the_process_of_a_job_that_rests_or_ends_is_stopped(library: Library, store: JobStore, asked: str) -> None:
    executor, job, other = Pretended(), queued(store), queued(store)
    with working(library, executor):
        until(lambda: executor.running)
        (place,) = executor.running
        until(lambda: store.get(None, job.id).place == place)
        getattr(store, asked)("acme", job.id)
        until(lambda: executor.asked == [(place, False)])
        until(lambda: any(other.id in place for place in executor.running))  # there is room again
    assert state(store, job) == {"pause": "paused", "cancel": "cancelled"}[asked]
    assert store.get(None, job.id).faults == 0


def test_a_worker_that_can_look_at_no_new_job_any_more_ends(library: Library, store: JobStore) -> None:
    """Whoever keeps it begins another; what it trains is given back."""
    job, new = queued(store), store.create("acme", {"base": "tiny"}, name="support")
    worker = Worker(library, Pretended(), poll=0.01, grace=0.1, lease=5.0)
    take = worker.terms

    def broken(tenant: str) -> TrainingTerms:
        if store.get(None, new.id).worker is not None:  # this one is looked at
            raise ZeroDivisionError
        return take(tenant)

    worker.terms = broken
    with pytest.raises(ZeroDivisionError):
        worker.run()
    assert state(store, job) == "queued"


def test_a_process_that_does_not_end_is_killed_after_its_grace(library: Library, store: JobStore) -> None:
    executor, job = Pretended(), queued(store)
    executor.stubborn = True
    with working(library, executor):
        until(lambda: executor.running)
        (place,) = executor.running
        store.pause("acme", job.id)
        until(lambda: executor.asked[-1:] == [(place, True)])
    assert executor.asked == [(place, False), (place, True)]


def test_a_process_that_dies_is_started_again_and_fails_in_the_end(library: Library, store: JobStore) -> None:
    executor, job = Pretended(), queued(store)
    with working(library, executor):
        for attempt in (1, 2, 3):
            place = f"pretended {job.id} {attempt}"
            until(lambda: place in executor.running)  # noqa: B023
            executor.over[place] = Ended("ended by SIGSEGV")
        until(lambda: state(store, job) == "failed")
    assert "died 3 times in a row" in str(store.get(None, job.id).error)


def test_a_process_that_takes_more_memory_than_planned_fails_at_once(library: Library, store: JobStore) -> None:
    executor, job = Pretended(), queued(store)
    with working(library, executor):
        until(lambda: executor.running)
        executor.over[next(iter(executor.running))] = Ended("it held 9 GB", memory=True)
        until(lambda: state(store, job) == "failed")
    error = store.get(None, job.id).error or {}
    assert (error["kind"], error["message"]) == ("memory", "it held 9 GB")
    assert "micro_rows" in error["fix"]


def test_a_place_that_cannot_start_anything_now_is_tried_again(library: Library, store: JobStore) -> None:
    executor, job, said = Pretended(), queued(store), list[str]()
    executor.refuse = True
    with working(library, executor, say=said.append):
        until(lambda: store.get(None, job.id).attempt > 1)
        assert any("there is no room for a process" in text for text in said)
        executor.refuse = False
        until(lambda: executor.running)
        assert store.get(None, job.id).faults == 0


@pytest.mark.parametrize("end", ["succeeded", "cancelled"])
def test_the_checkpoints_of_what_succeeded_are_not_kept(library: Library, store: JobStore, end: str) -> None:
    executor, job = Pretended(), queued(store)
    kept = job.folder / "attempt-1" / "checkpoints" / "step-00000001"
    kept.mkdir(parents=True)
    (job.folder / "attempt-1" / "log.jsonl").touch()
    with working(library, executor):
        until(lambda: executor.running)
        (place,) = executor.running
        if end == "cancelled":
            store.cancel("acme", job.id)
        else:
            store.finish(executor.running[place][0], result={"reference": "acme/support@1"})
        executor.over[place] = Ended("ended with exit code 0")
    assert state(store, job) == end
    assert kept.is_dir() == (end == "cancelled")
    assert (job.folder / "attempt-1" / "log.jsonl").is_file()


def test_what_failed_or_was_cancelled_is_kept_for_its_time(
    library: Library, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    jobs = [queued(store) for _ in range(3)]
    for job in jobs:
        (job.make_folder() / "process.log").write_text("words")
    store.cancel("acme", jobs[0].id)
    lease = store.take("w", 60, only=jobs[1].id)
    assert lease is not None
    store.finish(lease, error={"kind": "data", "message": "a broken line"})
    store.pause("acme", jobs[2].id)
    Worker(library, Pretended()).run(until_idle=True)
    assert all(job.log.exists() for job in jobs)
    Worker(library, Pretended(), failed_days=1e-9).run(until_idle=True)
    assert [job.folder.exists() for job in jobs] == [False, False, True]
    assert store.get("acme", jobs[1].id).error is not None


def test_a_worker_that_ends_asks_its_processes_to_save_their_state(library: Library, store: JobStore) -> None:
    """They give the job back by themselves; one that just ended is given back by the worker."""
    executor, job = Pretended(), queued(store)
    with working(library, executor):
        until(lambda: executor.running)
    assert [hard for _, hard in executor.asked] == [False]
    assert (state(store, job), store.get(None, job.id).faults) == ("queued", 0)


def test_no_tenant_runs_more_at_once_than_its_terms_say(library: Library, store: JobStore, tmp_path: Path) -> None:
    tenants = Store(str(tmp_path / "tenants.sqlite"))
    for name in ("acme", "best", "gone"):
        manage.add_tenant(tenants, name, who="test")
    manage.change_tenant(tenants, "gone", enabled=False, who="test")
    manage.set_training(tenants, "acme", TrainingTerms(jobs=2), who="test")
    for tenant in ("acme", "acme", "acme", "best", "gone", ""):
        queued(store, tenant)
    executor = Pretended()
    with working(library, executor, at_once=10, tenants=tenants):
        until(lambda: len(executor.running) == 4)
        time.sleep(0.1)
        assert sorted(lease.job.tenant for (lease,) in executor.running.values()) == ["", "acme", "acme", "best"]
    tenants.close()


def test_a_job_goes_on_while_the_database_is_away_and_no_longer_than_its_lease(
    library: Library, store: JobStore
) -> None:
    executor, job, away = Pretended(), queued(store), threading.Event()
    with working(library, executor, lease=0.8) as worker:
        until(lambda: executor.running)
        real = worker.store.held, worker.store.renew, worker.store.take

        def broken(call: Callable[..., Any]) -> Callable[..., Any]:
            def maybe(*arguments: Any, **named: Any) -> Any:
                if away.is_set():
                    raise OperationalError("SELECT", {}, Exception("the server closed the connection"))
                return call(*arguments, **named)

            return maybe

        worker.store.held, worker.store.renew, worker.store.take = map(broken, real)  # type: ignore[method-assign]
        away.set()
        time.sleep(0.3)
        assert not executor.asked
        away.clear()
        time.sleep(0.7)
        assert not executor.asked  # it was renewed in time
        assert state(store, job) == "running"
        away.set()
        until(lambda: executor.asked)
        away.clear()
