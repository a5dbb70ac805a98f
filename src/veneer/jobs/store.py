"""The queue: jobs, their events, checkpoints and bills, in the database of the library.

    store = JobStore(open_library())
    job = store.create("acme", {"base": "smollm2-135m", "data": {"train": "/data/a.jsonl"}}, name="support")
    store.get("acme", job.id).state                     validating, then queued, running, succeeded …
    jobs, more = store.jobs("acme", after=None, limit=20)       the newest first; the next page: after=jobs[-1].id
    store.events("acme", job.id, after=0)               the oldest first; what came since: after=the last one's number
    store.checkpoints("acme", job.id)                   the newest first
    store.pause("acme", job.id), .resume(…), .cancel(…) at once, whoever trains it
    store.bill("acme", job.id)                          once it has ended: tokens, seconds, what it cost

Every query names the tenant, and what is another tenant's is not there. "" is whoever has the machine, with its own
jobs alone; None is the operator, who sees everybody's, and is never to come from a request.

    validating ─> queued ─> running ─> succeeded, failed       (TRANSITIONS has them all)
                    ^ └─> paused <─┘      and every state that is not an end ─> cancelled
                    └───────┘

Who works on a job has a lease of it: a token in the job's row, and the time until which it holds.

    lease = store.take("worker-1", 60)         the next job (None: there is none), or one whose lease ran out
    store.renew(lease, 60)                     before it does
    store.note(lease, …), .queue(…), .release(…), .finish(…)

Each of these is one transaction that compares the token and changes the row; with another token in the row it changes
nothing and raises LeaseLost, and whoever held the lease has to stop. So a job that was paused, cancelled, or taken over
by somebody else after a kill or a broken wire, is written to by nobody else any more. Leases run by the database's
clock, whatever the machines' clocks say. Writes follow one another under one lock, as those of the index do.

A job ends in one transaction with its last state, its last event and its one bill. Steps are counted and billed once,
however often a kill made them be computed again: what is at or below the furthest step that was noted is left out.
Knows tables and connections; not what a job does.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Connection, Select, case, delete, func, insert, or_, select, update

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
from veneer.serve.tenancy.store import check_tenant

# -- states ------------------------------------------------------------------------------------------------------------

_JobState = Literal["validating", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
_Waiting = Literal["validating", "queued"]
TRANSITIONS: Mapping[_JobState, frozenset[_JobState]] = {
    "validating": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""State -> those that may follow it."""
ENDS = frozenset(state for state, following in TRANSITIONS.items() if not following)
UNFINISHED = frozenset(TRANSITIONS) - ENDS
_BILLED = frozenset({"succeeded", "cancelled"})
"""Ends after which the tokens that were trained are paid for."""

_WAITING = 1000
"""Jobs that a tenant may have which have not ended."""
_MONTH = 30 * 86400.0
_FAULTS = 3
"""So often in a row a job may lose who trains it without one new checkpoint."""


class UnknownJob(ConfigError):
    """Raised for a job that the tenant does not have."""


class WrongState(ConfigError):
    """Raised where a job is asked for what its state does not allow."""


class OverBudget(ConfigError):
    """Raised where a job would cost more than the tenant has left."""


class LeaseLost(VeneerError):
    """Raised to whoever works on a job that is no longer its own: it was paused, cancelled, or taken over."""


