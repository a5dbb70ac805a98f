"""The job queue: jobs, events, checkpoints and bills, in the library's database.

    store = JobStore(open_library())
    job = store.create("acme", {"base": "smollm2-135m", "data": {"train": "/data/a.jsonl"}}, name="support")
    store.get("acme", job.id).state                     validating, queued, running, succeeded …
    jobs, more = store.jobs("acme", after=None, limit=20)       newest first; next page: after=jobs[-1].id
    store.events("acme", job.id, after=0)               oldest first; next: after=the last event's number
    store.checkpoints("acme", job.id)                   newest first
    store.pause("acme", job.id), .resume(…), .cancel(…) immediate, even while a worker trains the job
    store.bill("acme", job.id)                          after the end: tokens, seconds and cost

Every query names the tenant and returns only this tenant's rows. Jobs without a tenant belong to the tenant
"", the owner of the machine. None stands for the operator, who sees the jobs of all tenants; code that handles
a client's request must never pass None.

    validating ─> queued ─> running ─> succeeded, failed       (TRANSITIONS has every transition)
                    ^ └─> paused <─┘      and every unfinished state ─> cancelled
                    └───────┘

A worker holds a lease on each of its jobs: a token in the job's row, and an expiry time.

    lease = store.acquire("worker-1", 60)      the next job, or a job with an expired lease
    store.renew(lease, 60)                     before the lease expires
    store.record(lease, …), .queue(…), .release(…), .finish(…)

Each of these calls is one transaction that compares the token and changes the row. If the row has another
token, the call changes nothing and raises LeaseLost, and the worker must stop. So only the holder of the
current lease can write to a job, even after a pause, a cancellation, or a takeover after a kill or a network
failure. Leases expire according to the database's clock, so the machines' clocks do not matter. One lock
serializes all writes, as in the library's index.

One transaction ends a job: it sets the final state and writes the last event and the bill. Each step is
counted and billed once, even if a worker had to repeat the step after a kill, because steps up to the last
recorded step are ignored. This module stores jobs and does not run them.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import string
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from sqlalchemy import Connection, Select, case, delete, func, insert, or_, select, update

from veneer.errors import ConfigError, VeneerError, counted, one_of, quoted, shown
from veneer.files.rights import private_folder
from veneer.jobs.tables import (
    JOB_SCHEMA,
    job_bill_table,
    job_checkpoint_table,
    job_event_table,
    job_reservation_table,
    job_table,
)
from veneer.library.database import database_clock, reading, write_transaction
from veneer.library.library import Library
from veneer.library.migrate import migrate
from veneer.library.names import check_name
from veneer.models.home import veneer_home
from veneer.serve.request import Refused
from veneer.serve.tenancy.store import check_tenant

# -- states ------------------------------------------------------------------------------------------------------------

_JobState = Literal["validating", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
_Waiting = Literal["validating", "queued"]
_AtOnce = Callable[[str], int | None]
"""Tenant -> maximum number of running jobs; None: no limit."""
_Order = Callable[[str], float]
"""Tenant -> rank among tenants with equally many running jobs."""
TRANSITIONS: Mapping[_JobState, frozenset[_JobState]] = {
    "validating": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""State -> the states that can follow."""
ENDS = frozenset(state for state, following in TRANSITIONS.items() if not following)
UNFINISHED = frozenset(TRANSITIONS) - ENDS
_BILLED = frozenset({"succeeded", "cancelled"})
"""The final states in which the trained tokens are billed."""

_MAX_UNFINISHED = 1000
"""Maximum number of unfinished jobs per tenant."""
_MAX_FAULTS = 3
"""A job fails after losing this many workers or processes without a new checkpoint."""


class UnknownJob(ConfigError):
    """The job does not exist, or belongs to another tenant."""


class WrongState(ConfigError):
    """The job's state does not allow the requested change."""


class OverBudget(ConfigError):
    """The cost exceeds the rest of the tenant's budget."""


class LeaseLost(VeneerError):
    """The lease is no longer valid: the job was paused, cancelled or taken over."""


