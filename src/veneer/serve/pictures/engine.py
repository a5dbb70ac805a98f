"""Image engine: generates images for many clients, in batches, with one base.

    events([request, …]) -> check, lease adapters -> queue -> fairest batch -> attach, denoise
                         -> Queued, PictureStep …, FinishedPicture for each

Images with equal settings are denoised together. Each image has its own mix and noise, so an image does not
depend on the rest of its batch. One thread denoises; no other code uses the base or its attachment. This
module is independent of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from veneer.core.attach import attach
from veneer.core.targets import base_modules
from veneer.errors import ConfigError, VeneerError
from veneer.formats.strengths import Strength, factors_by_module, in_campaign
from veneer.imaging.adapters import AdapterSource, add_divided, idle_ranges, mix_plan, without_effect
from veneer.imaging.controls import CONTROL_KINDS, ControlSpec, control_model_of
from veneer.imaging.generate import ImageRequest, recorded_picture, shared_record, unread_notes
from veneer.models.image.base import load_control, readers
from veneer.models.image.generate import MixPlan, Moment, PictureSettings, check_rows, generate_images
from veneer.serve.names.adapter_cache import AdapterCache, Lease
from veneer.serve.pictures.request import (
    FinishedPicture,
    PictureEvent,
    PictureRequest,
    PictureStep,
    Queued,
    picture_error,
)
from veneer.serve.request import DigestMix, Engine, EngineStats, Refused, Usage, invalid, make_mix, shutting_down

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter, NamedMix
    from veneer.models.image.base import ImageBase
    from veneer.models.image.generate import GeneratedPicture

_MAX_STEPS = 150
_MOST_PARTS = 64
"""Maximum parts into which the adapters of one image are split.