# -- what is in them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job as it is kept. `name`: what its adapter is called in the library, the tenant's namespace in front. `about`:
    whatever its maker wants to have back. `plan`: what it needs, once it was validated. `error`: kind, message, fix,
    where. `result`: what came out, its `reference` in the library among it. `step` of `steps`, `tokens`: what was
    trained. `seconds`: of machines. `price`: of a million tokens; `planned`: what all of them are going to cost; both
    in millionths. `attempt`: how often it was begun or gone on with; `faults`: how often in a row without a new
    checkpoint. `worker`, `until`: of its lease. `place`: of its process, in the words of who started it."""

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
        """Where its files are, on every machine that works on it: the veneer home is theirs in common."""
        return jobs_home() / self.id

    def make_folder(self) -> Path:
        """`folder`, made where it is not there, for this user alone, as `private_folder` has it. Raises OSError."""
        private_folder(jobs_home())
        self.folder.mkdir(exist_ok=True)
        return self.folder

    @property
    def log(self) -> Path:
        """What its processes print, one after another."""
        return self.folder / "process.log"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.__dict__}


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job. `number`: from 1, without gaps. `level`: info, warn, error. `kind`: state,
    note, preflight, metrics, whose `data` has step, steps, and what was measured, validation, sample (`file`: of the
    run's folder), checkpoint (`reference`: its adapter's in the library), and what comes after the training. `data` can
    have `public`: the text for the tenant, if the message names workers or repeats what a driver said."""

    level: str
    kind: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    at: float = 0.0


@dataclass(frozen=True)
class JobCheckpoint:
    """A state that the job can go on from. `metrics`: the newest of its step. `reference`: its adapter's in the
    library, where it was put there."""

    step: int
    metrics: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    at: float = 0.0


@dataclass(frozen=True)
class JobBill:
    """What a job that ended is paid for: `cost`, in millionths, is `tokens` at `price` where it succeeded or was
    cancelled, 0 where it failed. `seconds`: of machines, whatever came of them. `day`: of its end, in UTC."""

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
    """A job as it was when the lease was taken, and the lease's token."""

    job: Job
    token: str


def jobs_home() -> Path:
    """Where jobs' files are: `jobs` in the veneer home."""
    return veneer_home() / "jobs"


def cost_of(tokens: int, price: int) -> int:
    """In millionths, rounded half up. `price`: of a million tokens, in millionths."""
    return (tokens * price + 500_000) // 1_000_000


_WORDS = {"config", "about", "plan", "error", "result"}


def _job(row: Any) -> Job:
    values = {name: row._mapping[name] for name in Job.__dataclass_fields__}
    return Job(**values | {name: json.loads(values[name]) for name in _WORDS if values[name] is not None})


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, default=str)


# -- the store ---------------------------------------------------------------------------------------------------------


