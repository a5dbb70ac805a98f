"""Validate a job before it is queued: config, rows, memory, duration, cost.

    validate_job(store, lease, account, device)    queue the job with its plan, or mark it as failed
    submit_job(store, config, name=…)              create and validate a job

Validation encodes the rows with the base's tokenizer, exactly as training does, so it reports the first bad
line and counts tokens exactly. Validation does not load the base's weights. The checks that need the weights
(vocabulary, the longest batch) run at the start of training, before the first step. Validation changes only
the job.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import CheckpointError, PreflightError, ResourceError, UnavailableError, VeneerError, gigabytes
from veneer.jobs.account import TrainingAccount
from veneer.jobs.post_training import AfterJob, check_after, held_out_rows, parse_after
from veneer.jobs.store import Job, JobLease, JobStore, LeaseLost
from veneer.plan.plan import Plan
from veneer.plan.tables import Device
from veneer.serve.request import Refused
from veneer.serve.tenancy.store import Store
from veneer.serve.transient import is_transient
from veneer.train.config.load import RunConfig, config_from
from veneer.train.config.text import TrainConfig

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase


def after_section(job: Job) -> AfterJob | None:
    """Return a job's section `after`; None if it has none. Raises ConfigError."""
    section = {key: value for key, value in (job.about.get("after") or {}).items() if value is not None}
    return parse_after(section, job.folder) if section else None


def job_config(job: Job, output: Path) -> RunConfig:
    """Return a job's configuration with this output folder. Raises ConfigError."""
    return config_from({**job.config, "output": str(output)})[0]


def this_device() -> Device:
    """Return this machine's device, which jobs are planned for."""
    import torch

    from veneer.plan.tables import cpu_device, device_by_cuda_name

    if torch.cuda.is_available():
        return device_by_cuda_name(torch.cuda.get_device_name(), int(torch.cuda.mem_get_info()[1]))
    return cpu_device()


def validate_job(store: JobStore, lease: JobLease, account: TrainingAccount, device: Device) -> Job:
    """Validate a job, then queue it or mark it as failed; return the job.

    Raises LeaseLost, and transient errors that the job did not cause (a disk or database outage). After such
    an error, the job is still waiting for validation."""
    terms = account.terms(lease.job.tenant)
    try:
        account.check_allowed(lease.job.tenant)
        plan = _plan_of_job(lease.job, device)
        spent = 0 if terms.budget is None else account.spent(lease.job.tenant)
        return store.queue(lease, plan, price=terms.price, budget=terms.budget, spent=spent)
    except Refused as error:  # the tenant is not allowed to train
        return store.finish(lease, error=error_json(error) | {"kind": "config", "fix": "see veneer tenant list"})
    except Exception as error:
        if isinstance(error, LeaseLost) or is_retryable(error):
            raise
        return store.finish(lease, error=error_json(error))


def submit_job(
    store: JobStore,
    config: RunConfig,
    *,
    tenant: str = "",
    name: str = "",
    after: AfterJob | None = None,
    tenants: Store | None = None,
    device: Device | None = None,
) -> Job:
    """Create and validate a job; return it, queued or failed.

    name: the adapter's name; default: the name of the output folder
    after: actions to take after training
    tenants: the database with the tenants' training terms and routes

    Raises the errors of `JobStore.create` and `check_after`."""
    name = name or Path(config.output.directory).name
    if after is not None:
        check_after(after, config, f"{tenant}/{name}" if tenant else name, tenant, tenants)
    about = {} if after is None else {"after": after.model_dump(mode="json")}
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"output"})
    job = store.create(tenant, values, name=name, about=about)
    while (now := store.get(tenant, job.id)).state == "validating":
        lease = store.acquire("submit", 600, "validating", only=job.id)
        if lease is not None:
            return validate_job(store, lease, TrainingAccount(store, tenants), device or this_device())
        time.sleep(0.2)  # wait: a worker is already validating the job
    return now


def is_retryable(error: BaseException) -> bool:
    """Return whether a retry can succeed, later or on another machine.

    True for database, disk and memory errors."""
    if isinstance(error, VeneerError):
        return isinstance(error, UnavailableError | ResourceError | CheckpointError)
    return is_transient(error)


def error_json(error: BaseException) -> dict[str, Any]:
    """Return an error in the form that jobs store: kind, message, where, fix.

    kind: data, config, preflight, base, training, overbudget …; `internal` for a bug in veneer, whose
        traceback is printed to the log."""
    if not isinstance(error, VeneerError):
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
        fix = "please report this bug with the job's log (veneer jobs logs)"
        return {"kind": "internal", "message": message, "fix": fix}
    kind = re.sub(r"(?<=.)(Error)$", "", type(error).__name__).lower()
    fields = {"kind": kind, "message": error.what, "where": error.where, "fix": error.fix}
    return {name: value for name, value in fields.items() if value}


def _plan_of_job(job: Job, device: Device) -> dict[str, Any]:
    """Return the job's plan: `Plan.to_dict()` plus `rows` and exact counts (`counted`).

    Raises ConfigError, DataError, BaseError, PreflightError."""
    from veneer.models.text.base import text_without_weights
    from veneer.train.planning import plan_of_config

    config = job_config(job, job.folder)
    exact: Mapping[str, Any] = {}
    after, base = after_section(job), None
    held_out = None if after is None else after.evaluate
    if isinstance(config, TrainConfig):
        base = text_without_weights(config.base.name)
        exact = _rows_of(config, base)
        if held_out is not None:
            held_out_rows(held_out, config)
    plan = plan_of_config(config, device, **exact)
    if not plan.fits:
        room = f"{gigabytes(plan.available)} of {plan.device.label or plan.device.name}"
        message = f"this run does not fit: it needs about {gigabytes(plan.peak)}, and {room} are available"
        changes = "; or ".join(", ".join(change.settings) for change in plan.changes[:3] if change.settings)
        fix = changes or "a smaller base, or a machine with more memory (veneer plan shows how much)"
        raise PreflightError(message, where="memory", fix=fix)
    values: dict[str, Any] = {"rows": exact.get("rows", plan.job.rows), "counted": exact}
    if held_out is not None and held_out.answered and base is not None and plan.device.kind == "cpu":
        values["peak_bytes"] = max(plan.peak, _generation_peak(base, plan))
    return plan.to_dict() | values


def _generation_peak(base: TextBase, plan: Plan) -> int:
    """Return the process's peak memory in bytes while it generates evaluation answers.

    Raises PreflightError if the peak exceeds the memory available to the plan."""
    from veneer.serve.engine.offline import answering_bytes

    memory = plan.memory
    peak = memory.context + memory.weights + memory.constants + answering_bytes(base, memory.weights)
    if peak > plan.available:
        needs = f"they need about {gigabytes(peak)}, and {gigabytes(plan.available)} are available"
        message, fix = f"answers to the held-out rows do not fit in memory: {needs}", "evaluate: {metrics: [loss]}"
        raise PreflightError(message, where="after.evaluate", fix=fix)
    return peak


def _rows_of(config: TrainConfig, base: TextBase) -> Mapping[str, Any]:
    """Count the rows and tokens of the training data, and find its longest row.

    Raises PreflightError with a list of all problems in the data."""
    from veneer.train.planning import planned_rows
    from veneer.train.preflight import Report
    from veneer.train.text.data import read_data
    from veneer.train.text.preflight import TextSubject, data_findings

    data = read_data(config, base)
    subject = TextSubject(base=base, config=config, data=data)
    report = Report(numbers=subject.numbers)
    report.add(*data_findings(subject))
    report.raise_if_stopped()
    return planned_rows(config, data.train.items)