If an adapter has different strengths in different blocks, it has one part for each distinct strength.
"""
_KEPT_SHAPES = 16
"""Number of split adapters that stay attached, for later images with the same factors."""
_MAX_FAILURES = 3
"""Number of consecutive internal errors after which the engine counts as unhealthy."""


@dataclass(frozen=True, eq=False)
class _LoadedAdapter:
    """An adapter in memory, managed by `AdapterCache`."""

    key: str
    adapter: Adapter

    @property
    def bytes(self) -> int:
        return self.adapter.size_bytes()


class PictureEngine(Engine[Sequence[PictureRequest], tuple[int, PictureEvent]]):
    """An engine that generates images with one base. A context manager.

    `read`: digest -> adapter, checked against the base. `window`: seconds for which an image waits for other
    images to share its batch. `adapter_bytes`: memory for adapters. `stuck_seconds`: if a step takes longer,
    the engine counts as stuck.
    """

    makes = "pictures"

    def __init__(
        self,
        base: ImageBase,
        read: Callable[[str], Adapter],
        *,
        max_batch: int = 4,
        window: float = 0.03,
        max_waiting: int = 64,
        adapter_bytes: int = 1 << 30,
        stuck_seconds: float = 600.0,
    ) -> None:
        self.base, self.stuck_seconds = base, stuck_seconds
        self.max_batch, self.window, self.max_waiting = max_batch, window, max_waiting
        self.max_pixels = 4 * base.size**2
        self.attachment = attach(base.model)
        self._modules = [name for name, _ in base_modules(base.model) if name]
        self._divided: dict[tuple[str, Strength], NamedMix] = {}
        self.residents: AdapterCache[_LoadedAdapter] = AdapterCache(
            read, lambda adapter, digest: _LoadedAdapter(digest, adapter), limit_bytes=adapter_bytes, freed=self._freed
        )
        self._evicted: list[str] = []
        self._controls: dict[str, Any] = {}  # name -> loaded ControlNet
        (tokenizer, limit), *_ = readers(base)
        # A copy, because a tokenizer stores the settings of its last call, and the worker thread uses the
        # original.
        self._counter = copy.deepcopy(getattr(tokenizer, "tokenizer", tokenizer)), limit
        self._preparing, self._counting = threading.Lock(), threading.Lock()
        self._wake = threading.Condition()
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        self._turns = PictureTurns()
        self._closing = False
        self._steps = self._failures = 0
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=copy_context().run, args=(self._loop,), name="pictures", daemon=True)
        self._thread.start()

    def __enter__(self) -> PictureEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop after the current step, fail waiting requests, and restore the base.

        New requests are refused. Blocking; can be called more than once.
        """
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()
        self.residents.close()
        self.attachment.detach()

    async def end(self) -> None:
        await asyncio.to_thread(self.close)

    # -- interface for surfaces ----------------------------------------------------------------------------------------

    async def events(self, requests: Sequence[PictureRequest]) -> AsyncGenerator[tuple[int, PictureEvent], None]:
        """Generate images; yield (request index, event).

        Each request gets Queued, then a PictureStep for each step, and last FinishedPicture. Either all
        requests are accepted or none. Closing the iterator cancels the requests: waiting images leave the
        queue, and a batch without clients ends at its next step. Raises Refused, if possible before the first
        event; the first failure ends all requests.
        """
        self._refuse_beyond(len(requests))
        await asyncio.to_thread(self._check, requests)
        lease = await self._acquire_lease(make_mix((digest, 1.0) for request in requests for digest, _ in request.mix))
        inbox: asyncio.Queue[tuple[int, PictureEvent | Refused]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        adapters = {prepared.key: prepared.adapter for prepared, _ in lease.parts}
        jobs = [_Job(request, i, adapters, loop, inbox) for i, request in enumerate(requests)]
        try:
            if requests[0].factors:
                jobs[0].notes = await asyncio.to_thread(self._without_effect, requests[0], adapters)
            self._submit(jobs)
            for job in jobs:
                yield job.index, Queued()
            left = len(jobs)
            while left:
                index, event = await inbox.get()
                if isinstance(event, Refused):
                    raise event
                left -= isinstance(event, FinishedPicture)
                yield index, event
        finally:
            self._leave(jobs)
            lease.release()

    def control(self, kind: str) -> tuple[str, Any]:
        """Return (name, model) of the ControlNet for a kind of control image.

        Blocking; each model is loaded once. Raises Refused for a kind without a ControlNet.
        """
        with self._preparing:
            names = self._control_names()
            if (name := names.get(kind)) is None:
                fix = f"use one of {', '.join(names)}" if names else "leave control out; this base has no ControlNet"
                raise invalid(f"no control of type {kind!r}", "control", fix)
            if name not in self._controls:
                try:
                    self._controls[name] = load_control(name, self.base)
                except VeneerError as error:
                    raise invalid(error.what, "control", error.fix) from error
            return name, self._controls[name]

    def _control_names(self) -> dict[str, str]:
        """Return kind -> name of the ControlNet, for each kind that this base has."""
        names: dict[str, str] = {}
        for kind in sorted(CONTROL_KINDS):
            with contextlib.suppress(ConfigError):
                names[kind] = control_model_of(self.base, ControlSpec(kind, ""))
        return names

    def in_campaign(self, strength: Strength) -> Strength:
        """Return the strength, with this base's factors instead of a campaign role."""
        return in_campaign(strength, self.base.prediction, self._modules)

    def tokens(self, *texts: str) -> int:
        """Return the number of tokens in these prompts."""
        tokenizer, limit = self._counter
        with self._counting:
            return sum(min(limit, len(tokenizer(text, verbose=False)["input_ids"])) for text in texts)

    def positions(self, settings: PictureSettings) -> int:
        """Return the number of latent positions in an image of this size."""
        unit = self.base.unit
        return ((settings.width or self.base.size) // unit) * ((settings.height or self.base.size) // unit)

    def stats(self) -> EngineStats:
        with self._wake:
            running, waiting, steps = len(self._running), len(self._waiting), self._steps
        memory = self.residents.stats()
        held = {"adapters": memory.adapters, "adapter_bytes": memory.bytes, "evictions": memory.evictions}
        return EngineStats(running, waiting, steps=steps, adapter_slots=memory.slots or self.max_batch, **held)

    def problem(self) -> str:
        if self._closing:
            return ""
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        if self._running and (seconds := time.monotonic() - self._heartbeat) > self.stuck_seconds:
            return f"the engine's step has not ended for {seconds:.0f} s"
        return f"the last {self._failures} pictures failed" if self._failures >= _MAX_FAILURES else ""

    # -- adapters ------------------------------------------------------------------------------------------------------

    async def _acquire_lease(self, mix: DigestMix) -> Lease[_LoadedAdapter]:
        """Wait until all adapters of the mix are in memory. Raises Refused if loading fails."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Lease[_LoadedAdapter] | Refused] = loop.create_future()

        def deliver(result: Lease[_LoadedAdapter] | Refused) -> None:
            if not outcome.done():
                outcome.set_result(result)
            elif isinstance(result, Lease):  # the waiting request is gone
                result.release()

        def ready(result: Lease[_LoadedAdapter] | Refused) -> None:
            loop.call_soon_threadsafe(deliver, result)

        if (lease := self.residents.acquire(mix, ready)) is not None:
            return lease
        try:
            result = await outcome
        finally:
            self.residents.withdraw(ready)
        if isinstance(result, Refused):
            raise result
        return result

    def _freed(self, prepared: _LoadedAdapter) -> None:
        with self._wake:
            self._evicted.append(prepared.key)
            self._wake.notify_all()

    def _tidy(self) -> None:
        """Detach evicted adapters and old split adapters.

        Call on the worker thread, while holding `_wake`.
        """
        recent = list(self._divided)[-_KEPT_SHAPES:]
        for shape in [s for s in self._divided if s[0] in self._evicted or s not in recent]:
            for part, _ in self._divided.pop(shape):
                self.attachment.remove(part)
        for key in self._evicted:
            if key in self.attachment.adapters:
                self.attachment.remove(key)
        self._evicted.clear()

    # -- the queue -----------------------------------------------------------------------------------------------------

    def _check(self, requests: Sequence[PictureRequest]) -> None:
        """Raise Refused for every error that can be found before queueing."""
        for request in requests:
            s = request.settings
            if (s.steps or 0) > _MAX_STEPS:
                raise invalid(f"{s.steps} steps: at most {_MAX_STEPS}", "num_inference_steps")
            try:
                with self._preparing:
                    check_rows(self.base, [request.row(MixPlan())], s)
            except VeneerError as error:
                raise picture_error(error) from error
            parts = 0
            for _, strength in request.uses():
                if (shape := strength.by_block) != Strength():
                    try:
                        parts += len({1.0, *factors_by_module(shape, self._modules).values()})
                    except ConfigError as error:
                        raise invalid(error.what, "mix", error.fix) from error
            if parts > _MOST_PARTS:
                raise invalid(f"the mix has {parts} distinct per-block factors", "mix", f"at most {_MOST_PARTS}")

    def _without_effect(self, request: PictureRequest, adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
        notes: list[str] = []
        for digest, strength in request.uses():
            label = request.labels.get(digest, digest)
            notes += [label + note for note in without_effect(adapters[digest], strength, self._modules)]
        return tuple(notes)

    def _refuse_beyond(self, number: int) -> None:
        if self._closing:
            raise shutting_down()
        if number > self.max_waiting:
            raise invalid(f"{number} images at once: at most {self.max_waiting} can wait", "n")
        if len(self._waiting) + number > self.max_waiting:
            message = f"{len(self._waiting)} images are already waiting; the limit is {self.max_waiting}"
            raise Refused(message, status=429, code="overloaded", retry_after=5.0, fix="try again later")

    def _submit(self, jobs: Sequence[_Job]) -> None:
        with self._wake:
            self._refuse_beyond(len(jobs))
            for job in jobs:
                self._turns.enter(job.request.tenant, {waiting.request.tenant for waiting in self._waiting})
                self._waiting.append(job)
            self._wake.notify_all()

    def _leave(self, jobs: Sequence[_Job]) -> None:
        with self._wake:
            for job in jobs:
                job.abandoned = True
            self._waiting = [job for job in self._waiting if not job.abandoned]

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._running = []
                self._tidy()
                while not self._waiting and not self._closing:
                    self._wake.wait()
                    self._tidy()
                if self._closing:
                    for job in self._waiting:
                        job.deliver(shutting_down())
                    self._waiting.clear()
                    return
                if (left := self._patience()) > 0:
                    self._wake.wait(left)
                    continue
                self._running = self._next()
            self._generate(self._running)

    def _patience(self) -> float:
        """Return for how many more seconds the oldest image waits for others to join.

        Returns 0 or less if the image's batch can start.
        """
        oldest = self._waiting[0]
        if sum(job.kind == oldest.kind for job in self._waiting) >= self.max_batch:
            return 0.0
        return oldest.arrived + self.window - time.monotonic()

    def _next(self) -> list[_Job]:
        """Return the next batch.

        The first image is the oldest of the tenant whose turn is next. Images of the same kind follow, with
        tenants taking turns.
        """
        batch: list[_Job] = []
        while len(batch) < self.max_batch:
            fitting = [job for job in self._waiting if not batch or job.kind == batch[0].kind]
            if not fitting:
                break
            job = min(fitting, key=lambda job: self._turns.at(job.request.tenant))
            self._turns.take(job.request.tenant, job.request.weight)
            self._waiting.remove(job)
            batch.append(job)
        return batch

    # -- the worker thread ---------------------------------------------------------------------------------------------

    def _generate(self, jobs: Sequence[_Job]) -> None:
        jobs = [job for job in jobs if not job.abandoned and self._attach_adapters(job)]
        if not jobs:
            return
        settings = replace(jobs[0].request.settings, image=None, mask=None, references=(), batch_size=len(jobs))
        began = self._heartbeat = time.monotonic()
        rows, watch = [job.request.row(job.plan) for job in jobs], partial(self._watch, jobs)
        try:
            pictures = generate_images(self.base, rows, settings, attachment=self.attachment, watch=watch)
        except _Abandoned:
            for job in jobs:
                job.deliver(shutting_down())
            return
        except Exception as error:
            if len(jobs) > 1:  # rerun each image alone, to find the one that fails
                for job in jobs:
                    self._generate([job])
                return
            refused = picture_error(error)
            self._failures += refused.status >= 500
            jobs[0].deliver(refused)
            return
        self._failures = 0
        for job, picture in zip(jobs, pictures, strict=True):
            try:
                job.deliver(self._finished(job, picture, began))
            except Exception as error:  # an error in one image's record must not end the thread
                job.deliver(picture_error(error))

    def _attach_adapters(self, job: _Job) -> bool:
        try:
            for digest, _ in job.request.mix:
                if digest not in self.attachment.adapters:
                    self.attachment.add(digest, job.adapters[digest])
            job.plan = mix_plan([(strength, self._parts(digest, strength)) for digest, strength in job.request.uses()])
        except Exception as error:
            job.deliver(picture_error(error))
            return False
        return True

    def _parts(self, digest: str, strength: Strength) -> NamedMix:
        """Return an adapter as attached parts, one for each distinct per-block factor.

        The most recently used parts stay attached.
        """
        key = digest, strength.by_block
        if key[1] == Strength():
            return ((digest, 1.0),)
        parts = self._divided.pop(key, None)
        self._divided[key] = add_divided(self.attachment, *key, self._modules) if parts is None else parts
        return self._divided[key]

    def _watch(self, jobs: Sequence[_Job], moment: Moment) -> None:
        if self._closing or all(job.abandoned for job in jobs):
            raise _Abandoned
        self._steps += 1
        self._heartbeat = time.monotonic()
        for job in jobs[moment.start : moment.start + len(moment.rows)]:
            if not job.abandoned:
                job.deliver(PictureStep(moment.done, moment.of))

    def _finished(self, job: _Job, picture: GeneratedPicture, began: float) -> FinishedPicture:
        """Return the finished image with its record.

        The record describes only this image, because other images of the batch can belong to other clients.
        """
        request, now = job.request, time.monotonic()
        labels = {digest: request.labels.get(digest, "") for digest, _ in request.mix}
        sources = {d: AdapterSource(d, "", d, "", "", "", display_name=label) for d, label in labels.items()}
        described = ImageRequest(request.prompt, request.negative, request.seed, request.uses())
        shared = shared_record(self.base, request.settings) | dict(request.inputs)
        shared["base"]["name"] = self.base.short_name
        recorded = recorded_picture(self.base, sources, picture, [described], 0, shared)
        named = [(request.labels.get(digest, digest), strength) for digest, strength in request.uses()]
        notes = [*unread_notes(picture), *idle_ranges(named, picture.steps), *job.notes]
        tokens = self.tokens(*(text for text in (request.prompt, request.negative) if text))
        usage = Usage(tokens, 0, self.positions(request.settings), began - job.arrived, decode=now - began)
        return FinishedPicture(recorded, usage, len(picture.batch), tuple(notes))


class _Abandoned(Exception):
    """Raised when the engine closes, or when no client waits for the batch any more."""


class _Job:
    """An image in the queue, and the channel to its client."""

    def __init__(
        self,
        request: PictureRequest,
        index: int,
        adapters: Mapping[str, Adapter],
        loop: asyncio.AbstractEventLoop,
        inbox: asyncio.Queue[tuple[int, PictureEvent | Refused]],
    ) -> None:
        self.request, self.index, self.adapters, self._loop, self._inbox = request, index, adapters, loop, inbox
        self.kind = request.kind()
        self.plan = MixPlan()
        self.notes: tuple[str, ...] = ()
        self.arrived = time.monotonic()
        self.abandoned = False

    def deliver(self, event: PictureEvent | Refused) -> None:
        """Send an event to the client. Can be called from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (self.index, event))
        except RuntimeError:  # the event loop is closed, so no client waits
            self.abandoned = True


class PictureTurns:
    """Weighted round robin among tenants, counted in images.

    Each image advances its tenant's clock by 1/weight. The tenant whose clock is furthest behind is next. A
    tenant that returns after a pause starts at the current time, so that pauses earn no credit.
    """

    def __init__(self) -> None:
        self._clocks: dict[str, float] = {}
        self._present = 0.0

    def enter(self, tenant: str, waiting: set[str]) -> None:
        if tenant not in waiting:
            self._clocks = {name: at for name, at in self._clocks.items() if name in waiting or at > self._present}
            self._clocks[tenant] = max(self._clocks.get(tenant, 0.0), self._present)

    def at(self, tenant: str) -> float:
        return self._clocks[tenant]

    def take(self, tenant: str, weight: float) -> None:
        self._present = max(self._present, self._clocks[tenant])
        self._clocks[tenant] += 1 / max(weight, 1e-6)