class JobStore:
    """The queue of a `library`. Thread-safe; it lives as long as the library is open."""

    def __init__(self, library: Library) -> None:
        """Tables are made where there are none. Raises ConfigError for those of a later veneer."""
        self.library, self.engine = library, library.engine
        migrate(self.engine, JOB_SCHEMA, library.location)

    # -- whoever has jobs ----------------------------------------------------------------------------------------------

    def create(
        self, tenant: str, config: Mapping[str, Any], *, name: str, about: Mapping[str, Any] | None = None
    ) -> Job:
        """A new job, to be validated. `config`: as `veneer train` reads it, with absolute paths; where its output goes
        is the job's own affair. `name`: of the adapter to come, which is the library's `tenant/name`. `about`: see Job.

        Raises ConfigError for a name or a tenant that cannot be, and for one job too many."""
        if tenant:
            check_tenant(tenant)
        full = f"{tenant}/{name}" if tenant else name
        if tenant and "/" in name:
            raise ConfigError(
                f"{quoted(name)} cannot name an adapter of {tenant}",
                where="name",
                fix=f"one without a slash: {tenant}/ is put in front of it",
            )
        check_name(full)
        given = {key: value for key, value in config.items() if key != "output"}
        with self._writing() as (c, now):
            unfinished = job_table.c.tenant == tenant, job_table.c.state.not_in(ENDS)
            if (c.scalar(select(func.count()).select_from(job_table).where(*unfinished)) or 0) >= _WAITING:
                raise ConfigError(
                    f"{_WAITING:,} jobs of {tenant or 'this machine'} have not ended",
                    where="jobs",
                    fix="wait for some of them, or cancel those that nobody needs",
                )
            number = (c.scalar(select(func.max(job_table.c.number))) or 0) + 1
            zeros = dict.fromkeys(("step", "steps", "tokens", "price", "planned", "attempt", "faults"), 0)
            made = zeros | {
                "id": _new_id(),
                "number": number,
                "tenant": tenant,
                "name": full,
                "state": "validating",
                "config": _json(given),
                "about": _json(dict(about or {})),
                "created": now,
                "seconds": 0.0,
                "place": "",
            }
            c.execute(insert(job_table), made)
            job = self._row(c, tenant, str(made["id"]))
            _tell(c, job, now, JobEvent("info", "state", f"created {job.id}", {"state": "validating"}))
        return job

    def get(self, tenant: str | None, job: str) -> Job:
        """Raises UnknownJob."""
        with reading(self.engine) as c:
            return self._row(c, tenant, job)

    def jobs(
        self, tenant: str | None, *, after: str | None = None, limit: int = 20, states: Iterable[str] = ()
    ) -> tuple[list[Job], bool]:
        """Jobs, the newest first, and whether there are more. `after`: the id of the last one of the page before.
        Raises UnknownJob for an `after` that the tenant does not have, ConfigError for a state that is none."""
        query = _of(tenant).order_by(job_table.c.number.desc()).limit(limit + 1)
        wanted = [*states]
        for state in wanted:
            one_of(state, get_args(_JobState), "a state of jobs", "states")
        if wanted:
            query = query.where(job_table.c.state.in_(wanted))
        with reading(self.engine) as c:
            if after is not None:
                query = query.where(job_table.c.number < self._row(c, tenant, after).number)
            found = [_job(row) for row in c.execute(query)]
        return found[:limit], len(found) > limit

    def unfinished(self, tenant: str) -> int:
        """How many of a tenant's jobs have not ended."""
        query = select(func.count()).where(job_table.c.tenant == tenant, job_table.c.state.in_(UNFINISHED))
        with reading(self.engine) as c:
            return int(c.execute(query).scalar_one())

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
        """Events, the oldest first, those with a number above `after`, and whether there are more. `newest`: the newest
        first, those with a number below `after`, if that is not 0. `diagnostics`: include notes of level info, which
        describe how a run used its machine. Raises UnknownJob."""
        e = job_event_table.c
        query = select(job_event_table).order_by(e.number.desc() if newest else e.number).limit(limit + 1)
        if after or not newest:
            query = query.where(e.number < after if newest else e.number > after)
        if not diagnostics:
            query = query.where(or_(e.kind != "note", e.level != "info"))
        found = self._events(tenant, job, query)
        return found[:limit], len(found) > limit

    def events_of(self, tenant: str | None, job: str, *kinds: str) -> list[JobEvent]:
        """All events of these kinds, the oldest first. Raises UnknownJob."""
        e = job_event_table.c
        return self._events(tenant, job, select(job_event_table).where(e.kind.in_(kinds)).order_by(e.number))

    def _events(self, tenant: str | None, job: str, query: Select[Any]) -> list[JobEvent]:
        with reading(self.engine) as c:
            self._row(c, tenant, job)
            rows = c.execute(query.where(job_event_table.c.job == job)).all()
        return [JobEvent(r.level, r.kind, r.message, json.loads(r.data), r.number, r.at) for r in rows]

    def checkpoints(self, tenant: str | None, job: str) -> list[JobCheckpoint]:
        """The newest first. Raises UnknownJob."""
        k = job_checkpoint_table.c
        with reading(self.engine) as c:
            self._row(c, tenant, job)
            rows = c.execute(select(job_checkpoint_table).where(k.job == job).order_by(k.step.desc())).all()
        return [JobCheckpoint(r.step, json.loads(r.metrics), r.reference, r.at) for r in rows]

    def bill(self, tenant: str | None, job: str) -> JobBill | None:
        """None as long as the job has not ended. Raises UnknownJob."""
        with reading(self.engine) as c:
            self._row(c, tenant, job)
            row = c.execute(select(job_bill_table).where(job_bill_table.c.job == job)).first()
        return None if row is None else JobBill(**row._mapping)

    def reserve(self, tenant: str, cost: int, budget: int, posted: int) -> None:
        """Take `cost` from a tenant's budget for this month (UTC), for training by a Tinker client.

        Check and reservation are one transaction, so that jobs and clients see each other's costs. `posted`: the cost
        of such training that the ledger already has. All amounts are in millionths. Raises OverBudget."""
        r = job_reservation_table.c
        with self._writing() as (c, now):
            jobs, spent = _committed(c, tenant, now), max(posted, _reserved(c, tenant, now))
            if jobs + spent + cost > budget:
                left = money(max(0, budget - jobs - spent))
                what = f"this request costs {money(cost)}, but only {left} of this month's training budget is left"
                raise OverBudget(what, where="budget", fix="raise the budget, or wait until next month")
            c.execute(delete(job_reservation_table).where(r.tenant == tenant))
            row = {"tenant": tenant, "month": _day(now)[:7], "spent": spent + cost}
            c.execute(insert(job_reservation_table), row)

    def unreserve(self, tenant: str, cost: int) -> None:
        """Give back what `reserve` took this month."""
        r = job_reservation_table.c
        with self._writing() as (c, now):
            left = max(0, _reserved(c, tenant, now) - cost)
            c.execute(update(job_reservation_table).where(r.tenant == tenant).values(spent=left))

    def bills(self, since: str = "", until: str = "") -> list[JobBill]:
        """Every tenant's, of jobs that ended on these days, both included; the oldest first. For the operator."""
        b = job_bill_table.c
        query = select(job_bill_table).where(b.day >= since).order_by(b.at, b.job)
        with reading(self.engine) as c:
            return [JobBill(**row._mapping) for row in c.execute(query.where(b.day <= until) if until else query)]

    def long_over(self, seconds: float, *states: str) -> list[str]:
        """Jobs that ended so more than so many seconds ago, whose folders nobody needs any more."""
        with reading(self.engine) as c:
            return [*c.scalars(select(job_table.c.id).where(*self._over(c, seconds, states)))]

    def forget_metrics(self, seconds: float) -> int:
        """Of jobs that ended more than so many seconds ago (the database itself wants a month) the measures of each
        step go, and what they came to stays: the job, its other events, checkpoints, bill. Returns how many went."""
        e = job_event_table.c
        with self._writing() as (c, _):
            jobs = select(job_table.c.id).where(*self._over(c, max(seconds, _MONTH), ENDS))
            return c.execute(delete(job_event_table).where(e.kind == "metrics", e.job.in_(jobs))).rowcount

    def _over(self, c: Connection, seconds: float, states: Iterable[str]) -> tuple[ColumnElement[bool], ...]:
        return job_table.c.state.in_([*states]), job_table.c.ended < self._now(c) - seconds

    def spent(self, tenant: str, since: str = "") -> int:
        """What a tenant's jobs cost that ended on the day `since` (2026-11-01) or later, in millionths."""
        with reading(self.engine) as c:
            return _spent(c, tenant, since)

    def pause(self, tenant: str | None, job: str) -> Job:
        """A job that waits or is trained rests until it is resumed. Raises UnknownJob, WrongState."""
        return self._ask(tenant, job, "paused")

    def resume(self, tenant: str | None, job: str) -> Job:
        """A paused job waits again, to go on from its last checkpoint. Raises UnknownJob, WrongState."""
        return self._ask(tenant, job, "queued", only="paused")

    def cancel(self, tenant: str | None, job: str) -> Job:
        """Ends a job for good; steps that were trained are billed. Raises UnknownJob, WrongState."""
        return self._ask(tenant, job, "cancelled")

    def remark(self, tenant: str | None, job: str, event: JobEvent) -> None:
        """Adds what somebody did by hand about a job, whatever its state. Raises UnknownJob."""
        with self._writing() as (c, now):
            _tell(c, self._row(c, tenant, job), now, event)

    def _ask(self, tenant: str | None, job: str, state: _JobState, only: str | None = None) -> Job:
        with self._writing() as (c, now):
            found = self._row(c, tenant, job)
            if found.state == state and state in ("paused", "cancelled"):
                return found  # asked twice
            _allowed(found, state, only)
            c.execute(update(job_table).where(job_table.c.id == job).values(**_LEFT))
            return self._move(c, found, state, now, {"paused": "paused", "queued": "resumed"}.get(state, "cancelled"))

    # -- whoever works on them -----------------------------------------------------------------------------------------

    def take(
        self,
        worker: str,
        seconds: float,
        state: _Waiting = "queued",
        at_once: Callable[[str], int | None] = lambda tenant: None,
        only: str | None = None,
        order: Callable[[str], float] = lambda tenant: 0.0,
    ) -> JobLease | None:
        """A lease, for so many seconds, of a job to validate or to train; None where nothing is to be done.

        Jobs with an expired lease come first; then the oldest job of the tenant with the fewest running jobs, and among
        equal tenants the tenant with the lowest `order`. `at_once`: how many running jobs a tenant may have, None for
        any number. For `validating`, jobs being validated count as running. `only`: this job or none. A job that lost
        its worker too often fails here."""

        while self.waiting(state, at_once, order, only, limit=1):  # tried often, and mostly in vain: that takes no lock
            with self._writing() as (c, now):
                found = next(iter(self._waiting(c, now, state, at_once, order, only, 1)), None)
                if found is None:
                    return None
                lost = found.until is not None
                if lost and found.faults + 1 >= _FAULTS:
                    what = f"whoever worked on this job was lost {_FAULTS} times in a row before a new checkpoint"
                    fix = "look at the workers' memory, then submit it again"
                    self._end(c, found, "failed", now, error={"kind": "lost", "message": what, "fix": fix})
                    continue
                values: dict[str, Any] = {"token": secrets.token_hex(16), "worker": shown(worker), "renewed": now}
                values |= {"until": now + seconds, "attempt": found.attempt + (state == "queued")}
                values |= {"faults": found.faults + lost}
                if state == "queued" and found.started is None:
                    values["started"] = now
                c.execute(update(job_table).where(job_table.c.id == found.id).values(**values))
                if state == "queued" and lost:
                    text = f"{found.worker} was lost: {worker} goes on from the last checkpoint"
                    data = {"public": "its worker was lost: another goes on from the last checkpoint"}
                    _tell(c, found, now, JobEvent("warn", "note", text, data))
                elif state == "queued":
                    public = "resumed" if found.attempt else "started"
                    self._move(c, found, "running", now, f"{public} by {worker}", public=public)
                return JobLease(self._row(c, None, found.id), values["token"])
        return None

    def waiting(
        self,
        state: _Waiting = "queued",
        at_once: Callable[[str], int | None] = lambda tenant: None,
        order: Callable[[str], float] = lambda tenant: 0.0,
        only: str | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Return the jobs that `take` would return, in order."""
        with reading(self.engine) as c:
            return self._waiting(c, self._now(c), state, at_once, order, only, limit)

    def _waiting(
        self,
        c: Connection,
        now: float,
        state: _Waiting,
        at_once: Callable[[str], int | None],
        order: Callable[[str], float],
        only: str | None,
        limit: int,
    ) -> list[Job]:
        """Return the next jobs: jobs with an expired lease first, then waiting jobs.

        Among waiting jobs, every tenant's first job comes before any tenant's second; running jobs count, and no tenant
        exceeds `at_once`. Ties go to the tenant with the lowest `order`, then to the oldest job."""
        j, chosen = job_table.c, () if only is None else (job_table.c.id == only,)
        held = "running" if state == "queued" else state
        late = select(job_table).where(j.state == held, j.until <= now, *chosen).order_by(j.number).limit(limit)
        found = [_job(row) for row in c.execute(late)]
        if len(found) == limit:
            return found
        working = select(j.tenant, func.count()).where(j.state == held, j.token.is_not(None)).group_by(j.tenant)
        running = {tenant: int(count) for tenant, count in c.execute(working)}
        place = func.row_number().over(partition_by=j.tenant, order_by=j.number).label("place")
        free = select(j.tenant, j.number, place).where(j.state == state, j.token.is_(None), *chosen).subquery()
        turns = []
        for tenant, number, own in c.execute(select(free).where(free.c.place <= limit)):
            turn, most = running.get(tenant, 0) + own, at_once(tenant)
            if most is None or turn <= most:
                turns.append((turn, order(tenant), number))
        next_ones = [number for _, _, number in sorted(turns)[: limit - len(found)]]
        jobs = {row.number: _job(row) for row in c.execute(select(job_table).where(j.number.in_(next_ones)))}
        return found + [jobs[number] for number in next_ones]

    def get_lease(self, job: str, token: str) -> JobLease:
        """Return the lease of this job and token. Raises LeaseLost."""
        with reading(self.engine) as c:
            row = c.execute(select(job_table).where(job_table.c.id == job, job_table.c.token == token)).first()
        if row is None:
            raise _lost(job)
        return JobLease(_job(row), token)

    def renew(self, lease: JobLease, seconds: float) -> Job:
        """The lease holds for so many seconds from now on. Raises LeaseLost."""
        with self._working(lease) as (c, now, job):
            c.execute(update(job_table).where(job_table.c.id == job.id).values(until=now + seconds))
        return job

    def note(
        self,
        lease: JobLease,
        events: Sequence[JobEvent] = (),
        checkpoints: Sequence[JobCheckpoint] = (),
        *,
        trained: tuple[int, int, int] | None = None,
        place: str | None = None,
    ) -> None:
        """Adds what happened, in one transaction. `trained`: (step, steps, tokens of all steps to there). What is not
        beyond the furthest step that was noted is left out, of `trained` and of events of kind metrics; a checkpoint
        that is there already too. `place`: see Job. Raises LeaseLost."""
        with self._working(lease) as (c, now, job):
            for event in events:
                if event.kind != "metrics" or event.data["step"] > job.step:
                    _tell(c, job, now, event)
            values: dict[str, Any] = {} if place is None else {"place": place}
            if trained is not None and trained[0] > job.step:
                values |= dict(zip(("step", "steps", "tokens"), trained, strict=True))
            k = job_checkpoint_table.c
            for point in checkpoints:
                there = k.job == job.id, k.step == point.step
                if c.scalar(select(k.step).where(*there)) is None:
                    row = {"job": job.id, "step": point.step, "at": now, "metrics": _json(point.metrics)}
                    c.execute(insert(job_checkpoint_table), row | {"reference": point.reference})
                    values["faults"] = 0
                elif point.reference is not None:
                    c.execute(update(job_checkpoint_table).where(*there).values(reference=point.reference))
            if values:
                c.execute(update(job_table).where(job_table.c.id == job.id).values(**values))

    def queue(
        self, lease: JobLease, plan: Mapping[str, Any], *, price: int = 0, budget: int | None = None, spent: int = 0
    ) -> Job:
        """A validated job waits to be trained, and nobody has it any more. `plan`: with `tokens` and `steps`. `price`:
        for a million tokens; `budget`: the tenant's for a month (UTC); `spent`: the part that the ledger has recorded
        for training by Tinker clients; all in millionths.

        Raises OverBudget where this job, what waits and runs, and what was spent this month are together more than the
        budget; LeaseLost."""
        with self._working(lease) as (c, now, job):
            planned = cost_of(int(plan["tokens"]), price)
            spent = max(spent, _reserved(c, job.tenant, now))
            if budget is not None and planned + (taken := spent + _committed(c, job.tenant, now)) > budget:
                raise OverBudget(
                    f"this job is planned to cost {money(planned)}, and of this month's budget of "
                    f"{money(budget)} {money(max(0, budget - taken))} are left",
                    where="budget",
                    fix="fewer rows or epochs, a larger budget, or next month",
                )
            values = {"plan": _json(dict(plan)), "price": price, "planned": planned, "steps": int(plan["steps"])}
            c.execute(update(job_table).where(job_table.c.id == job.id).values(**values, queued=now, faults=0, **_LEFT))
            cost = f", {money(planned)}" if planned else ""
            what = f"validated: {counted(int(plan['steps']), 'step')}, {int(plan['tokens']):,} tokens{cost}"
            return self._move(c, job, "queued", now, what)

    def release(self, lease: JobLease, why: str, detail: str = "") -> Job:
        """Return a job in training to the queue, to resume from its last checkpoint; a job in validation will be
        validated again. `detail`: more of the reason, for the operator. Raises LeaseLost."""
        with self._working(lease) as (c, now, job):
            c.execute(update(job_table).where(job_table.c.id == job.id).values(**_LEFT))
            if job.state == "validating":
                return self._row(c, None, job.id)
            text = f"{why}: {detail}" if detail else why
            return self._move(c, job, "queued", now, text, public=why if detail else "")

    def died(self, lease: JobLease, why: str, *, fix: str = "") -> Job:
        """As `release`, where the job's process is gone and nobody asked for it; it fails the third time in a row
        without a new checkpoint. Raises LeaseLost."""
        with self._working(lease) as (c, now, job):
            if job.faults + 1 >= _FAULTS:
                what = f"its process died {_FAULTS} times in a row before a new checkpoint: {why}"
                return self._end(c, job, "failed", now, error={"kind": "died", "message": what, "fix": fix})
            c.execute(update(job_table).where(job_table.c.id == job.id).values(faults=job.faults + 1, **_LEFT))
            _tell(c, job, now, JobEvent("warn", "note", f"its process died: {why}", {"public": "its process died"}))
            return self._move(c, job, "queued", now, "waits to go on from its last checkpoint")

    def finish(
        self, lease: JobLease, *, result: Mapping[str, Any] | None = None, error: Mapping[str, Any] | None = None
    ) -> Job:
        """Ends a job: succeeded with a `result`, or failed with an `error`, both as Job has them. Raises LeaseLost."""
        with self._working(lease) as (c, now, job):
            return self._end(c, job, "succeeded" if error is None else "failed", now, result=result, error=error)

    # -- transactions --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[Connection, float]]:
        """A transaction that no other one of this queue overlaps, and the time."""
        with write_transaction(self.engine, JOB_SCHEMA.lock) as c:
            yield c, self._now(c)

    def _now(self, c: Connection) -> float:
        return float(c.scalar(select(database_clock(self.engine))) or time.time())

    @contextlib.contextmanager
    def _working(self, lease: JobLease) -> Iterator[tuple[Connection, float, Job]]:
        """As `_writing`, for whoever has the lease; the time that passed since the last of these is counted."""
        mine = job_table.c.id == lease.job.id, job_table.c.token == lease.token
        with self._writing() as (c, now):
            since = case((job_table.c.renewed < now, now - job_table.c.renewed), else_=0.0)  # clocks are set back, too
            passed = since if lease.job.state == "running" else 0.0
            done = c.execute(update(job_table).where(*mine).values(seconds=job_table.c.seconds + passed, renewed=now))
            if done.rowcount != 1:
                raise _lost(lease.job.id)
            yield c, now, self._row(c, None, lease.job.id)

    def _row(self, c: Connection, tenant: str | None, job: str) -> Job:
        row = c.execute(_of(tenant).where(job_table.c.id == job)).first() if _ID.fullmatch(job) else None
        if row is None:
            raise UnknownJob(f"there is no job {quoted(job, 40)}", where="job", fix="see `veneer jobs list`")
        return _job(row)

    def _move(
        self, c: Connection, job: Job, state: _JobState, now: float, text: str, level: str = "info", public: str = ""
    ) -> Job:
        """Change a job's state; nothing else does. `public`: what the tenant reads in place of the text."""
        _allowed(job, state)
        c.execute(update(job_table).where(job_table.c.id == job.id).values(state=state))
        _tell(c, job, now, JobEvent(level, "state", text, {"state": state} | ({"public": public} if public else {})))
        if state in ENDS:
            c.execute(update(job_table).where(job_table.c.id == job.id).values(ended=now, **_LEFT))
            ended = self._row(c, None, job.id)
            cost = cost_of(ended.tokens, ended.price) if state in _BILLED else 0
            own = {name: getattr(ended, name) for name in ("tenant", "name", "seconds", "tokens", "price")}
            bill = own | {"job": job.id, "day": _day(now), "state": state, "at": now, "cost": cost}
            c.execute(insert(job_bill_table), bill)
        return self._row(c, None, job.id)

    def _end(
        self,
        c: Connection,
        job: Job,
        state: _JobState,
        now: float,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> Job:
        c.execute(update(job_table).where(job_table.c.id == job.id).values(result=_json(result), error=_json(error)))
        text = str((error or {}).get("message") or (result or {}).get("reference") or "done")
        return self._move(c, job, state, now, f"{state}: {text}", "info" if error is None else "error")


_LEFT: dict[str, Any] = {"token": None, "worker": None, "until": None, "renewed": None}


def _of(tenant: str | None) -> Select[Any]:
    return select(job_table) if tenant is None else select(job_table).where(job_table.c.tenant == tenant)


def _allowed(job: Job, state: _JobState, only: str | None = None) -> None:
    """Raises WrongState."""
    if state in TRANSITIONS[job.state] and only in (None, job.state):
        return
    asked = {"paused": "paused", "queued": "resumed", "cancelled": "cancelled"}.get(state, state)
    froms = [only] if only else [name for name, following in TRANSITIONS.items() if state in following]
    raise WrongState(
        f"job {job.id} is {job.state} and cannot be {asked}",
        where="job",
        fix=f"only one that is {' or '.join(froms)} can" if job.state not in ENDS else "it has ended: submit a new one",
    )


def _tell(c: Connection, job: Job, now: float, event: JobEvent) -> None:
    number = (c.scalar(select(func.max(job_event_table.c.number)).where(job_event_table.c.job == job.id)) or 0) + 1
    text = shown(event.message, lines=True)  # PostgreSQL keeps no NUL
    values = replace(event, number=number, at=now, message=text).__dict__ | {"job": job.id, "data": _json(event.data)}
    c.execute(insert(job_event_table), values)


def _spent(c: Connection, tenant: str, since: str) -> int:
    b = job_bill_table.c
    return int(c.scalar(select(func.sum(b.cost)).where(b.tenant == tenant, b.day >= since)) or 0)


def _committed(c: Connection, tenant: str, now: float) -> int:
    j = job_table.c
    planned = select(func.sum(j.planned)).where(j.tenant == tenant, j.state.not_in(ENDS))  # 0 while one is validated
    return int(c.scalar(planned) or 0) + _spent(c, tenant, _day(now)[:8] + "01")


def _reserved(c: Connection, tenant: str, now: float) -> int:
    r = job_reservation_table.c
    return int(c.scalar(select(r.spent).where(r.tenant == tenant, r.month == _day(now)[:7])) or 0)


def _lost(job: str) -> LeaseLost:
    return LeaseLost(f"job {job} is no longer this worker's: it was paused, cancelled, or taken over")


_LETTERS = string.ascii_letters + string.digits
_ID = re.compile(r"ftjob-[A-Za-z0-9]{24}")
"""As OpenAI's look, so that one id serves everywhere."""


def _new_id() -> str:
    return "ftjob-" + "".join(secrets.choice(_LETTERS) for _ in range(24))


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def money(millionths: int) -> str:
    """An amount with two digits after the point, or as many as it needs, up to six."""
    whole, part = divmod(millionths, 1_000_000)
    return f"{whole:,}.{f'{part:06d}'.rstrip('0').ljust(2, '0')}"