# -- stored objects ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A stored job.

    name: the adapter's name in the library, including the tenant's namespace
    about: data that the job's creator stores with the job
    plan: the planned resources; None before validation
    error: kind, message, fix, where
    result: the result of training, with `reference`, the adapter's reference in the library
    step, steps, tokens: steps done, steps planned, and tokens trained on so far
    seconds: machine time
    price, planned: price of a million tokens, and the job's planned cost, both in millionths
    attempt: number of times that training was started or resumed
    faults: number of times that the worker or process was lost since the last new checkpoint
    worker, until: holder and expiry of the lease
    place: the executor's handle of the job's process, for the operator"""

    id: str
    number: int
    tenant: str
    name: str
    state: _JobState
    config: dict[str, Any] = field(repr=False)
    about: dict[str, Any] = field(repr=False)
    plan: dict[str, Any] | None = field(repr=False)
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    created: float
    queued: float | None
    started: float | None
    ended: float | None
    step: int
    steps: int
    tokens: int
    price: int
    planned: int
    seconds: float
    attempt: int
    faults: int
    worker: str | None
    until: float | None
    place: str

    @property
    def folder(self) -> Path:
        """The folder with the job's files. All machines of a queue share the veneer home."""
        return jobs_home() / self.id

    def make_folder(self) -> Path:
        """Create the job's folder if missing, private to this user; return its path.

        Raises OSError."""
        private_folder(jobs_home())
        self.folder.mkdir(exist_ok=True)
        return self.folder

    @property
    def log(self) -> Path:
        """The log file of the job's processes."""
        return self.folder / "process.log"

    def to_dict(self) -> dict[str, Any]:
        """Return the job as JSON values."""
        return {**self.__dict__}


@dataclass(frozen=True)
class JobEvent:
    """An event of a job.

    level: info, warn or error
    kind: state, note, preflight, metrics, validation, sample, checkpoint, evaluation or route
    data: depends on the kind:
        metrics: step, total steps, metrics
        sample: `file`, in the run's folder
        checkpoint: `reference`, the adapter in the library
        any kind: `public`, a text for the tenant, if the message has details only for the operator
    number: from 1, without gaps"""

    level: str
    kind: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    at: float = 0.0


@dataclass(frozen=True)
class JobCheckpoint:
    """A checkpoint from which a job can resume.

    metrics: the newest metrics at this step.
    reference: the checkpoint's adapter in the library, or None."""

    step: int
    metrics: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    at: float = 0.0


@dataclass(frozen=True)
class JobBill:
    """The bill for a job that has ended.

    cost: in millionths: `tokens` at `price` for succeeded and cancelled jobs, 0 for failed jobs.
    seconds: machine time; also counted for failed jobs.
    day: the day on which the job ended, in UTC."""

    job: str
    tenant: str
    name: str
    day: str
    state: str
    at: float
    seconds: float
    tokens: int
    price: int
    cost: int


@dataclass(frozen=True)
class JobLease:
    """A lease on a job.

    job: the job at the start of the lease.
    token: the token that each write must present."""

    job: Job
    token: str


def jobs_home() -> Path:
    """Return the folder for the files of all jobs: `jobs` in the veneer home."""
    return veneer_home() / "jobs"


def cost_of(tokens: int, price: int) -> int:
    """Return the cost in millionths, tokens · price / 1,000,000, rounded half up.

    price: the price of a million tokens, in millionths."""
    return (tokens * price + 500_000) // 1_000_000


_JSON_COLUMNS = {"config", "about", "plan", "error", "result"}


def _job(row: Any) -> Job:
    values = {name: row._mapping[name] for name in Job.__dataclass_fields__}
    return Job(**values | {name: json.loads(values[name]) for name in _JSON_COLUMNS if values[name] is not None})


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, default=str)


# -- the store ---------------------------------------------------------------------------------------------------------


