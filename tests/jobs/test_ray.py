"""Jobs on Ray: what Ray receives; and on a real Ray, a job that is trained and a job that is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.jobs.fakes import FixedTerms, queued, taken
from tests.jobs.small import small_config
from tests.library.conftest import quick  # noqa: F401
from veneer.errors import UnavailableError
from veneer.jobs.process import process_environment
from veneer.jobs.ray import RayExecutor
from veneer.jobs.store import JobLease, JobStore
from veneer.jobs.validate import device_of, validate_job
from veneer.library.library import open_library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a head node in its own process."""
    pytest.importorskip("ray.job_submission", reason="pip install 'veneer[ray]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    handle = Path("/tmp") / f"ray-{os.getpid()}"  # sockets want a short path
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    command = [
        *ray,
        "start",
        "--head",
        "--block",
        "--port=0",
        "--num-cpus=2",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        "--disable-usage-stats",
        f"--temp-dir={handle}",
        "--object-store-memory=80000000",
    ]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "RAY_DISABLE_MEMORY_MONITOR": "1"}
    with open(tmp_path_factory.mktemp("ray") / "log", "wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, 9)
            head.wait()


def connected(address: str) -> RayExecutor:
    end = time.monotonic() + 300
    while True:
        try:
            return RayExecutor(address, python=sys.executable, grace=60)
        except UnavailableError:
            assert time.monotonic() < end
            time.sleep(1)


def leased(store: JobStore, folder: Path, steps: int) -> JobLease:
    job = store.create("acme", small_config(folder, steps), name="support")
    new = store.acquire("v", 600, "validating")
    assert new is not None
    assert validate_job(store, new, FixedTerms(store), device_of()).state == "queued"
    lease = store.acquire("w", 3600)
    assert lease.job.id == job.id
    return lease


def test_ray_gets_neither_password_nor_lease(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    submitted: list[dict[str, Any]] = []
    client = SimpleNamespace(submit_job=lambda **job: submitted.append(job))
    module = ModuleType("ray.job_submission")
    monkeypatch.setattr(module, "JobSubmissionClient", lambda address: client, raising=False)
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.job_submission", module)
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    variables = {"VENEER_HOME": str(tmp_path), "VENEER_LIBRARY_INDEX": "postgresql://u:secret@h/d"}
    with open_library(tmp_path / "library") as library:
        store = JobStore(library)
        queued(store)
        lease = taken(store)
    RayExecutor("http://head:8265", grace=30).start(lease, variables)
    (job,) = submitted
    assert job["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}}
    assert "secret" not in str(job)
    assert lease.token not in str(job)
    file = Path(job["entrypoint"].split()[-1])
    assert oct(file.stat().st_mode & 0o777) == "0o600"
    handed = {"job": lease.job.id, "token": lease.token, "environment": variables, "validation": None}
    assert json.loads(file.read_text()) == handed


@pytest.mark.peers
def test_ray_trains_a_job_and_stops_another(address: str, tmp_path: Path) -> None:
    executor = connected(address)
    with open_library(tmp_path / "library") as library:
        store = JobStore(library)
        lease = leased(store, tmp_path, 3)
        variables = process_environment(library)
        handle = executor.start(lease, variables)
        assert executor.start(lease, variables) == handle
        while (status := executor.poll(handle)) is None:
            time.sleep(0.5)
        job = store.get("acme", lease.job.id)
        assert job.state == "succeeded", (status, job.log.read_text() if job.log.is_file() else "")
        assert library.find("acme/support@1").tags == [f"job:{job.id}"]

        lease = leased(store, tmp_path, 100_000)
        handle = executor.start(lease, variables)
        while store.get("acme", lease.job.id).step < 2:
            assert executor.poll(handle) is None
            time.sleep(0.5)
        executor.stop(handle)
        while executor.poll(handle) is None:
            time.sleep(0.5)
        job = store.get("acme", lease.job.id)
        assert job.state == "queued"  # its process has saved its state, and given the job back
        assert store.checkpoints("acme", job.id)[0].step == max(p.step for p in store.checkpoints("acme", job.id)) >= 2
    status = executor.poll("nothing")
    assert "does not know it" in status.why
