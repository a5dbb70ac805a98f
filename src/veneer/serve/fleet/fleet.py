"""A fleet: remote servers of the same base behind this server, as an `Engine`.

    fleet = Fleet(["http://a:8000", "http://b:8000"], files=…, decode=…, cache=…)
    async with fleet:
        async for event in fleet.events(request): …

A request goes to the replica with the fewest running requests among those that have its mix loaded. If none
has it, the mix is written to one folder (`folders`), every running replica is told to load it, and the
request goes to the first that has. A replica that failed to load the mix never gets the request: it would
answer with the base under the adapter's name.

| replica                           | reaction |
| -------                           | -------- |
| does not answer                   | before the first token, try another; pause it for 1, 2, 4 … 30 seconds |
| answers 5xx or 429                | try another; pause it after the third in a row |
| forgot an adapter (restarted)     | load the adapter again, there or elsewhere, before the first token |
| fails after the first token       | Finished with an error: tokens already sent cannot be taken back |
| rejects an adapter                | return its reason to the client; remember it for `_REFUSED_FOR` s |
| has more than `capacity` adapters | unload the least recently used without running requests |

A plain adapter goes to all replicas; a mix with client-chosen strengths to `mix_copies` of them. The choice
follows from the names alone (rendezvous hashing: the replicas with the highest hash of replica and mix), so
that every front door agrees, and adding or removing a replica moves only its own mixes. Stored mixes are
bounded (`folders`).

Handles replicas, residency and routing; `remote` implements the protocol of one server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from veneer.core.adapter import Adapter
from veneer.errors import ConfigError, VeneerError
from veneer.serve.fleet.folders import Folders, is_made, rendezvous, servable, served_name
from veneer.serve.fleet.remote import Decode, Failed, NotThere, Remote, parse_upstream, recognise
from veneer.serve.names.adapter_cache import ResidentAdapter
from veneer.serve.request import (
    DigestMix,
    Engine,
    EngineEvent,
    EngineStats,
    Finished,
    Refused,
    Request,
    Started,
    Token,
    Usage,
    invalid,
    shutting_down,
)
from veneer.serve.transient import fault, is_outage, outage

log = logging.getLogger("veneer.serve.fleet.fleet")

REST = (1.0, 30.0)
"""Seconds that a failed replica is paused: the first time, and at most, doubling in between."""
FAULTS = 3
"""Consecutive failed answers after which a replica is paused; a single one can be the request's fault."""
_REFUSED_FOR = 30.0
_WATCH_EVERY = 5.0


@dataclass
class _ReplicaAdapter:
    """An adapter loaded on a replica."""

    used: float = 0.0
    running: int = 0


@dataclass(eq=False)
class Replica:
    """One upstream server.

    `server`: None until the server first answered. `rest_until`: no requests before this time. `failures`:
    consecutive pauses. `faults`: consecutive failed answers. `last`: time of its last request.
    """

    place: str
    server: Remote | None = None
    up: bool = False
    failures: int = 0
    faults: int = 0
    rest_until: float = 0.0
    running: int = 0
    last: float = 0.0
    resident: dict[str, _ReplicaAdapter] = field(default_factory=dict)
    loading: dict[str, asyncio.Task[Refused | None]] = field(default_factory=dict)
    check: asyncio.Task[None] | None = None