class JobStore:
    """The job queue in the database of `library`. Thread-safe."""

    def __init__(self, library: Library) -> None:
        """Create or migrate the tables.

        Raises ConfigError if a later version of veneer created them."""
        self.library, self.engine = library, library.engine
        migrate(self.engine, JOB_SCHEMA, library.location)

    # -- for the owners of jobs ----------------------------------------------------------------------------------------

    def create(
        self, tenant: str, config: Mapping[str, Any], *, name: str, about: Mapping[str, Any] | None = None
    ) -> Job:
        """Create a job in the state `validating`, and return it.

        config: as for `veneer train`, with absolute paths; `output` is ignored.
        name: the new adapter's name; in the library, the name is `tenant/name`.
        about: see Job.

        Raises ConfigError if the name or tenant is invalid, or if there are too many unfinished jobs."""
        if tenant:
            check_tenant(tenant)
        full = f"{tenant}/{name}" if tenant else name
        if tenant and "/" in name:
            fix = f"use a name without a slash; {tenant}/ is added as a prefix"
            raise ConfigError(f"{quoted(name)} cannot name an adapter of {tenant}", where="name", fix=fix)
        check_name(full)
        stored_config = {key: value for key, value in config.items() if key != "output"}
        with self._transaction() as (c, now):
            unfinished = job_table.c.tenant == tenant, job_table.c.state.in_(UNFINISHED)
            if (c.scalar(select(func.count()).where(*unfinished)) or 0) >= _MAX_UNFINISHED:
                message = f"{_MAX_UNFINISHED:,} jobs of {tenant or 'this machine'} have not ended"
                raise ConfigError(message, where="jobs", fix="wait for some jobs to finish, or cancel some")
            id, number = _new_id(), (c.scalar(select(func.max(job_table.c.number))) or 0) + 1
            row = {"id": id, "number": number, "tenant": tenant, "name": full, "state": "validating", "created": now}
            c.execute(insert(job_table), row | {"config": _json(stored_config), "about": _json(dict(about or {}))})
            job = self._row(c, tenant, id)
            _insert_event(c, job, now, JobEvent("info", "state", f"created {job.id}", {"state": "validating"}))
        return job

    def get(self, tenant: str | None, job: str) -> Job:
        """Return a job. Raises UnknownJob."""
        with reading(self.engine) as c:
            return self._row(c, tenant, job)

    def jobs(
        self, tenant: str | None, *, after: str | None = None, limit: int = 20, states: Collection[str] = ()
    ) -> tuple[list[Job], bool]:
        """Return (one page of jobs, newest first; whether there are more).

        after: id of the last job of the previous page.
        states: return only jobs in these states; empty: all.

        Raises UnknownJob if `after` does not exist, and ConfigError for an unknown state."""
        query = _select_jobs(tenant).order_by(job_table.c.number.desc()).limit(limit + 1)
        for state in states:
            one_of(state, get_args(_JobState), "a state of jobs", "states")
        if states:
            query = query.where(job_table.c.state.in_(states))
        with reading(self.engine) as c:
            if after is not None:
                query = query.where(job_table.c.number < self._row(c, tenant, after).number)
            rows = [_job(row) for row in c.execute(query)]
        return rows[:limit], len(rows) > limit

    def events(
        self,
        tenant: str | None,
        job: str,
        *,
        after: int = 0,
        limit: int = 1000,
        newest: bool = False,
        diagnostics: bool = True,
    ) -> tuple[list[JobEvent], bool]:
        """Return (events after the number `after`, oldest first; whether there are more).

        newest: return events before `after`, newest first; if `after` is 0, start with the newest event.
        diagnostics: include notes of level info, which describe how a run used its machine.

        Raises UnknownJob."""
        e = job_event_table.c
        query = select(job_event_table).order_by(e.number.desc() if newest else e.number).limit(limit + 1)
        if after or not newest:
            query = query.where(e.number < after if newest else e.number > after)
        if not diagnostics:
            query = query.where(or_(e.kind != "note", e.level != "info"))
        rows = self._events(tenant, job, query)
        return rows[:limit], len(rows) > limit

    def events_of(self, tenant: str | None, job: str, *kinds: str) -> list[JobEvent]:
        """Return all events of these kinds, oldest first. Raises UnknownJob."""
        e = job_event_table.c
        return self._events(tenant, job, select(job_event_table).where(e.kind.in_(kinds)).order_by(e.number))

    def _events(self, tenant: str | None, job: str, query: Select[Any]) -> list[JobEvent]:
        with reading(self.engine) as c:
            self._row(c, tenant, job)
            rows = c.execute(query.where(job_event_table.c.job == job)).all()
        return [JobEvent(r.level, r.kind, r.message, json.loads(r.data), r.number, r.at) for r in rows]

    def checkpoints(self, tenant: str | None, job: str) -> list[JobCheckpoint]:
        """Return a job's checkpoints, newest first. Raises UnknownJob."""
        k = job_checkpoint_table.c
        with reading(self.engine) as c:
            self._row(c, tenant, job)
            rows = c.execute(select(job_checkpoint_table).where(k.job == job).order_by(k.step.desc())).all()
        return [JobCheckpoint(r.step, json.loads(r.metrics), r.reference, r.at) for r in rows]

    def bill(self, tenant: str | None, job: str) -> JobBill | None:
        """Return a job's bill; None if the job has not ended. Raises UnknownJob."""
        with reading(self.engine) as c:
            self._row(c, tenant, job)
            row = c.execute(select(job_bill_table).where(job_bill_table.c.job == job)).first()
        return None if row is None else JobBill(**row._mapping)

    def reserve(self, tenant: str, cost: int, budget: int, posted: int) -> None:
        """Reserve `cost` in a tenant's budget for this month (UTC), for a Tinker client.

        The check and the reservation are one transaction, so that jobs and clients count each other's costs.

        posted: the cost of Tinker training that the ledger already has.

        All amounts are in millionths. Raises Refused (402)."""
        r = job_reservation_table.c
        with self._transaction() as (c, now):
            jobs, spent = _committed(c, tenant, now), max(posted, _reserved(c, tenant, now))
            if jobs + spent + cost > budget:
                left = money(max(0, budget - jobs - spent))
                message = f"this request costs {money(cost)}, but only {left} of this month's training budget is left"
                fix = "raise the budget, or wait until next month"
                raise Refused(message, status=402, code="over_budget", fix=fix)
            c.execute(delete(job_reservation_table).where(r.tenant == tenant))
            row = {"tenant": tenant, "month": _day(now)[:7], "spent": spent + cost}
            c.execute(insert(job_reservation_table), row)

    def release_budget(self, tenant: str, cost: int) -> None:
        """Release `cost` from this month's reservation."""
        r = job_reservation_table.c
        with self._transaction() as (c, now):
            left = max(0, _reserved(c, tenant, now) - cost)
            c.execute(update(job_reservation_table).where(r.tenant == tenant).values(spent=left))

    def bills(self, since: str = "", until: str = "") -> list[JobBill]:
        """Return all tenants' bills for a period, oldest first. For the operator.

        A job is billed on the day on which it ended.

        since, until: first and last day; "": no bound."""
        b = job_bill_table.c
        query = select(job_bill_table).where(b.day >= since).order_by(b.at, b.job)
        with reading(self.engine) as c:
            return [JobBill(**row._mapping) for row in c.execute(query.where(b.day <= until) if until else query)]

    def ended_before(self, seconds: float, *states: str) -> list[str]:
        """Return the ids of jobs that ended in one of `states` more than `seconds` ago."""
        with reading(self.engine) as c:
            ended = job_table.c.state.in_(states), job_table.c.ended < self._now(c) - seconds
            return [*c.scalars(select(job_table.c.id).where(*ended))]

    def delete_old_metrics(self, seconds: float) -> None:
        """Delete metrics events of jobs that ended more than `seconds` ago.

        The job, its other events, checkpoints and bill stay."""
        e = job_event_table.c
        with self._transaction() as (c, now):
            jobs = select(job_table.c.id).where(job_table.c.ended < now - seconds)
            c.execute(delete(job_event_table).where(e.kind == "metrics", e.job.in_(jobs)))

    def pause(self, tenant: str | None, job: str) -> Job:
        """Pause a queued or running job. Raises UnknownJob, WrongState."""
        return self._change_state(tenant, job, "paused")

    def resume(self, tenant: str | None, job: str) -> Job:
        """Queue a paused job again; it resumes from its last checkpoint.

        Raises UnknownJob, WrongState."""
        return self._change_state(tenant, job, "queued", only="paused")

    def cancel(self, tenant: str | None, job: str) -> Job:
        """Cancel a job permanently and bill the steps trained so far.

        Raises UnknownJob, WrongState."""
        return self._change_state(tenant, job, "cancelled")

    def add_event(self, tenant: str | None, job: str, event: JobEvent) -> None:
        """Record an event for a manual action; the job can be in any state.

        Raises UnknownJob."""
        with self._transaction() as (c, now):
            _insert_event(c, self._row(c, tenant, job), now, event)

    def _change_state(self, tenant: str | None, job: str, state: _JobState, only: str | None = None) -> Job:
        with self._transaction() as (c, now):
            current = self._row(c, tenant, job)
            if current.state == state and state in ("paused", "cancelled"):
                return current  # repeated request
            _check_transition(current, state, only)
            return self._set_state(c, current, state, now, "resumed" if state == "queued" else state)

    # -- for workers ---------------------------------------------------------------------------------------------------

    def acquire(
        self,
        worker: str,
        seconds: float,
        state: _Waiting = "queued",
        at_once: _AtOnce = lambda tenant: None,
        only: str | None = None,
        order: _Order = lambda tenant: 0.0,
    ) -> JobLease | None:
        """Return a lease on the next job to train or validate, or None if there is no job.

        The lease lasts `seconds`. Jobs with an expired lease come first, then the oldest job of the tenant
        with the fewest running jobs; among tenants with equally many, the tenant with the lowest `order`
        comes first. A job that has lost its worker _MAX_FAULTS times in a row fails instead.

        state: "queued": lease a job to train; "validating": lease a job to validate.
        at_once: returns a tenant's maximum number of running jobs (or validations); None: no limit.
        only: consider only this job."""
        choice = state, at_once, order, only
        while True:
            with reading(self.engine) as c:  # without a lock, because usually there is no job
                if _next(c, self._now(c), *choice) is None:
                    return None
            with self._transaction() as (c, now):
                if (job := _next(c, now, *choice)) is None:
                    return None
                lost = job.until is not None
                if lost and job.faults + 1 >= _MAX_FAULTS:
                    message = f"the job lost its worker {_MAX_FAULTS} times in a row without a new checkpoint"
                    fix = "check the workers' memory, then submit the job again"
                    self._end(c, job, now, error={"kind": "lost", "message": message, "fix": fix})
                    continue
                token = secrets.token_hex(16)
                values = {"token": token, "worker": shown(worker), "renewed": now, "until": now + seconds}
                _update(c, job, **values, faults=job.faults + lost)
                if state == "queued":
                    _update(c, job, attempt=job.attempt + 1, started=now if job.started is None else job.started)
                if state == "queued" and lost:
                    text = f"{job.worker} was lost: {worker} resumes from the last checkpoint"
                    data = {"public": "its worker was lost: another worker resumes from the last checkpoint"}
                    _insert_event(c, job, now, JobEvent("warn", "note", text, data))
                elif state == "queued":
                    public = "resumed" if job.attempt else "started"
                    self._set_state(c, job, "running", now, f"{public} by {worker}", public=public)
                return JobLease(self._row(c, None, job.id), token)

    def get_lease(self, job: str, token: str) -> JobLease:
        """Return the lease with this job and token. Raises LeaseLost if it is not valid."""
        with reading(self.engine) as c:
            row = c.execute(select(job_table).where(job_table.c.id == job, job_table.c.token == token)).first()
        if row is None:
            raise _lease_lost(job)
        return JobLease(_job(row), token)

    def claim(self, job: str, attempt: int) -> JobLease:
        """Return this attempt's lease to the first caller; raise LeaseLost for all later callers."""
        t = job_table.c
        with reading(self.engine) as c:
            row = c.execute(select(job_table).where(t.id == job, t.attempt == attempt, t.state == "running")).first()
        if row is None or row.token is None:
            raise _lease_lost(job)
        lease = JobLease(_job(row), row.token)
        try:
            (lease.job.make_folder() / f"claimed-{attempt}").touch(exist_ok=False)
        except FileExistsError:
            raise _lease_lost(job) from None
        return lease

    def renew(self, lease: JobLease, seconds: float) -> Job:
        """Extend a lease so that it lasts `seconds` from now. Raises LeaseLost."""
        with self._with_lease(lease) as (c, now, job):
            _update(c, job, until=now + seconds)
        return job

    def record(
        self,
        lease: JobLease,
        events: Sequence[JobEvent] = (),
        checkpoints: Sequence[JobCheckpoint] = (),
        *,
        trained: tuple[int, int, int] | None = None,
        place: str | None = None,
    ) -> None:
        """Record events, checkpoints and progress in one transaction.

        Metrics events and progress are ignored for steps up to the last recorded step. If a checkpoint already
        exists, only its new `reference` is recorded.

        trained: (step, planned steps, total tokens up to the step).
        place: see Job.

        Raises LeaseLost."""
        with self._with_lease(lease) as (c, now, job):
            for event in events:
                if event.kind != "metrics" or event.data["step"] > job.step:
                    _insert_event(c, job, now, event)
            values: dict[str, Any] = {} if place is None else {"place": place}
            if trained is not None and trained[0] > job.step:
                values |= dict(zip(("step", "steps", "tokens"), trained, strict=True))
            k = job_checkpoint_table.c
            for point in checkpoints:
                existing = k.job == job.id, k.step == point.step
                if c.scalar(select(k.step).where(*existing)) is None:
                    row = {"job": job.id, "step": point.step, "at": now, "metrics": _json(point.metrics)}
                    c.execute(insert(job_checkpoint_table), row | {"reference": point.reference})
                    values["faults"] = 0
                elif point.reference is not None:
                    c.execute(update(job_checkpoint_table).where(*existing).values(reference=point.reference))
            if values:
                _update(c, job, **values)

    def queue(
        self, lease: JobLease, plan: Mapping[str, Any], *, price: int = 0, budget: int | None = None, spent: int = 0
    ) -> Job:
        """Queue a validated job and release its lease.

        plan: has at least `tokens` and `steps`.
        price: price of a million tokens, in millionths.
        budget: the tenant's budget per month (UTC), in millionths; None: no limit.
        spent: this month's cost of the tenant's Tinker clients according to the ledger, in millionths.

        Raises LeaseLost, and OverBudget if this job, the tenant's other unfinished jobs and this month's
        spending would together exceed the budget."""
        with self._with_lease(lease) as (c, now, job):
            planned = cost_of(int(plan["tokens"]), price)
            spent = max(spent, _reserved(c, job.tenant, now))
            if budget is not None and planned + (taken := spent + _committed(c, job.tenant, now)) > budget:
                left = f"of this month's budget of {money(budget)}, only {money(max(0, budget - taken))} is left"
                fix = "use fewer rows or epochs, raise the budget, or wait until next month"
                raise OverBudget(f"this job would cost {money(planned)}, but {left}", where="budget", fix=fix)
            steps, cost = int(plan["steps"]), f", {money(planned)}" if planned else ""
            text = f"validated: {counted(steps, 'step')}, {int(plan['tokens']):,} tokens{cost}"
            values: dict[str, Any] = {"plan": _json(dict(plan)), "price": price, "planned": planned, "steps": steps}
            return self._set_state(c, job, "queued", now, text, **values, queued=now, faults=0)

    def release(self, lease: JobLease, why: str, detail: str = "") -> Job:
        """Return a job to the queue; it resumes from its last checkpoint.

        A job in validation will be validated again.

        why: the reason, for the tenant.
        detail: details of the reason, only for the operator.

        Raises LeaseLost."""
        with self._with_lease(lease) as (c, now, job):
            if job.state == "validating":
                _update(c, job, **_NO_LEASE)
                return self._row(c, None, job.id)
            text = f"{why}: {detail}" if detail else why
            return self._set_state(c, job, "queued", now, text, public=why if detail else "")

    def died(self, lease: JobLease, why: str, *, fix: str = "") -> Job:
        """Return a job to the queue after its process died unexpectedly.

        If this happens for the third time in a row without a new checkpoint, the job fails instead. Raises
        LeaseLost."""
        with self._with_lease(lease) as (c, now, job):
            if job.faults + 1 >= _MAX_FAULTS:
                message = f"its process died {_MAX_FAULTS} times in a row without a new checkpoint: {why}"
                return self._end(c, job, now, error={"kind": "died", "message": message, "fix": fix})
            event = JobEvent("warn", "note", f"the job's process died: {why}", {"public": "its process died"})
            _insert_event(c, job, now, event)
            text = "queued to resume from the last checkpoint"
            return self._set_state(c, job, "queued", now, text, faults=job.faults + 1)

    def finish(
        self, lease: JobLease, *, result: Mapping[str, Any] | None = None, error: Mapping[str, Any] | None = None
    ) -> Job:
        """End a job: it has succeeded with `result`, or failed with `error`; see Job.

        Raises LeaseLost."""
        with self._with_lease(lease) as (c, now, job):
            return self._end(c, job, now, result=result, error=error)

    # -- transactions --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[tuple[Connection, float]]:
        """Run a write transaction under the queue's lock; yield (connection, time)."""
        with write_transaction(self.engine, JOB_SCHEMA.lock) as c:
            yield c, self._now(c)

    def _now(self, c: Connection) -> float:
        return float(c.scalar(select(database_clock(self.engine))) or time.time())

    @contextlib.contextmanager
    def _with_lease(self, lease: JobLease) -> Iterator[tuple[Connection, float, Job]]:
        """Run a write transaction under a lease; yield (connection, time, job).

        Also adds the time since the last such transaction to the job's machine time. Raises LeaseLost."""
        mine = job_table.c.id == lease.job.id, job_table.c.token == lease.token
        with self._transaction() as (c, now):
            # The time since the last transaction is 0 if the clock was set back.
            since = case((job_table.c.renewed < now, now - job_table.c.renewed), else_=0.0)
            passed = since if lease.job.state == "running" else 0.0
            done = c.execute(update(job_table).where(*mine).values(seconds=job_table.c.seconds + passed, renewed=now))
            if done.rowcount != 1:
                raise _lease_lost(lease.job.id)
            yield c, now, self._row(c, None, lease.job.id)

    def _row(self, c: Connection, tenant: str | None, job: str) -> Job:
        row = c.execute(_select_jobs(tenant).where(job_table.c.id == job)).first() if _ID.fullmatch(job) else None
        if row is None:
            raise UnknownJob(f"there is no job {quoted(job, 40)}", where="job", fix="see `veneer jobs list`")
        return _job(row)

    def _set_state(
        self, c: Connection, job: Job, state: _JobState, now: float, text: str, *, public: str = "", **values: Any
    ) -> Job:
        """Change a job's state and the given columns; all state changes use this function.

        The lease ends, unless the new state is `running`. `public`: text for the tenant."""
        _check_transition(job, state)
        _update(c, job, state=state, **values, **({} if state == "running" else _NO_LEASE))
        data = {"state": state} | ({"public": public} if public else {})
        _insert_event(c, job, now, JobEvent("error" if values.get("error") else "info", "state", text, data))
        if state in ENDS:
            _update(c, job, ended=now)
            cost = cost_of(job.tokens, job.price) if state in _BILLED else 0
            bill = {name: getattr(job, name) for name in ("tenant", "name", "seconds", "tokens", "price")}
            bill |= {"job": job.id, "day": _day(now), "state": state, "at": now, "cost": cost}
            c.execute(insert(job_bill_table), bill)
        return self._row(c, None, job.id)

    def _end(
        self, c: Connection, job: Job, now: float, *, result: Mapping[str, Any] | None = None, error: Any = None
    ) -> Job:
        state: _JobState = "succeeded" if error is None else "failed"
        text = f"{state}: {(error or {}).get('message') or (result or {}).get('reference') or 'done'}"
        return self._set_state(c, job, state, now, text, result=_json(result), error=_json(error))


