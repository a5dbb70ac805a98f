"""A fleet: other servers of the same base behind the front door, as an `Engine`.

    fleet = Fleet(["http://a:8000", "http://b:8000"], files=…, decode=…, cache=…)
    async with fleet:
        async for event in fleet.events(request): …

A request goes to the replica with the fewest requests running among those that have its mix. Where none has, the mix
is made one folder (`folders`), every replica that is up is told to load it, and the request goes where that is done
first. A replica that could not load it never gets the request: what it would answer is the base's words under the
adapter's name.

| what a replica does                  | what follows                                                                  |
| does not answer                      | before the first token another one is tried; it rests 1, 2, 4 … 30 seconds    |
| answers 5xx or 429                   | another one is tried; the third time in a row it rests too                    |
| forgot an adapter (it was restarted) | the adapter is loaded again, there or elsewhere, before the first token       |
| fails after the first token          | Finished with an error: what was sent cannot be taken back                    |
| refuses an adapter                   | its reason goes to the client, and is remembered for `_REFUSED_FOR` seconds   |
| has more than `capacity` adapters    | those longest unused are unloaded, never one with a request running           |

An adapter as it is goes to all replicas; a mix that a client made up of strengths to `mix_copies` of them. Which these
are follows from the names alone (rendezvous hashing: the replicas whose hash with the mix is
highest), so that every front door says the same, and a replica that leaves or comes moves only what was on it. What is
kept of such mixes is bounded (`folders`).

Knows replicas, residency and routes; how to talk to one server is `remote`'s.
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
from veneer.serve.names.resident import ResidentAdapter
from veneer.serve.outage import fault, is_outage, outage
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

log = logging.getLogger("veneer.serve.fleet.fleet")

REST = (1.0, 30.0)
"""Seconds that a replica rests after a failure: the first time, and at most, doubling in between."""
FAULTS = 3
"""Failed answers in a row after which a replica rests. One alone may be the fault of what was asked."""
_REFUSED_FOR = 30.0
_WATCH_EVERY = 5.0


@dataclass
class _ReplicaAdapter:
    """An adapter on a replica."""

    used: float = 0.0
    running: int = 0


@dataclass(eq=False)
class Replica:
    """One upstream. `server` is None until it first answered. `rest_until`: not asked before. `failures`: rests in a
    row; `faults`: failed answers in a row. `last`: when it last got a request."""

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
    """`files`: digest -> the path of that adapter's files, as the library resolves it. `decode`: the base's tokenizer,
    special tokens included. `cache`: where folders for replicas are made; replicas read them by the same path, so it
    and the library are on a disk that they share. `mix_copies`: on how many replicas a mix is loaded that a client
    made. `capacity`: adapters kept on one replica. `mixes`: of one tenant at a time; `cache_bytes`: of all folders.
    `key`: sent to the replicas as a bearer token."""

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
        """Name of a mix -> its folder, under way or made."""
        self.refused: dict[tuple[str, str], tuple[float, Refused]] = {}
        self.closing = False
        self.loop: asyncio.AbstractEventLoop | None = None
        """Where it runs, once it does."""
        self.prompt_tokens = self.generated_tokens = 0
        self._watch: asyncio.Task[None] | None = None
        self._spreading: set[asyncio.Task[Any]] = set()
        self._collecting: asyncio.Task[None] | None = None
        self._unwanted: list[str] = []
        self._going: set[str] = set()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Ask every replica once, and keep watching them."""
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
        """What goes on behind requests: mixes that are made, loaded, brought to more replicas, and let go of."""
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
        """Ask a replica how it is; one question at a time, whoever asks."""
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
            replica.resident.pop(name, None)  # it was restarted, or somebody unloaded them
        if not replica.up:
            # Names say what they mean, so that what an earlier front door loaded is as good as loaded by this one.
            new = {n for n in has - set(replica.resident) if n.startswith("veneer-")}
            replica.resident |= {name: _ReplicaAdapter(time.monotonic()) for name in new}
            log.info("%s is up; it has %d adapters", replica.place, len(replica.resident))
        replica.up, replica.failures, replica.faults, replica.rest_until = True, 0, 0, 0.0

    def _failed(self, replica: Replica, error: Failed) -> None:
        """Let it rest, unless it rests already: many requests may see the same failure."""
        replica.faults += 1
        if time.monotonic() < replica.rest_until or (replica.up and error.answered and replica.faults < FAULTS):
            return
        rest = min(REST[0] * 2**replica.failures, REST[1])
        replica.up, replica.failures = False, replica.failures + 1
        replica.rest_until = time.monotonic() + rest
        log.warning("%s rests for %g s: %s", replica.place, rest, error)

    # -- adapters ------------------------------------------------------------------------------------------------------

    async def load(self, mix: DigestMix) -> dict[str, str]:
        """Bring a mix to its replicas now and wait for all of them: upstream -> "" or why not.

        Raises Refused where no replica has it in the end."""
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
        """Why no replica takes adapters, in the words of one of them."""
        for server in (r.server for r in up if r.server is not None and not r.server.loads):
            try:
                await server.load(name, "")
            except Refused as refusal:
                return refusal
        return outage("the model", "no replica answers", retry_after=REST[0])

    async def unload(self, mix: DigestMix) -> None:
        """Take a mix off every replica that has it. Requests that run with it go on: vLLM keeps what they need."""
        name = served_name(mix)
        self.making.pop(name, None)
        await asyncio.gather(*(self._unload(r, name) for r in self.replicas))

    async def _unload(self, replica: Replica, name: str) -> None:
        if replica.resident.pop(name, None) is not None and replica.server is not None:
            with contextlib.suppress(Failed):
                await replica.server.unload(name)

    async def _folder(self, mix: DigestMix) -> Path:
        """The mix as one folder, made once. Raises Refused with the reason where it cannot be."""
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
        """Note who asks for a mix that was made, and let go of what that tenant has for it. Raises Refused(429)."""
        if is_made(mix) and (names := self.folders.use(served_name(mix), tenant, self._busy)):
            self.collect(names)

    def _busy(self, name: str) -> bool:
        here = [r.resident[name] for r in self.replicas if name in r.resident]
        return any(a.running for a in here) or any(name in r.loading for r in self.replicas)

    def collect(self, names: Sequence[str] = ()) -> None:
        """Let go of `names`, and of folders beyond the limit, behind the requests."""
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
        """The replicas that should have a mix and have not."""
        name = served_name(mix)
        able = [r for r in up if r.server is not None and r.server.loads]
        able.sort(key=lambda r: rendezvous(name, r.place), reverse=True)
        return [r for r in able[: self.mix_copies if is_made(mix) else None] if name not in r.resident]

    async def _bring(self, mix: DigestMix, up: Sequence[Replica]) -> dict[Replica, asyncio.Task[Refused | None]]:
        """The loads of a mix on those of `up` that should have it, those under way included. Raises Refused where it
        has no folder."""
        name, now = served_name(mix), time.monotonic()
        tasks: dict[Replica, asyncio.Task[Refused | None]] = {}
        if not self._missing(mix, up):
            return tasks
        folder = str(await self._folder(mix))
        for replica in self._missing(mix, up):  # others may have been placed meanwhile
            until, refusal = self.refused.get((replica.place, name), (0.0, None))
            if refusal is not None and now < until:
                tasks[replica] = asyncio.create_task(_answer(refusal))
            elif name not in replica.loading:
                tasks[replica] = replica.loading[name] = asyncio.create_task(self._load(replica, name, folder))
            else:
                tasks[replica] = replica.loading[name]
        return tasks

    def _spread(self, mix: DigestMix, up: Sequence[Replica]) -> None:
        """Bring a mix in the background to replicas that should have it too: they came later, or were restarted."""
        name, now = served_name(mix), time.monotonic()
        to = [r for r in self._missing(mix, up) if name not in r.loading]
        to = [r for r in to if self.refused.get((r.place, name), (0.0, None))[0] <= now]
        if to and not self._spreading:
            task: asyncio.Task[Any] = asyncio.create_task(self._bring(mix, up))
            self._spreading.add(task)
            task.add_done_callback(self._spreading.discard)

    async def _load(self, replica: Replica, name: str, folder: str) -> Refused | None:
        """None when it is there, else why not."""
        server = replica.server
        assert server is not None
        try:
            await self._make_room(replica)
            await server.load(name, folder)
        except Refused as refusal:
            now = time.monotonic()
            self.refused = {key: kept for key, kept in self.refused.items() if kept[0] > now}
            self.refused[replica.place, name] = (now + _REFUSED_FOR, refusal)
            self.making.pop(name, None)  # the files may have moved: looked up again the next time
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
        """Unload what was not used for longest. All of them busy: one more is better than no answer."""
        idle = sorted((n for n, a in replica.resident.items() if not a.running), key=lambda n: replica.resident[n].used)
        for name in idle[: max(0, len(replica.resident) + 1 - self.capacity)]:
            await self._unload(replica, name)

    # -- routes --------------------------------------------------------------------------------------------------------

    async def _up(self, tried: set[Replica]) -> list[Replica]:
        """The replicas that may be asked; those whose rest is over are asked how they are first."""
        now = time.monotonic()
        due = [r for r in self.replicas if not r.up and now >= r.rest_until]
        up = [r for r in self.replicas if r.up and r not in tried]
        if due and not up:
            await asyncio.gather(*(self._check(r) for r in due))
            up = [r for r in self.replicas if r.up and r not in tried]
        return up

    async def _route(self, request: Request, tried: set[Replica], why: str = "") -> Replica:
        """The replica for a request, which has its mix. Raises Refused, with `why` the last one failed."""
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
        """The engine's protocol: Started, Tokens, Finished. Started comes with the first token, because until then
        another replica may have to answer."""
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
        """The answer of one replica, counted while it runs."""
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

    # -- what is known -------------------------------------------------------------------------------------------------

    def trouble(self) -> str:
        """Why no request can be answered now; "" where one can."""
        return "" if any(r.up for r in self.replicas) else "no replica answers"

    def stats(self) -> EngineStats:
        """What the front door sees; the replicas' own /metrics have their caches and steps."""
        running = sum(r.running for r in self.replicas)
        resident = len({name for r in self.replicas for name in r.resident})
        return EngineStats(running, 0, 0.0, 0, 0, 0, 0, self.prompt_tokens, self.generated_tokens, resident)


