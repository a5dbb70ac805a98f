"""The process of a job: it trains, tells the queue, puts the adapter into the library, and ends the job.

    python -m veneer.jobs.process FILE [--tied]

The starting process (`executors`) holds and renews the lease; this process writes under the lease's token. `FILE`: from
`executors.hand_over`, with the jobs' tokens and the queue's addresses. `--tied`: end as soon as standard input ends,
which happens when the starting process ends.

Each lease has a folder of its own, `attempt-N`, into which the one before it is renamed with its checkpoints. So a
process that was taken for dead and is not can write, but never where its successor does. The run goes on from its last
checkpoint, on the CPU bit for bit as if nothing had happened.

| what ends it                                   | the job                                          |
| the run is done                                | succeeded, its adapter a version in the library  |
| what the user gave, or a loss that is not finite | failed, with the error                         |
| SIGTERM, or the lease is lost                  | given back, if it still has it                   |
| memory, a disk, a database                     | given back; failed the third time in a row       |
| a kill                                         | whoever watches gives it back, or its lease runs out |

Several jobs are trained in one pass of their base (`train.text.together`), and each is what it would be alone: it has
its lease, events, checkpoints and end, which comes as soon as its run's does. Who loses its lease saves its state and
leaves; so does whoever fails. What ends all of them at once (a fault of veneer's, a base that cannot be loaded) may be
any one's: all are given back, and go on each by itself. They may be of several tenants, so that what one of them comes
to is in its own log, and what is everybody's (`together.log`) in nobody's.

Of the seconds that pass each job is counted a share, by the tokens of its steps beside those of the others that go on
(`with_shares`): its bill says what it used of the machine, and all bills together what the machine worked.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import CheckpointError, Interrupted, VeneerError
from veneer.files.rights import forbid_inspection
from veneer.jobs.canary import compare_job, place_job
from veneer.jobs.executors import taken_over
from veneer.jobs.store import Job, JobCheckpoint, JobEvent, JobLease, JobStore, LeaseLost, with_shares
from veneer.jobs.validate import is_compared, job_config, may_pass, terms_of, told, validated
from veneer.library.library import Library, open_library
from veneer.plan.tables import Device
from veneer.serve.outage import is_outage
from veneer.serve.tenancy.store import tenants_at
from veneer.train import checkpoint
from veneer.train.config.image import ImageTrainConfig
from veneer.train.events import TOKEN_ACCURACY, Checked, Event, Note, Saved, measure_text, to_record
from veneer.train.report.log import read_log

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase
    from veneer.train.text.save import RunResult

_EVERY = 1.0
"""Seconds between two writes of what happened."""
_AGAIN = 2.0
"""Seconds after which a database that was away is tried again."""


def _validate_job(library: Library, job: str, token: str, device: Device, room: int) -> int:
    """Validate one job in this process; return 0, or 75 if the job has to be validated again."""
    store = JobStore(library)
    try:
        lease = store.held(job, token)
        with tenants_at(os.environ.get("VENEER_TENANTS")) as tenants:
            validated(store, lease, terms_of(tenants)(lease.job.tenant), device, tenants, room=room)
        return 0
    except LeaseLost as error:
        print(error, file=sys.stderr)
    except Exception as error:
        if not may_pass(error):
            raise
        print(f"{job} will be validated again: {type(error).__name__}: {error}", file=sys.stderr)
    return 75


def carry_out_jobs(library: Library, tokens: Mapping[str, str]) -> int:
    """Everything, in this process, of the jobs of these tokens, several of them in one pass of their base; 0, or 75
    where one of them was given back, or none is this process's."""
    store = JobStore(library)
    held: list[JobLease] = []
    for job, token in tokens.items():
        try:
            held.append(store.held(job, token))
        except LeaseLost as error:
            print(error, file=sys.stderr)
    if not held:
        return 75
    if len(tokens) > 1:
        return max(_carried_out_together(store, held))
    teller = _Teller(store, held[0], lambda: os.kill(os.getpid(), signal.SIGTERM))  # its state is saved, and it ends
    return _carried_out(teller, lambda: _trained(teller))