_NO_LEASE: dict[str, Any] = {"token": None, "worker": None, "until": None, "renewed": None}


def _update(c: Connection, job: Job, **values: Any) -> None:
    c.execute(update(job_table).where(job_table.c.id == job.id).values(**values))


def _select_jobs(tenant: str | None) -> Select[Any]:
    return select(job_table) if tenant is None else select(job_table).where(job_table.c.tenant == tenant)


def _next(c: Connection, now: float, state: _Waiting, at_once: _AtOnce, order: _Order, only: str | None) -> Job | None:
    """Return the next job: a job with an expired lease, else a waiting job.

    Among waiting jobs, a job of the tenant with the fewest running jobs comes first; tenants that reached
    `at_once` are skipped. Ties go to the tenant with the lowest `order`, then to the oldest job."""
    j, condition = job_table.c, () if only is None else (job_table.c.id == only,)
    working_state = "running" if state == "queued" else state
    late = select(job_table).where(j.state == working_state, j.until <= now, *condition).order_by(j.number)
    if (expired := c.execute(late.limit(1)).first()) is not None:
        return _job(expired)
    working = select(j.tenant, func.count()).where(j.state == working_state, j.token.is_not(None))
    running = {tenant: int(count) for tenant, count in c.execute(working.group_by(j.tenant))}
    oldest = select(j.tenant, func.min(j.number)).where(j.state == state, j.token.is_(None), *condition)
    turns = []
    for tenant, number in c.execute(oldest.group_by(j.tenant)):
        count, most = running.get(tenant, 0), at_once(tenant)
        if most is None or count < most:
            turns.append((count, order(tenant), number))
    if not turns:
        return None
    return _job(c.execute(select(job_table).where(j.number == min(turns)[2])).one())


