"""A job's process: train, report to the queue, publish the adapter, end the job.

    veneer_job=… python -m veneer.jobs.process
    python -m veneer.jobs.process JOB ATTEMPT           in a pod: claims the lease in the database

The parent process (`executors`) holds and renews the lease; this process writes with the lease's token.
`veneer_job`: see `executors.JOB_VARIABLE`. This process ends as soon as its standard input closes, which
happens when the parent process ends. In a pod, this process instead ends when the pod is deleted, or when the
lease is lost.

Each lease has its own folder, `attempt-N`. At the start, this process renames the previous lease's folder,
including its checkpoints. If the previous process was wrongly considered dead, it can therefore not write to
this process's folder. The run resumes from the last checkpoint; on the CPU, the result is bit-identical to that
of an uninterrupted run.

| what ends the process                             | the job                                               |
| the run is done                                   | succeeded; its adapter is a version in the library    |
| an error in the user's input, a non-finite loss   | failed, with the error                                |
| SIGTERM, or the lease is lost                     | returned to the queue, if the lease is still valid    |
| a memory, disk or database error                  | returned to the queue; failed the third time in a row |
| a kill                                            | returned to the queue by the worker, or on expiry     |
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import CheckpointError, Interrupted, VeneerError
from veneer.files.rights import forbid_inspection
from veneer.jobs.account import TrainingAccount
from veneer.jobs.canary import compare_job, release_job
from veneer.jobs.executors import JOB_VARIABLE
from veneer.jobs.store import Job, JobCheckpoint, JobEvent, JobLease, JobStore, LeaseLost
from veneer.jobs.validate import after_section, error_json, is_retryable, job_config, validate_job
from veneer.library.library import Library, open_library
from veneer.plan.tables import Device
from veneer.serve.tenancy.store import tenants_at
from veneer.serve.transient import is_transient
from veneer.train import checkpoint
from veneer.train.config.image import ImageTrainConfig
from veneer.train.events import TOKEN_ACCURACY, Checked, Event, Note, Saved, measure_text, to_record
from veneer.train.report.log import read_log

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

_FLUSH_SECONDS = 1.0
"""Minimum seconds between two writes of events to the database."""
_RETRY_SECONDS = 2.0
"""Seconds before a retry while the database is unavailable."""


def run_job(library: Library, job: str, token: str, device: Device | None = None) -> int:
    """Train the job that is leased under `token`, and record how it ended.

    With `device`, validates the job for this device instead. Returns 0, or 75 if the job returned to the
    queue."""
    store = JobStore(library)
    try:
        lease = store.get_lease(job, token)
        if device is None:
            return _train_and_publish(_JobReporter(store, lease))
        with tenants_at(os.environ.get("VENEER_TENANTS")) as tenants:
            validate_job(store, lease, TrainingAccount(store, tenants), device)
        return 0
    except LeaseLost as error:
        print(error, file=sys.stderr)
    except Exception as error:
        if not is_retryable(error):
            raise
        print(f"{job} will continue later: {type(error).__name__}: {error}", file=sys.stderr)
    return 75


def _train_and_publish(reporter: _JobReporter) -> int:
    store, lease = reporter.store, reporter.lease
    try:
        result, base = _train(reporter)
        reporter.flush(wait=True)
        store.finish(lease, result={**result, "reference": _publish(store, lease, result, base)})
        return 0
    except LeaseLost:
        raise
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        return _record_failure(reporter, error)


def _publish(store: JobStore, lease: JobLease, result: Mapping[str, Any], base: TextBase | None) -> str:
    """Compare the adapter, add it to the library and move the job's route.

    Returns the adapter's reference."""
    library, job = store.library, lease.job
    with tenants_at(os.environ.get("VENEER_TENANTS")) as tenants:
        compared = compare_job(store, lease, tenants, result, base)
        reference = _add_adapter(library, job, result)
        release_job(store, lease, tenants, reference, compared)
    if job.about.get("publish") == "checkpoints":
        from veneer.jobs.checkpoints import publish_checkpoints  # imported here, because a worker does not need torch

        warnings: list[str] = []
        points = publish_checkpoints(library, job.name, _folder(job), Path(result["adapter"]), warnings.append)
        events = [JobEvent("warn", "note", text) for text in warnings]
        store.record(lease, events, [JobCheckpoint(step, reference=at) for step, at in points.items()])
    return reference


def _record_failure(reporter: _JobReporter, error: BaseException) -> int:
    """Record the error that ended a run; return the exit code of `run_job`."""
    store, lease = reporter.store, reporter.lease
    with contextlib.suppress(LeaseLost):
        reporter.flush(wait=True)
        if isinstance(error, Interrupted | KeyboardInterrupt):
            store.release(lease, "stopped; will resume from the last checkpoint")
        elif is_retryable(error):
            message = error.what if isinstance(error, VeneerError) else f"{type(error).__name__}: {error}"
            store.died(lease, message, fix=getattr(error, "fix", None) or "")
        else:
            store.finish(lease, error=error_json(error))
            return 0
    return 75


