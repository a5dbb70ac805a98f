"""A job whose machine is killed at every change of the database: `python -m tests.jobs.driver FOLDER STRIDE`.

Each process is a fork of one that has imported what it needs and computed nothing. It does what a worker and the job's
process do, one after the other, and dies at the K-th commit; another goes on after it. Prints, as JSON, how often that
was done; ends with an error unless every job came to its one end, its one bill, its one version, and the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import veneer.train.text.task  # noqa: F401  what a job needs is imported once, before there are processes
from tests.jobs.small import STEPS, small_config
from veneer.jobs.process import carry_out_job
from veneer.jobs.store import JobStore
from veneer.jobs.validate import device_of, tenants_at, validated
from veneer.library.database import reading
from veneer.library.library import open_library
from veneer.models.home import veneer_home
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.routes import route_history
from veneer.serve.tenancy.store import TrainingTerms

KERNELS = (veneer_home() / "kernels").resolve()
LEASE = 0.05
AFTER = {
    "evaluate": {"metrics": ["loss"]}, "route": {"name": "support", "weight": 0.1}, "promote": "loss <= base + 1",
}  # fmt: skip
TERMS = TrainingTerms(price=4_000_000, budget=10**9)


def machine(folder: Path, kill_at: int | None) -> None:
    """A worker's work until there is none."""
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
        Connection.commit = killing  # type: ignore[method-assign]
        while any(job.state in ("validating", "queued", "running") for job in store.jobs(None)[0]):
            new = store.take("machine", LEASE, "validating")
            if new is not None:
                validated(store, new, TERMS, device_of())
            lease = store.take("machine", LEASE)
            if lease is not None:
                carry_out_job(library, lease.job.id, lease.token)
            time.sleep(0.01)


def forked(folder: Path, kill_at: int | None) -> bool:
    """Whether it came to its end; else it was killed, as it was told."""
    child = os.fork()
    if not child:
        code = 1
        try:
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            machine(folder, kill_at)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), (folder / "log").read_text()[-3000:]
    return status == 0


def outcome(folder: Path) -> bytes:
    """The adapter's bytes, once everything that must hold was seen to."""
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
        assert bill is not None
        assert bill.tokens == job.tokens == sum(data["tokens"] for data in steps)
        assert bill.cost == 4 * bill.tokens == store.spent("acme")
        assert job.result is not None
        versions = library.search(name="acme/support", all_versions=True)
        assert [version.version for version in versions] == [1, 2, 3, 4]  # the checkpoints, and what came of it
        assert job.result["reference"] == "acme/support@4"
        assert [point.reference for point in points] == ["acme/support@3", "acme/support@2", "acme/support@1"]
        with tenants_at(None) as tenants:
            assert tenants is not None
            with reading(tenants.engine) as c:
                (move,) = route_history(c, "support", tenant="acme")  # moved once
        assert (move["targets"], move["current"]) == ({"acme/support@4": 1}, True)
        assert [e.kind for e in events if e.kind in ("evaluation", "route")] == ["evaluation", "route"]
        assert versions[-1].card["metrics"]["held_out"]["rows"] == 4
        kept = [library.resolve(version.reference) / "adapter_model.safetensors" for version in versions]
        return b"".join(file.read_bytes() for file in kept)


def submitted(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "kernels").symlink_to(KERNELS)  # compiled once, not by each machine
    os.environ["VENEER_HOME"] = str(folder)
    child = os.fork()
    if not child:
        with open_library(folder / "library") as library:
            with tenants_at(str(folder / "tenants.sqlite")) as tenants:
                assert tenants is not None
                manage.add_tenant(tenants, "acme", who="test")
            JobStore(library).create(
                "acme", config, name="support", about={"publish": "checkpoints", "after": AFTER}
            )  # fmt: skip
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def checked(folder: Path) -> bytes:
    here, there = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(there, outcome(folder))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        found = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, (folder / "log").read_text()[-3000:]
    return found


def main(folder: Path, stride: int) -> int:
    config = small_config(folder, checkpoint={"every": 1, "keep": STEPS})
    whole = folder / "whole"
    submitted(whole, config)
    assert forked(whole, None)
    expected = checked(whole)
    for kill_at in range(1, 1000, stride):
        place = folder / f"killed-{kill_at}"
        submitted(place, config)
        if forked(place, kill_at):
            return kill_at
        time.sleep(LEASE)
        assert forked(place, None)
        assert checked(place) == expected, f"another adapter after a kill at {kill_at}"
        shutil.rmtree(place)
    raise AssertionError("it never came to its end")


if __name__ == "__main__":
    print(json.dumps({"kills": main(Path(sys.argv[1]), int(sys.argv[2]))}))
