"""`veneer jobs …`: submit, watch and control training jobs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.options import AsJson, JobsLibrary, LibraryIndex, Settings, TenantsDatabase, file_and_settings
from veneer.cli.output import field, print_json, print_table, say

if TYPE_CHECKING:
    from veneer.jobs.store import Job, JobStore

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Submit, watch and stop training jobs.")

_Id = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, ftjob-….", show_default=False)]
_Tenant = Annotated[
    str | None, typer.Option("--tenant", help="Only jobs of this tenant; '': jobs without a tenant. Default: all jobs.")
]
_location: dict[str, str | None] = {"location": None, "index": None}


@app.callback()
def _set_location(library: JobsLibrary = None, index: LibraryIndex = None) -> None:
    """Manage the training jobs of a library.

    Jobs are run by `veneer worker` or `veneer serve --train`."""
    _location.update(location=library, index=index)


@contextmanager
def _opened() -> Iterator[JobStore]:
    from veneer.jobs.store import JobStore
    from veneer.library.library import open_library

    with open_library(_location["location"], _location["index"]) as library:
        yield JobStore(library)


@app.command(
    epilog="Example: veneer jobs submit support.yaml optimizer.learning_rate=5e-4 --name support --tenant acme"
)
def submit(
    words: Settings = None,
    name: Annotated[str, typer.Option("--name", help="Name of the new adapter; default: the output folder's.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="Tenant that owns the job; default: no tenant.")] = "",
    tenants: TenantsDatabase = None,
    as_json: AsJson = False,
) -> None:
    """Check, plan and queue a run. The exit code is 2 if the run cannot be queued."""
    from veneer.jobs.post_training import load_job_config
    from veneer.jobs.validate import submit_job
    from veneer.serve.tenancy.store import tenants_at

    config, after = load_job_config(*file_and_settings(words))
    with _opened() as store, tenants_at(tenants) as tenant_store:
        job = submit_job(store, config, tenant=tenant, name=name, after=after, tenants=tenant_store)
    _print_job(job, as_json)
    if job.state == "failed":
        raise SystemExit(2)


@app.command("list", epilog="Example: veneer jobs list --state running --tenant acme")
def list_(
    tenant: _Tenant = None,
    state: Annotated[list[str] | None, typer.Option("--state", help="Only jobs in this state; repeatable.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of jobs.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with _opened() as store:
        page, more = store.jobs(tenant, limit=limit, states=state or ())
    if as_json:
        print_json({"jobs": [job.to_dict() for job in page], "more": more})
        return
    rows = [(job.id, job.name, job.state, _progress(job), _day(job.created), _error(job)) for job in page]
    print_table(("job", "adapter", "state", "steps", "made", ""), rows) if rows else print("no jobs")
    if more:
        say("there are more: --limit")


@app.command(epilog="Example: veneer jobs show ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w")
def show(job: _Id, tenant: _Tenant = None, as_json: AsJson = False) -> None:
    """Show a job's state, plan, result or error, checkpoints and bill."""
    with _opened() as store:
        details = store.get(tenant, job)
        bill, points = store.bill(tenant, job), store.checkpoints(tenant, job)
        after = store.events_of(tenant, job, "evaluation", "route")
    if as_json:
        more = {"checkpoints": [point.__dict__ for point in points], "bill": None if bill is None else bill.__dict__}
        more["after"] = [event.__dict__ for event in after]
        print_json(details.to_dict() | more)
        return
    _print_job(details, False)
    for event in after:
        print(f"{event.kind:<12} {field(event.message)}")
    if points:
        print(f"checkpoints  after steps {', '.join(str(point.step) for point in points[:10])}")
        if named := [point.reference for point in points[:10] if point.reference]:
            print(f"published    {', '.join(map(field, named))}")
    if bill is not None:
        from veneer.jobs.store import money

        print(f"cost         {money(bill.cost)} for {bill.tokens:,} tokens, {bill.seconds:,.0f} machine-seconds")


@app.command(epilog="Example: veneer jobs watch ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w")
def watch(job: _Id, tenant: _Tenant = None, as_json: AsJson = False) -> None:
    """Print a job's events until the job ends. The exit code is 0 on success, else 2.

    With --json, prints one event per line."""
    import json

    from veneer.jobs.store import ENDS

    with _opened() as store:
        number = 0
        while True:
            state = store.get(tenant, job).state  # read the state first, so that no event is missed
            events, more = store.events(tenant, job, after=number)
            for event in events:
                number = event.number
                if as_json:
                    print(json.dumps(event.__dict__), flush=True)
                elif event.kind != "preflight":
                    print(f"{_day(event.at)}  {field(event.message)}", flush=True)
            if state in ENDS and not more:
                break
            time.sleep(0.0 if more else 0.5)
    if state != "succeeded":
        raise SystemExit(2)


