"""OpenAI's text API: chat completions, completions, models; `model` may be an adapter, and `mix` several.

A form (`_ChatForm`, `_TextForm`) says how an answer is written, whole and in pieces; everything else is one for both.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer import __version__
from veneer.serve.access import ModelCard
from veneer.serve.http.bodies import BodyRoute
from veneer.serve.http.errors import Json, error_body, invalid
from veneer.serve.http.house import House, caller_of, house_of, place_of
from veneer.serve.http.prompts import Prompts
from veneer.serve.http.running import Answer, Ask, Opened, collect, opened, total, unless_left
from veneer.serve.http.sse import EventStream, data
from veneer.serve.http.surfaces.openai_bodies import Chat, Completion, Shared
from veneer.serve.http.surfaces.tools import Call, ToolUse, tool_use
from veneer.serve.request import Finished, Refused, Started, Token, Usage

__all__ = ["router"]

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


# -- models ------------------------------------------------------------------------------------------------------------


@router.get("/v1/models", summary="The base, adapters and routes that exist for this caller.")
async def models(request: HttpRequest) -> Response:
    house = house_of(request)
    return Json({"object": "list", "data": [_card(house, c) for c in house.catalog.models(caller_of(request))]})


@router.get("/v1/models/{model:path}", summary="One of them.")
async def model(request: HttpRequest, model: str) -> Response:
    house = house_of(request)
    for card in house.catalog.models(caller_of(request)):
        if card.id == model:
            return Json(_card(house, card))
    raise Refused(f"The model `{model[:200]}` does not exist.", status=404, code="model_not_found", param="model")


def _card(house: House, card: ModelCard) -> dict[str, Any]:
    """A model as vLLM describes it, with the adapter's digest."""
    permission = {
        "id": f"modelperm-{card.digest[:24] or card.id}", "object": "model_permission", "created": card.created,
        "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False,
        "allow_view": True, "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
    }  # fmt: skip
    return {
        "id": card.id, "object": "model", "created": card.created, "owned_by": "veneer", "root": card.root,
        "parent": card.parent, "max_model_len": house.prompts.context, "permission": [permission],
        "digest": card.digest, "pinned": card.pinned,
    }  # fmt: skip


# -- the two routes ----------------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions", summary="Answer a conversation.")
async def chat(request: HttpRequest, body: Chat) -> Response:
    house, caller = house_of(request), caller_of(request, body.user)
    n = body.choices(house)
    chosen = house.choose(caller, **body.adapters())
    use = tool_use(body.tools, body.tool_choice, house.prompts.takes_tools)
    place = place_of(request)
    place.take("answers", n)
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    prompt = await house.prompts.of_messages(messages, use.shown, place, **body.variables())
    room = house.prompts.fits(prompt, "messages")
    settings = body.sampling(
        house, room=room, max_tokens=body.limit(), default=room, logprobs=body.alternatives(), grammar=use.grammar
    )
    ask = Ask(caller, chosen, [prompt], settings, n, body.cache_salt or "", f"chatcmpl-{request.scope['veneer.id']}")
    return await _answered(request, house, ask, body, _ChatForm(house.prompts, ask, use))


@router.post("/v1/completions", summary="Continue one or several texts.")
async def completions(request: HttpRequest, body: Completion) -> Response:
    house, caller = house_of(request), caller_of(request, body.user)
    n = body.choices(house)
    texts = body.texts(house)
    if len(texts) * n > house.settings.max_prompts:
        raise invalid(
            f"{len(texts)} prompts with {n} answers each", "n", f"at most {house.settings.max_prompts} answers"
        )
    chosen = house.choose(caller, **body.adapters())
    place = place_of(request)
    place.take("answers", len(texts) * n)
    written = [text for text in texts if isinstance(text, str)]
    if written:
        prompts = await house.prompts.of_parts(written, special=[body.add_special_tokens] * len(written), place=place)
        echoes = written
    else:
        prompts = [house.prompts.of_ids(ids) for ids in texts if not isinstance(ids, str)]
        echoes = [await house.prompts.decode(ids, place=place) for ids in prompts] if body.echo else []
    room = min(house.prompts.fits(prompt) for prompt in prompts)
    scored = bool(body.echo) and body.logprobs is not None
    settings = body.sampling(
        house, room=room, max_tokens=body.max_tokens, default=room, logprobs=body.logprobs, prompt_logprobs=scored
    )
    ask = Ask(caller, chosen, prompts, settings, n, body.cache_salt or "", f"cmpl-{request.scope['veneer.id']}")
    return await _answered(request, house, ask, body, _TextForm(house.prompts, ask, echoes if body.echo else []))


