"""Tinker service: sessions, training clients, and the execution of their requests.

    service = TinkerService(base, library, folder)
    session = service.create_session("acme", {})
    run = service.create_run(session.id, 0, Lora(8), {})
    service.submit(run, 1, "forward_backward", body)        written to disk; executed in order
    answer = service.answer(run, 1)                         a future

A client numbers its requests. The service executes them in the order of their numbers, each once; a repeated
number is the same request. One thread trains. Each pass of the base takes the next rows of clients that have
rows, together in one batch if possible; the tenant that has received the least comes first. Other requests
(an optimizer step, saving, loading) run between passes.

A result is written to disk before it is visible, so that a kill loses nothing: on the next access, the
service restores a client's state from the last saved state and the later requests (journal.py). It repeats at
most `_AGAIN` seconds of a client's computing. In the same way, idle clients make room in memory for others:
their state goes to disk, and returns with their next request.

The service periodically removes states of sessions that their client ended, and of sessions unused for
`days`. Checkpoints that a client saved by name stay until they expire.

Knows a base, a library and folders, but no HTTP and no bills.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from veneer.core.adapter import Adapter
from veneer.errors import ConfigError, ResourceError, VeneerError
from veneer.files.atomic import atomic_write
from veneer.files.locks import take_lock
from veneer.jobs.tinker.checkpoints import Checkpoints, SavedWeights, parse_path
from veneer.jobs.tinker.journal import FutureResult, Journal, JournalEntry
from veneer.jobs.tinker.trainer import (
    Adam,
    Lora,
    PassWork,
    Trainee,
    Trainer,
    TrainRow,
    checked_rows,
    newest_state,
    target_names,
    trained_bytes,
)
from veneer.jobs.tinker.wire import ForwardAsked, forward_bytes, read_forward, read_head
from veneer.library.library import Library
from veneer.models.text.base import TextBase
from veneer.serve.quota import QuotaHold, Quotas
from veneer.serve.request import Refused
from veneer.train.text.save import write_adapter

_log = logging.getLogger("veneer.tinker")

_AGAIN, _JOURNAL = 60.0, 64 << 20
"""Seconds of computing, or bytes of requests, after which a state is saved."""
_IDLE = 600.0
"""Seconds without a request after which a client's state can leave memory."""
_SNAPSHOTS = 16
"""Number of newest unnamed sampler weights to keep per run."""
_SWEEP, _ENDED = 3600.0, 3600.0
"""Seconds between sweeps; seconds for which an ended session's results stay."""
_GAP, _AHEAD = 400.0, 10_000
"""Seconds that requests wait for a missing earlier number; maximum distance to it."""
_LOADED = 64
"""Maximum runs per tenant in memory; idle runs above are unloaded to their files."""
_SESSION, _NUMBER = "(s[0-9a-f]{12})", "(0|[1-9][0-9]{0,8})"
"""Patterns of ids. `01` is invalid: it would be a second client of one folder."""
_BASE_NAME = "base-name"
"""A session's file with the client's name for the base."""
_OVER = "over"
"""Marker file: the session has ended, or only the run's checkpoints are left."""


_T = TypeVar("_T")
_KINDS = {str: "a text", int: "a whole number", dict: "an object"}


class NotHere(Refused):
    """The tenant has no such session, run or sampler (404)."""

    def __init__(self, what: str, *, where: str, fix: str | None = None) -> None:
        super().__init__(what, status=404, code="not_found", param=where, where=where, fix=fix)


class SessionOver(Refused):
    """The session or run has ended (410)."""

    def __init__(self, what: str, *, where: str, fix: str | None = None) -> None:
        super().__init__(what, status=410, code="gone", param=where, where=where, fix=fix)