class Fleet(Engine[Request, EngineEvent]):
    """Routes requests to replicas.

    `files`: digest -> path of the adapter's files in the library. `decode`: decodes with the base's
    tokenizer, special tokens included. `cache`: where folders for replicas are written; replicas read the
    cache and the library by the same paths, so both must be on shared storage. `mix_copies`: replicas on
    which a client-chosen mix is loaded. `capacity`: adapters per replica. `mixes`: mixes per tenant.
    `cache_bytes`: size of all folders. `key`: sent to replicas as a bearer token.
    """

    def __init__(
        self,
        upstreams: Sequence[str],
        *,
        files: Callable[[str], Path],
        decode: Decode,
        cache: Path,
        mix_copies: int = 2,
        capacity: int = 256,
        mixes: int = 64,
        cache_bytes: int = 16 << 30,
        key: str | None = None,
        timeout: float = 300.0,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        if not upstreams or len(set(upstreams)) < len(upstreams):
            raise ConfigError("a fleet needs one server or more, each named once", where="--upstream")
        for place in upstreams:
            parse_upstream(place)
        self.replicas = [Replica(place) for place in upstreams]
        self.files, self.decode = files, decode
        self.mix_copies, self.capacity = mix_copies, capacity
        self.folders = Folders(cache, limit_bytes=cache_bytes, each=mixes)
        self.client = client or httpx.AsyncClient(
            timeout=httpx.Timeout(timeout, connect=5.0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None),
        )
        self.making: dict[str, asyncio.Task[Path]] = {}
        """Name of a mix -> task that writes its folder, running or done."""
        self.refused: dict[tuple[str, str], tuple[float, Refused]] = {}
        self.closing = False
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop on which the fleet runs, once started."""
        self.prompt_tokens = self.generated_tokens = 0
        self._watch: asyncio.Task[None] | None = None
        self._spreading: set[asyncio.Task[Any]] = set()
        self._collecting: asyncio.Task[None] | None = None
        self._unwanted: list[str] = []
        self._going: set[str] = set()

    # -- lifecycle -----------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Check every replica once, then keep checking in the background."""
        self.loop = asyncio.get_running_loop()
        await asyncio.gather(*(self._check(r) for r in self.replicas))
        self._watch = asyncio.create_task(self._watching())
        self.collect()

    async def end(self) -> None:
        self.closing = True
        tasks = self.behind() + [t for t in (self._watch, *(r.check for r in self.replicas)) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()

    def behind(self) -> list[asyncio.Task[Any]]:
        """Background tasks: writing, loading, spreading and removing mixes."""
        loading = [task for r in self.replicas for task in r.loading.values()]
        return [*loading, *self.making.values(), *self._spreading, *([self._collecting] if self._collecting else [])]

    async def __aenter__(self) -> Fleet:
        await self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_EVERY)
            now = time.monotonic()
            await asyncio.gather(*(self._check(r) for r in self.replicas if now >= r.rest_until))

    async def _check(self, replica: Replica) -> None:
        """Check a replica's health; concurrent callers share one check."""
        if replica.check is None or replica.check.done():
            replica.check = asyncio.create_task(self._ask(replica))
        await asyncio.wait([replica.check])

    async def _ask(self, replica: Replica) -> None:
        known = set(replica.resident)
        try:
            if replica.server is None:
                replica.server = await recognise(replica.place, self.client, self.decode)
            has = await replica.server.check()
        except Failed as error:
            self._failed(replica, error)
            return
        for name in known - has:
            replica.resident.pop(name, None)  # restarted, or unloaded by somebody
        if not replica.up:
            # Names determine content, so adapters loaded by another front door can be used.
            new = {n for n in has - set(replica.resident) if n.startswith("veneer-")}
            replica.resident |= {name: _ReplicaAdapter(time.monotonic()) for name in new}
            log.info("%s is up; it has %d adapters", replica.place, len(replica.resident))
        replica.up, replica.failures, replica.faults, replica.rest_until = True, 0, 0, 0.0

    def _failed(self, replica: Replica, error: Failed) -> None:
        """Pause a replica, unless it is paused already.

        Many requests can see the same failure.
        """
        replica.faults += 1
        if time.monotonic() < replica.rest_until or (replica.up and error.answered and replica.faults < FAULTS):
            return
        rest = min(REST[0] * 2**replica.failures, REST[1])
        replica.up, replica.failures = False, replica.failures + 1
        replica.rest_until = time.monotonic() + rest
        log.warning("%s rests for %g s: %s", replica.place, rest, error)

    # -- adapters ------------------------------------------------------------------------------------------------------

    async def load(self, mix: DigestMix) -> dict[str, str]:
        """Load a mix on its replicas and wait for all.

        Returns upstream -> "" or the reason it failed. Raises Refused if no replica has the mix in the end.
        """
        name, up = served_name(mix), await self._up(set())
        tasks = await self._bring(mix, up)
        done = {r.place: await asyncio.shield(task) for r, task in tasks.items()}
        reasons = {place: "" if refusal is None else refusal.what for place, refusal in done.items()}
        if tasks and all(reasons.values()):
            raise next(r for r in done.values() if r is not None)
        if not any(name in r.resident for r in self.replicas):
            raise await self._nowhere(name, up)
        return reasons | {r.place: "" for r in self.replicas if name in r.resident}

    async def _nowhere(self, name: str, up: Sequence[Replica]) -> Refused:
        """The error for a mix that no replica can load, with one replica's reason."""
        for server in (r.server for r in up if r.server is not None and not r.server.loads):
            try:
                await server.load(name, "")
            except Refused as refusal:
                return refusal
        return outage("the model", "no replica answers", retry_after=REST[0])

    async def unload(self, mix: DigestMix) -> None:
        """Unload a mix from every replica.

        Running requests continue, because vLLM keeps their weights.
        """
        name = served_name(mix)
        self.making.pop(name, None)
        await asyncio.gather(*(self._unload(r, name) for r in self.replicas))

    async def _unload(self, replica: Replica, name: str) -> None:
        if replica.resident.pop(name, None) is not None and replica.server is not None:
            with contextlib.suppress(Failed):
                await replica.server.unload(name)

    async def _folder(self, mix: DigestMix) -> Path:
        """The folder of the mix, written once.

        Raises Refused with the reason if writing fails.
        """
        name = served_name(mix)
        if name in self._going and self._collecting is not None:
            await asyncio.wait([self._collecting])
        if name not in self.making or not await _is_there(self.making[name]):
            self.making[name] = asyncio.create_task(asyncio.to_thread(self._make, mix, name))
        try:
            folder = await asyncio.shield(self.making[name])
        except (VeneerError, OSError) as error:
            self.making.pop(name, None)
            if isinstance(error, Refused):
                raise
            if not isinstance(error, VeneerError) or is_outage(error):
                raise fault("the adapter", error) from error
            raise Refused(error.what, status=422, code="adapter_unusable", fix=error.fix) from error
        self.collect()
        return folder

    def _make(self, mix: DigestMix, name: str) -> Path:
        parts = [(self.files(digest), strength) for digest, strength in mix]
        return servable(parts, name, self.folders.cache).folder.absolute()

    def _use(self, mix: DigestMix, tenant: str) -> None:
        """Record a tenant's use of a client-chosen mix, and drop what exceeds its quota.

        Raises Refused (429).
        """
        if is_made(mix) and (names := self.folders.use(served_name(mix), tenant, self._busy)):
            self.collect(names)

    def _busy(self, name: str) -> bool:
        here = [r.resident[name] for r in self.replicas if name in r.resident]
        return any(a.running for a in here) or any(name in r.loading for r in self.replicas)

    def collect(self, names: Sequence[str] = ()) -> None:
        """Remove `names` and folders beyond the size limit, in the background."""
        self._unwanted += names
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.create_task(self._let_go())

    async def _let_go(self) -> None:
        while True:
            names, self._unwanted = [n for n in self._unwanted if not self.folders.used(n)], []
            names += await asyncio.to_thread(self.folders.excess, self._busy, self.folders.last_used())
            self._going = {n for n in names if not self._busy(n)}
            self.folders.forget(self._going)
            for name in self._going:
                self.making.pop(name, None)
                await asyncio.gather(*(self._unload(r, name) for r in self.replicas))
            await asyncio.to_thread(self.folders.delete, self._going)
            self._going = set()
            if not self._unwanted:
                return

    def _missing(self, mix: DigestMix, up: Sequence[Replica]) -> list[Replica]:
        """The replicas that should have a mix and do not."""
        name = served_name(mix)
        able = [r for r in up if r.server is not None and r.server.loads]
        able.sort(key=lambda r: rendezvous(name, r.place), reverse=True)
        return [r for r in able[: self.mix_copies if is_made(mix) else None] if name not in r.resident]

    async def _bring(self, mix: DigestMix, up: Sequence[Replica]) -> dict[Replica, asyncio.Task[Refused | None]]:
        """Start loading a mix on the replicas of `up` that should have it.

        Returns the load tasks. Loads already running are included. Raises Refused if the mix has no folder.
        """
        name, now = served_name(mix), time.monotonic()
        tasks: dict[Replica, asyncio.Task[Refused | None]] = {}
        if not self._missing(mix, up):
            return tasks
        folder = str(await self._folder(mix))
        for replica in self._missing(mix, up):  # other requests may have loaded some meanwhile
            until, refusal = self.refused.get((replica.place, name), (0.0, None))
            if refusal is not None and now < until:
                tasks[replica] = asyncio.create_task(_answer(refusal))
            elif name not in replica.loading:
                tasks[replica] = replica.loading[name] = asyncio.create_task(self._load(replica, name, folder))
            else:
                tasks[replica] = replica.loading[name]
        return tasks

    def _spread(self, mix: DigestMix, up: Sequence[Replica]) -> None:
        """Load a mix in the background on replicas that joined late or restarted."""
        name, now = served_name(mix), time.monotonic()
        to = [r for r in self._missing(mix, up) if name not in r.loading]
        to = [r for r in to if self.refused.get((r.place, name), (0.0, None))[0] <= now]
        if to and not self._spreading:
            task: asyncio.Task[Any] = asyncio.create_task(self._bring(mix, up))
            self._spreading.add(task)
            task.add_done_callback(self._spreading.discard)

    async def _load(self, replica: Replica, name: str, folder: str) -> Refused | None:
        """Load an adapter on a replica; returns None, or the error."""
        server = replica.server
        assert server is not None
        try:
            await self._make_room(replica)
            await server.load(name, folder)
        except Refused as refusal:
            now = time.monotonic()
            self.refused = {key: kept for key, kept in self.refused.items() if kept[0] > now}
            self.refused[replica.place, name] = (now + _REFUSED_FOR, refusal)
            self.making.pop(name, None)  # the files may have moved: look them up again next time
            log.warning("%s", refusal.what)
            return refusal
        except Failed as error:
            self._failed(replica, error)
            return outage("the model", error, retry_after=REST[0])
        finally:
            replica.loading.pop(name, None)
        replica.resident[name] = _ReplicaAdapter(time.monotonic())
        return None

    async def _make_room(self, replica: Replica) -> None:
        """Unload least recently used adapters over `capacity`.

        If all are busy, exceed the limit.
        """
        idle = sorted((n for n, a in replica.resident.items() if not a.running), key=lambda n: replica.resident[n].used)
        for name in idle[: max(0, len(replica.resident) + 1 - self.capacity)]:
            await self._unload(replica, name)

    # -- routes --------------------------------------------------------------------------------------------------------

    async def _up(self, tried: set[Replica]) -> list[Replica]:
        """The replicas that can take requests.

        Replicas whose pause is over are checked first.
        """
        now = time.monotonic()
        due = [r for r in self.replicas if not r.up and now >= r.rest_until]
        up = [r for r in self.replicas if r.up and r not in tried]
        if due and not up:
            await asyncio.gather(*(self._check(r) for r in due))
            up = [r for r in self.replicas if r.up and r not in tried]
        return up

    async def _route(self, request: Request, tried: set[Replica], why: str = "") -> Replica:
        """The replica for a request, with the mix loaded.

        Raises Refused; `why`: the last failure.
        """
        mix, up = request.mix, await self._up(tried)
        if not up:
            wait = max(0.0, min(r.rest_until for r in self.replicas) - time.monotonic())
            raise outage("the model", why or "no replica answers", retry_after=max(1.0, round(wait, 1)))
        up = _able(up, request)
        if not mix:
            return _freest(up)
        name = served_name(mix)
        if here := [r for r in up if name in r.resident]:
            self._spread(mix, up)
            return _freest(here)
        pending = set((await self._bring(mix, up)).values())
        refusals: list[Refused] = []
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            refusals += [r for task in done if (r := task.result()) is not None]
            if here := [r for r in up if name in r.resident]:
                return _freest(here)
        raise refusals[0] if refusals else await self._nowhere(name, up)

    async def events(self, request: Request) -> AsyncGenerator[EngineEvent, None]:
        """Answer a request: Started, Tokens, Finished.

        Started comes with the first token, because until then another replica may have to answer.
        """
        if self.closing:
            raise shutting_down()
        self._use(request.mix, request.tenant)
        began = time.monotonic()
        tried: set[Replica] = set()
        forgot, why = 0, ""
        while True:
            replica = await self._route(request, tried, why)
            tokens = 0
            try:
                async with aclosing(self._from(replica, request, began)) as events:
                    async for event in events:
                        if not tokens:
                            yield Started(0)
                        tokens += 1
                        yield event
                return
            except NotThere as error:
                replica.resident.pop(served_name(request.mix), None)
                forgot += 1
                if forgot > len(self.replicas):
                    raise outage("the model", error, retry_after=REST[0]) from error
            except Failed as error:
                self._failed(replica, error)
                if tokens:
                    wrong = outage("the rest of the answer", error)
                    yield Finished("error", Usage(len(request.prompt), 0, tokens), error=wrong)
                    return
                tried.add(replica)
                why = str(error)

    async def _from(self, replica: Replica, request: Request, began: float) -> AsyncGenerator[Token | Finished, None]:
        """The answer of one replica, counted in the running requests."""
        server = replica.server
        assert server is not None
        name = served_name(request.mix) if request.mix else server.base
        fitted = _fitted(request, server)
        adapter = replica.resident.get(name) or _ReplicaAdapter()
        for counted in (replica, adapter):
            counted.running += 1
        replica.last = adapter.used = time.monotonic()
        try:
            queued = replica.last - began
            async with aclosing(server.stream(fitted, name)) as answer:
                async for event in answer:
                    replica.faults = 0
                    if isinstance(event, Finished):
                        self.prompt_tokens += event.usage.prompt
                        self.generated_tokens += event.usage.completion
                        event = replace(event, usage=replace(event.usage, queued=queued))
                    yield event
        finally:
            for counted in (replica, adapter):
                counted.running -= 1

    # -- status --------------------------------------------------------------------------------------------------------

    def trouble(self) -> str:
        """Why no request can be answered now; "" if the fleet can answer."""
        return "" if any(r.up for r in self.replicas) else "no replica answers"

    def stats(self) -> EngineStats:
        """Counters of this front door.

        Replicas report caches and steps at their own /metrics.
        """
        running = sum(r.running for r in self.replicas)
        resident = len({name for r in self.replicas for name in r.resident})
        return EngineStats(running, 0, 0.0, 0, 0, 0, 0, self.prompt_tokens, self.generated_tokens, resident)


class FleetAdapters:
    """The adapter memory of a running fleet, for `Catalog`.

    Call from any thread but the fleet's own.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def load(self, digest: str, adapter: Adapter | None = None, *, pinned: bool = False) -> None:
        """Load an adapter. Raises Refused if no replica has it in the end."""
        if pinned:
            raise invalid("adapters cannot be pinned here", "pinned")
        self._wait(self.fleet.load(((digest, 1.0),)))

    def drop(self, digest: str) -> None:
        self._wait(self.fleet.unload(((digest, 1.0),)))

    def unpin(self, digest: str) -> None:
        pass

    def listed(self) -> list[ResidentAdapter]:
        """Always empty: the memory belongs to the replicas."""
        return []

    def _wait(self, work: Coroutine[Any, Any, Any]) -> None:
        assert self.fleet.loop is not None
        asyncio.run_coroutine_threadsafe(work, self.fleet.loop).result()


def _able(up: Sequence[Replica], request: Request) -> list[Replica]:
    """The replicas that support all settings of a request.

    Raises Refused if none does.
    """
    wrong = {r: r.server.refusal(request.sampling) for r in up if r.server is not None}
    if able := [r for r, names in wrong.items() if not names]:
        return able
    names = min(wrong.values(), key=len)
    raise invalid(f"no server behind this one supports {', '.join(names)}", names[0])


def _fitted(request: Request, server: Remote) -> Request:
    """The request with max_tokens cut to the replica's context.

    Raises Refused if the prompt does not fit.
    """
    if not server.room:
        return request
    left = server.room - len(request.prompt)
    if left < 1:
        raise Refused(
            f"the prompt has {len(request.prompt)} tokens, and the context {server.room}",
            status=400,
            code="context_exceeded",
        )
    if request.sampling.max_tokens <= left:
        return request
    fitted = replace(request.sampling, max_tokens=left, min_tokens=min(request.sampling.min_tokens, left))
    return replace(request, sampling=fitted)


def _freest(replicas: Iterable[Replica]) -> Replica:
    return min(replicas, key=lambda r: (r.running, r.last))


async def _is_there(made: asyncio.Task[Path]) -> bool:
    """Whether a folder still exists, since another front door may have removed it.

    Folders still being written count as existing.
    """
    return not made.done() or await asyncio.to_thread(made.result().is_dir)


async def _answer(refusal: Refused) -> Refused | None:
    return refusal
