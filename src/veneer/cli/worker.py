"""`veneer worker`: run training jobs, here or on a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import JobsLibrary, LibraryIndex, TenantsDatabase
from veneer.cli.output import say
from veneer.errors import ConfigError, one_of

if TYPE_CHECKING:
    from veneer.jobs.executors import Executor

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
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="GPU model to plan jobs for, from `veneer plan --list`; default: this machine's."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs per job.")] = 1,
    executor: Annotated[
        str, typer.Option("--executor", help="Where jobs run: local (this machine) or kubernetes.")
    ] = "local",
    image: Annotated[str, typer.Option("--image", help="With kubernetes: container image with veneer installed.")] = "",
    namespace: Annotated[str, typer.Option("--namespace", help="With kubernetes: namespace of the Jobs.")] = "default",
    claim: Annotated[
        str,
        typer.Option(
            "--claim", help="With kubernetes: PersistentVolumeClaim of the veneer home, writable by all pods."
        ),
    ] = "",
    secret: Annotated[
        str, typer.Option("--secret", help="With kubernetes: Secret that contains VENEER_LIBRARY_INDEX.")
    ] = "",
    nice: Annotated[int, typer.Option("--nice", min=0, max=19, help="Niceness of training processes.")] = 0,
    lease: Annotated[
        float, typer.Option("--lease-seconds", min=1, help="Seconds after which a lost worker's job is queued again.")
    ] = 60.0,
    tied: Annotated[bool, typer.Option("--tied", hidden=True, help="Exit when standard input closes.")] = False,
) -> None:
    """Take jobs from the queue and train them until Ctrl-C or SIGTERM.

    On exit, the worker saves running jobs and returns them to the queue. Any number of workers can share a
    queue. If a worker is killed, another worker continues its jobs from the last checkpoint."""
    from veneer.files.rights import forbid_inspection
    from veneer.jobs.process import end_with_input
    from veneer.jobs.validate import device_of
    from veneer.jobs.worker import Worker
    from veneer.library.library import open_library
    from veneer.serve.tenancy.store import tenants_at

    forbid_inspection()
    one_of(executor, ("local", "kubernetes"), "an executor", "--executor")
    selected: Executor
    if executor == "kubernetes":
        from veneer.jobs.kubernetes import KubernetesExecutor

        if not image:
            message, fix = "Jobs of Kubernetes need a container image", "an image with veneer installed"
            raise ConfigError(message, where="--image", fix=fix)
        options: dict[str, Any] = {"namespace": namespace, "claim": claim, "secret": secret, "gpus": gpus if gpu else 0}
        selected = KubernetesExecutor(image=image, **options)
    else:
        from veneer.jobs.executors import LocalExecutor

        selected = LocalExecutor(nice=nice)
    with open_library(library, index) as opened, tenants_at(tenants) as tenant_store:
        job_worker = Worker(
            opened,
            selected,
            tenants=tenant_store,
            at_once=at_once,
            lease=lease,
            log=say,
            device=None if gpu is None else device_of(gpu, gpus),
            poll=min(0.5, lease / 8),
        )
        if tied:
            end_with_input(job_worker.stop)
        say(f"worker {job_worker.name}: jobs of {opened.location}")
        job_worker.run(until_idle=until_idle)
