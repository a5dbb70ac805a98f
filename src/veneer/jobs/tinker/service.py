"""The Tinker service: sessions, training clients, execution of requests.

    service = TinkerService(base, library, folder)
    session = service.create_session("acme")
    run = service.create_run("acme", session.id, 0, Lora(8), {})
    future = service.submit(run, 1, "forward", body)        requests are executed in the order of their numbers

A client numbers its requests, and one thread executes each request once, in the order of the numbers. Each pass
through the base takes pending rows of all clients, in one batch if possible; the tenant that has been served
least comes first. Other requests (an optimizer step, saving, loading) are executed between passes.

Sessions, clients and pending requests end with this process. A client's saved checkpoints stay on disk
(checkpoints.py), together with a description of the run, so that another client can continue from them. If
memory is short, the state of the least recently used idle client is moved to disk.

This module uses a base, a library and folders; other modules handle HTTP and billing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from veneer.core.adapter import Adapter
from veneer.errors import ConfigError, ResourceError, VeneerError
from veneer.files.atomic import atomic_write
from veneer.files.locks import take_lock
from veneer.jobs.tinker.checkpoints import Checkpoints, SavedWeights, parse_path
from veneer.jobs.tinker.trainer import Adam, Learner, Lora, PassWork, Trainer, check_rows, state_bytes, target_names
from veneer.jobs.tinker.wire import forward_bytes, read_forward
from veneer.library.library import Library
from veneer.models.text.base import TextBase
from veneer.ops.cpu.memory import trim_heap
from veneer.serve.http.bodies import checked
from veneer.serve.quota import QuotaHold, Quotas
from veneer.serve.request import Refused
from veneer.train.text.save import write_adapter

_log = logging.getLogger("veneer.tinker")

_SNAPSHOTS = 16
"""Maximum number of sets of unnamed sampler weights per run; the oldest are removed."""
_SWEEP_SECONDS, _ENDED_SECONDS = 3600.0, 3600.0
"""Seconds between sweeps; seconds for which an ended session can still be queried."""
_GAP_SECONDS, _MAX_AHEAD = 400.0, 10_000
"""Seconds to wait for a missing earlier request; limit on how far ahead requests can be numbered.

The limit is counted from the last executed request."""
_LARGE_BYTES = 1 << 20
"""After a request whose body is larger than this, free heap memory is returned to the system."""
_OBJECT_BYTES = 2000
"""Memory charged per session, run or sampler, in bytes; a run's metadata is added."""
_CONTINUE = "create_training_client_from_state continues from a saved checkpoint"


class _WeightsBody(BaseModel):
    """A request to save or load weights; other keys are ignored."""

    model_config = ConfigDict(strict=True)
    path: str | None = None
    kind: str | None = None
    ttl_seconds: int | None = Field(default=None, ge=3600, le=10 * 366 * 86400)
    overwrite: bool | None = None
    optimizer: bool | None = None
    user_metadata: dict[str, Any] | None = None
    sampling_session_seq_id: int | None = Field(default=None, ge=0, lt=10**9)


def not_found(what: str, where: str, fix: str | None = None) -> Refused:
    """Return a 404 error: the tenant has no such session, run or sampler."""
    return Refused(what, status=404, code="not_found", param=where, where=where, fix=fix)


def ended(what: str, where: str, fix: str | None = None) -> Refused:
    """Return a 410 error: the session or run has ended."""
    return Refused(what, status=410, code="gone", param=where, where=where, fix=fix)


@dataclass(frozen=True)
class FutureResult:
    """The result of a request.

    kind: the format of `data`; for `failed`, `data` is JSON with the error."""

    kind: Literal["proto", "json", "failed"]
    data: bytes


@dataclass(eq=False)
class Session:
    """Everything that one ServiceClient of a tenant created.

    used: time of the last use, in seconds since 1970
    ended: time at which the client ended the session, or None
    base_name: the path or hub id that the client last used for the base; "" if none
    hold: quota held for the session and its samplers"""

    id: str
    tenant: str
    hold: QuotaHold
    used: float = field(default_factory=time.time)
    ended: float | None = None
    base_name: str = ""

    def use(self) -> None:
        """Record a use of the session. Raises Refused (410)."""
        if self.ended is not None:
            raise ended(f"the session {self.id} has ended", "session_id", "make a new ServiceClient")
        self.used = time.time()


