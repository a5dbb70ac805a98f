"""Chat requests to the engine, from an HTTP body or from a Studio view in this process.

    chat_job    admission, prompt tokens, storage for feedback -> a TextJob, which `answers.run` runs
    ask_texts   the full request without HTTP: events as they arrive, under the same limits and bill

A request carries its mix: only adapters that it names are loaded, and none is merged.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from veneer.serve.access import ResolvedModel, shadow_id
from veneer.serve.engine.admission import AdmittedRequest
from veneer.serve.http.answers import IndexedEvent, TextJob, run
from veneer.serve.http.service import Service
from veneer.serve.http.text_bodies import limited, sampling_of
from veneer.serve.http.tools import ToolReader, ToolUse, message_of_answer
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Sampling, invalid, not_ready


async def chat_job(
    service: Service,
    principal: Principal,
    model: ResolvedModel,
    messages: Sequence[dict[str, Any]],
    sampling: Callable[[int], Sampling],
    admitted: AdmittedRequest,
    id: str,
    *,
    n: int = 1,
    use: ToolUse | None = None,
    variables: Mapping[str, Any] | None = None,
    cache_salt: str = "",
    stores: bool = True,
) -> TextJob:
    """Return the engine job of a conversation.

    `sampling`: from the number of free tokens to parameters. `id`: the response's. `variables`: chat template
    variables other than messages and tools. `stores`: whether the completion can be stored for feedback.
    Raises Refused (429 for too many requests, 400 for a prompt that exceeds the context).
    """
    use, variables = use or ToolUse(), variables or {}
    admitted.reserve("answers", n)
    prompt = await service.prompts.of_messages(messages, admitted, use.tools, **variables)
    settings = sampling(service.prompts.fits(prompt, "messages"))
    continued = bool(variables.get("continue_final_message"))

    def keeping(answered: ResolvedModel, answer_id: str) -> Callable[[Sequence[str]], None] | None:
        """Return a function that stores completions for feedback as training conversations, or None."""
        keep = service.tenancy.keeping(principal, answered, answer_id) if stores else None
        if keep is None:
            return None
        start = str(messages[-1].get("content") or "") if continued else ""
        row: dict[str, Any] = {"messages": list(messages[:-1] if continued else messages)}
        if use.tools:
            row["tools"] = list(use.tools)
        return lambda texts: keep(row, [message_of_answer(ToolReader(use), start + text) for text in texts])

    keep, keep_shadow = keeping(model, id), None
    if keep is not None and model.shadow is not None and not isinstance(mix := model.shadow[1], Refused):
        name = model.shadow[0]
        behind = ResolvedModel(mix, model.name, name, adapters=(name,) if mix else ())
        keep_shadow = keeping(behind, shadow_id(id))
    return TextJob(principal, model, [prompt], settings, n, cache_salt, keep, keep_shadow, id)


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
    `on_resolved`: called with the resolved names before the first event. Call on the server's event loop.
        Raises Refused.
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
