"""Runs one HTTP request on the engine: admission, engine requests, metrics and billing.

    run        yields (index, event) of all completions as they arrive
    collect    returns complete completions
    stream     returns server-sent events

Events are read from the engine as soon as they arrive, and queued here, so that a slow client does not delay
other clients. The queue holds at most the tokens of the request's own completions. Closing `run` cancels all
running work.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from veneer.serve.access import BEHIND, SHADOWS, ResolvedModel, ShadowAnswer, shadow_id
from veneer.serve.http.errors import as_refused, log, message_of
from veneer.serve.http.metrics import Meter
from veneer.serve.http.service import Service
from veneer.serve.http.sse import EventStream, client_left
from veneer.serve.http.telemetry import current, settle
from veneer.serve.principal import Principal
from veneer.serve.request import (
    DigestMix,
    EngineEvent,
    Finished,
    Refused,
    Request,
    Sampling,
    Started,
    Token,
    Usage,
    shutting_down,
)

T = TypeVar("T")
IndexedEvent = tuple[int, EngineEvent]
"""(index of the completion within the request, event)."""


class ClientLeft(Exception):
    """The client has closed the connection, so its request is cancelled."""


@dataclass(frozen=True)
class TextJob:
    """The engine work of one HTTP request.

    Each prompt gets `choices` answers, in order: answer i belongs to prompt i // choices. `cache_salt`: the
    client's salt; only prompts with the same salt share cached blocks. `keep`: called with the texts of all
    answers when they are complete; `keep_shadow`: the same for the shadow's answer. `label`: the name in
    metrics, if it is not the model's.
    """

    principal: Principal
    model: ResolvedModel
    prompts: Sequence[tuple[int, ...]]
    sampling: Sampling
    choices: int = 1
    cache_salt: str = ""
    keep: Callable[[Sequence[str]], None] | None = None
    keep_shadow: Callable[[Sequence[str]], None] | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    label: str = ""

    def requests(self, scope: str = "") -> list[Request]:
        """Return the engine requests. `scope`: the cache scope, from the tenancy."""
        salt = json.dumps([scope, self.cache_salt]) if scope or self.cache_salt else ""
        tenant, seed = BEHIND if self.principal is SHADOWS else self.principal.scheduled_as, self.sampling.seed
        model, principal = self.model, self.principal
        shared: dict[str, Any] = {"mix": model.mix, "tenant": tenant, "weight": principal.weight, "salt": salt}
        shared |= {"name": model.name, "router_name": model.router_name, "user": principal.user or ""}
        requests: list[Request] = []
        for prompt in self.prompts:
            for k in range(self.choices):  # the seed of the first completion is the client's; others add their index
                sampling = self.sampling
                if k and seed is not None:
                    sampling = replace(sampling, seed=(seed + k) % 2**63)
                requests.append(Request(prompt, sampling, **shared, id=f"{self.id}-{len(requests)}"))
        return requests


@dataclass
class TextAnswer:
    """One complete completion. `text`: the full text; `tokens`: as emitted by the engine."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    cached: int = 0
    end: Finished | None = None

    def add(self, event: EngineEvent) -> None:
        self.text += "" if isinstance(event, Started) else event.text
        if isinstance(event, Started):
            self.cached = event.cached
        elif isinstance(event, Token):
            self.tokens.append(event)
        else:
            self.end = event

    @property
    def finished(self) -> Finished:
        assert self.end is not None
        return self.end


def finite_logprob(logprob: float | None) -> float:
    """Return a finite log-probability: JSON has no infinity, and OpenAI uses -9999."""
    return logprob if logprob is not None and logprob > -9999.0 else -9999.0


def total(usages: Sequence[Usage], choices: int) -> Usage:
    """Return a request's total usage.

    Counts each prompt once, sums all completions, and uses the longest times.
    """
    firsts = usages[::choices]
    return Usage(
        prompt=sum(u.prompt for u in firsts),
        cached=sum(u.cached for u in firsts),
        completion=sum(u.completion for u in usages),
        queued=max((u.queued for u in usages), default=0.0),
        prefill=max((u.prefill for u in usages), default=0.0),
        decode=max((u.decode for u in usages), default=0.0),
    )


async def run(service: Service, job: TextJob) -> AsyncGenerator[IndexedEvent, None]:
    """Yield (index, event) until every completion has finished. Raises Refused if any completion fails."""
    requests = job.requests(service.tenancy.cache_scope(job.principal, job.model))
    usages = [Usage(0, 0, 0) for _ in requests]
    trail = None if job.principal is SHADOWS else current.get()  # a shadow's task inherits the request's trail
    admitted = service.tenancy.admitted(
        job.principal,
        job.model,
        request=job.id,
        prompt_tokens=sum(map(len, job.prompts)),
        max_tokens=job.sampling.max_tokens * len(requests),
    )
    async with admitted as bill:
        queue: asyncio.Queue[tuple[int, EngineEvent | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(service, job, r, i, queue, usages)) for i, r in enumerate(requests)]
        shadow = _shadow(service, job, requests[0].salt)
        texts = [""] * len(requests)
        going = len(requests)
        billed = False
        try:
            while going:
                i, event = await queue.get()
                if isinstance(event, Exception):
                    raise as_refused(event)
                if isinstance(event, Finished):
                    going -= 1
                    if event.reason == "cancelled":
                        raise event.error or shutting_down()
                    if event.reason == "error":
                        raise event.error or Refused("the answer failed", status=500, code="internal")
                if not isinstance(event, Started):
                    texts[i] += event.text
                if not going:  # bill before yielding the last event, so that a delivered completion is in the ledger
                    billed = True
                    used = total(usages, job.choices)
                    await settle(trail, job.model.name, used, bill)
                    if job.keep is not None:
                        job.keep(texts)
                yield i, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not billed:
                if trail is not None:
                    trail.used(job.model.name, total(usages, job.choices))
                bill.used(total(usages, job.choices))
            if shadow is not None:
                shadow.set_result((texts[0], total(usages, job.choices)))


