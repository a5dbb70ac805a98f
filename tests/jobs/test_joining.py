"""Jobs of one base in one process: who joins whom, and each is what it would be alone, whatever comes of the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.pretended import Pretended, until
from tests.jobs.small import small_config
from veneer.files.safetensors import read_tensors
from veneer.jobs.executors import Ended, LocalExecutor
from veneer.jobs.joining import company
from veneer.jobs.process import carry_out_jobs
from veneer.jobs.store import Job, JobLease, JobStore
from veneer.jobs.validate import device_of, validated
from veneer.jobs.worker import Worker
from veneer.library.library import Library
from veneer.serve.tenancy.store import TrainingTerms

pytestmark = pytest.mark.parametrize("library", ["sqlite"], indirect=True)
LAW = 1e-5
"""Of the largest entry, in float32."""
CALM = {"optimizer": {"name": "sgd", "learning_rate": 0.1}}
"""Adam goes as far by a gradient that is rounding alone as by any other, and these rows have such."""


def queued(
    store: JobStore, folder: Path, tenant: str = "acme", steps: int = 3, name: str = "support", **sections: Any
) -> Job:
    config = small_config(folder, steps, **sections)
    made = store.create(tenant, config, name=name, about={"publish": "checkpoints"})
    lease = store.take("v", 600, "validating")
    assert lease is not None
    job = validated(store, lease, TrainingTerms(price=4_000_000), device_of())
    assert job.state == "queued", job.error
    assert job.id == made.id
    return job


def taken(store: JobStore, *jobs: Job) -> dict[str, str]:
    leases = [store.take("w", 600, only=job.id) for job in jobs]
    return {lease.job.id: lease.token for lease in leases if lease is not None}


def test_who_joins(library: Library, store: JobStore, tmp_path: Path) -> None:
    """As many as one pass has room for, of those with the same base that gain by it, without overtaking."""
    device = device_of()
    first = queued(store, tmp_path)
    like = queued(store, tmp_path, "globex", 9, adapter={"rank": 8})
    others = [
        queued(store, tmp_path, base={"name": str(tmp_path / "tiny-base"), "dtype": "bfloat16"}),
        queued(store, tmp_path, memory={"activation_checkpointing": "on"}),
        queued(store, tmp_path, adapter={"rank": 2, "dora": True}),
    ]
    large = queued(store, tmp_path, batching={"rows": 500, "micro_tokens": 1 << 20, "micro_rows": 500})
    lease = store.take("w", 600, only=first.id)
    assert lease is not None
    assert store.waiting()[0].id == like.id  # of each tenant the first: acme has one running
    chosen, held = company(lease.job, [like, *others], device)
    assert [job.id for job in chosen] == [like.id]
    assert held > (first.plan or {})["peak_bytes"]
    narrow = [queued(store, tmp_path, batching={"rows": 2, "micro_tokens": 64}) for _ in range(3)]
    begun = store.take("w", 600, only=narrow[0].id)
    assert begun is not None
    assert company(begun.job, narrow, device)[0] == []  # two rows fill a pass
    assert large.id in {job.id for job in store.waiting()}
    assert [job.tenant for job in store.waiting(lambda tenant: 3)] == ["globex", "acme"]  # two of acme run already


def test_each_comes_out_as_if_it_were_alone_and_pays_for_itself(
    library: Library, store: JobStore, tmp_path: Path
) -> None:
    pair: dict[str, Any] = {
        "acme": {**CALM, "steps": 6, "checkpoint": {"every": 3, "keep": 2}},
        "globex": {**CALM, "steps": 3, "adapter": {"rank": 4}, "seed": 7, "batching": {"rows": 1}},
    }
    jobs = {tenant: queued(store, tmp_path, tenant, **settings) for tenant, settings in pair.items()}
    began = time.time()
    assert carry_out_jobs(library, taken(store, *jobs.values())) == 0
    took = time.time() - began
    apart = {tenant: queued(store, tmp_path, tenant, name="alone", **settings) for tenant, settings in pair.items()}
    for job in apart.values():
        assert carry_out_jobs(library, taken(store, job)) == 0
    bills = {tenant: store.bill(tenant, job.id) for tenant, job in jobs.items()}
    for tenant, job in jobs.items():
        now, bill, expected = store.get(tenant, job.id), bills[tenant], store.bill(tenant, apart[tenant].id)
        assert now.state == "succeeded", now.error
        assert bill is not None
        assert expected is not None
        assert (bill.tokens, bill.cost) == (expected.tokens, expected.cost)
        alone = store.get(tenant, apart[tenant].id)
        references = [str((each.result or {})["reference"]) for each in (now, alone)]
        found, want = (read_tensors(library.resolve(r) / "adapter_model.safetensors")[0] for r in references)
        assert found.keys() == want.keys()
        for name, tensor in want.items():
            assert (found[name] - tensor).abs().max() <= LAW * tensor.abs().max(), name
        points = [
            [p.step for p in store.checkpoints(tenant, each.id) if p.reference is not None] for each in (now, alone)
        ]
        assert points[0] == points[1]  # not those that the other one wished for
        events, _ = store.events(tenant, job.id)
        assert [e.data["step"] for e in events if e.kind == "metrics"] == [*range(1, pair[tenant]["steps"] + 1)]
        other = jobs["globex" if tenant == "acme" else "acme"]
        told = " ".join(f"{event.message} {event.data}" for event in events) + str(now.to_dict())
        assert other.id not in told
        assert other.tenant not in told
    seconds = {tenant: bill.seconds for tenant, bill in bills.items() if bill is not None}
    assert sum(seconds.values()) == pytest.approx(took, rel=0.2, abs=0.3)  # a second of the machine is billed once
    assert seconds["acme"] > 1.5 * seconds["globex"]  # twice the tokens a step, and twice the steps


@pytest.mark.parametrize("asked", ["pause", "cancel"])
def test_one_that_leaves_or_fails_leaves_the_others(
    library: Library, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    every = {"checkpoint": {"every": 2}, "evaluation": {"every": 100, "keep": "last"}}
    stays, leaves = queued(store, tmp_path, "acme", 8, **every), queued(store, tmp_path, "globex", 8, **every)
    wild = {"optimizer": {"name": "sgd", "learning_rate": 1e30, "clip": None}}
    fails = queued(store, tmp_path, "initech", 8, **{**every, **wild})
    note, seen = JobStore.note, list[int]()

    def noting(self: JobStore, lease: JobLease, *values: Any, **named: Any) -> None:
        note(self, lease, *values, **named)
        step = (named.get("trained") or [0])[0]
        if lease.job.id == leaves.id and step >= 2 and not seen:
            seen.append(step)
            getattr(store, asked)("globex", leaves.id)

    monkeypatch.setattr(JobStore, "note", noting)
    carry_out_jobs(library, taken(store, stays, leaves, fails))
    now = {job.tenant: store.get(None, job.id) for job in (stays, leaves, fails)}
    assert now["acme"].state == "succeeded"
    assert (now["acme"].step, now["globex"].step) == (8, seen[0])
    assert now["globex"].state == {"pause": "paused", "cancel": "cancelled"}[asked]
    assert now["initech"].state == "failed"
    assert "not finite" in str(now["initech"].error)
    assert "not finite" in fails.log.read_text()
    assert not stays.log.read_text()
    if asked == "pause":  # the state of its last whole step is there, and it goes on by itself
        store.resume("globex", leaves.id)
        assert carry_out_jobs(library, taken(store, leaves)) == 0
        events, _ = store.events("globex", leaves.id)
        resumed = [event.message for event in events if event.message.startswith("resuming after step")]
        assert len(resumed) == 1
        assert int(resumed[0].split()[3]) > seen[0]
        assert any("may differ in the last bits" in event.message for event in events)


def test_a_worker_trains_several_in_one_process_of_this_machine(
    library: Library, store: JobStore, tmp_path: Path
) -> None:
    """Nothing is pretended here: the process finds its queue and library by what the worker hands on."""
    jobs = [queued(store, tmp_path, tenant) for tenant in ("acme", "globex")]
    Worker(library, LocalExecutor(), poll=0.02, device=device_of()).run(until_idle=True)
    for job in jobs:
        now, (told, _) = store.get(None, job.id), store.events(None, job.id)
        assert (now.state, now.attempt) == ("succeeded", 1), (now.error, told)
        assert "in one process with other jobs of its base" in [event.message for event in told]
        assert library.find(f"{job.tenant}/support").version == 4  # after its three checkpoints
    assert len({place.partition(",")[0] for place in (store.get(None, job.id).place for job in jobs)}) == 1


def rounds(worker: Worker, condition: Callable[[], object]) -> None:
    """The worker works in a thread until the condition holds."""
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        until(condition)
    finally:
        worker.stop()
        thread.join(20)


def members(executor: Pretended) -> list[list[str]]:
    return [[lease.job.tenant for lease in leases] for leases in executor.running.values()]


def test_a_worker_joins_and_looks_after_each(library: Library, store: JobStore, tmp_path: Path) -> None:
    """A tenant that may have one gets one; a pause stops nobody else; after a kill they are together, the last time
    each is alone."""
    jobs = [queued(store, tmp_path, tenant) for tenant in ("acme", "globex", "acme", "initech")]
    executor = Pretended()
    tries: list[list[list[str]]] = []

    def worker() -> Worker:
        made = Worker(library, executor, poll=0.01, grace=0.1, lease=5, device=device_of())
        made.terms = lambda tenant: TrainingTerms(jobs=1)
        return made

    def begun() -> object:
        place = next(iter(executor.running), None)
        return place and all(store.get(None, lease.job.id).place == place for lease in executor.running[place])

    rounds(worker(), begun)  # it ends: all are given back
    assert members(executor) == [["acme", "globex", "initech"]]
    assert [store.get(None, job.id).state for job in jobs] == ["queued"] * 4
    executor.running, executor.over, executor.asked = {}, {}, []

    def paused() -> bool:
        if begun() and store.get(None, jobs[1].id).state == "running":
            store.pause("globex", jobs[1].id)
        return store.get(None, jobs[1].id).state == "paused" and bool(time.sleep(0.2)) is False

    rounds(worker(), paused)
    assert members(executor) == [["acme", "globex", "initech"]]  # as they were
    assert len(executor.asked) == 1  # when the worker ended
    store.resume("globex", jobs[1].id)
    executor.running, executor.over, executor.asked = {}, {}, []

    def killed() -> bool:
        for place in executor.running:
            executor.over.setdefault(place, Ended("ended by SIGKILL"))
        tries[:] = members(executor)
        return len(tries) >= 4

    rounds(worker(), killed)
    assert tries[0] == tries[1] == ["acme", "initech"]  # who was paused is no more of them
    assert all(len(one) == 1 for one in tries[2:])