@dataclass(eq=False)
class Session:
    """Everything that one ServiceClient of a tenant created.

    made: seconds since 1970
    runs: quota holds of its training clients, by number
    hold: quota of the session's and its samplers' files"""

    id: str
    tenant: str
    folder: Path
    made: float
    hold: QuotaHold
    name: str | None = None
    runs: dict[str, QuotaHold] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any] | None:
        """Return the client's metadata from disk: reads are rare, sessions are many."""
        found: dict[str, Any] | None = json.loads((self.folder / "session.json").read_text(encoding="utf-8"))[
            "metadata"
        ]
        return found

    @property
    def over(self) -> bool:
        """Whether the client ended the session."""
        return (self.folder / _OVER).exists()

    def seen(self) -> None:
        """Record a use of the session. Raises SessionOver."""
        if self.over:
            raise _over(self.id)
        with suppress(FileNotFoundError):  # swept at this moment
            os.utime(self.folder / "session.json")

    @property
    def base_name(self) -> str:
        """The client's last name for the base, if it was a path or hub ID; else ""."""
        try:
            return (self.folder / _BASE_NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def keep_base_name(self, name: str) -> None:
        """Save the client's name for the base, if it is a path or a hub ID.

        Keeps up to 1,000 characters."""
        if "/" in name and name[:1000] != self.base_name:
            atomic_write(self.folder / _BASE_NAME, [name[:1000].encode()])


@dataclass(frozen=True)
class SamplerSource:
    """The weights of a sampling session.

    A `reference` of the library; or unnamed weights of the run `name`, by their digest in `folder`; with
    neither, the base. `follows`: a run whose newest unnamed weights the session uses for each request."""

    id: str
    tenant: str
    path: str | None = None
    reference: str = ""
    digest: str = ""
    folder: str = ""
    name: str = ""
    follows: str = ""


@dataclass(eq=False)
class TrainingRun:
    """A training client on the server.

    applied: number of the last request that the state includes
    unbilled: requests that an earlier process accepted but did not execute
    came: time of the client's last request, accepted or not
    used: time of the last access
    over: the state is gone; only checkpoints are left
    hold: quota of its files and waiting requests"""

    id: str
    session: str
    tenant: str
    lora: Lora
    folder: Path
    checkpoints: Checkpoints
    metadata: dict[str, Any] | None
    hold: QuotaHold
    weight: float = 1.0
    journal: Journal = field(init=False)
    unpacked: QuotaHold | None = None
    applied: int = 0
    futures: dict[int, Future[FutureResult]] = field(default_factory=dict)
    unbilled: set[int] = field(default_factory=set)
    learner: Trainee | None = None
    work: PassWork | None = None
    seconds: float = 0.0
    used: float = field(default_factory=time.monotonic)
    came: float = field(default_factory=time.monotonic)
    over: bool = False

    @property
    def name(self) -> str:
        return self.checkpoints.name

    @property
    def following(self) -> JournalEntry | None:
        """The next request to apply; None if it has not arrived."""
        return self.journal.requests.get(self.applied + 1)

    @property
    def waits(self) -> bool:
        """Whether a client waits for this run, or the run has requests to process."""
        return self.following is not None or bool(self.futures) or bool(self.unbilled)


@dataclass(frozen=True)
class _Start:
    """A saved training state to start from: path, folder, with optimizer state or not."""

    path: str
    state: Path
    optimizer: bool

    @property
    def size(self) -> int:
        return _size(self.state.rglob("*"))


class TinkerService:
    """Tinker sessions, runs and samplers of a server. Call `close` at the end.

    folder: folder of this service only
    room: bytes of memory for the states of training clients
    days: days after which unused sessions are removed
    quotas: limits per tenant; existing files in the folder count from the start"""

    def __init__(
        self,
        base: TextBase,
        library: Library,
        folder: Path,
        *,
        room: int = 4 << 30,
        days: float = 30.0,
        quotas: Quotas | None = None,
    ) -> None:
        self.base, self.library, self.folder, self.room, self.days = base, library, folder, room, days
        self.quotas = quotas or Quotas()
        self._lock = _own(folder)
        self.names = target_names(base.model)
        self.sessions = {path.parent.name: self._read_session(path) for path in folder.glob("*/session.json")}
        self.runs: dict[str, TrainingRun] = {}
        self.passes = self.shared_passes = 0
        self._served: dict[str, float] = {}
        self._changed, self._making = threading.Condition(), threading.Lock()
        self._closed = False
        self._swept = -math.inf
        self._pause = min(_SWEEP, days * 86400.0 / 24)
        self._trainer: Trainer | None = None
        self._thread = threading.Thread(target=copy_context().run, args=(self._train,), name="tinker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the current pass, and write all clients' states to disk."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for session in self.sessions.values():
            for hold in (session.hold, *session.runs.values()):
                hold.release()
        os.close(self._lock)

    # -- sessions ------------------------------------------------------------------------------------------------------

    def create_session(self, tenant: str, metadata: dict[str, Any] | None, name: str | None = None) -> Session:
        """Create a session. Raises Refused if a quota is exceeded."""
        id, made = f"s{secrets.token_hex(6)}", time.time()
        data = self._json({"tenant": tenant, "metadata": metadata, "name": name, "made": made}, metadata)
        session = Session(id, tenant, self.folder / id, made, self.quotas.take(tenant, files=1, disk=len(data)), name)
        (session.folder / "samplers").mkdir(parents=True)
        atomic_write(session.folder / "session.json", [data])
        with self._changed:
            self.sessions[id] = session
        return session

    def _json(self, content: Mapping[str, Any], metadata: Any) -> bytes:
        """Return content as JSON. Raises Refused (413) for metadata over the limit."""
        most = self.quotas.limits.metadata
        if metadata and len(json.dumps(metadata)) > most:
            raise Refused(
                f"user_metadata is over {most:,} bytes of JSON (metadata)",
                status=413,
                code="too_large",
                param="user_metadata",
                fix="send less metadata",
            )
        return json.dumps(content).encode()

    def _read_session(self, path: Path) -> Session:
        data = json.loads(path.read_text(encoding="utf-8"))
        folder, tenant = path.parent, data["tenant"]
        session = Session(folder.name, tenant, folder, data["made"], self.quotas.take(tenant), data["name"])
        samplers = list(folder.glob("samplers/*.json"))
        session.hold.set(files=1 + len(samplers), disk=_size([path, *samplers]))
        for file in _runs_in(folder):
            hold = session.runs[_number(file.parent)] = self.quotas.take(tenant)
            self._measure(hold, file.parent, self._checkpoints(session, file.parent))
        return session

    def session(self, tenant: str, id: str) -> Session:
        """Return a session. Raises NotHere."""
        with self._changed:
            found = self.sessions.get(id)
        if found is None or found.tenant != tenant:
            raise NotHere(f"there is no session {id[:60]!r}", where="session_id", fix="make a new ServiceClient")
        return found

    def finish(self, tenant: str, id: str) -> None:
        """End a session. Raises NotHere.

        The session accepts no further requests; unsaved states are removed later."""
        (self.session(tenant, id).folder / _OVER).touch()

    def sessions_of(self, tenant: str) -> list[Session]:
        """Return a tenant's sessions, newest first."""
        with self._changed:
            found = [session for session in self.sessions.values() if session.tenant == tenant]
        return sorted(found, key=lambda session: session.made, reverse=True)

    # -- training clients ----------------------------------------------------------------------------------------------

    def create_run(
        self,
        tenant: str,
        session: str,
        number: int,
        lora: Lora,
        metadata: dict[str, Any] | None,
        weight: float = 1.0,
        start: _Start | None = None,
    ) -> TrainingRun:
        """Create a run, or return the session's existing run of this number.

        Raises NotHere, SessionOver, ConfigError for modules that the base lacks, and Refused if a quota is
        exceeded."""
        owner = self.session(tenant, session)
        owner.seen()
        self._bytes(lora)
        with self._making:
            if str(number) not in owner.runs:
                data = {"lora": asdict(lora), "metadata": metadata, "weight": weight, "made": time.time()}
                content = self._json(data, metadata)
                hold = self.quotas.take(tenant, files=1, disk=len(content) + (start.size if start else 0))
                try:
                    self._write_run(owner.folder / f"train-{number}", content, start)
                except BaseException:
                    hold.release()
                    raise
                owner.runs[str(number)] = hold
        found = self.run(tenant, f"{owner.id}:train:{number}")
        if found.lora != lora:
            raise ConfigError(f"the session has another model of the number {number}", where="model_seq_id")
        return found

    def _write_run(self, folder: Path, content: bytes, start: _Start | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if start is not None:  # a copy, because the checkpoint can be removed
            own = folder / "start"
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(start.state, own)
            atomic_write(own / "start.json", [json.dumps({"path": start.path, "optimizer": start.optimizer}).encode()])
        atomic_write(folder / "run.json", [content])

    def create_from(
        self,
        tenant: str,
        session: str,
        number: int,
        path: str,
        optimizer: bool,
        metadata: dict[str, Any] | None,
        weight: float = 1.0,
    ) -> TrainingRun:
        """Create a run from a checkpoint; `optimizer`: with the optimizer state.

        Raises NotHere, SessionOver, ConfigError."""
        saved, source = self.saved(tenant, path), self.run_of(tenant, path)
        start = _Start(saved.path, source.checkpoints.state(saved.id), optimizer)
        return self.create_run(tenant, session, number, source.lora, metadata, weight, start)

    def run_of(self, tenant: str, path: str) -> TrainingRun:
        """Return the run that saved a training state. Raises NotHere, ConfigError."""
        run, id = parse_path(path)
        if not id.startswith("weights/"):
            what = f"{path[:200]} is to sample from, and has no training state"
            raise ConfigError(what, where="path", fix="a path that save_state gave: tinker://RUN/weights/NAME")
        return self.described(tenant, run)

    def described(self, tenant: str, id: str) -> TrainingRun:
        """Return a run's description and checkpoints. Raises NotHere.

        The run has its journal only if it is in memory."""
        with self._changed:
            found = self.runs.get(id)
        if found is not None and found.tenant == tenant:
            return found
        missing = NotHere(f"there is no training run {id[:80]!r}", where="model_id", fix="one of your own")
        form = re.fullmatch(f"{_SESSION}:train:{_NUMBER}", id)
        if form is None or found is not None:
            raise missing
        session, number = form.groups()
        try:
            owner = self.session(tenant, session)
        except NotHere:
            raise missing from None
        path = owner.folder / f"train-{number}" / "run.json"
        if number not in owner.runs or not path.is_file():
            raise missing
        data = json.loads(path.read_text(encoding="utf-8"))
        return TrainingRun(
            id,
            session,
            tenant,
            Lora(**data["lora"]),
            path.parent,
            self._checkpoints(owner, path.parent),
            data["metadata"],
            owner.runs[number],
            data["weight"],
        )

    def run(self, tenant: str, id: str) -> TrainingRun:
        """Return a run, loaded from disk if it is not in memory. Raises NotHere."""
        made = self.described(tenant, id)
        with self._changed:
            if id in self.runs:
                return self.runs[id]
            made.over = (made.folder / _OVER).exists()
            made.journal = Journal(made.folder / "journal") if made.over else Journal.open(made.folder / "journal")
            with suppress(VeneerError):
                made.applied = _number_of_state(made)
            while made.applied + 1 in made.journal.answers:  # their effects are restored on demand
                made.applied += 1
            made.unbilled = {seq for seq in made.journal.requests if seq > made.applied}
            made.hold.set(requests=len(made.unbilled))
            self._unload(tenant)
            self.runs[id] = made
            self._changed.notify_all()
        return made

    def _unload(self, tenant: str) -> None:
        """Unload a tenant's idle runs to make room for one more.

        An idle run's files hold its whole state."""
        own = [run for run in self.runs.values() if run.tenant == tenant]
        idle = [run for run in own if run.learner is None and run.work is None and not run.waits]
        for run in sorted(idle, key=lambda run: run.used)[: max(0, len(own) + 1 - _LOADED)]:
            del self.runs[run.id]

    def _checkpoints(self, session: Session, folder: Path) -> Checkpoints:
        """Return the checkpoints of the run in a folder."""
        number, namespace = _number(folder), f"{session.tenant}/" if session.tenant else ""
        name = f"{namespace}tinker-{session.id}-{number}"
        return Checkpoints(f"{session.id}:train:{number}", folder / "checkpoints", name, self.library)

    def runs_of(self, tenant: str) -> list[str]:
        """Return ids of a tenant's runs, newest session first."""
        return [f"{s.id}:train:{number}" for s in self.sessions_of(tenant) for number in sorted(s.runs)]

    def submit(self, run: TrainingRun, seq: int, kind: str, body: bytes) -> bool:
        """Accept a request, to execute after all earlier numbers; return if it is new.

        A request of kind `refused` fails with the error in its body, so that no number is missing. Raises
        ConfigError for an invalid number, or a number that a request of another kind has; SessionOver;
        Refused if a quota is exceeded."""
        if not 1 <= seq <= run.applied + _AHEAD:
            raise ConfigError(f"seq_id is {seq}", where="seq_id", fix="from 1 on, one more for each request")
        with self._changed:
            run = self._present(run)
            run.used = run.came = time.monotonic()
            if seq <= run.applied or seq in run.journal.requests:
                known = run.journal.requests.get(seq)
                if known is not None and known.kind != kind:
                    raise ConfigError(f"request {seq} of {run.id} was {known.kind}", where="seq_id")
                return False
            if (run.folder.parent / _OVER).exists():
                raise _over(run.session)
            size = 0 if kind == "refused" else len(body)
            run.hold.add(requests=1, disk=size)
            try:
                run.journal.asked(seq, kind, body)
            except BaseException:
                run.hold.add(requests=-1, disk=-size)
                raise
            self._changed.notify_all()
            return True

    def answer(self, run: TrainingRun, seq: int) -> Future[FutureResult] | None:
        """Return the future of a request's result. Raises SessionOver.

        Returns None for an unknown request or an expired result."""
        with self._changed:
            run = self._present(run)
            run.used = time.monotonic()
            if seq in run.futures:
                return run.futures[seq]
            if (known := run.journal.answer(seq)) is not None:
                done: Future[FutureResult] = Future()
                done.set_result(known)
                return done
            if seq not in run.journal.requests:
                return None
            return run.futures.setdefault(seq, Future())

    def tried(self, run: TrainingRun) -> None:
        """Record a request that was not accepted yet: later requests wait for it."""
        run.came = time.monotonic()

    def rest(self, run: TrainingRun) -> None:
        """Mark a run as idle, so that its state leaves memory early."""
        run.used = -_IDLE

    # -- sampling ------------------------------------------------------------------------------------------------------

    def create_sampler(self, tenant: str, session: str, number: int, path: str | None) -> SamplerSource:
        """Create a sampling session.

        Raises NotHere, SessionOver, and ConfigError for an unknown path."""
        owner = self.session(tenant, session)
        owner.seen()
        id = f"{owner.id}:sample:{number}"
        reference = "" if path is None else self.saved(tenant, path).reference
        return self._put_sampler(owner, SamplerSource(id, tenant, path, reference))

    def sampler(self, tenant: str, id: str) -> SamplerSource:
        """Return a sampling session with its current weights. Raises NotHere."""
        form = re.fullmatch(f"{_SESSION}:sample:{_NUMBER}", id)
        missing = NotHere(f"there is no sampling session {id[:80]!r}", where="sampling_session_id")
        if form is None:
            raise missing
        owner = self.session(tenant, form[1])
        owner.seen()
        path = owner.folder / "samplers" / f"{form[2]}.json"
        if not path.is_file():
            raise missing
        found = SamplerSource(**json.loads(path.read_text(encoding="utf-8")))
        if found.follows:
            newest = self.run(tenant, found.follows).folder / "inflight.json"
            return replace(SamplerSource(**json.loads(newest.read_text(encoding="utf-8"))), id=id)
        return found

    def samplers_of(self, session: Session) -> list[str]:
        numbers = sorted(int(path.stem) for path in (session.folder / "samplers").glob("*.json"))
        return [f"{session.id}:sample:{number}" for number in numbers]

    def _put_sampler(self, session: Session, made: SamplerSource) -> SamplerSource:
        path = session.folder / "samplers" / f"{made.id.rpartition(':')[2]}.json"
        data = json.dumps(asdict(made)).encode()
        if not path.exists():
            session.hold.add(files=1, disk=len(data))
        atomic_write(path, [data])
        return made

    def saved(self, tenant: str, path: str) -> SavedWeights:
        """Return the checkpoint of a tinker:// path. Raises NotHere, ConfigError."""
        run, id = parse_path(path)
        found = self.described(tenant, run).checkpoints.find(id)
        if found is None:
            raise NotHere(f"there is no checkpoint {path[:200]!r}", where="path", fix="it may have expired")
        return found

    def remove(self, run: TrainingRun, id: str) -> None:
        """Remove a checkpoint. Raises ConfigError if it does not exist."""
        run.checkpoints.remove(id)
        self._measure(run.hold, run.folder, run.checkpoints)

    # -- training thread -----------------------------------------------------------------------------------------------

    def _train(self) -> None:
        while True:
            self._sweep()
            with self._changed:
                if not self._closed and not self._ready():
                    self._changed.wait(min(30.0, self._pause))
                if self._closed:
                    break
                ready = self._ready()
            try:
                self._round(ready)
                self._give_up_gaps()
                self._let_idle_go()
            except Exception as error:  # a bug: waiting clients get the error, and the thread continues
                _log.exception("a round of training failed")
                for run in ready:
                    self._fail(run, error)
        for run in list(self.runs.values()):
            try:
                self._put_away(run)
            except Exception:  # still write the other runs
                _log.exception(
                    "the state of %s could not be written; requests since its last state will be replayed", run.id
                )
        if self._trainer is not None:
            self._trainer.close()

    def _ready(self) -> list[TrainingRun]:
        """Return runs with pending work; the tenant that received the least comes first."""
        found = [run for run in self.runs.values() if run.work is not None or run.following is not None]
        return sorted(found, key=lambda run: self._served.get(run.tenant, 0.0))

    def _give_up_gaps(self) -> None:
        """Fail requests that waited too long for a missing number."""
        for run in list(self.runs.values()):
            late = time.monotonic() - run.came > _GAP
            if not late or run.work is not None or run.following is not None or run.journal.last <= run.applied:
                continue
            missing, last = run.applied + 1, run.journal.last
            said = f"request {missing} of {run.id} never came, and those after it waited for it: send them again"
            while run.applied < last:
                self._tell(run, _failure(said))

    def _round(self, ready: list[TrainingRun]) -> None:
        """Execute each run's requests that need no pass, then one pass for runs with rows."""
        training = []
        for run in ready:
            if run.work is None:
                request = run.following
                assert request is not None
                try:
                    if request.kind == "refused":
                        raise ConfigError(run.journal.body(request.seq).decode())
                    if request.kind != "forward":
                        self._do(run, request)
                        continue
                    if not self._begin(run, request):
                        continue
                except Exception as error:
                    self._fail(run, error)
                    continue
            training.append(run)
        if training:
            self._pass(training)

    def _begin(self, run: TrainingRun, request: JournalEntry) -> bool:
        """Unpack a request; return False if the tenant's other requests must finish first.

        A tenant's memory quota limits its unpacked requests."""
        body = run.journal.body(request.seq)
        memory = read_head(body).memory
        others = any(other.unpacked is not None and other.tenant == run.tenant for other in self.runs.values())
        if others and not self.quotas.fits(run.tenant, memory=memory):
            return False
        run.unpacked = self.quotas.take(run.tenant)
        run.unpacked.set(memory=memory)
        try:
            asked = read_forward(body)
            rows = self._rows(asked)
            run.work = PassWork(self._learner(run), rows, asked.loss, asked.options, not asked.forward_only)
        finally:
            if run.work is None:
                self._stop_work(run)
        return True

    def _stop_work(self, run: TrainingRun) -> None:
        run.work = None
        if run.unpacked is not None:
            run.unpacked.release()
            run.unpacked = None

    def _rows(self, asked: ForwardAsked) -> list[TrainRow]:
        trainer = self._ready_trainer()
        context = trainer.base.context
        return checked_rows(asked.rows, asked.loss, asked.options, vocabulary=trainer.vocabulary, context=context)

    def _pass(self, runs: list[TrainingRun]) -> None:
        trainer = self._ready_trainer()
        works = [run.work for run in runs if run.work is not None]
        began = time.perf_counter()
        try:
            acted = trainer.step(works)
        except Exception as error:
            if len(works) > 1:  # one by one, so that only the faulty request fails
                for run in runs:
                    if run.work is not None:
                        self._again(run)
                        self._alone(run)
                return
            self._fail(runs[0], error)
            return
        seconds = time.perf_counter() - began
        self.passes += 1
        self.shared_passes += len(acted) > 1
        for run in runs:
            if run.work is None or run.work not in acted:
                continue
            run.seconds += seconds
            if run.work.done:
                self._complete(run, run.work)

    def _again(self, run: TrainingRun) -> None:
        """Restore the state from before the current request."""
        self._stop_work(run)
        self._forget(run)
        request = run.following
        assert request is not None
        try:
            self._begin(run, request)
        except Exception as error:
            self._fail(run, error)

    def _alone(self, run: TrainingRun) -> None:
        try:
            while run.work is not None and not run.work.done:
                self._ready_trainer().step([run.work])
        except Exception as error:
            self._fail(run, error)
        else:
            if run.work is not None:
                self._complete(run, run.work)

    def _complete(self, run: TrainingRun, work: PassWork) -> None:
        outputs = [{"logprobs": logps.numpy()} for logps in work.logps]
        self._stop_work(run)
        served = self._served.get(run.tenant, min(self._served.values(), default=0.0))
        self._served[run.tenant] = served + work.tokens / run.weight
        self._tell(run, FutureResult("proto", forward_bytes(outputs, {"loss:sum": work.total})))
        self._write_if_due(run)

    def _tell(self, run: TrainingRun, answer: FutureResult) -> None:
        """Write a result to the journal, then publish it."""
        seq = run.applied + 1
        with self._changed:
            run.journal.told(seq, answer)
            run.applied = seq
            if seq in run.journal.requests:
                run.hold.add(requests=-1)
            future = run.futures.pop(seq, None)
        if future is not None:
            future.set_result(answer)

    def _fail(self, run: TrainingRun, error: Exception) -> None:
        """Fail the next request with an error, and undo its effect on the state in memory."""
        if run.following is None:
            return
        if run.work is not None or not isinstance(error, VeneerError):
            self._stop_work(run)
            self._forget(run)
        user = isinstance(error, VeneerError) and not isinstance(error, ResourceError)
        if isinstance(error, VeneerError):
            said = ": ".join(part for part in (error.where or "", error.what, error.fix or "") if part)
        else:
            _log.error("request %d of %s failed", run.applied + 1, run.id, exc_info=error)
            said = "the server failed at this request; its log says why"
        try:
            self._tell(run, _failure(said, "user" if user else "server"))
        except OSError:
            _log.exception("an answer could not be written")
            time.sleep(1.0)

    # -- what is no pass -----------------------------------------------------------------------------------------------

    def _do(self, run: TrainingRun, request: JournalEntry) -> None:
        body = json.loads(run.journal.body(request.seq))
        result = {
            "optim_step": self._optimise,
            "save_weights": self._save,
            "save_weights_for_sampler": self._sampler_weights,
            "save_weights_external": self._external,
            "load_weights": self._load,
        }[request.kind](run, request.seq, body)
        self._tell(run, FutureResult("json", json.dumps(result).encode()))
        self._write_if_due(run)

    def _optimise(self, run: TrainingRun, seq: int, body: Mapping[str, Any]) -> dict[str, Any]:
        learner = self._learner(run)
        try:
            return {"metrics": self._ready_trainer().optimise(learner, _adam_of(body))}
        except VeneerError:
            learner.forget_gradients()  # the next step must not use gradients that this step refused
            raise

    def _save(self, run: TrainingRun, seq: int, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"path": self._saved(run, seq, body, "weights").path, "type": "save_weights"}

    def _external(self, run: TrainingRun, seq: int, body: Mapping[str, Any]) -> dict[str, Any]:
        if body.get("age_encryption_recipients"):
            what = "weights are not encrypted here"
            raise ConfigError(what, where="age_encryption_recipients", fix="leave it out: they go over your own wire")
        made = self._saved(run, seq, body, "external_weights")
        return {"path": made.path, "size_bytes": made.bytes, "type": "save_weights_external"}

    def _saved(self, run: TrainingRun, seq: int, body: Mapping[str, Any], kind: str) -> SavedWeights:
        """Save a run's weights as a checkpoint of `kind`; `weights` has a training state."""
        whole, metadata = kind == "weights", _given(body, "user_metadata", dict)
        name = _given(body, "path", str) or (f"{seq:06d}" if whole else "")
        place, found = run.checkpoints.place(kind, name), run.checkpoints.find(f"{kind}/{name}")
        if found is not None and found.seq != seq and not (whole and body.get("overwrite")):
            raise ConfigError(f"there is a checkpoint {found.path} already", where="path", fix="another name")
        self._json({}, metadata)
        learner, ttl, size = self._learner(run), _given(body, "ttl_seconds", int), self._bytes(run.lora)
        with self._storing(run, files=1, disk=size // 4 + whole * size):
            if whole:
                self._ready_trainer().write(learner, place / "state", seq)
            adapter = self._adapter(run)
            return run.checkpoints.put(kind, name, seq, adapter, self.base, ttl=ttl, metadata=metadata)

    def _sampler_weights(self, run: TrainingRun, seq: int, body: Mapping[str, Any]) -> dict[str, Any]:
        if body.get("path") is not None:
            path = self._saved(run, seq, body, "sampler_weights").path
            return {"path": path, "type": "save_weights_for_sampler"}
        number = _given(body, "sampling_session_seq_id", int)
        if number is None or not 0 <= number < 10**9:
            raise ConfigError("it has neither path nor a sampling_session_seq_id that can be", where="path")
        folder = run.folder / "snapshots" / str(seq)
        session = self.session(run.tenant, run.session)
        id = f"{session.id}:sample:{number}"
        with self._storing(run, disk=self._bytes(run.lora) // 4):
            digest = write_adapter(self._adapter(run), folder, self.base)
            sampler = SamplerSource(id, run.tenant, digest=digest, folder=str(folder), name=run.name)
            if body.get("kind") == "inflight":
                atomic_write(run.folder / "inflight.json", [json.dumps(asdict(sampler)).encode()])
                sampler = SamplerSource(id, run.tenant, follows=run.id)
            self._put_sampler(session, sampler)
            for old in sorted(run.folder.glob("snapshots/*"), key=lambda path: int(path.name))[:-_SNAPSHOTS]:
                shutil.rmtree(old)
        return {"sampling_session_id": sampler.id, "type": "save_weights_for_sampler"}

    @contextmanager
    def _storing(self, run: TrainingRun, **amounts: int) -> Iterator[None]:
        """Hold quota while writing these amounts to a run's folder. Raises Refused."""
        run.checkpoints.sweep()
        self._measure(run.hold, run.folder, run.checkpoints)
        run.hold.add(**amounts)
        try:
            yield
        finally:
            self._measure(run.hold, run.folder, run.checkpoints)

    def _measure(self, hold: QuotaHold, folder: Path, checkpoints: Checkpoints) -> None:
        """Set the quota hold to a run's files, including its adapters in the library."""
        saved = checkpoints.all()
        hold.set(files=1 + len(saved), disk=_size(folder.rglob("*")) + sum(each.bytes for each in saved))

    def _load(self, run: TrainingRun, seq: int, body: Mapping[str, Any]) -> dict[str, Any]:
        path = _given(body, "path", str) or ""
        source, saved = self.run_of(run.tenant, path), self.saved(run.tenant, path)
        if replace(source.lora, seed=None) != replace(run.lora, seed=None):
            raise ConfigError(
                f"{saved.path} has another rank or other targets than this client",
                where="path",
                fix="create_training_client_from_state makes one that fits",
            )
        trainer = self._ready_trainer()
        self._forget(run)
        try:
            self._make_room(run)
            run.learner = trainer.create(run.id, run.lora)
            trainer.read(run.learner, source.checkpoints.state(saved.id), bool(body.get("optimizer")))
            run.learner.forget_gradients()
            trainer.write(run.learner, run.folder / "states", seq)  # the source can be removed or overwritten
        except BaseException:
            self._forget(run)
            raise
        return {"path": saved.path, "model_id": run.id, "type": "load_weights"}

    def _adapter(self, run: TrainingRun) -> Adapter:
        made = self._ready_trainer().adapter(self._learner(run))
        card = replace(
            made.card,
            base=self.base.name,
            base_fingerprint=self.base.fingerprint,
            kind="text",
            recipe={"tinker": {"run": run.id, "request": run.applied + 1, **asdict(run.lora)}},
        )
        return replace(made, card=card)

    # -- what nobody comes back for ------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Sweep sessions, at most once per `_pause` seconds."""
        if time.monotonic() - self._swept < self._pause:
            return
        self._swept = time.monotonic()
        with self._changed:
            sessions = list(self.sessions.values())
        for session in sessions:
            try:
                self._sweep_session(session)
            except Exception:  # still sweep the other sessions
                _log.exception("the files of session %s could not be removed", session.id)

    def _sweep_session(self, session: Session) -> None:
        """Sweep a session by its files, without loading its runs."""
        folders = [path.parent for path in _runs_in(session.folder)]
        for folder in folders:
            checkpoints = self._checkpoints(session, folder)
            checkpoints.sweep()
            self._measure(session.runs[_number(folder)], folder, checkpoints)
        now, kept, over = time.time(), self.days * 86400.0, session.folder / _OVER
        used = max(_time(path) for path in (session.folder / "session.json", *(each / "journal" for each in folders)))
        if now - used <= kept and not (over.exists() and now - _time(over) > min(_ENDED, kept)):
            return
        with self._changed:
            runs = {each: self.runs.get(f"{session.id}:train:{_number(each)}") for each in folders}
            if any(run is not None and (run.work is not None or run.following is not None) for run in runs.values()):
                return  # a client uses it right now
            for folder, run in runs.items():
                (folder / _OVER).touch()
                if run is not None:
                    run.over = True
                    del self.runs[run.id]
            over.touch()
        for folder, run in runs.items():
            if run is not None:
                self._leave(run)
            checkpoints, hold = self._checkpoints(session, folder), session.runs[_number(folder)]
            if self._clear(folder, checkpoints):
                self._measure(hold, folder, checkpoints)
            else:
                del session.runs[_number(folder)]
                hold.release()
        session.hold.set(files=1, disk=_size([session.folder / "session.json"]))
        if session.runs:
            shutil.rmtree(session.folder / "samplers", ignore_errors=True)
            return
        with self._changed:
            del self.sessions[session.id]
        session.hold.release()
        shutil.rmtree(session.folder, ignore_errors=True)

    def _leave(self, run: TrainingRun) -> None:
        """Fail the futures of requests that can never be executed."""
        self._forget(run)
        for future in run.futures.values():
            future.set_result(_failure("its client went away before the requests before it had come"))
        run.futures.clear()
        run.hold.set(requests=0)

    def _clear(self, folder: Path, checkpoints: Checkpoints) -> bool:
        """Remove a run's files except checkpoints; return whether checkpoints are left."""
        if not checkpoints.all():
            shutil.rmtree(folder)
            return False
        journal = folder / "journal"
        asked = _time(journal)  # keep the time of the last request
        journal.write_bytes(b"")
        os.utime(journal, (asked, asked))
        for name in ("states", "start", "snapshots"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "inflight.json").unlink(missing_ok=True)
        return True

    # -- memory --------------------------------------------------------------------------------------------------------

    def _ready_trainer(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self.base)
            _log.info("training beside serving: %s", self._trainer.how)
        return self._trainer

    def _learner(self, run: TrainingRun) -> Trainee:
        """Return a run's adapter in memory, with all applied requests.

        Can move other runs' states to disk."""
        run.used = time.monotonic()
        if run.learner is not None:
            return run.learner
        trainer = self._ready_trainer()
        if not (run.folder / "states").is_dir():
            self._measure(run.hold, run.folder, run.checkpoints)
            run.hold.add(disk=self._bytes(run.lora))  # for the state that will be written
        self._make_room(run)
        learner = run.learner = trainer.create(run.id, run.lora)
        try:
            at, start = 0, run.folder / "start"
            if (run.folder / "states").is_dir():
                at = trainer.read(learner, run.folder / "states")
            elif start.is_dir():
                begun = json.loads((start / "start.json").read_text(encoding="utf-8"))
                trainer.read(learner, start, begun["optimizer"])
                learner.forget_gradients()
            self._replay(run, learner, at)
        except BaseException:
            self._forget(run)
            raise
        return learner

    def _replay(self, run: TrainingRun, learner: Trainee, at: int) -> None:
        """Repeat applied requests after a saved state that changed the state."""
        trainer = self._ready_trainer()
        for seq in range(at + 1, run.applied + 1):
            request, answer = run.journal.requests.get(seq), run.journal.answers.get(seq)
            if request is None or answer is None:
                continue
            body = run.journal.body(seq)
            if answer.kind == "failed":
                if request.kind == "optim_step":
                    learner.forget_gradients()
            elif request.kind == "optim_step":
                trainer.optimise(learner, _adam_of(json.loads(body)))
            elif request.kind == "forward":
                asked = read_forward(body)
                if not asked.forward_only:
                    work = PassWork(learner, self._rows(asked), asked.loss, asked.options, True)
                    while not work.done:
                        trainer.step([work])

    def _bytes(self, lora: Lora) -> int:
        """Return a client's bytes of memory. Raises ConfigError if they exceed `room`."""
        needed = trained_bytes(self.base.model, lora.spec(self.names))
        if needed > self.room:
            raise ConfigError(
                f"a client of rank {lora.rank} takes {needed:,} bytes to train; the server has room for {self.room:,}",
                where="lora_config.rank",
                fix="a lower rank, or --adapter-memory of the server",
            )
        return needed

    def _make_room(self, run: TrainingRun) -> None:
        """Move other runs' states to disk to make room, least recently used first.

        Raises ConfigError if the room is still too small."""
        trainer, needed = self._ready_trainer(), self._bytes(run.lora)

        def taken() -> int:
            return sum(learner.bytes for learner in trainer.learners.values())

        others = [other for other in list(self.runs.values()) if other.learner is not None and other is not run]
        for other in sorted(others, key=lambda other: other.used):
            if taken() + needed <= self.room:
                return
            if other.work is None:
                self._put_away(other)

    def _let_idle_go(self) -> None:
        """Unload idle runs and their results; the next access reads them again."""
        for run in list(self.runs.values()):
            if run.work is not None or time.monotonic() - run.used <= _IDLE:
                continue
            if run.learner is not None:
                self._put_away(run)
            with self._changed:
                if not run.waits and time.monotonic() - run.used > _IDLE:
                    del self.runs[run.id]
        with self._changed:
            here = {run.tenant for run in self.runs.values()}
            self._served = {tenant: amount for tenant, amount in self._served.items() if tenant in here}

    def _present(self, run: TrainingRun) -> TrainingRun:
        """Return the run's current object in memory. Raises SessionOver."""
        if not run.over and self.runs.get(run.id) is not run:
            run = self.run(run.tenant, run.id)
        if run.over:
            what = f"the training client {run.id} is over: its session was ended, or not used for {self.days:g} days"
            fix = "create_training_client_from_state goes on from a checkpoint of it"
            raise SessionOver(what, where="model_id", fix=fix)
        return run

    def _put_away(self, run: TrainingRun) -> None:
        """Write a run's state to disk and drop it from memory."""
        if run.learner is None:
            return
        if run.work is not None:  # the request starts over later
            self._stop_work(run)
            self._forget(run)
            return
        self._write_state(run)
        self._forget(run)

    def _write_if_due(self, run: TrainingRun) -> None:
        if run.learner is not None and (run.seconds > _AGAIN or run.journal.bytes > _JOURNAL):
            self._write_state(run)

    def _write_state(self, run: TrainingRun) -> None:
        assert run.learner is not None
        self._ready_trainer().write(run.learner, run.folder / "states", run.applied)
        with self._changed:
            run.journal.trim(run.applied)
        run.seconds = 0.0
        self._measure(run.hold, run.folder, run.checkpoints)

    def _forget(self, run: TrainingRun) -> None:
        """Drop a run's state from memory without writing; it is read again on demand."""
        if run.learner is not None:
            self._ready_trainer().drop(run.learner)
            run.learner = None


def _failure(said: str, category: str = "user") -> FutureResult:
    return FutureResult("failed", json.dumps({"error": said, "category": category}).encode())


def _over(session: str) -> SessionOver:
    return SessionOver(f"the session {session} is over", where="session_id", fix="make a new ServiceClient")


def _runs_in(session: Path) -> list[Path]:
    """Return the run files in a session's folder."""
    return sorted(session.glob("train-*/run.json"))


def _number(folder: Path) -> str:
    return folder.name.removeprefix("train-")


def _size(paths: Iterable[Path]) -> int:
    """Return the total bytes of the paths that are existing files."""
    size = 0
    for path in paths:
        with suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _own(folder: Path) -> int:
    """Lock a folder for this process. Raises ConfigError if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        take_lock(lock)
    except OSError as error:
        os.close(lock)
        what = "another server on this machine has the training clients of this base"
        raise ConfigError(what, fix="ask that one, or give this one a VENEER_HOME of its own") from error
    return lock


def _given(body: Mapping[str, Any], name: str, kind: type[_T]) -> _T | None:
    """Return a body's value of type `kind`, or None. Raises ConfigError."""
    value = body.get(name)
    if value is not None and type(value) is not kind:
        raise ConfigError(f"{name} is {str(value)[:50]!r}", where=name, fix=f"{_KINDS[kind]}, or leave it out")
    return value


def _adam_of(body: Mapping[str, Any]) -> Adam:
    """Return the AdamW parameters of an optim_step body. Raises ConfigError."""
    given = body.get("adam_params")
    if not isinstance(given, dict):
        raise ConfigError("a step here is AdamW's alone", where="optimizer_params", fix="AdamParams(…)")
    names = {"learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"}
    if wrong := sorted(set(given) - names):
        raise ConfigError(f"adam_params has no {wrong[0][:50]!r}", where="adam_params", fix=", ".join(sorted(names)))
    for name, value in given.items():
        if type(value) not in (int, float) or abs(value) > sys.float_info.max:  # the SDK sends null for NaN
            raise ConfigError(f"{name} is not a finite number", where="adam_params")
    return Adam(**{"clip" if name == "grad_clip_norm" else str(name): float(value) for name, value in given.items()})


def _number_of_state(run: TrainingRun) -> int:
    """Return the number of the newest saved state. Raises CheckpointError."""
    return int(newest_state(run.folder / "states").name.rpartition("-")[2])
