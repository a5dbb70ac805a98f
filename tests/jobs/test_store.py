"""The job queue: state transitions, and separation of tenants; nothing is counted twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.jobs.fakes import CONFIG, PLAN, queued, taken
from veneer.errors import ConfigError
from veneer.jobs.store import (
    ENDS,
    TRANSITIONS,
    Job,
    JobCheckpoint,
    JobEvent,
    JobLease,
    JobStore,
    LeaseLost,
    OverBudget,
    UnknownJob,
    WrongState,
    cost_of,
)
from veneer.library.database import write_transaction


def running(store: JobStore, **how: Any) -> JobLease:
    queued(store, **how)
    return taken(store)


def step(number: int) -> JobEvent:
    return JobEvent("info", "metrics", f"step {number} of 10", {"step": number, "steps": 10, "loss": 1 / number})


def trained(number: int, tokens: int = 100_000) -> tuple[int, int, int]:
    return number, 10, number * tokens


def in_state(store: JobStore, state: str) -> Job:
    """Return a job in this state."""
    if state == "validating":
        return store.create("acme", CONFIG, name="support")
    job = queued(store)
    if state in ("running", "succeeded", "failed"):
        lease = taken(store)
        if state == "succeeded":
            store.finish(lease, result={"reference": "acme/support@1"})
        if state == "failed":
            store.finish(lease, error={"kind": "data", "message": "no rows"})
    if state == "paused":
        store.pause("acme", job.id)
    if state == "cancelled":
        store.cancel("acme", job.id)
    return store.get("acme", job.id)


ASKED: dict[str, tuple[str, Callable[[JobStore, str], Job]]] = {
    "pause": ("paused", lambda store, job: store.pause("acme", job)),
    "resume": ("queued", lambda store, job: store.resume("acme", job)),
    "cancel": ("cancelled", lambda store, job: store.cancel("acme", job)),
}


@pytest.mark.parametrize("library", ["sqlite"], indirect=True)
@pytest.mark.parametrize("state", TRANSITIONS)
@pytest.mark.parametrize("asked", ASKED)
def test_pause_resume_cancel_follow_the_transitions(store: JobStore, state: str, asked: str) -> None:
    job = in_state(store, state)
    assert job.state == state
    after, change = ASKED[asked]
    earlier, _ = store.events("acme", job.id)
    allowed = after in TRANSITIONS[state] and (asked != "resume" or state == "paused")
    again = state == after and asked != "resume"
    if allowed or again:
        assert change(store, job.id).state == after
    else:
        with pytest.raises(WrongState, match=f"is {state} and cannot be"):
            change(store, job.id)
        assert store.get("acme", job.id) == job
    later = store.events("acme", job.id)[0][len(earlier) :]
    assert [event.data["state"] for event in later] == ([after] if allowed else [])
    assert (store.bill("acme", job.id) is not None) == (store.get("acme", job.id).state in ENDS)


def test_job_from_creation_to_bill(store: JobStore) -> None:
    job = queued(store, price=3_000_000)
    assert (job.state, job.steps, job.planned) == ("queued", 10, 3_000_000)
    assert "output" not in job.config  # the server chooses the output folder
    lease = taken(store)
    loaded = JobEvent("info", "note", "loaded\x00")
    store.record(lease, [loaded, step(1), step(2)], [JobCheckpoint(2, {"loss": 0.5})], trained=trained(2))
    store.record(lease, [step(1)], trained=trained(1))  # a resumed job repeats the step
    store.record(lease, [step(2), step(3)], [JobCheckpoint(2), JobCheckpoint(3)], trained=trained(3), place="here")
    done = store.finish(lease, result={"reference": "acme/support@1"})
    assert (done.state, done.step, done.tokens, done.place) == ("succeeded", 3, 300_000, "here")
    bill = store.bill("acme", job.id)
    assert (bill.tokens, bill.cost, bill.state) == (300_000, cost_of(300_000, 3_000_000), "succeeded")
    assert [each.cost for each in store.bills()] == [900_000]
    assert [(point.step, point.metrics) for point in store.checkpoints("acme", job.id)] == [(3, {}), (2, {"loss": 0.5})]
    events, more = store.events("acme", job.id)
    assert [event.number for event in events] == [*range(1, len(events) + 1)]
    assert not more
    assert [e.data["step"] for e in events if e.kind == "metrics"] == [1, 2, 3]
    assert [e.data["state"] for e in events if e.kind == "state"] == ["validating", "queued", "running", "succeeded"]
    newest, more = store.events("acme", job.id, newest=True, limit=2)
    assert newest == events[:-3:-1]
    assert more
    assert store.events("acme", job.id, newest=True, after=newest[-1].number)[0] == events[-3::-1]
    assert store.events("acme", job.id, after=events[-2].number)[0] == events[-1:]


def test_failed_jobs_are_free_and_cancelled_jobs_billed(store: JobStore) -> None:
    lease = running(store, price=1_000_000)
    store.record(lease, [step(1)], trained=trained(1))
    store.finish(lease, error={"kind": "training", "message": "not finite"})
    lease = running(store, price=1_000_000)
    store.record(lease, [step(1), step(2)], trained=trained(2))
    store.cancel("acme", lease.job.id)
    assert [each.cost for each in store.bills()] == [0, 200_000]


def test_lost_lease_changes_nothing(store: JobStore) -> None:
    """After a pause, a cancel or a takeover, every call with the old lease fails."""
    for lose in ("pause", "cancel", "expire"):
        queued(store)
        lease = taken(store, 0.05 if lose == "expire" else 60)
        if lose == "expire":
            time.sleep(0.1)
            again = taken(store, worker="another")
            assert again.job.id == lease.job.id
            assert (again.job.attempt, again.job.faults) == (2, 1)
        else:
            ASKED[lose][1](store, lease.job.id)
        unchanged = store.get("acme", lease.job.id), store.events("acme", lease.job.id)
        tries: list[Callable[[], object]] = [
            lambda: store.renew(lease, 60),  # noqa: B023
            lambda: store.record(lease, [step(1)], [JobCheckpoint(1)]),  # noqa: B023
            lambda: store.release(lease, "stopped"),  # noqa: B023
            lambda: store.died(lease, "killed"),  # noqa: B023
            lambda: store.finish(lease, result={}),  # noqa: B023
            lambda: store.get_lease(lease.job.id, lease.token),  # noqa: B023
        ]
        for attempt in tries:
            with pytest.raises(LeaseLost, match="paused, cancelled, or taken over"):
                attempt()
        assert (store.get("acme", lease.job.id), store.events("acme", lease.job.id)) == unchanged
        assert store.checkpoints("acme", lease.job.id) == []
        store.cancel("acme", lease.job.id)


def test_renewed_lease_stays_and_counts_seconds(store: JobStore) -> None:
    lease = running(store)
    time.sleep(0.05)
    assert store.renew(lease, 60).seconds > 0.04
    with store.engine.begin() as c:  # the clock is set back by an hour
        c.exec_driver_sql("UPDATE jobs SET renewed = renewed + 3600")
    assert store.renew(lease, 60).seconds > 0.04
    assert store.acquire("another", 60) is None
    assert store.get_lease(lease.job.id, lease.token).job.worker == "w"


def test_many_workers_take_each_job_once(store: JobStore) -> None:
    ids = [queued(store).id for _ in range(6)]
    got: list[str] = []
    ready = threading.Barrier(3)

    def work(name: str) -> None:
        ready.wait()
        while (lease := store.acquire(name, 60)) is not None:
            got.append(lease.job.id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(ids)


def test_tenant_with_fewest_running_jobs_is_next(store: JobStore) -> None:
    a = [queued(store, "acme").id for _ in range(3)]
    b = [queued(store, "best").id]
    limits = {"acme": 2}
    order = [taken(store, at_once=limits.get).job.id for _ in range(3)]
    assert order == [a[0], b[0], a[1]]
    assert store.acquire("w", 60, at_once=limits.get) is None
    store.cancel("acme", a[0])
    assert taken(store, at_once=limits.get).job.id == a[2]


def test_job_fails_after_three_dead_processes(store: JobStore) -> None:
    queued(store)
    for _ in range(2):
        assert store.died(taken(store), "killed by signal 9").state == "queued"
    store.record(lease := taken(store), checkpoints=[JobCheckpoint(1)])  # progress resets the count
    assert store.died(lease, "killed by signal 9").state == "queued"
    for end in ("queued", "failed"):
        job = store.died(taken(store), "killed by signal 9", fix="more memory")
        assert job.state == end
    assert job.error["message"].startswith("its process died 3 times in a row without a new checkpoint: killed by")


def test_job_fails_after_three_lost_workers(store: JobStore) -> None:
    queued(store)
    for _ in range(3):
        taken(store, seconds=0.02)
        time.sleep(0.05)
    assert store.acquire("w", 60) is None
    (job,), _ = store.jobs("acme")
    assert (job.state, job.error and job.error["kind"]) == ("failed", "lost")


def test_budget_counts_bills_and_planned_jobs(store: JobStore) -> None:
    lease = running(store, price=2_000_000, budget=5_000_000)  # the plan costs 2
    store.record(lease, [step(1)], trained=trained(1, tokens=500_000))
    store.finish(lease, result={})  # the job spent 1
    queued(store, price=2_000_000, budget=5_000_000)
    store.create("acme", CONFIG, name="support")
    lease = taken(store, state="validating")
    with pytest.raises(OverBudget, match=r"would cost 3\.00, but of this month's budget of 5\.00, only 2\.00 is left"):
        store.queue(lease, PLAN, price=3_000_000, budget=5_000_000)
    assert store.get("acme", lease.job.id).state == "validating"
    assert store.queue(lease, PLAN, price=2_000_000, budget=5_000_000).state == "queued"


def test_jobs_are_listed_by_page(store: JobStore) -> None:
    ids = [store.create("acme", CONFIG, name="support", about={"n": n}).id for n in range(5)][::-1]
    store.create("best", CONFIG, name="support")
    listed: list[str] = []
    after, more = None, True
    while more:
        page, more = store.jobs("acme", after=after, limit=2)
        listed += [job.id for job in page]
        after = listed[-1]
    assert listed == ids
    assert store.jobs("acme")[0][0].about == {"n": 4}
    store.cancel("acme", ids[1])
    assert [job.id for job in store.jobs("acme", states=["cancelled"])[0]] == [ids[1]]
    with pytest.raises(ConfigError, match="'done' is not a state of jobs"):
        store.jobs("acme", states=["done"])


OTHERS = ["best", "", "%", "acme%", "acm_", "*", "ACME", "acme' OR '1'='1"]


def test_jobs_of_other_tenants_are_unknown(store: JobStore) -> None:
    lease = running(store, price=1_000_000)
    store.record(lease, [step(1)], [JobCheckpoint(1)])
    job = lease.job.id
    unchanged = store.get("acme", job), store.events("acme", job)
    names = (f"{job}\x00", "%", f"{job}' --", "ftjob-\ud800", "")
    for method in (store.get, store.events, store.checkpoints, store.bill, store.pause, store.resume, store.cancel):
        for tenant, name in [*((stranger, job) for stranger in OTHERS), *(("acme", name) for name in names)]:
            with pytest.raises(UnknownJob, match="there is no job"):
                method(tenant, name)
    for stranger in OTHERS:
        with pytest.raises(UnknownJob):
            store.jobs(stranger, after=job)
        assert store.jobs(stranger) == ([], False)
    assert (store.get("acme", job), store.events("acme", job)) == unchanged
    store.cancel("acme", job)
    assert [bill.tenant for bill in store.bills()] == ["acme"]
    assert store.get(None, job).tenant == "acme"  # the operator's


def test_job_name_must_be_in_the_tenants_namespace(store: JobStore) -> None:
    named = [("acme", "best/support"), ("acme", "../best/x"), ("all", "x"), ("a/b", "x"), ("acme", "Up")]
    for tenant, name in named:
        with pytest.raises(ConfigError, match="cannot name"):
            store.create(tenant, CONFIG, name=name)
    assert store.jobs(None) == ([], False)


def test_only_old_metrics_are_deleted(store: JobStore) -> None:
    leases = [running(store, tenant=tenant) for tenant in ("acme", "best", "corp")]
    for lease in leases:
        store.record(lease, [step(1), step(2)], trained=trained(2))
    for lease in leases[:2]:
        store.finish(lease, result={})
    old, young, runs = (store.get(None, lease.job.id) for lease in leases)
    with write_transaction(store.engine) as c:
        c.execute(text("UPDATE jobs SET ended = ended - 400 * 86400 WHERE id = :id"), {"id": old.id})
    earlier = {job.id: store.events(None, job.id)[0] for job in (old, young, runs)}
    store.delete_old_metrics(365 * 86400)
    after = {job.id: store.events(None, job.id)[0] for job in (old, young, runs)}
    assert after == earlier | {old.id: [event for event in earlier[old.id] if event.kind != "metrics"]}
    assert (store.bill(None, old.id) or young).tokens == store.get(None, old.id).tokens > 0
    assert store.ended_before(365 * 86400, "succeeded") == [old.id]


def test_bills_are_append_only(store: JobStore) -> None:
    store.cancel("acme", queued(store).id)
    for statement in ("DELETE FROM job_bills", "UPDATE job_bills SET job = job"):
        with pytest.raises(DBAPIError, match="append-only"), store.engine.begin() as c:
            c.execute(text(statement))
