"""Chat requests to the engine, from a surface's body or from a view in this process.

    chat_job    admission, the prompt's tokens, storing the answer -> a TextJob, which `answers.run` runs
    ask_texts   the whole request without HTTP: events as they arrive, under the same limits and bill

A request carries its mix: only adapters that it names are loaded, and none is merged.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.serve.access import ResolvedModel, shadow_id
from veneer.serve.engine.admission import AdmittedRequest
from veneer.serve.http.answers import IndexedEvent, TextJob, run
from veneer.serve.http.sampling import limited, sampling_of
from veneer.serve.http.service import ChosenMix, Service
from veneer.serve.http.tools import ToolUse, message_of_answer
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Sampling, invalid


@dataclass(frozen=True)
class AskedChat:
    """A conversation and its options.

    `sampling`: parameters for the tokens that the prompt leaves. `n`: answers. `variables`: template
    variables besides messages and tools. `kept`: whether the answer can be stored for feedback. `continued`:
    the last message is the assistant's, and the answer continues it.
    """

    chosen: ChosenMix
    messages: Sequence[dict[str, Any]]
    sampling: Callable[[int], Sampling]
    n: int = 1
    use: ToolUse = field(default_factory=ToolUse)
    variables: Mapping[str, Any] = field(default_factory=dict)
    cache_salt: str = ""
    kept: bool = True
    continued: bool = False


async def chat_job(
    service: Service, caller: Principal, asked: AskedChat, place: AdmittedRequest, number: str
) -> TextJob:
    """The engine job of a chat request. `number`: the answer's id.

    Raises Refused: too much at once (429), a prompt that does not fit the context (400).
    """
    place.take("answers", asked.n)
    prompt = await service.prompts.of_messages(asked.messages, asked.use.shown, place, **asked.variables)
    room = service.prompts.fits(prompt, "messages")
    sampling = asked.sampling(room)
    keep = keep_shadow = None
    if asked.kept:
        served = asked.chosen.served
        keep = _keeping(service, caller, asked, served, number)
        if keep is not None and served.shadow is not None and not isinstance(mix := served.shadow[1], Refused):
            name = served.shadow[0]
            behind = ResolvedModel(mix, served.name, name, adapters=(name,) if mix else ())
            keep_shadow = _keeping(service, caller, asked, behind, shadow_id(number))
    return TextJob(caller, asked.chosen, [prompt], sampling, asked.n, asked.cache_salt, keep, keep_shadow, number)


def _keeping(
    service: Service, caller: Principal, asked: AskedChat, served: ResolvedModel, number: str
) -> Callable[[Sequence[str]], None] | None:
    """A function that stores an answer for feedback, as a training conversation.

    None if not stored.
    """
    keep = service.tenancy.keeping(caller, served, number)
    if keep is None:
        return None
    begun = str(asked.messages[-1].get("content") or "") if asked.continued else ""
    row: dict[str, Any] = {"messages": list(asked.messages[:-1] if asked.continued else asked.messages)}
    if asked.use.shown:
        row["tools"] = list(asked.use.shown)

    def told(texts: Sequence[str]) -> None:
        keep(row, [message_of_answer(asked.use, begun + text) for text in texts])

    return told


@dataclass(frozen=True)
class TextRequest:
    """A request from a view.

    `mix`: (name, strength) of each part, empty for the base. `logprobs`: most likely tokens in addition to
    each of the answer's, None for no logprobs. `id`: the answer's id, used by feedback.
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
    service: Service, caller: Principal, asked: TextRequest, served: Callable[[ResolvedModel], None] | None = None
) -> AsyncGenerator[IndexedEvent, None]:
    """(index, event) of `n` answers, as for a chat completion of the caller.

    The request is a trial (see `ResolvedModel`). Closing it cancels what still runs. `served`: called with the
    resolved names before the first event. Call on the server's event loop. Raises Refused.
    """
    if service.phase != "ready":
        raise Refused(f"the server is {service.phase}", status=503, code="shutting_down", retry_after=5.0)
    most = service.settings.max_choices
    if not 0 < asked.n <= most:
        raise invalid(f"n is {asked.n}", "n", f"from 1 to {most} answers to a prompt")
    place = service.admission.enter(caller.tenant, caller.weight)
    service.inside += 1
    try:
        await service.catalog.fresh()

        def sampling(room: int) -> Sampling:
            wanted = room if asked.max_tokens is None else asked.max_tokens
            return sampling_of(
                max_tokens=limited(wanted, room, service, asked=asked.max_tokens is not None),
                temperature=asked.temperature,
                seed=asked.seed,
                logprobs=asked.logprobs,
            )

        chosen = _chosen(service, caller, asked.mix)
        chosen = replace(chosen, served=chosen.served.as_trial())
        if served is not None:
            served(chosen.served)
        chat = AskedChat(chosen, asked.messages, sampling, asked.n)
        async with aclosing(run(service, await chat_job(service, caller, chat, place, asked.id))) as events:
            async for event in events:
                yield event
    finally:
        service.inside -= 1
        place.leave()


def _chosen(service: Service, caller: Principal, mix: Sequence[tuple[str, float]]) -> ChosenMix:
    """The mix of a view.

    A single name at strength 1 resolves as `model`, so that routes apply.
    """
    if len(mix) == 1 and mix[0][1] == 1:
        return service.mixes.choose(caller, model=mix[0][0])
    return service.mixes.choose(caller, mix=list(mix))