async def _answered(request: HttpRequest, house: House, ask: Ask, body: Shared, form: _Form) -> Response:
    if not body.stream:
        answers = await unless_left(request, collect(house, ask))
        return Json(form.whole(answers), headers=body.headers)
    events = await opened(request, house, ask)
    options = body.stream_options
    lines = form.stream(
        events, bool(options and options.include_usage), bool(options and options.continuous_usage_stats)
    )

    def told(error: Exception) -> bytes:
        assert isinstance(error, Refused)
        return data(error_body(error, "OpenAI")[1]) + data("[DONE]")

    stream = EventStream(lines, events, told, house.settings.stall)
    stream.headers.update(body.headers)
    return stream


# -- forms -------------------------------------------------------------------------------------------------------------


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class _Form:
    """How answers are written. Subclasses say what a piece and a whole choice look like."""

    kind = whole_kind = ""

    def __init__(self, prompts: Prompts, ask: Ask) -> None:
        self.prompts, self.ask = prompts, ask
        self.head = {
            "id": ask.id, "object": self.kind, "created": int(time.time()), "model": ask.chosen.served.name,
            "system_fingerprint": f"veneer-{__version__}",
        }  # fmt: skip
        self.count = len(ask.prompts) * ask.choices

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [self.choice(i, answer) for i, answer in enumerate(answers)]
        usage = total([answer.finished.usage for answer in answers], self.ask.choices)
        return {**self.head, "object": self.whole_kind, "choices": choices, "usage": _usage(usage)}

    async def stream(self, events: Opened, usage_last: bool, usage_always: bool) -> AsyncIterator[bytes]:
        usages = [Usage(0, 0, 0) for _ in range(self.count)]

        def chunk(choices: list[dict[str, Any]], usage: Usage | None) -> bytes:
            body: dict[str, Any] = {**self.head, "choices": choices}
            if usage_last or usage_always:
                body["usage"] = None if usage is None else _usage(usage)
            return data(body)

        def so_far() -> Usage | None:
            return total(usages, self.ask.choices) if usage_always else None

        for i in range(self.count):
            for choice in self.first(i):
                yield chunk([choice], so_far())
        async for i, event in events:
            if isinstance(event, Started):
                usages[i] = Usage(len(self.ask.prompts[i // self.ask.choices]), event.cached, 0)
            elif isinstance(event, Token):
                old = usages[i]
                usages[i] = Usage(old.prompt, old.cached, old.completion + 1)
            else:
                usages[i] = event.usage
            for choice in self.pieces(i, event):
                yield chunk([choice], so_far())
        if usage_last:
            yield chunk([], total(usages, self.ask.choices))
        yield data("[DONE]")

    def choice(self, i: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def first(self, i: int) -> list[dict[str, Any]]:
        raise NotImplementedError

    def pieces(self, i: int, event: Started | Token | Finished) -> list[dict[str, Any]]:
        raise NotImplementedError

    # -- logprobs

    @property
    def alternatives(self) -> int | None:
        return self.ask.sampling.logprobs

    def best(self, token: Token) -> list[tuple[int, float]]:
        """The likeliest tokens, best first, as many as were asked for; the chosen one among them if it is one."""
        known = {id: logprob for id, _, logprob in token.top}
        known.setdefault(token.id, token.logprob if token.logprob is not None else -9999.0)
        ranked = sorted(known.items(), key=lambda pair: -pair[1])
        return ranked[: self.alternatives or 0]


class _ChatForm(_Form):
    kind, whole_kind = "chat.completion.chunk", "chat.completion"

    def __init__(self, prompts: Prompts, ask: Ask, use: ToolUse) -> None:
        super().__init__(prompts, ask)
        self.use = use
        self.readers = [use.reader() for _ in range(self.count)]

    def choice(self, i: int, answer: Answer) -> dict[str, Any]:
        reader = self.readers[i]
        found = [*reader.feed(answer.text), *reader.end()]
        calls = [piece.whole() for piece in found if isinstance(piece, Call)]
        text = "".join(piece for piece in found if isinstance(piece, str))
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text.strip() else text}
        message["refusal"] = None
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if self.alternatives is not None:
            logprobs = {"content": [self.logprob(t) for t in answer.tokens if shown(t)], "refusal": None}
        return {"index": i, "message": message, "logprobs": logprobs, **self.ending(i, answer.finished)}

    def ending(self, i: int, end: Finished) -> dict[str, Any]:
        called = self.readers[i].calls and self.use.mode != "named" and end.reason == "stop"
        return {"finish_reason": "tool_calls" if called else end.reason, "stop_reason": _stop_text(end)}

    def first(self, i: int) -> list[dict[str, Any]]:
        return [self.piece(i, {"role": "assistant", "content": ""})]

    def pieces(self, i: int, event: Started | Token | Finished) -> list[dict[str, Any]]:
        if isinstance(event, Started):
            return []
        reader = self.readers[i]
        found = list(reader.feed(event.text))
        if isinstance(event, Finished):
            found += reader.end()
        made = [self.piece(i, {"tool_calls": [p.delta()]} if isinstance(p, Call) else {"content": p}) for p in found]
        if isinstance(event, Finished):
            return [*made, self.piece(i, {}) | self.ending(i, event)]
        if self.alternatives is not None and shown(event):
            made = made or [self.piece(i, {"content": ""})]
            made[0]["logprobs"] = {"content": [self.logprob(event)], "refusal": None}
        return made

    def piece(self, i: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprob(self, token: Token) -> dict[str, Any]:
        best = [self.entry(id, logprob) for id, logprob in self.best(token)]
        return self.entry(token.id, token.logprob) | {"top_logprobs": best}

    def entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self.prompts.piece(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


class _TextForm(_Form):
    kind = whole_kind = "text_completion"

    def __init__(self, prompts: Prompts, ask: Ask, echoes: list[str]) -> None:
        super().__init__(prompts, ask)
        self.echoes = echoes
        self.scored = ask.sampling.prompt_logprobs  # then a prompt is told with its logprobs, by the first token
        self.at = [0 if self.scored else len(self.echo(i)) for i in range(self.count)]

    def echo(self, i: int) -> str:
        return self.echoes[i // self.ask.choices] if self.echoes else ""

    def choice(self, i: int, answer: Answer) -> dict[str, Any]:
        logprobs = self.logprobs(i, [each for token in answer.tokens for each in self.told(token)])
        text = self.echo(i) + answer.text
        return {"index": i, "text": text, "logprobs": logprobs, **self.ending(answer.finished)}

    def ending(self, end: Finished) -> dict[str, Any]:
        return {"finish_reason": end.reason, "stop_reason": _stop_text(end)}

    def first(self, i: int) -> list[dict[str, Any]]:
        echo = self.echo(i)
        return [self.piece(i, echo, None)] if echo and not self.scored else []

    def pieces(self, i: int, event: Started | Token | Finished) -> list[dict[str, Any]]:
        if isinstance(event, Started):
            return []
        if isinstance(event, Finished):
            return [self.piece(i, event.text, None) | self.ending(event)]
        told = self.told(event)
        logprobs = self.logprobs(i, told) if told else None
        text = (self.echo(i) if event.prompt else "") + event.text
        return [self.piece(i, text, logprobs)] if text or logprobs else []

    def told(self, token: Token) -> list[Token]:
        """The tokens whose logprobs come with this one: the prompt's before the first. Whoever asks for the prompt's
        counts tokens, so that one that ends the answer is among them there."""
        return [*token.prompt, token] if self.scored or shown(token) else []

    def piece(self, i: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": None}

    def logprobs(self, i: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """OpenAI's older form: lists beside each other; alternatives by text, the chosen token always among them."""
        if self.alternatives is None:
            return None
        texts = [self.prompts.piece(token.id)[0] for token in tokens]
        offsets = []
        for token, text in zip(tokens, texts, strict=True):
            offsets.append(self.at[i])
            self.at[i] += 0 if self.prompts.special(token.id) else len(text)
        tops: list[dict[str, float] | None] = []
        for token, text in zip(tokens, texts, strict=True):
            best = {self.prompts.piece(id)[0]: _finite(logprob) for id, logprob in self.best(token)}
            tops.append(None if token.logprob is None else best | {text: _finite(token.logprob)})
        chosen = [None if token.logprob is None else _finite(token.logprob) for token in tokens]
        return {"text_offset": offsets, "token_logprobs": chosen, "tokens": texts, "top_logprobs": tops}


def shown(token: Token) -> bool:
    """Whether a token is part of the answer: the special one that ends it is not."""
    return not (token.special and not token.text)


def _finite(logprob: float | None) -> float:
    """JSON has no infinity; -9999 is OpenAI's word for it."""
    return logprob if logprob is not None and logprob > -9999.0 else -9999.0


def _stop_text(end: Finished) -> str | int | None:
    """vLLM's stop_reason: the stop text, or the id of a token other than the usual one."""
    return end.stop