async def _pump(
    service: Service, job: TextJob, request: Request, i: int, queue: asyncio.Queue[Any], usages: list[Usage]
) -> None:
    """Copy the events of one engine request into the queue, and record the usage so far in `usages`."""
    reason, meter, failed = "abort", None, False
    if job.principal is not SHADOWS:
        named = (job.label or job.model.label, request.router_name, request.mix)
        meter = Meter(service.metrics, *named, tenant=job.principal.tenant)
    try:
        events: Any = service.texts(request)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Started):
                    usages[i] = Usage(len(request.prompt), event.cached, 0)
                    if meter is not None:
                        meter.started()
                elif isinstance(event, Token):
                    usages[i] = replace(usages[i], completion=usages[i].completion + 1)
                    if meter is not None:
                        meter.token()
                else:
                    usages[i] = event.usage
                    reason = {"cancelled": "abort"}.get(event.reason, event.reason)
                    failed = reason == "error"
                queue.put_nowait((i, event))
                if isinstance(event, Finished):
                    return
        raise RuntimeError("the engine ended an answer without Finished")
    except Exception as error:
        reason, status = "error", as_refused(error).status
        failed = status >= 500 or status == 429  # other errors are the client's
        queue.put_nowait((i, error))
    finally:
        if meter is not None:
            meter.end(reason, usages[i], failed=failed)


async def collect(request: HttpRequest, service: Service, job: TextJob) -> list[TextAnswer]:
    """Return all completions of a request. Raises the errors of `run`, and ClientLeft."""
    answers = [TextAnswer() for _ in range(len(job.prompts) * job.choices)]

    async def read() -> None:
        async with aclosing(run(service, job)) as events:
            async for i, event in events:
                answers[i].add(event)

    await unless_left(request, read())
    return answers


async def stream(
    request: HttpRequest,
    service: Service,
    job: TextJob,
    lines: Callable[[AsyncIterator[IndexedEvent]], AsyncIterator[bytes]],
    format_error: Callable[[Refused], bytes],
    headers: Mapping[str, str],
) -> EventStream:
    """Stream completions as server-sent events. Raises the errors of `collect` until the first event.

    `lines`: formats the events. `format_error`: formats an error that occurs after the first event.
    """
    events = run(service, job)
    lines_of_events = lines(await opened_stream(request, events))
    return EventStream(lines_of_events, events, format_error, service.settings.stall, headers)


async def opened_stream(request: HttpRequest, events: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    """Wait for the first event, then return all events.

    An error before the first event can still set the HTTP status. Raises the error of the first event, or
    ClientLeft. The caller closes `events`.
    """
    first = await unless_left(request, anext(events))

    async def all_events() -> AsyncIterator[T]:
        yield first
        async for event in events:
            yield event

    return all_events()


async def unless_left(request: HttpRequest, work: Awaitable[T]) -> T:
    """Return the result of `work`; if the client disconnects first, cancel the work and raise ClientLeft."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.create_task(client_left(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


_Sent = tuple[str, Usage]
"""(text sent to the client, usage)."""


# -- shadows -----------------------------------------------------------------------------------------------------------


def _shadow(service: Service, job: TextJob, salt: str) -> asyncio.Future[_Sent] | None:
    """Start the shadow's answer to the first prompt, unless too many shadows are running.

    Returns a future, or None. When the client's answer is complete, the caller sets the future to the answer's
    text and usage, which are then compared with the shadow's.
    """
    if job.model.shadow is None or len(service.shadows) >= service.settings.shadows:
        return None
    sent: asyncio.Future[_Sent] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(_run_shadow(service, job, salt, *job.model.shadow, sent))
    service.shadows.add(task)
    task.add_done_callback(service.shadows.discard)
    return sent


async def _run_shadow(
    service: Service, job: TextJob, salt: str, name: str, mix: DigestMix | Refused, sent: asyncio.Future[_Sent]
) -> None:
    """Run a request on its route's shadow, under the shadow's own bill.

    Records how the shadow's answer compares with the answer that was sent."""
    answer, error = TextAnswer(), ""
    try:
        if isinstance(mix, Refused):
            raise mix
        model = ResolvedModel(mix, job.model.name, name, adapters=(name,) if mix else ())
        shadow = TextJob(SHADOWS, model, job.prompts[:1], job.sampling, 1, salt, job.keep_shadow, id=shadow_id(job.id))
        async with aclosing(run(service, shadow)) as events:
            async for _, event in events:
                answer.add(event)
    except Exception as problem:  # an error of the shadow must not affect the client's request
        error = message_of(problem) if isinstance(problem, Refused) else repr(problem)
        log.warning("the shadow %s of %s failed (%s): %s", name, job.model.name, job.id, error)
    with suppress(asyncio.CancelledError):
        text, usage = await sent
        so_far = Usage(len(job.prompts[0]), answer.cached, len(answer.tokens))
        own = so_far if answer.end is None else answer.end.usage
        names = (job.id, job.principal.tenant, job.model.name, name, job.model.target)
        compared = ShadowAnswer(*names, text, answer.text, usage, own, error)
        service.tenancy.record_shadow(compared)
