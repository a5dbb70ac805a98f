"""The executor stops, kills and limits this machine's processes with real signals."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from tests.jobs.fakes import queued
from tests.serve.http.toy import wait_for
from veneer.jobs.executors import ExitStatus, LocalExecutor, memory_of
from veneer.jobs.store import Job, JobLease, JobStore
from veneer.library.library import Library

pytestmark = pytest.mark.parametrize("library", ["sqlite"], indirect=True)


def planned(store: JobStore, peak: int, device: str = "cpu") -> Job:
    return queued(store, plan={"peak_bytes": peak, "device": {"name": device}})


def wait_for_exit(executor: LocalExecutor, handle: str) -> ExitStatus:
    return wait_for(lambda: executor.poll(handle), 60)


@pytest.mark.parametrize(("hard", "signal"), [(False, "SIGTERM"), (True, "SIGKILL")])
def test_process_is_terminated_or_killed(library: Library, store: JobStore, hard: bool, signal: str) -> None:
    executor, job = LocalExecutor(), planned(store, 1 << 30)
    handle = executor.start(JobLease(job, "token"), {})
    assert executor.poll(handle) is None
    executor.stop(handle, hard=hard)
    assert wait_for_exit(executor, handle) == ExitStatus(f"ended by {signal}")
    assert executor.poll(handle) == ExitStatus("it is not a process of this worker")
    executor.stop(handle)  # does nothing, because the process has ended


def test_process_over_its_plan_is_killed(library: Library, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, job = LocalExecutor(), planned(store, 1 << 30)
    holds = {"rss": memory_of(job)}
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(memory_info=lambda: SimpleNamespace(**holds)))
    handle = executor.start(JobLease(job, "token"), {})
    assert executor.poll(handle) is None
    holds["rss"] += 1
    status = wait_for_exit(executor, handle)
    assert status.memory
    assert "the limit from its plan is" in status.why


def test_process_arguments_have_no_lease(library: Library, store: JobStore) -> None:
    """Every user of the machine can see a process's arguments."""
    executor, job = LocalExecutor(), planned(store, 1 << 30)
    handle = executor.start(JobLease(job, "token-of-the-lease"), {"VENEER_LIBRARY_INDEX": "postgresql://u:secret@h/d"})
    process = psutil.Process(int(handle.split()[-1]))
    wait_for(lambda: "veneer.jobs.process" in process.cmdline())  # until exec, the child has this process's arguments
    arguments = " ".join(process.cmdline())
    executor.stop(handle, hard=True)
    wait_for_exit(executor, handle)
    assert "token-of-the-lease" not in arguments
    assert "secret" not in arguments


def test_gpu_plan_sets_no_host_memory_limit(library: Library, store: JobStore) -> None:
    assert memory_of(planned(store, 80 << 30, "h100-80gb")) == 0
    assert memory_of(planned(store, 2 << 30)) > 3 << 30