def _carried_out_together(store: JobStore, leases: Sequence[JobLease]) -> list[int]:
    tellers = [_Teller(store, lease, lambda: None) for lease in with_shares(leases)]
    for teller in tellers:
        teller.events.append(JobEvent("info", "note", "in one process with other jobs of its base"))
    going_on, codes = dict(enumerate(tellers)), [0] * len(tellers)

    def ended(place: int, outcome: RunResult | VeneerError) -> None:
        teller = going_on.pop(place)
        with _own_log(teller.lease.job):
            codes[place] = _carried_out(teller, lambda: (_result(outcome), None), alone=True)
        again = with_shares([each.lease for each in going_on.values()])
        for each, lease in zip(going_on.values(), again, strict=True):
            each.lease = lease

    try:
        _trained_together(tellers, ended)
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        if not stopped:
            traceback.print_exception(error)
        for place, teller in going_on.items():
            codes[place] = _ended(teller, error, alone=not stopped, anyones=True)
    return codes


def _result(outcome: RunResult | VeneerError) -> dict[str, Any]:
    if isinstance(outcome, VeneerError):
        raise outcome
    return dict(outcome.to_dict())


@contextlib.contextmanager
def _own_log(job: Job) -> Iterator[None]:
    """What is said to stderr is said in the job's log."""
    with open(job.log, "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        yield


def _trained_together(tellers: Sequence[_Teller], ended: Callable[[int, RunResult | VeneerError], None]) -> None:
    """The runs, each in its folder."""
    from veneer.models.loading import errors_only
    from veneer.train.text.together import run_texts

    jobs = [teller.lease.job for teller in tellers]
    folders = [_folder(job) for job in jobs]
    for teller, folder in zip(tellers, folders, strict=True):
        teller.catch_up(folder)
    with errors_only():
        run_texts(
            [job_config(job, folder) for job, folder in zip(jobs, folders, strict=True)],
            names=[job.id for job in jobs],
            called=[job.id for job in jobs],
            listeners=tellers,
            ended=ended,
            resume=any(folder.is_dir() for folder in folders),
            leave=lambda running: {place: None for place in running if tellers[place].lost},
        )


_Trained = tuple[dict[str, Any], "TextBase | None"]
"""What came of a run as JSON values, and its base, where it is needed once more."""


def _carried_out(teller: _Teller, train: Callable[[], _Trained], *, alone: bool = False) -> int:
    """Trains a job and ends it. `alone`: others of its process go on, without it."""
    store, library = teller.store, teller.store.library
    try:
        result, base = train()
        teller.flush(wait=True)
        lease = teller.lease
        with tenants_at(os.environ.get("VENEER_TENANTS")) as tenants:
            compared = compare_job(store, lease, tenants, result, base)
            reference = _published(library, lease.job, result)
            place_job(store, lease, tenants, reference, compared)
        if lease.job.about.get("publish") == "checkpoints":
            from veneer.jobs.checkpoints import publish_checkpoints  # late: a worker needs no torch

            left_out: list[JobEvent] = []
            points = publish_checkpoints(
                library,
                lease.job.name,
                _folder(lease.job),
                Path(result["adapter"]),
                lambda text: left_out.append(JobEvent("warn", "note", text)),
            )
            store.note(lease, left_out, [JobCheckpoint(step, reference=at) for step, at in points.items()])
        store.finish(lease, result={**result, "reference": reference})
        return 0
    except LeaseLost as error:
        print(error, file=sys.stderr)
        return 75
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        return _ended(teller, error, alone=alone)


def _ended(teller: _Teller, error: BaseException, *, alone: bool, anyones: bool = False) -> int:
    """What becomes of a job whose run did not come to its end. `alone`: it is no more of those whom it was with.
    `anyones`: whose error it is, nobody can tell, and none of them fails by it."""
    store, lease = teller.store, teller.lease
    with contextlib.suppress(LeaseLost):
        teller.flush(wait=True)
        if alone:
            store.note(lease, place="")
        if isinstance(error, Interrupted | KeyboardInterrupt):
            store.release(lease, "stopped, to go on from its last checkpoint")
        elif anyones:
            store.release(lease, "its process ended, to go on by itself from its last checkpoint")
        elif may_pass(error):
            what = error.what if isinstance(error, VeneerError) else f"{type(error).__name__}: {error}"
            store.died(lease, what, fix=getattr(error, "fix", None) or "")
        else:
            store.finish(lease, error=told(error))
            return 0
    return 75


def _trained(teller: _Teller) -> _Trained:
    """The run in its folder. Where its adapter is compared afterwards the base is loaded here, for both."""
    from veneer.models.loading import errors_only

    folder = _folder(teller.lease.job)
    teller.catch_up(folder)
    config = job_config(teller.lease.job, folder)
    options: dict[str, Any] = {"resume": folder.is_dir(), "on_event": teller}
    result: Any
    base = None
    with errors_only():
        if isinstance(config, ImageTrainConfig):
            from veneer.train.image.run import run_images

            result = run_images(config, **options)
        else:
            from veneer.models.text.base import load_text
            from veneer.serve.engine.live import live_sampler
            from veneer.train.text.task import run_text

            if is_compared(teller.lease.job):
                own = config.base
                base = load_text(own.name, dtype=own.dtype, device=own.device, quantise=own.quantise)
            result = run_text(config, base=base, **options, sampler=live_sampler)
    return dict(result.to_dict()), base


def _folder(job: Job) -> Path:
    """This lease's own: what earlier ones left, under its name."""
    job.make_folder()
    own = job.folder / f"attempt-{job.attempt}"
    earlier = [(int(p.name.rpartition("-")[2]), p) for p in job.folder.glob("attempt-*[0-9]")]
    if earlier and not own.exists():
        os.rename(max(earlier)[1], own)
    return own


def _published(library: Library, job: Job, result: Mapping[str, Any]) -> str:
    """The adapter's reference in the library: once, whoever tried before and was killed after it. Where checkpoints are
    published too, each is the version of its step, and this the one after them."""
    tag = f"job:{job.id}"
    if there := library.search(tags=[tag], all_versions=True):
        return there[0].reference
    number = int(result["steps"]) + 1 if job.about.get("publish") == "checkpoints" else None
    added = library.add(result["adapter"], job.name, tags=[tag], source=f"job {job.id}", number=number)
    return added.version.reference


class _Teller:
    """Listens to the run and tells the queue, at most once a second, and at once of checkpoints. While the database is
    away it keeps what it has to tell. `stop`: called when the lease is lost."""

    def __init__(self, store: JobStore, lease: JobLease, stop: Callable[[], None]) -> None:
        self.store, self.lease, self.stop = store, lease, stop
        self.events: list[JobEvent] = []
        self.checkpoints: list[JobCheckpoint] = []
        self.newest: dict[str, Any] = {}
        self.step, self.steps, self.tokens = 0, lease.job.steps, 0
        self.last, self.lost = 0.0, False
        heard: dict[str, set[int]] = {"validation": set(), "sample": set(), "checkpoint": set()}
        for event in store.events_of(None, lease.job.id, *heard):
            heard[event.kind].add(event.data["step"])
        self.scored, self.sampled, self.published = heard["validation"], heard["sample"], heard["checkpoint"]

    def catch_up(self, folder: Path) -> None:
        """What the last checkpoint in `folder` has, of which a kill may have kept the queue from hearing. The run's own
        log has the steps one by one; the checkpoint their number and their tokens, should the log have lost some."""
        progress = _last_progress(folder / "checkpoints", self)
        if progress is None:
            return
        for record in read_log(folder / "log.jsonl"):
            if int(record.get("step", 0)) <= progress["step"]:
                self._hear(record)
        self.checkpoints.append(JobCheckpoint(progress["step"], dict(self.newest)))
        self._publish(folder)
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.flush()

    def __call__(self, event: Event) -> None:
        self._hear(to_record(event))
        if isinstance(event, Checked):
            self.events.append(JobEvent("info", "preflight", event.text, event.data))
        elif isinstance(event, Note):
            level = "warn" if event.text.startswith("warning:") else "info"
            self.events.append(JobEvent(level, "note", event.text))
        elif isinstance(event, Saved):
            self._publish(Path(event.path).parents[1])
        if isinstance(event, Saved) or time.monotonic() - self.last > _EVERY:
            self.flush()

    def _hear(self, record: Mapping[str, Any]) -> None:
        """Of an event, as the run's log has it, what is counted."""
        kind, step = record.get("event"), int(record.get("step", 0))
        if kind == "stepped":
            if step > self.step:  # several that go on together may go back behind the last checkpoint of one
                self.step, self.steps, self.tokens = step, int(record["steps"]), self.tokens + int(record["tokens"])
            data = {name: value for name, value in record.items() if name in _MEASURED} | dict(record["extra"])
            self.newest = {"step": step, "loss": record["loss"], **_accuracy(record, "token_accuracy")}
            text = f"step {step:,} of {self.steps:,}: {measure_text(record['loss'], record['extra'])}"
            self.events.append(JobEvent("info", "metrics", text, data))
        elif kind == "evaluated":
            self.newest |= {"validation_loss": record["loss"], **_accuracy(record, "validation_token_accuracy")}
            if step not in self.scored:
                self.scored.add(step)
                data = {"step": step, "validation_loss": record["loss"], "best": record["best"], **record["extra"]}
                text = f"after step {step:,}: validation {measure_text(record['loss'], record['extra'])}"
                self.events.append(JobEvent("info", "validation", text, data))
        elif kind == "sampled":
            if step not in self.sampled:
                self.sampled.add(step)
                data = {"step": step, "file": record["path"], "seconds": record["seconds"]}
                self.events.append(JobEvent("info", "sample", f"after step {step:,}: sample pictures", data))
        elif kind == "saved":
            self.checkpoints.append(JobCheckpoint(step, dict(self.newest)))

    def _publish(self, folder: Path) -> None:
        """The checkpoints in a run's folder that have their adapters beside them, into the library, so that they can be
        asked while the run goes on. A library that is away is asked again at the next one."""
        if not dict(self.lease.job.config.get("checkpoint") or {}).get("adapters"):
            return
        from veneer.jobs.checkpoints import publish_steps  # late: a worker needs no torch

        try:
            found = publish_steps(self.store.library, self.lease.job, folder)
        except Exception as error:
            if not is_outage(error):
                raise
            print(f"checkpoints are published later: {type(error).__name__}", file=sys.stderr, flush=True)
            return
        for step, reference in found.items():
            if step not in self.published:
                self.published.add(step)
                self.checkpoints.append(JobCheckpoint(step, reference=reference))
                text = f"step {step:,} can be asked: {reference}"
                self.events.append(JobEvent("info", "checkpoint", text, {"step": step, "reference": reference}))

    def flush(self, *, wait: bool = False) -> None:
        """Writes what there is. `wait`: until the database has it. Raises LeaseLost then, and if it was told before."""
        while not self.lost:
            self.last = time.monotonic()
            try:
                trained = (self.step, self.steps, self.tokens)
                self.store.note(self.lease, self.events, self.checkpoints, trained=trained)
                self.events, self.checkpoints = [], []
                return
            except LeaseLost as error:
                print(error, file=sys.stderr, flush=True)
                self.lost = True
            except Exception as error:
                if not is_outage(error):
                    raise
                print(f"the database is away: {type(error).__name__}", file=sys.stderr, flush=True)
                if not wait:
                    return
                time.sleep(_AGAIN)
        if wait:
            raise LeaseLost(f"job {self.lease.job.id} is no longer this process's")
        self.stop()


_MEASURED = {
    "step", "steps", "epoch", "loss", "tokens", "learning_rate", "gradient_norm", "seconds", "memory_bytes",
    "tokens_per_second",
}  # fmt: skip


def _accuracy(record: Mapping[str, Any], name: str) -> dict[str, float]:
    return {name: record["extra"][TOKEN_ACCURACY]} if TOKEN_ACCURACY in record["extra"] else {}


def _last_progress(checkpoints: Path, teller: _Teller) -> dict[str, Any] | None:
    """How far the newest whole checkpoint is. A damaged one is put aside, so that the run takes the one before it."""
    while (newest := checkpoint.latest(checkpoints)) is not None:
        try:
            return dict(checkpoint.read_checkpoint(newest)["progress"])
        except CheckpointError as error:
            teller.events.append(JobEvent("warn", "note", f"{newest.name} is put aside: {error.what}"))
            os.rename(newest, newest.with_name(f"aside-{secrets.token_hex(4)}-{newest.name}"))
    return None


def tied(end: Callable[[], object]) -> None:
    """Has `end` called, in a thread, when standard input ends, that is with whoever has its other end. Read by its
    number: a stream has a lock, which Python wants at its own end."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        end()

    threading.Thread(target=wait, name="veneer-tied", daemon=True).start()


def main(arguments: list[str]) -> int:
    forbid_inspection()
    (path,) = [word for word in arguments if word != "--tied"]
    if "--tied" in arguments:
        tied(lambda: os._exit(75))
    try:
        tokens, validation = taken_over(Path(path))
        with open_library() as library:
            if validation is not None:
                ((job, token),) = tokens.items()
                return _validate_job(library, job, token, Device(**validation["device"]), validation["room"])
            return carry_out_jobs(library, tokens)
    except VeneerError as error:  # a library or a database that is away
        print(error, file=sys.stderr)
        return 75


def environment_of(library: Library, tenants: str | None = None) -> Mapping[str, str]:
    """What a process needs to find the same queue, the same files and, by its place, the same tenants' database."""
    from veneer.models.home import veneer_home

    return {
        "VENEER_LIBRARY": library.location,
        "VENEER_LIBRARY_INDEX": library.engine.url.render_as_string(hide_password=False),
        "VENEER_HOME": str(veneer_home()),
    } | ({"VENEER_TENANTS": tenants} if tenants is not None else {})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