def _train(reporter: _JobReporter) -> tuple[dict[str, Any], TextBase | None]:
    """Train in the job's folder; return (result as JSON values, base or None).

    The base is returned only if the comparison needs it."""
    from veneer.models.loading import errors_only

    job = reporter.lease.job
    folder = _folder(job)
    reporter.catch_up(folder)
    config = job_config(job, folder)
    # A job can continue on any worker. On another kind of machine, an event reports that the last bits differ.
    options: dict[str, Any] = {"resume": folder.is_dir(), "allow_other_machine": True, "on_event": reporter}
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

            after = after_section(job)
            if after is not None and after.evaluate is not None:  # the evaluation uses the run's base
                base = load_text(**config.base.model_dump(exclude={"compute"}))
            result = run_text(config, base=base, **options, sampler=live_sampler)
    return dict(result.to_dict()), base


def _folder(job: Job) -> Path:
    """Return this lease's folder.

    If there is a folder of a previous lease, renames it."""
    job.make_folder()
    folder = job.folder / f"attempt-{job.attempt}"
    earlier = [(int(p.name.rpartition("-")[2]), p) for p in job.folder.glob("attempt-*[0-9]")]
    if earlier and not folder.exists():
        os.rename(max(earlier)[1], folder)
    return folder


def _add_adapter(library: Library, job: Job, result: Mapping[str, Any]) -> str:
    """Add the adapter to the library, and return its reference.

    If an earlier, killed process already added the adapter, returns that version's reference. If checkpoints
    are published too, the adapter's version number is the number of the last step plus 1."""
    tag = f"job:{job.id}"
    if there := library.search(tags=[tag], all_versions=True):
        return there[0].reference
    number = int(result["steps"]) + 1 if job.about.get("publish") == "checkpoints" else None
    added = library.add(result["adapter"], job.name, tags=[tag], source=f"job {job.id}", number=number)
    return added.version.reference


class _JobReporter:
    """Reports a run's events to the queue: checkpoints at once, others every second.

    Events are buffered while the database is unavailable. If the lease is lost, the reporter sends SIGTERM to
    its own process, so that the run saves its state and ends."""

    def __init__(self, store: JobStore, lease: JobLease) -> None:
        self.store, self.lease = store, lease
        self.events: list[JobEvent] = []
        self.checkpoints: list[JobCheckpoint] = []
        self.newest: dict[str, Any] = {}
        self.step, self.steps, self.tokens = 0, lease.job.steps, 0
        self.last, self.lost = 0.0, False
        earlier = store.events_of(None, lease.job.id, "validation", "sample", "checkpoint")
        self.reported = {(event.kind, event.data["step"]) for event in earlier}

    def catch_up(self, folder: Path) -> None:
        """Report events that a killed process logged but did not report.

        Reports the log's events up to the last checkpoint. The step number and the token count come from the
        checkpoint, in case the log is incomplete."""
        progress = _last_progress(folder / "checkpoints", self)
        if progress is None:
            return
        for record in read_log(folder / "log.jsonl"):
            if int(record.get("step", 0)) <= progress["step"]:
                self._add_record(record)
        self.checkpoints.append(JobCheckpoint(progress["step"], dict(self.newest)))
        self._publish(folder)
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.flush()

    def _add_once(self, kind: str, step: int, text: str, data: Mapping[str, Any]) -> bool:
        """Add an event unless an earlier process reported it; return whether it is new."""
        if (kind, step) in self.reported:
            return False
        self.reported.add((kind, step))
        self.events.append(JobEvent("info", kind, text, {"step": step, **data}))
        return True

    def __call__(self, event: Event) -> None:
        self._add_record(to_record(event))
        if isinstance(event, Checked):
            self.events.append(JobEvent("info", "preflight", event.text, event.data))
        elif isinstance(event, Note):
            level = "warn" if event.text.startswith("warning:") else "info"
            self.events.append(JobEvent(level, "note", event.text))
        elif isinstance(event, Saved):
            self._publish(Path(event.path).parents[1])
        if isinstance(event, Saved) or time.monotonic() - self.last > _FLUSH_SECONDS:
            self.flush()

    def _add_record(self, record: Mapping[str, Any]) -> None:
        """Add the event and the progress from one record of the run's log to the buffers."""
        kind, step = record.get("event"), int(record.get("step", 0))
        if kind == "stepped":
            if step > self.step:
                self.step, self.steps, self.tokens = step, int(record["steps"]), self.tokens + int(record["tokens"])
            data = {name: value for name, value in record.items() if name not in _UNREPORTED} | record["extra"]
            self.newest = {"step": step, "loss": record["loss"], **_accuracy(record, "token_accuracy")}
            text = f"step {step:,} of {self.steps:,}: {measure_text(record['loss'], record['extra'])}"
            self.events.append(JobEvent("info", "metrics", text, data))
        elif kind == "evaluated":
            self.newest |= {"validation_loss": record["loss"], **_accuracy(record, "validation_token_accuracy")}
            data = {"validation_loss": record["loss"], "best": record["best"], **record["extra"]}
            text = f"after step {step:,}: validation {measure_text(record['loss'], record['extra'])}"
            self._add_once("validation", step, text, data)
        elif kind == "sampled":
            data = {"file": record["path"], "seconds": record["seconds"]}
            self._add_once("sample", step, f"after step {step:,}: sample pictures", data)
        elif kind == "saved":
            self.checkpoints.append(JobCheckpoint(step, dict(self.newest)))

    def _publish(self, folder: Path) -> None:
        """During training, add checkpoints that have an adapter folder to the library.

        If the library is unavailable, the next checkpoint triggers another attempt."""
        if not dict(self.lease.job.config.get("checkpoint") or {}).get("adapters"):
            return
        from veneer.jobs.checkpoints import publish_steps  # imported here, because a worker does not need torch

        try:
            references = publish_steps(self.store.library, self.lease.job, folder)
        except Exception as error:
            if not is_transient(error):
                raise
            print(f"checkpoints will be published later: {type(error).__name__}", file=sys.stderr, flush=True)
            return
        for step, reference in references.items():
            text = f"step {step:,} is published: {reference}"
            if self._add_once("checkpoint", step, text, {"reference": reference}):
                self.checkpoints.append(JobCheckpoint(step, reference=reference))

    def flush(self, *, wait: bool = False) -> None:
        """Write the buffered events and progress to the database.

        wait: retry until the database accepts them.

        If the lease is lost, raises LeaseLost if `wait` is set, else sends SIGTERM to this process."""
        while not self.lost:
            self.last = time.monotonic()
            try:
                trained = (self.step, self.steps, self.tokens)
                self.store.record(self.lease, self.events, self.checkpoints, trained=trained)
                self.events, self.checkpoints = [], []
                return
            except LeaseLost as error:
                print(error, file=sys.stderr, flush=True)
                self.lost = True
            except Exception as error:
                if not is_transient(error):
                    raise
                print(f"the database is unavailable: {type(error).__name__}", file=sys.stderr, flush=True)
                if not wait:
                    return
                time.sleep(_RETRY_SECONDS)
        if wait:
            raise LeaseLost(f"job {self.lease.job.id} is no longer this process's")
        os.kill(os.getpid(), signal.SIGTERM)


