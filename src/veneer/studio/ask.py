"""Chat requests of a Studio view to the engine in this process, without HTTP.

    async for index, event in ask_texts(service, principal, TextRequest(messages, [("support", 1.0)])): …

A request has the same limits and bill as a chat completion over HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from veneer.serve.access import ResolvedModel
from veneer.serve.http.answers import IndexedEvent, run
from veneer.serve.http.service import Service
from veneer.serve.http.text_bodies import limited, sampling_of
from veneer.serve.http.text_requests import chat_job
from veneer.serve.principal import Principal
from veneer.serve.request import Sampling, invalid, not_ready


@dataclass(frozen=True)
class TextRequest:
    """A request from a Studio view.

    `mix`: (name, strength) of each part, empty for the base. `logprobs`: number of most likely tokens per
    position in addition to the sampled one, or None. `id`: the response's id, used by feedback.
    """

    messages: Sequence[dict[str, Any]]
    mix: Sequence[tuple[str, float]] = ()
    n: int = 1
    seed: int | None = None
    temperature: float = 0.0
    max_tokens: int | None = None
    logprobs: int | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")


async def ask_texts(
    service: Service,
    principal: Principal,
    request: TextRequest,
    on_resolved: Callable[[ResolvedModel], None] | None = None,
) -> AsyncGenerator[IndexedEvent, None]:
    """Yield (index, event) of `n` completions, as for a chat completion of the principal.

    The request is a trial (see `ResolvedModel`). Closing the iterator cancels all running work.
    `on_resolved`: called with the resolved names before the first event. Call this function on the server's
    event loop. Raises Refused.
    """
    if service.phase != "ready":
        raise not_ready(service.phase)
    most = service.settings.max_choices
    if not 0 < request.n <= most:
        raise invalid(f"n is {request.n}", "n", f"from 1 to {most} answers to a prompt")
    admitted = service.admission.enter(principal.tenant, principal.weight)
    service.inside += 1
    try:
        await service.catalog.fresh()

        def sampling(available: int) -> Sampling:
            return sampling_of(
                max_tokens=limited(request.max_tokens, available, service),
                temperature=request.temperature,
                seed=request.seed,
                logprobs=request.logprobs,
            )

        if len(request.mix) == 1 and request.mix[0][1] == 1:  # sent as `model`, so that routes apply
            model = service.choose(principal, model=request.mix[0][0])
        else:
            model = service.choose(principal, mix=list(request.mix))
        model = model.as_trial()
        if on_resolved is not None:
            on_resolved(model)
        job = await chat_job(service, principal, model, request.messages, sampling, admitted, request.id, n=request.n)
        async with aclosing(run(service, job)) as events:
            async for event in events:
                yield event
    finally:
        service.inside -= 1
        admitted.leave()
