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
        str, typer.Option("--executor", help="Where jobs run: local (this machine), ray or kubernetes.")
    ] = "local",
    ray_address: Annotated[
        str, typer.Option("--ray-address", envvar="RAY_ADDRESS", help="With ray: URL of the Ray dashboard.")
    ] = "http://127.0.0.1:8265",
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
    failed_days: Annotated[
        float,
        typer.Option(
            "--failed-days",
            envvar="VENEER_FAILED_DAYS",
            min=1,
            help="Days to keep folders of failed and cancelled jobs.",
        ),
    ] = 30.0,
    ended_days: Annotated[
        float,
        typer.Option(
            "--ended-days",
            envvar="VENEER_ENDED_DAYS",
            min=30,
            help="Days to keep folders of other ended jobs, and per-step metrics.",
        ),
    ] = 365.0,
    beside: Annotated[bool, typer.Option("--tied", hidden=True, help="Exit when standard input closes.")] = False,
) -> None:
    """Take jobs from the queue and train them until Ctrl-C or SIGTERM.

    On exit, the worker saves running jobs and returns them to the queue. Any number of workers can share a
    queue. If a worker is killed, another worker continues its jobs from the last checkpoint."""
    from veneer.files.rights import forbid_inspection
    from veneer.jobs.process import tied
    from veneer.jobs.validate import device_of
    from veneer.jobs.worker import Worker
    from veneer.library.library import open_library
    from veneer.serve.tenancy.store import tenants_at

    forbid_inspection()
    one_of(executor, ("local", "ray", "kubernetes"), "a place where jobs run", "--executor")
    places: Any = {
        "local": lambda: _local(nice),
        "ray": lambda: _ray(ray_address, gpus if gpu else 0),
        "kubernetes": lambda: _kubernetes(image, namespace, claim, secret, gpus if gpu else 0),
    }
    with open_library(library, index) as opened, tenants_at(tenants) as known:
        made = Worker(
            opened,
            places[executor](),
            tenants=known,
            at_once=at_once,
            lease=lease,
            say=say,
            device=None if gpu is None else device_of(gpu, gpus),
            poll=min(0.5, lease / 8),
            failed_days=failed_days,
            ended_days=ended_days,
        )
        if beside:
            tied(made.stop)
        say(f"worker {made.name}: jobs of {opened.location}")
        made.run(until_idle=until_idle)


def _local(nice: int) -> Executor:
    from veneer.jobs.executors import LocalExecutor

    return LocalExecutor(nice=nice)


def _ray(address: str, gpus: int) -> Executor:
    from veneer.jobs.ray import RayExecutor

    return RayExecutor(address, gpus=gpus)


def _kubernetes(image: str, namespace: str, claim: str, secret: str, gpus: int) -> Executor:
    if not image:
        raise ConfigError(
            "a Job of Kubernetes needs a container image", where="--image", fix="one with veneer installed in it"
        )
    from veneer.jobs.kubernetes import KubernetesExecutor

    return KubernetesExecutor(image=image, namespace=namespace, claim=claim, secret=secret, gpus=gpus)