@dataclass(frozen=True)
class SamplerSource:
    """The weights of a sampling session.

    The weights are a library version (`reference`), unnamed weights of the run `name` (`digest` and `folder`),
    or, if these fields are empty, the base."""

    id: str
    tenant: str
    path: str | None = None
    reference: str = ""
    digest: str = ""
    folder: str = ""
    name: str = ""


@dataclass(frozen=True, eq=False)
class _Request:
    kind: str
    body: bytes
    result: Future[FutureResult] = field(default_factory=Future)


@dataclass(eq=False)
class TrainingRun:
    """A training client on the server; after its session, only its checkpoints remain.

    used: time of the client's last request, in seconds since 1970
    lock: lets the server's event loop accept one request at a time
    applied: number of the last executed request; request 0 creates the client
    created: the result of request 0
    turn: time of the state's last use; 0: never used, so it is the first to be moved to disk
    hold: quota held for the client's memory, state and checkpoints"""

    id: str
    session: str
    tenant: str
    lora: Lora
    checkpoints: Checkpoints
    metadata: dict[str, Any] | None
    base_name: str
    hold: QuotaHold
    weight: float = 1.0
    used: float = field(default_factory=time.time)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    pending: dict[int, _Request] = field(default_factory=dict)
    applied: int = -1
    created: Future[FutureResult] = field(default_factory=Future)
    turn: float = 0.0
    learner: Learner | None = None
    work: PassWork | None = None

    @property
    def next(self) -> _Request | None:
        """Return the next request to execute, or None if that request has not arrived."""
        return self.pending.get(self.applied + 1)