@app.command(epilog="Example: veneer jobs cancel ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w")
def cancel(job: _Id, tenant: _Tenant = None, as_json: AsJson = False) -> None:
    """Cancel a job permanently.

    Tokens trained so far are billed, and checkpoints stay in the job's folder."""
    with _opened() as store:
        _print_job(store.cancel(tenant, job), as_json)


@app.command(epilog="Example: veneer jobs pause ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w")
def pause(job: _Id, tenant: _Tenant = None, as_json: AsJson = False) -> None:
    """Pause a job: the job's worker saves the training state and takes another job."""
    with _opened() as store:
        _print_job(store.pause(tenant, job), as_json)


@app.command(epilog="Example: veneer jobs resume ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w")
def resume(job: _Id, tenant: _Tenant = None, as_json: AsJson = False) -> None:
    """Queue a paused job again; training continues from the job's last checkpoint."""
    with _opened() as store:
        _print_job(store.resume(tenant, job), as_json)


_Step = Annotated[
    int | None, typer.Option("--step", min=1, help="Step to use; default: the job's result, or its newest step.")
]


@app.command(epilog="Example: veneer jobs keep ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w --step 300 --alias prod")
def keep(
    job: _Id,
    step: _Step = None,
    alias: Annotated[str, typer.Option("--alias", help="Alias to point to the new version, such as prod.")] = "",
    tenant: _Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Store a checkpoint's adapter as the newest version of the job's adapter name."""
    from veneer.jobs.checkpoints import store_checkpoint

    with _opened() as store:
        version = store_checkpoint(store, job, step, alias=alias, tenant=tenant)
    print_json({"reference": version.reference, "aliases": version.aliases}) if as_json else print(version.reference)


@app.command(epilog="Example: veneer jobs promote ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w")
def promote(job: _Id, tenant: _Tenant = None, tenants: TenantsDatabase = None, as_json: AsJson = False) -> None:
    """Point the job's route to the job's adapter for all users."""
    from veneer.jobs.canary import promote_job

    _move_route(job, tenant, tenants, as_json, promote_job)


@app.command(epilog="Example: veneer jobs rollback ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w")
def rollback(job: _Id, tenant: _Tenant = None, tenants: TenantsDatabase = None, as_json: AsJson = False) -> None:
    """Restore the targets that the job's route had before the job, for the same users."""
    from veneer.jobs.canary import rollback_job

    _move_route(job, tenant, tenants, as_json, rollback_job)


def _move_route(
    job: str, tenant: str | None, tenants: str | None, as_json: bool, move: Callable[..., tuple[str, object]]
) -> None:
    from veneer.serve.tenancy.store import tenants_at

    with _opened() as store, tenants_at(tenants) as tenant_store:
        text, values = move(store, tenant_store, tenant, job)
    print_json(values) if as_json else print(field(text))


@app.command(epilog="Example: veneer jobs logs ftjob-0rx8RJ2l2U6vZ2PNsFJP8v6w")
def logs(job: _Id, tenant: _Tenant = None) -> None:
    """Print the output of the job's processes, for debugging. See also `watch`."""
    with _opened() as store:
        details = store.get(tenant, job)
    if not details.log.is_file():
        say(f"no process of this job has printed anything on this machine ({details.log})")
        return
    with details.log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            sys.stdout.write(line)


def _print_job(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job.to_dict())
        return
    print(f"{job.id}  {job.state}  {field(job.name)}  {_progress(job)}".rstrip())
    if job.state == "queued" and job.plan is not None:
        from veneer.jobs.store import money
        from veneer.plan.render import rough_duration

        cost = f", {money(job.planned)}" if job.planned else ""
        seconds = job.plan.get("seconds")
        approximately = "about " if seconds and seconds >= 1 else ""  # "under 1 s" needs no "about"
        took = f"{approximately}{rough_duration(seconds)}" if seconds else "for some time"
        print(f"planned      {job.plan['tokens']:,} tokens, {took}{cost}")
    if job.result is not None:
        print(f"adapter      {field(job.result['reference'])}")
    for name, text in (job.error or {}).items():
        print(f"{name:<12} {field(text)}")


def _progress(job: Job) -> str:
    return f"{job.step:,}/{job.steps:,}" if job.steps else ""


def _error(job: Job) -> str:
    return str((job.error or {}).get("message", ""))[:80]


def _day(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
