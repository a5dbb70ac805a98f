"""Kill a job's worker at every STRIDE-th commit: `python -m tests.jobs.driver FOLDER STRIDE`.

Each run forks a worker process, kills it at the K-th commit, and lets a second process continue. Prints the
commits as a JSON list. Fails unless every job ends exactly once, with one bill, one copy of each version and
unchanged bytes.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  an optimizer imports it at its first step, which would be in each process

import veneer.train.text.task  # noqa: F401  what a job needs is imported once, before there are processes
from tests.forks import expect, fork
from tests.jobs.fakes import FixedTerms
from tests.jobs.small import STEPS, small_config
from veneer.jobs.executors import LocalExecutor
from veneer.jobs.process import run_job
from veneer.jobs.store import ENDS, JobLease, JobStore, LeaseLost
from veneer.jobs.validate import validate_job
from veneer.jobs.worker import Worker
from veneer.library.database import reading
from veneer.library.library import open_library
from veneer.models.home import veneer_home
from veneer.plan.tables import Device
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.routes import route_history
from veneer.serve.tenancy.store import tenants_at

KERNELS = (veneer_home() / "kernels").resolve()
LEASE = 0.05
AFTER = {
    "evaluate": {"metrics": ["loss"]},
    "route": {"name": "support", "weight": 0.1},
    "promote": {"metric": "loss", "against": "base", "by": -1},
}
TERMS = {"price": 4_000_000, "budget": 10**9}


class Here(LocalExecutor):
    """An executor that validates and trains jobs inside the worker's process."""

    def __init__(self, store: JobStore) -> None:
        super().__init__()
        self.store = store

    def start(
        self, lease: JobLease, environment: Mapping[str, str], device: Device | None = None, max_memory: int = 0
    ) -> str:
        if device is None:
            run_job(self.store.library, lease.job.id, lease.token)
        else:
            with suppress(LeaseLost):
                validate_job(self.store, lease, FixedTerms(self.store, **TERMS), device)
        return f"here {lease.token} {device is None}"


def machine(folder: Path, kill_at: int | None) -> None:
    """Run a worker until all jobs have ended.

    `kill_at`: the commit at which the process kills itself."""
    from sqlalchemy import Connection

    left = [kill_at]
    commit = Connection.commit

    def killing(self: Any) -> None:
        if left[0] is not None:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        commit(self)

    with open_library(folder / "library") as library:
        store = JobStore(library)
        worker = Worker(library, Here(store), lease=LEASE)
        worker.account = FixedTerms(store, **TERMS)
        Connection.commit = killing
        while any(job.state not in ENDS for job in store.jobs(None)[0]):
            worker.run(until_idle=True)
            time.sleep(0.01)


def forked(folder: Path, kill_at: int | None) -> bool:
    """Run `machine` in a fork; return whether it finished before it was killed."""

    def work() -> None:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        machine(folder, kill_at)

    status = os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])
    assert status in (0, -signal.SIGKILL), (folder / "log").read_text()[-3000:]
    return status == 0


def outcome(folder: Path) -> list[bytes]:
    """Check the invariants of a finished job; return the bytes of its adapters."""
    with open_library(folder / "library") as library:
        store = JobStore(library)
        (job,), _ = store.jobs("acme")
        events, _ = store.events("acme", job.id)
        assert job.state == "succeeded", job
        assert [event.number for event in events] == [*range(1, len(events) + 1)]
        steps = [event.data for event in events if event.kind == "metrics"]
        assert [data["step"] for data in steps] == [*range(1, STEPS + 1)], steps
        assert [e.data["step"] for e in events if e.kind == "validation"] == [0, 2, 3]
        assert [e.data["state"] for e in events if e.kind == "state"][-1] == "succeeded"
        points = store.checkpoints("acme", job.id)
        assert [point.step for point in points] == [3, 2, 1]
        bill = store.bill("acme", job.id)
        assert bill.tokens == job.tokens == sum(data["tokens"] for data in steps)
        assert bill.cost == 4 * bill.tokens == sum(each.cost for each in store.bills())
        name = "acme/support"
        versions = library.search(name=name, all_versions=True)
        assert [version.version for version in versions] == [1, 2, 3, 4]  # three checkpoints and the result
        assert job.result["reference"] == f"{name}@4"
        assert [point.reference for point in points] == [f"{name}@3", f"{name}@2", f"{name}@1"]
        with tenants_at(None) as database, reading(database.engine) as c:
            (move,) = route_history(c, "support", tenant="acme")  # moved once
        assert (move["targets"], move["current"]) == ({f"{name}@4": 1}, True)
        assert [e.kind for e in events if e.kind in ("evaluation", "route")] == ["evaluation", "route"]
        assert versions[-1].card["metrics"]["held_out"]["rows"] == 4
        files = [library.resolve(version.reference) / "adapter_model.safetensors" for version in versions]
        return [file.read_bytes() for file in files]


def submit_job(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "kernels").symlink_to(KERNELS)  # share compiled kernels, so that no process compiles them again
    os.environ["VENEER_HOME"] = str(folder)

    def work() -> None:
        with open_library(folder / "library") as library:
            with tenants_at(str(folder / "tenants.sqlite")) as database:
                manage.add_tenant(database, "acme", actor="test")
            JobStore(library).create("acme", config, name="support", about={"publish": "checkpoints", "after": AFTER})

    expect(fork(work), killed=False)


def checked(folder: Path) -> list[bytes]:
    here, there = os.pipe()

    def work() -> None:
        with os.fdopen(there, "wb") as pipe:
            pickle.dump(outcome(folder), pipe)

    child = fork(work)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        content = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, (folder / "log").read_text()[-3000:]
    outputs: list[bytes] = pickle.loads(content)
    return outputs


def kills(folder: Path, stride: int) -> list[int]:
    """Kill a job at every `stride`-th commit; return the commits."""
    config = small_config(folder, checkpoint={"every": 1, "keep": STEPS})
    undisturbed = folder / "whole"
    submit_job(undisturbed, config)
    assert forked(undisturbed, None)
    expected = checked(undisturbed)
    killed: list[int] = []
    for kill_at in range(stride, 1000, stride):
        handle = folder / f"killed-{kill_at}"
        submit_job(handle, config)
        if forked(handle, kill_at):
            return killed
        killed.append(kill_at)
        time.sleep(LEASE)
        assert forked(handle, None)
        assert checked(handle) == expected, f"another adapter after a kill at {kill_at}"
        shutil.rmtree(handle)
    raise AssertionError("it never came to its end")


if __name__ == "__main__":
    gc.freeze()  # processes collect garbage at exit; exclude torch's modules, which are slow to scan
    print(json.dumps(kills(Path(sys.argv[1]), int(sys.argv[2]))))
