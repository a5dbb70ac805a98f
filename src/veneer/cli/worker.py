"""`veneer worker`: run training jobs on this machine, on Ray or on Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import JobsLibrary, LibraryIndex, TenantsDatabase
from veneer.cli.output import say

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: veneer worker --at-once 1 --until-idle")
def worker(
    library: JobsLibrary = None,
    index: LibraryIndex = None,
    tenants: TenantsDatabase = None,
    at_once: Annotated[
        int, typer.Option("--at-once", min=1, max=10_000, help="Maximum concurrent training processes.")
    ] = 1,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Exit when no job is queued or running.")] = False,
    nice: Annotated[int, typer.Option("--nice", min=0, max=19, help="Niceness of training processes.")] = 0,
    lease: Annotated[
        float, typer.Option("--lease-seconds", min=1, help="Seconds after which a lost worker's job is queued again.")
    ] = 60.0,
    executor: Annotated[
        Path | None,
        typer.Option("--executor", help="YAML file: run jobs on Ray or Kubernetes instead of this machine."),
    ] = None,
    tied: Annotated[bool, typer.Option("--tied", hidden=True, help="Exit when standard input closes.")] = False,
) -> None:
    """Take jobs from the queue and train them until Ctrl-C or SIGTERM.

    On exit, the worker saves the state of its running jobs and returns them to the queue. Any number of
    workers can share a queue. If a worker is killed, another worker continues its jobs from their last
    checkpoints."""
    from veneer.files.rights import forbid_inspection
    from veneer.jobs.cluster import executor_at
    from veneer.jobs.process import end_with_input
    from veneer.jobs.worker import Worker
    from veneer.library.library import open_library
    from veneer.serve.tenancy.store import tenants_at

    forbid_inspection()
    with open_library(library, index) as opened, tenants_at(tenants) as tenant_store:
        job_worker = Worker(
            opened,
            executor_at(executor, nice=nice),
            tenants=tenant_store,
            at_once=at_once,
            lease=lease,
            log=say,
            poll=min(0.5, lease / 8),
        )
        if tied:
            end_with_input(job_worker.stop)
        say(f"worker {job_worker.name}: jobs of {opened.location}")
        job_worker.run(until_idle=until_idle)