def _check_transition(job: Job, state: _JobState, only: str | None = None) -> None:
    """Raise WrongState unless the job can change to `state`."""
    if state in TRANSITIONS[job.state] and only in (None, job.state):
        return
    action = "resumed" if state == "queued" else state
    froms = [only] if only else [name for name, following in TRANSITIONS.items() if state in following]
    fix = "the job has ended: submit a new one" if job.state in ENDS else f"the job must be {' or '.join(froms)}"
    raise WrongState(f"job {job.id} is {job.state} and cannot be {action}", where="job", fix=fix)


def _insert_event(c: Connection, job: Job, now: float, event: JobEvent) -> None:
    number = (c.scalar(select(func.max(job_event_table.c.number)).where(job_event_table.c.job == job.id)) or 0) + 1
    text = shown(event.message, lines=True)  # escapes NUL, which PostgreSQL cannot store
    values = replace(event, number=number, at=now, message=text).__dict__ | {"job": job.id, "data": _json(event.data)}
    c.execute(insert(job_event_table), values)


def _committed(c: Connection, tenant: str, now: float) -> int:
    j, b = job_table.c, job_bill_table.c
    planned = select(func.sum(j.planned)).where(j.tenant == tenant, j.state.not_in(ENDS))  # 0 during validation
    spent = select(func.sum(b.cost)).where(b.tenant == tenant, b.day >= _day(now)[:8] + "01")
    return int(c.scalar(planned) or 0) + int(c.scalar(spent) or 0)


def _reserved(c: Connection, tenant: str, now: float) -> int:
    r = job_reservation_table.c
    return int(c.scalar(select(r.spent).where(r.tenant == tenant, r.month == _day(now)[:7])) or 0)


def _lease_lost(job: str) -> LeaseLost:
    return LeaseLost(f"job {job} is no longer this worker's: it was paused, cancelled, or taken over")


_LETTERS = string.ascii_letters + string.digits
_ID = re.compile(r"ftjob-[A-Za-z0-9]{24}")
"""The format of OpenAI's job ids, so that a job has the same id in every API."""


def _new_id() -> str:
    return "ftjob-" + "".join(secrets.choice(_LETTERS) for _ in range(24))


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def money(millionths: int) -> str:
    """Return an amount as text, with at least two and at most six decimals."""
    units, part = divmod(millionths, 1_000_000)
    return f"{units:,}.{f'{part:06d}'.rstrip('0').ljust(2, '0')}"