class TinkerService:
    """A server's Tinker sessions, runs and samplers. Call `close` at the end.

    folder: a folder that only this service uses
    max_memory: bytes of memory for the states of training clients
    days: days after which unused sessions are removed
    quotas: limits per tenant; existing checkpoints count from the start"""

    def __init__(
        self,
        base: TextBase,
        library: Library,
        folder: Path,
        *,
        max_memory: int = 4 << 30,
        days: float = 30.0,
        quotas: Quotas | None = None,
    ) -> None:
        self.base, self.library, self.folder, self.max_memory, self.days = base, library, folder, max_memory, days
        self.quotas = quotas or Quotas()
        self._lock = _lock_folder(folder)
        self.names = target_names(base.model)
        self.sessions: dict[str, Session] = {}
        self.samplers: dict[str, SamplerSource] = {}
        self.runs: dict[str, TrainingRun] = {}
        self._live = folder / "live"
        try:
            self._read_runs()
        except BaseException:
            os.close(self._lock)
            raise
        self._served: Counter[str] = Counter()
        """Tenant -> number of trained tokens / the tenant's weight, since the service was last idle."""
        self._changed = threading.Condition()
        self._closed = False
        self._pause = min(_SWEEP_SECONDS, days * 86400.0 / 24)
        self._next_sweep = 0.0
        self._trainer: Trainer | None = None
        self._thread = threading.Thread(target=copy_context().run, args=(self._loop,), name="tinker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the training thread after the current pass, and release all quota."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for hold in [each.hold for each in self.sessions.values()] + [each.hold for each in self.runs.values()]:
            hold.release()
        shutil.rmtree(self._live, ignore_errors=True)
        os.close(self._lock)

    def _read_runs(self) -> None:
        """Read the runs that have checkpoints; remove other files of earlier processes."""
        shutil.rmtree(self._live, ignore_errors=True)
        for folder in self.folder.glob("*/train-*"):
            try:
                self._read_run(folder)
            except Exception:  # continue with the other runs
                _log.exception("the run in %s is not available: its files cannot be read", folder)
        for path in self.folder.glob("*/session.json"):
            if not any(path.parent.glob("train-*")):
                shutil.rmtree(path.parent)

    def _read_run(self, folder: Path) -> None:
        """Read a run from its folder, or remove the folder if the run has no checkpoints."""
        session = folder.parent.name
        tenant = json.loads((folder.parent / "session.json").read_text(encoding="utf-8"))["tenant"]
        checkpoints = self._checkpoints(tenant, session, folder.name.removeprefix("train-"))
        checkpoints.sweep()
        if checkpoints.empty or not (folder / "run.json").is_file():
            shutil.rmtree(folder)
            return
        data = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lora, hold, base_name = Lora(**data["lora"]), self.quotas.take(tenant), data.get("base_name", "")
        run = TrainingRun(checkpoints.run, session, tenant, lora, checkpoints, data["metadata"], base_name, hold)
        run.used = (folder / "run.json").stat().st_mtime
        self._update_quota(run)
        self.runs[run.id] = run

    def _checkpoints(self, tenant: str, session: str, number: str) -> Checkpoints:
        name = f"{tenant}/tinker-{session}-{number}" if tenant else f"tinker-{session}-{number}"
        folder = self.folder / session / f"train-{number}" / "checkpoints"
        return Checkpoints(f"{session}:train:{number}", folder, name, self.library)

    # -- sessions, runs and samplers -----------------------------------------------------------------------------------

    def create_session(self, tenant: str) -> Session:
        """Create a session. Raises Refused if a quota is exceeded."""
        session = Session(f"s{secrets.token_hex(6)}", tenant, self.quotas.take(tenant, memory=_OBJECT_BYTES))
        with self._changed:
            self.sessions[session.id] = session
        return session

    def _object_bytes(self, metadata: dict[str, Any] | None) -> int:
        """Return the memory to charge for a run or checkpoint with this metadata.

        Raises Refused (413) if the metadata is too large."""
        size, limit = len(json.dumps(metadata)) if metadata else 0, self.quotas.limits.metadata
        if size > limit:
            message, fix = f"user_metadata is over {limit:,} bytes of JSON (metadata)", "send less metadata"
            raise Refused(message, status=413, code="too_large", param="user_metadata", fix=fix)
        return _OBJECT_BYTES + size

    def session(self, tenant: str, id: str) -> Session:
        """Return a session. Raises Refused (404)."""
        if (session := self.sessions.get(id)) is None or session.tenant != tenant:
            fix = "make a new ServiceClient; a router in front of several servers must send a client to one of them"
            raise not_found(f"this server has no session {id[:60]!r}", "session_id", fix)
        return session

    def create_run(
        self,
        tenant: str,
        session_id: str,
        number: int,
        start: Lora | str,
        metadata: dict[str, Any] | None = None,
        *,
        weight: float = 1.0,
        optimizer: bool = False,
    ) -> TrainingRun:
        """Create a run, or return the session's existing run with this number.

        `start`: a new adapter's configuration, or the path of a checkpoint to continue from. `optimizer`:
        whether to continue from the checkpoint's optimizer state too. Raises ConfigError if the base lacks the
        modules or the path is invalid, and Refused: 404, 410, or over a quota."""
        lora = start if isinstance(start, Lora) else self.saved_state(tenant, start)[1].lora
        size = self._state_bytes(lora)
        with self._changed:
            session = self.session(tenant, session_id)
            session.use()
            checkpoints = self._checkpoints(tenant, session.id, str(number))
            if (existing := self.runs.get(checkpoints.run)) is not None:
                if existing.lora != lora:
                    message = f"the session already has a different model with number {number}"
                    raise ConfigError(message, where="model_seq_id")
                return existing
            hold = self.quotas.take(tenant, files=1, disk=size, memory=self._object_bytes(metadata))
            id, base_name = checkpoints.run, session.base_name
            run = TrainingRun(id, session.id, tenant, lora, checkpoints, metadata, base_name, hold, weight)
            self.runs[id] = run
            kind = "create_model" if isinstance(start, Lora) else "load_weights"
            body = {} if isinstance(start, Lora) else {"path": start, "optimizer": optimizer}
            run.created = self.submit(run, 0, kind, json.dumps(body).encode())
        return run

    def run(self, tenant: str, id: str) -> TrainingRun:
        """Return a run. A run that has checkpoints stays after its session has ended.

        Raises Refused (404)."""
        run = self.runs.get(id)
        if run is None or run.tenant != tenant:
            message = f"there is no training run {id[:80]!r}"
            raise not_found(message, "model_id", f"a restart of the server ends training clients; {_CONTINUE}")
        return run

    def runs_of(self, tenant: str) -> list[TrainingRun]:
        """Return a tenant's runs, newest first."""
        with self._changed:
            runs = [run for run in self.runs.values() if run.tenant == tenant]
        return sorted(runs, key=lambda run: run.used, reverse=True)

    def check_open(self, run: TrainingRun) -> None:
        """Record a use of a run's session. Raises Refused (410) if the session has ended."""
        session = self.sessions.get(run.session)
        if session is None:
            message = f"the training client {run.id} has ended with its session or by a restart of the server"
            raise ended(message, "model_id", _CONTINUE)
        session.use()
        run.used = time.time()

    def is_new(self, run: TrainingRun, seq: int) -> bool:
        """Return whether a request has not been accepted yet. Raises Refused (410), ConfigError."""
        self.check_open(run)
        if not 1 <= seq <= run.applied + _MAX_AHEAD:
            fix = "numbers start at 1 and increase by 1 with each request"
            raise ConfigError(f"seq_id is {seq}", where="seq_id", fix=fix)
        return seq > run.applied and seq not in run.pending

    def submit(self, run: TrainingRun, seq: int, kind: str, body: bytes) -> Future[FutureResult]:
        """Accept a new request, which is executed after all requests with lower numbers.

        A request of kind `refused` fails with the error in its body, but leaves no gap in the numbers. Raises
        Refused (410)."""
        with self._changed:
            if self._closed:
                raise ended("the server stops", "model_id", _CONTINUE)
            self.check_open(run)
            request = run.pending[seq] = _Request(kind, body)
            self._changed.notify_all()
        return request.result

    def create_sampler(self, tenant: str, session: str, number: int, path: str | None) -> SamplerSource:
        """Create a sampling session. Raises Refused (404, 410), and ConfigError for an unknown path."""
        owner = self.session(tenant, session)
        owner.use()
        reference = "" if path is None else self.saved(tenant, path).reference
        return self._add_sampler(owner, SamplerSource(f"{owner.id}:sample:{number}", tenant, path, reference))

    def _add_sampler(self, session: Session, sampler: SamplerSource) -> SamplerSource:
        with self._changed:
            if sampler.id not in self.samplers:
                session.hold.add(memory=_OBJECT_BYTES)
            self.samplers[sampler.id] = sampler
        return sampler

    def sampler(self, tenant: str, id: str) -> SamplerSource:
        """Return a sampling session. Raises Refused (404, 410)."""
        sampler = self.samplers.get(id)
        if sampler is None or sampler.tenant != tenant:
            raise not_found(f"there is no sampling session {id[:80]!r}", "sampling_session_id")
        self.session(tenant, id.partition(":")[0]).use()
        return sampler

    def saved(self, tenant: str, path: str) -> SavedWeights:
        """Return the checkpoint of a tinker:// path. Raises Refused (404), ConfigError."""
        return self.checkpoint(tenant, *parse_path(path))

    def checkpoint(self, tenant: str, run: str, id: str) -> SavedWeights:
        """Return a run's checkpoint. Raises Refused (404).

        id: kind and name, as in `SavedWeights`"""
        saved = self.run(tenant, run).checkpoints.find(id)
        if saved is None:
            raise not_found(f"{run} has no checkpoint {id[:200]!r}", "path", "the checkpoint may have expired")
        return saved

    def saved_state(self, tenant: str, path: str) -> tuple[SavedWeights, TrainingRun]:
        """Return a checkpoint that has a training state, and the checkpoint's run.

        Raises Refused (404), ConfigError."""
        saved = self.saved(tenant, path)
        if not saved.id.startswith("weights/"):
            message = f"{path[:200]} has weights for sampling, but no training state"
            fix = "use a path that save_state returned: tinker://RUN/weights/NAME"
            raise ConfigError(message, where="path", fix=fix)
        return saved, self.run(tenant, saved.run)

    def remove(self, tenant: str, run_id: str, id: str) -> None:
        """Remove a run's checkpoint. Raises Refused (404)."""
        run = self.run(tenant, run_id)
        run.checkpoints.remove(self.checkpoint(tenant, run_id, id))
        self._update_quota(run)

    # -- training thread -----------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._closed:
            ready: list[TrainingRun] = []
            try:
                self._sweep()
                with self._changed:
                    if not self._closed and not self._ready():
                        self._served.clear()
                        self._changed.wait(min(30.0, self._pause))
                    ready = [] if self._closed else self._ready()
                self._round(ready)
                self._fail_gaps()
            except Exception as error:  # a bug: the waiting clients get the error, and the thread continues
                _log.exception("a round of training failed")
                for run in ready:
                    self._fail(run, error)
        for run in list(self.runs.values()):
            self._fail_pending(run, ConfigError("the server stops", fix=_CONTINUE))
        if self._trainer is not None:
            self._trainer.close()

    def _ready(self) -> list[TrainingRun]:
        """Return the runs with pending requests; runs of the least served tenant come first."""
        ready = [run for run in list(self.runs.values()) if run.next is not None]
        return sorted(ready, key=lambda run: (self._served[run.tenant], run.turn))

    def _round(self, ready: list[TrainingRun]) -> None:
        """Execute requests that need no pass, then run one pass over pending rows.

        If a run's state does not fit in memory, the run waits, and so do all later runs that need memory."""
        training, waiting = [], False
        for run in ready:
            try:
                if self._needs_memory(run) and (waiting or not self._has_memory(run)):
                    waiting = True
                elif run.work is not None or self._begin(run):
                    training.append(run)
            except Exception as error:
                self._fail(run, error)
        if training:
            self._pass(training)

    def _needs_memory(self, run: TrainingRun) -> bool:
        """Return whether a run's next request starts passes or loads the state into memory."""
        if run.work is not None or run.next is None or run.next.kind in ("create_model", "refused"):
            return False
        return run.next.kind == "forward" or run.learner is None

    def _has_memory(self, run: TrainingRun) -> bool:
        """Return whether a run's state fits in memory next to the states of unfinished passes."""
        used = [each.learner.bytes for each in list(self.runs.values()) if each.work is not None and each.learner]
        if not used:
            return True
        size = self._state_bytes(run.lora) if run.learner is None else run.learner.bytes
        return sum(used) + size <= self.max_memory

    def _begin(self, run: TrainingRun) -> bool:
        """Execute a run's next request, or prepare the passes of a forward request.

        Returns whether the run now needs passes."""
        request = run.next
        assert request is not None
        if request.kind == "refused":
            raise ConfigError(request.body.decode())
        if request.kind != "forward":
            result = self._execute(run, request.kind, json.loads(request.body))
            self._finish(run, FutureResult("json", json.dumps(result | {"type": request.kind}).encode()))
            return False
        message, trainer = read_forward(request.body), self._ready_trainer()
        limits = {"vocabulary": trainer.vocabulary, "context": trainer.base.context}
        rows = check_rows(message.rows, message.loss, message.options, **limits)
        run.work = PassWork(self._learner(run), rows, message.loss, message.options, not message.forward_only)
        return True

    def _pass(self, runs: list[TrainingRun]) -> None:
        trainer = self._ready_trainer()
        works = {run: run.work for run in runs if run.work is not None}
        try:
            trainer.step([*works.values()])
        except Exception as error:
            if len(works) == 1:
                self._fail(runs[0], error)
                return
            for run, work in works.items():  # run each request separately, so that only faulty requests fail
                work.restart()
                try:
                    while not work.done:
                        trainer.step([work])
                    self._finish_work(run, work)
                except Exception as own_error:
                    self._fail(run, own_error)
            return
        for run, work in works.items():
            if work.done:
                self._finish_work(run, work)

    def _finish_work(self, run: TrainingRun, work: PassWork) -> None:
        least = min(self._served.values(), default=0)
        tokens = sum(len(row.targets) for row in work.rows)
        self._served[run.tenant] = max(self._served[run.tenant], least) + round(tokens / run.weight)
        data = forward_bytes([logps.numpy() for logps in work.logps], work.total)
        self._finish(run, FutureResult("proto", data))

    def _finish(self, run: TrainingRun, result: FutureResult) -> None:
        run.work = None
        with self._changed:
            run.applied += 1
            request = run.pending.pop(run.applied)
        if len(request.body) > _LARGE_BYTES:
            trim_heap()
        if not request.result.cancelled():
            request.result.set_result(result)

    def _fail(self, run: TrainingRun, error: Exception) -> None:
        """Fail a run's next request, and undo the request's effect on gradients."""
        if run.next is None:
            return
        if run.work is not None:
            run.work.restart()
        category = "user" if isinstance(error, VeneerError) and not isinstance(error, ResourceError) else "server"
        if isinstance(error, VeneerError):
            text = ": ".join(part for part in (error.where or "", error.what, error.fix or "") if part)
        else:
            _log.error("request %d of %s failed", run.applied + 1, run.id, exc_info=error)
            text = "internal error in this request; the server's log has the cause"
        self._finish(run, FutureResult("failed", json.dumps({"error": text, "category": category}).encode()))

    def _fail_gaps(self) -> None:
        """Fail requests that have waited too long for a missing earlier number."""
        for run in [run for run in list(self.runs.values()) if run.pending and run.next is None]:
            if time.time() - run.used > _GAP_SECONDS:
                message = f"request {run.applied + 1} of {run.id} never arrived"
                self._fail_pending(run, ConfigError(message, fix="send all later requests again"))

    def _fail_pending(self, run: TrainingRun, error: VeneerError) -> None:
        for seq in sorted(run.pending):
            run.applied = seq - 1
            self._fail(run, error)

    # -- requests without a pass ---------------------------------------------------------------------------------------

    def _execute(self, run: TrainingRun, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Execute a request that needs no pass, and return its result."""
        if kind == "create_model":
            return {"model_id": run.id}
        if kind == "optim_step":
            return {"metrics": self._optimize(run, body)}
        weights = checked(_WeightsBody, body, kind)
        if kind == "load_weights":
            return self._load(run, weights)
        if kind == "save_weights":
            return {"path": self._save(run, weights, "weights", weights.path or f"{run.applied + 1:06d}")}
        if weights.path is not None:
            return {"path": self._save(run, weights, "sampler_weights", weights.path)}
        return {"sampling_session_id": self._save_snapshot(run, weights)}

    def _optimize(self, run: TrainingRun, body: Mapping[str, Any]) -> dict[str, float]:
        learner = self._learner(run)
        try:
            if not isinstance(body.get("adam_params"), dict):
                message = "this server's only optimizer is AdamW"
                raise ConfigError(message, where="optimizer_params", fix="AdamParams(…)")
            return self._ready_trainer().optimize(learner, checked(Adam, body["adam_params"], "adam_params"))
        except VeneerError:
            learner.forget_gradients()  # the next step must not use the gradients of this failed step
            raise

    def _save(self, run: TrainingRun, body: _WeightsBody, kind: str, name: str) -> str:
        """Save a checkpoint and return its path; kind `weights` includes the training state."""
        with_state, id, seq = kind == "weights", f"{kind}/{name}", run.applied + 1
        run.checkpoints.check_name(id)
        existing = run.checkpoints.find(id)
        if existing is not None and not (with_state and body.overwrite):
            raise ConfigError(f"the checkpoint {existing.path} already exists", where="path", fix="another name")
        self._object_bytes(body.user_metadata)
        learner, size = self._learner(run), self._state_bytes(run.lora)
        with self._reserve_quota(run, files=1, disk=size // 4 + with_state * size):
            folder = run.checkpoints.folder.parent
            folder.mkdir(parents=True, exist_ok=True)
            # Later processes read the description of the run from these files.
            atomic_write(folder.parent / "session.json", [json.dumps({"tenant": run.tenant}).encode()])
            data = {"lora": asdict(run.lora), "metadata": run.metadata, "base_name": run.base_name}
            atomic_write(folder / "run.json", [json.dumps(data).encode()])
            if with_state:
                self._ready_trainer().write(learner, run.checkpoints.folder / id / "state", seq)
            ttl, metadata = body.ttl_seconds, body.user_metadata
            return run.checkpoints.save(id, seq, self._adapter(run), self.base, ttl, metadata).path

    def _save_snapshot(self, run: TrainingRun, body: _WeightsBody) -> str:
        """Save unnamed weights, and return the id of a sampling session for them."""
        if body.kind not in (None, "snapshot"):
            raise ConfigError("this server's sampling clients have fixed weights", where="kind", fix="kind='snapshot'")
        if body.sampling_session_seq_id is None:
            raise ConfigError("the request has neither path nor sampling_session_seq_id", where="path")
        snapshots = self._live_folder(run) / "snapshots"
        folder, id = snapshots / str(run.applied + 1), f"{run.session}:sample:{body.sampling_session_seq_id}"
        with self._reserve_quota(run, disk=self._state_bytes(run.lora) // 4):
            digest = write_adapter(self._adapter(run), folder, self.base)
            source = SamplerSource(id, run.tenant, digest=digest, folder=str(folder), name=run.checkpoints.name)
            self._add_sampler(self.session(run.tenant, run.session), source)
            for old in sorted(snapshots.iterdir(), key=lambda path: int(path.name))[:-_SNAPSHOTS]:
                shutil.rmtree(old)
        return id

    @contextmanager
    def _reserve_quota(self, run: TrainingRun, **amounts: int) -> Iterator[None]:
        """Hold quota for these amounts while the `with` block writes a run's files.

        Raises Refused."""
        run.checkpoints.sweep()
        self._update_quota(run)
        run.hold.add(**amounts)
        try:
            yield
        finally:
            self._update_quota(run)

    def _update_quota(self, run: TrainingRun) -> None:
        """Update a run's quota to the sizes of its checkpoints, states and unnamed weights."""
        saved, live, state = run.checkpoints.all(), run.session in self.sessions, self._state_bytes(run.lora)
        states = live + sum(each.id.startswith("weights/") for each in saved)
        snapshots = len([*(self._live_folder(run) / "snapshots").glob("*")])
        disk = states * state + snapshots * state // 4 + sum(each.bytes for each in saved)
        run.hold.set(files=live + len(saved), disk=disk)

    def _load(self, run: TrainingRun, body: _WeightsBody) -> dict[str, Any]:
        saved, source = self.saved_state(run.tenant, body.path or "")
        if replace(source.lora, seed=None) != replace(run.lora, seed=None):
            message = f"{saved.path} differs from this client in rank or targets"
            fix = "create_training_client_from_state creates a client that matches"
            raise ConfigError(message, where="path", fix=fix)
        learner = self._read_learner(run, source.checkpoints.folder / saved.id / "state", bool(body.optimizer))
        learner.forget_gradients()
        self._drop(run)
        run.learner = learner
        return {"path": saved.path, "model_id": run.id}

    def _adapter(self, run: TrainingRun) -> Adapter:
        adapter = self._ready_trainer().adapter(self._learner(run))
        recipe = {"tinker": {"run": run.id, "request": run.applied + 1, **asdict(run.lora)}}
        name, fingerprint = self.base.name, self.base.fingerprint
        card = replace(adapter.card, base=name, base_fingerprint=fingerprint, kind="text", recipe=recipe)
        return replace(adapter, card=card)

    # -- expiry --------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Remove ended and unused sessions and expired checkpoints, if a sweep is due."""
        now, limit = time.time(), self.days * 86400.0
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._pause
        for session in list(self.sessions.values()):
            expired = session.ended is not None and now - session.ended > min(_ENDED_SECONDS, limit)
            if expired or now - session.used > limit:
                self._remove_session(session)
        for run in list(self.runs.values()):
            try:
                run.checkpoints.sweep()
                self._update_quota(run)
                if run.session not in self.sessions and run.checkpoints.empty:
                    with self._changed:
                        del self.runs[run.id]
                    run.hold.release()
                    shutil.rmtree(run.checkpoints.folder.parent, ignore_errors=True)
            except Exception:  # continue with the other runs
                _log.exception("the files of %s could not be removed", run.id)

    def _remove_session(self, session: Session) -> None:
        """Remove a session and its clients; the clients' checkpoints stay."""
        with self._changed:
            del self.sessions[session.id]
            for id in [id for id in self.samplers if id.startswith(f"{session.id}:")]:
                del self.samplers[id]
        session.hold.release()
        for run in [run for run in list(self.runs.values()) if run.session == session.id]:
            self._fail_pending(run, ConfigError("the session ended before this request was executed", fix=_CONTINUE))
            self._drop(run)
            shutil.rmtree(self._live_folder(run), ignore_errors=True)
            run.hold.set(memory=_OBJECT_BYTES)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _ready_trainer(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self.base)
        return self._trainer

    def _live_folder(self, run: TrainingRun) -> Path:
        """Return the folder for a run's unnamed weights and its evicted state."""
        return self._live / run.id.replace(":", "-")

    def _learner(self, run: TrainingRun) -> Learner:
        """Return a run's adapter, and load it into memory if necessary.

        This can move the states of other runs to disk."""
        run.turn = time.monotonic()
        if run.learner is None:
            run.learner = self._read_learner(run, self._live_folder(run) / "state")
        return run.learner

    def _read_learner(self, run: TrainingRun, state: Path, optimizer: bool = True) -> Learner:
        """Create a run's adapter in memory; load the state in the folder `state` if it exists."""
        self._evict_others(run)
        trainer = self._ready_trainer()
        learner = trainer.create(f"{run.id}:{run.applied + 1}", run.lora)
        try:
            if state.is_dir():
                trainer.read(learner, state, optimizer)
        except BaseException:
            trainer.drop(learner)
            raise
        return learner

    def _state_bytes(self, lora: Lora) -> int:
        """Return the memory that a client's state needs, in bytes.

        Raises ConfigError if this is more than `max_memory`."""
        size = state_bytes(self.base.model, lora.spec(self.names))
        if size > self.max_memory:
            message = f"a client of rank {lora.rank} needs {size:,} bytes; the limit is {self.max_memory:,}"
            fix = "use a lower rank, or raise the server's --adapter-memory"
            raise ConfigError(message, where="lora_config.rank", fix=fix)
        return size

    def _evict_others(self, run: TrainingRun) -> None:
        """Move other runs' states to disk, least recently used first, until this state fits."""
        trainer, size = self._ready_trainer(), self._state_bytes(run.lora)
        for idle in sorted(self.runs.values(), key=lambda each: each.turn):
            if size + sum(learner.bytes for learner in trainer.learners.values()) <= self.max_memory:
                return
            if idle.learner is not None and idle.work is None and idle is not run:
                trainer.write(idle.learner, self._live_folder(idle) / "state", idle.applied + 1)
                self._drop(idle)

    def _drop(self, run: TrainingRun) -> None:
        """Drop a run's state from memory without writing it to disk."""
        if run.learner is not None:
            self._ready_trainer().drop(run.learner)
            run.learner = None


def _lock_folder(folder: Path) -> int:
    """Lock a folder and return the lock file's descriptor.

    Raises ConfigError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        take_lock(lock)
    except OSError as error:
        os.close(lock)
        message = "another server on this machine already trains clients on this base"
        raise ConfigError(message, fix="use that server, or give this server its own VENEER_HOME") from error
    return lock