class FleetAdapters:
    """What is loaded on the replicas of a fleet that runs, for `Catalog`: from any thread but the fleet's own."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def load(self, digest: str, adapter: Adapter | None = None, *, pinned: bool = False) -> None:
        """Raises Refused where no replica has it in the end."""
        if pinned:
            raise invalid("adapters cannot be pinned here", "pinned")
        self._wait(self.fleet.load(((digest, 1.0),)))

    def drop(self, digest: str) -> None:
        self._wait(self.fleet.unload(((digest, 1.0),)))

    def unpin(self, digest: str) -> None:
        pass

    def listed(self) -> list[ResidentAdapter]:
        """None: the memory is the replicas' own."""
        return []

    def _wait(self, work: Coroutine[Any, Any, Any]) -> None:
        assert self.fleet.loop is not None
        asyncio.run_coroutine_threadsafe(work, self.fleet.loop).result()


def _able(up: Sequence[Replica], request: Request) -> list[Replica]:
    """The replicas that can do what is asked, all of it. Raises Refused where none can."""
    wrong = {r: r.server.refusal(request.sampling) for r in up if r.server is not None}
    if able := [r for r, names in wrong.items() if not names]:
        return able
    names = min(wrong.values(), key=len)
    raise invalid(f"no server behind this one supports {', '.join(names)}", names[0])


def _fitted(request: Request, server: Remote) -> Request:
    """The request within the replica's room. Raises Refused for a prompt that does not fit."""
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
    """Whether a folder is there still: another front door may have collected it. One under way will be."""
    return not made.done() or await asyncio.to_thread(made.result().is_dir)


async def _answer(refusal: Refused) -> Refused | None:
    return refusal
