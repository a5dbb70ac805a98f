"""If a process is killed at any commit, no job is lost, trained twice or billed twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.forks import Forked
from tests.jobs.small import small_config
from tests.library.conftest import quick  # noqa: F401
from tests.serve.http.toy import wait_for
from veneer.jobs.executors import LocalExecutor
from veneer.jobs.store import JobStore
from veneer.jobs.worker import Worker
from veneer.library.library import open_library

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_job_survives_a_kill_at_every_commit(quick: Path, stride: int) -> None:  # noqa: F811
    """A worker is killed at a commit; another worker continues until the job's route and bill are correct.

    Covers every twelfth commit; the slow test covers every commit."""
    log = quick / "said"
    command = ["-m", "tests.jobs.driver", str(quick), str(stride)]
    code = Forked(command, env=os.environ, log=log, cwd=ROOT).wait()
    assert code == 0, log.read_text()[-5000:]
    assert len(json.loads(log.read_text().splitlines()[-1])) > 1


@pytest.mark.slow
def test_second_worker_continues_a_killed_workers_job(quick: Path) -> None:  # noqa: F811
    """Uses real processes: the job's process ends with its worker.

    Another worker resumes the job."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    with open_library(quick / "library") as library:
        store = JobStore(library)
        config = small_config(quick, 300, checkpoint={"every": 5})
        created = store.create("acme", config, name="support")
        command = ["worker", "--library", library.location, "--lease-seconds", "2"]
        worker = subprocess.Popen([sys.executable, "-m", "veneer.cli.main", *command], cwd=ROOT, env=env)
        wait_for(lambda: len(store.checkpoints("acme", created.id)) > 1, 300)
        child = int(store.get("acme", created.id).place.rpartition(" ")[2])
        worker.kill()
        worker.wait()
        wait_for(lambda: not psutil.pid_exists(child), 300)
        time.sleep(2)
        running, saved = store.get("acme", created.id), max(p.step for p in store.checkpoints("acme", created.id))
        assert (running.state, running.attempt) == ("running", 1)
        Worker(library, LocalExecutor(), lease=5).run(until_idle=True)
        job = store.get("acme", created.id)
        assert (job.state, job.attempt, job.step) == ("succeeded", 2, 300)
        events, _ = store.events("acme", created.id, limit=10_000)
        assert [e.data["step"] for e in events if e.kind == "metrics"] == [*range(1, 301)]
        (resumed,) = [e.message for e in events if e.message.startswith("resuming after step")]
        assert int(resumed.split()[3]) >= saved