_UNREPORTED = {"event", "extra", "learned_tokens"}
"""Keys of a step's record that are not reported under their own names."""


def _accuracy(record: Mapping[str, Any], name: str) -> dict[str, float]:
    return {name: record["extra"][TOKEN_ACCURACY]} if TOKEN_ACCURACY in record["extra"] else {}


def _last_progress(checkpoints: Path, reporter: _JobReporter) -> dict[str, Any] | None:
    """Return the progress of the newest valid checkpoint; None if there is none.

    Renames damaged checkpoints, so that the run resumes from an earlier one."""
    while (newest := checkpoint.latest(checkpoints)) is not None:
        try:
            return dict(checkpoint.read_checkpoint(newest)["progress"])
        except CheckpointError as error:
            reporter.events.append(JobEvent("warn", "note", f"{newest.name} is damaged and was renamed: {error.what}"))
            os.rename(newest, newest.with_name(f"aside-{secrets.token_hex(4)}-{newest.name}"))
    return None


def end_with_input(end: Callable[[], object]) -> None:
    """Call `end` in a thread when standard input closes.

    Standard input closes when the process at its other end exits. The thread reads the file descriptor
    directly, because a blocked stream would hold a lock that Python needs at exit."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        end()

    threading.Thread(target=wait, name="veneer-tied", daemon=True).start()


def main() -> int:
    forbid_inspection()
    job, token, device = sys.argv[1] if len(sys.argv) == 3 else "", "", None
    if not job:
        end_with_input(lambda: os._exit(75))
        job, token, device = json.loads(os.environ.pop(JOB_VARIABLE)).values()
    try:
        with open_library() as library:
            token = token or JobStore(library).claim(job, int(sys.argv[2])).token
            return run_job(library, job, token, device and Device(**device))
    except VeneerError as error:  # for example, the library or the database is unavailable
        print(error, file=sys.stderr)
        return 75


def process_environment(library: Library, tenants: str | None = None) -> Mapping[str, str]:
    """Return a job process's environment variables: library, home and tenants."""
    from veneer.models.home import veneer_home

    return {
        "VENEER_LIBRARY": library.location,
        "VENEER_LIBRARY_INDEX": library.engine.url.render_as_string(hide_password=False),
        "VENEER_HOME": str(veneer_home()),
    } | ({"VENEER_TENANTS": tenants} if tenants is not None else {})


if __name__ == "__main__":
    raise SystemExit(main())
