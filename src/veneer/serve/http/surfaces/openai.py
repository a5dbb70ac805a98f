"""OpenAI's text routes: chat completions, completions, models.

`model` can name one adapter, and `mix` several.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer import __version__
from veneer.library.names import organisation_of, parse_tuned, tuned_of
from veneer.serve.access import ModelCard
from veneer.serve.http.answers import IndexedEvent, TextAnswer, TextJob, collect, finite_logprob, stream, total
from veneer.serve.http.bodies import BodyRoute
from veneer.serve.http.errors import Json, error_body
from veneer.serve.http.guard import needs
from veneer.serve.http.prompts import Prompts
from veneer.serve.http.service import Service, admission_of, caller_of, service_of
from veneer.serve.http.sse import data
from veneer.serve.http.surfaces.messages import model_info, model_page
from veneer.serve.http.text_bodies import ChatBody, CompletionBody, TextBody
from veneer.serve.http.text_requests import chat_job
from veneer.serve.http.tools import ToolCall, ToolReader, ToolUse, message_of_answer, tool_use
from veneer.serve.principal import Principal
from veneer.serve.request import EngineEvent, Finished, Refused, Sampling, Started, Token, Usage, invalid

_RENDERED = 64
"""Maximum prompts of a request to render; each prompt's entry repeats all parameters."""

openai_routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute, dependencies=[needs("infer")])


# -- models ------------------------------------------------------------------------------------------------------------


@openai_routes.get("/v1/models", summary="List the base, adapters and routes that are visible to the caller.")
async def models(request: HttpRequest) -> Response:
    service, principal = service_of(request), caller_of(request)
    cards = service.catalog.models(principal)
    cards = [*cards, *_tuned_cards(service.catalog.base, cards, principal)]
    if "anthropic-version" in request.headers:
        return Json(model_page(service, cards, request.query_params))
    return Json({"object": "list", "data": [_card(service, card) for card in cards]})


@openai_routes.get("/v1/models/{model:path}", summary="Get a model.")
async def model(request: HttpRequest, model: str) -> Response:
    service = service_of(request)
    card = service.catalog.card(model, caller_of(request))
    return Json((model_info if "anthropic-version" in request.headers else _card)(service, card))


def _tuned_cards(base: str, cards: Sequence[ModelCard], principal: Principal) -> list[ModelCard]:
    """Return the caller's fine-tuned models again, under their OpenAI names (`ft:…`)."""
    names = {card.id: tuned_of(base, card.id) for card in cards if card.parent is not None}
    tuned = {id: str(name) for id, name in names.items() if name is not None and name.organisation == principal.tenant}
    return [replace(card, id=tuned[card.id]) for card in cards if card.id in tuned]


def _card(service: Service, card: ModelCard) -> dict[str, Any]:
    """Return a model as JSON in vLLM's format, with the adapter's digest.

    `owned_by` is the organization of a fine-tuned model, or "veneer".
    """
    tuned = parse_tuned(card.id)
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "root": card.root,
        "parent": card.parent,
        "owned_by": "veneer" if tuned is None else organisation_of(tuned.organisation),
        "max_model_len": service.prompts.context,
        "digest": card.digest,
    }


# -- completions -------------------------------------------------------------------------------------------------------


@openai_routes.post("/v1/chat/completions", summary="Answer a conversation.")
async def chat(request: HttpRequest, body: ChatBody) -> Response:
    job, use = await _chat_job(request, body)
    if body.store and job.keep is None:
        body.ignore("store")
    service = service_of(request)
    return await _respond(request, service, job, body, _ChatFormat(service.prompts, job, use))


@openai_routes.post("/v1/chat/completions/render", summary="Get the tokens of a conversation's prompt, as vLLM does.")
async def render_chat(request: HttpRequest, body: ChatBody) -> Response:
    job, _ = await _chat_job(request, body)
    return Json(_rendered(job, body)[0], headers=body.headers)


async def _chat_job(request: HttpRequest, body: ChatBody) -> tuple[TextJob, ToolUse]:
    service, principal = service_of(request), caller_of(request, body.user)
    n = body.choices(service)
    model = service.choose(principal, **body.adapters())
    use = tool_use(body.tools, body.tool_choice, service.prompts.takes_tools)

    def sampling(available: int) -> Sampling:
        settings: dict[str, Any] = {"max_tokens": body.limit(), "logprobs": body.alternatives(), "grammar": use.grammar}
        return body.sampling(service, available=available, **settings)

    job = await chat_job(
        service,
        principal,
        model,
        [message.model_dump(exclude_none=True) for message in body.messages],
        sampling,
        admission_of(request),
        f"chatcmpl-{request.scope['veneer.id']}",
        n=n,
        use=use,
        variables=body.variables(),
        cache_salt=body.cache_salt or "",
        stores=body.store is not False,
    )
    return job, use


@openai_routes.post("/v1/completions", summary="Complete one or several texts.")
async def completions(request: HttpRequest, body: CompletionBody) -> Response:
    job, echoes = await _text_job(request, body)
    service = service_of(request)
    return await _respond(
        request, service, job, body, _TextFormat(service.prompts, job, body, echoes, service.catalog.fingerprint)
    )


@openai_routes.post("/v1/completions/render", summary="Get the tokens of prompts, as vLLM does.")
async def render(request: HttpRequest, body: CompletionBody) -> Response:
    job, _ = await _text_job(request, body)
    return Json(_rendered(job, body), headers=body.headers)


async def _text_job(request: HttpRequest, body: CompletionBody) -> tuple[TextJob, list[str]]:
    """Return the engine job, and the texts of the prompts to echo."""
    service, principal = service_of(request), caller_of(request, body.user)
    n = body.choices(service)
    texts = body.texts(service)
    if body.store:  # only chat completions can be stored
        body.ignore("store")
    model = service.choose(principal, **body.adapters())
    admitted = admission_of(request)
    admitted.reserve("answers", len(texts) * n)
    echoes = [text for text in texts if isinstance(text, str)]
    if echoes:
        prompts = await service.prompts.of_parts(echoes, admitted, special=body.add_special_tokens)
    else:
        prompts = [service.prompts.of_ids(ids) for ids in texts if not isinstance(ids, str)]
        echoes = [await service.prompts.decode(ids, admitted) for ids in prompts] if body.echo else []
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs cannot be used with stream", "prompt_logprobs", "leave stream out")
    counts = [each for each in (body.logprobs, body.prompt_logprobs) if each is not None]
    settings = body.sampling(
        service,
        available=min(service.prompts.fits(prompt) for prompt in prompts),
        max_tokens=body.max_tokens,
        logprobs=max(counts, default=None),
        prompt_logprobs=bool(body.echo and body.logprobs is not None) or body.prompt_logprobs is not None,
        sampled_logprob=body.return_token_ids,
    )
    job = TextJob(
        principal, model, prompts, settings, n, body.cache_salt or "", id=f"cmpl-{request.scope['veneer.id']}"
    )
    return job, echoes


def _rendered(job: TextJob, body: TextBody) -> list[dict[str, Any]]:
    """Return one GenerateRequest for each prompt, with the keys of
    vllm/entrypoints/scale_out/token_in_token_out/protocol.py.

    Routers read `token_ids`; the sampling parameters have vLLM's names. Raises Refused (400) for more prompts than
    _RENDERED, because each repeats the parameters."""
    if len(job.prompts) > _RENDERED:
        raise invalid(f"at most {_RENDERED} prompts can be rendered at a time", "prompt")
    names = {"stop_ids": "stop_token_ids", "grammar": "", "sampled_logprob": "", "prompt_logprobs": ""}
    sampling = {names.get(key, key): value for key, value in vars(job.sampling).items() if names.get(key, key)}
    shared: dict[str, Any] = {"sampling_params": sampling | {"n": job.choices}, "features": None, "priority": 0}
    shared |= {"model": job.model.name, "stream": bool(body.stream), "cache_salt": body.cache_salt}
    ids = [f"{job.id}-{i}" for i in range(len(job.prompts))] if len(job.prompts) > 1 else [job.id]
    return [shared | {"request_id": i, "token_ids": p} for i, p in zip(ids, job.prompts, strict=True)]


async def _respond(
    request: HttpRequest, service: Service, job: TextJob, body: TextBody, form: _ChatFormat | _TextFormat
) -> Response:
    if not body.stream:
        answers = await collect(request, service, job)
        usage = total([answer.finished.usage for answer in answers], job.choices)
        choices = [form.choice(i, answer) for i, answer in enumerate(answers)]
        response = _head(job, form.whole_kind) | form.head | {"choices": choices, "usage": _usage(usage)}
        return Json(response, headers=body.headers)
    wants_usage = body.stream_options is not None and body.stream_options.include_usage

    def error_event(error: Refused) -> bytes:
        return data(error_body(error, "OpenAI")[1]) + data("[DONE]")

    return await stream(
        request, service, job, lambda events: _chunks(job, form, events, wants_usage), error_event, body.headers
    )


# -- response formats --------------------------------------------------------------------------------------------------


def _head(job: TextJob, kind: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": kind,
        "created": int(time.time()),
        "model": job.model.name,
        "system_fingerprint": f"veneer-{__version__}",
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


async def _chunks(
    job: TextJob, form: _ChatFormat | _TextFormat, events: AsyncIterator[IndexedEvent], wants_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the chunks of a streamed response.

    `wants_usage`: end with a separate chunk that contains the usage.
    """
    head = _head(job, form.kind) | form.head | ({"usage": None} if wants_usage else {})
    usages: dict[int, Usage] = {}
    for i in range(len(job.prompts) * job.choices):
        for choice in form.first(i):
            yield data(head | {"choices": [choice]})
    async for i, event in events:
        if isinstance(event, Finished):
            usages[i] = event.usage
        for choice in form.pieces(i, event):
            yield data(head | {"choices": [choice]})
    if wants_usage:
        usage = total([usages[i] for i in sorted(usages)], job.choices)
        yield data(head | {"choices": [], "usage": _usage(usage)})
    yield data("[DONE]")


def _best(token: Token, count: int) -> list[tuple[int, float]]:
    """Return up to `count` (id, logprob) pairs, best first.

    The candidates are the top tokens and the sampled token.
    """
    logprobs = {id: logprob for id, _, logprob in token.top}
    logprobs.setdefault(token.id, token.logprob if token.logprob is not None else -9999.0)
    return sorted(logprobs.items(), key=lambda pair: -pair[1])[:count]


def _is_visible(token: Token) -> bool:
    """Return whether clients see a token.

    The special token that ends a text is hidden; an upstream's held-back text has no token id."""
    return token.id >= 0 and not (token.special and not token.text)


def logprob_entries(prompts: Prompts, tokens: Sequence[Token], count: int) -> list[dict[str, Any]]:
    """Return OpenAI's log-probabilities of the tokens that clients see, each with `count` alternatives."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = prompts.piece(token)
        return {"token": text, "logprob": finite_logprob(logprob), "bytes": list(raw)}

    return [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(id, p) for id, p in _best(token, count)]}
        for token in tokens
        if _is_visible(token)
    ]


class _ChatFormat:
    kind, whole_kind = "chat.completion.chunk", "chat.completion"

    def __init__(self, prompts: Prompts, job: TextJob, use: ToolUse) -> None:
        self.prompts, self.use, self.count = prompts, use, job.sampling.logprobs
        self.head: dict[str, Any] = {}
        self.readers = [ToolReader(use) for _ in range(len(job.prompts) * job.choices)]

    def choice(self, i: int, answer: TextAnswer) -> dict[str, Any]:
        """Return choice `i` of a response that is not streamed."""
        message = message_of_answer(self.readers[i], answer.text) | {"refusal": None}
        if "tool_calls" in message and not message["content"].strip():
            message["content"] = None
        logprobs = None if self.count is None else self.logprobs(answer.tokens)
        return {"index": i, "message": message, "logprobs": logprobs, **self.ending(i, answer.finished)}

    def ending(self, i: int, end: Finished) -> dict[str, Any]:
        called = self.readers[i].calls and self.use.mode != "named" and end.reason == "stop"
        return {"finish_reason": "tool_calls" if called else end.reason, "stop_reason": end.stop}

    def first(self, i: int) -> list[dict[str, Any]]:
        return [self.piece(i, {"role": "assistant", "content": ""})]

    def pieces(self, i: int, event: EngineEvent) -> list[dict[str, Any]]:
        if isinstance(event, Started):
            return []
        reader = self.readers[i]
        parsed = [*reader.feed(event.text), *(reader.end() if isinstance(event, Finished) else ())]
        choices = [
            self.piece(i, {"tool_calls": [p.delta()]} if isinstance(p, ToolCall) else {"content": p}) for p in parsed
        ]
        if isinstance(event, Finished):
            return [*choices, self.piece(i, {}) | self.ending(i, event)]
        if self.count is not None and _is_visible(event):
            choices = choices or [self.piece(i, {"content": ""})]
            choices[0]["logprobs"] = self.logprobs([event])
        return choices

    def piece(self, i: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"content": logprob_entries(self.prompts, tokens, self.count or 0), "refusal": None}


class _TextFormat:
    kind = whole_kind = "text_completion"

    def __init__(
        self, prompts: Prompts, job: TextJob, body: CompletionBody, echoes: list[str], fingerprint: str
    ) -> None:
        self.prompts, self.choices, self.ids = prompts, job.choices, body.return_token_ids
        # what the tokens were sampled from, for clients that train on them
        sampled_by = {"base": fingerprint, "adapters": [list(part) for part in job.model.mix]}
        self.head: dict[str, Any] = {"sampled_by": sampled_by} if self.ids else {}
        self.inputs = [list(prompt) for prompt in job.prompts] if self.ids else []
        self.word = (
            (lambda id: f"token_id:{id}") if body.return_tokens_as_token_ids else lambda id: prompts.piece(id)[0]
        )
        self.echoes = echoes if body.echo else []
        self.count, self.prompt_count = body.logprobs, body.prompt_logprobs
        # if true, the first token event also carries the prompt's tokens with log-probabilities
        self.scored = bool(body.echo) and body.logprobs is not None
        self.offsets = [0 if self.scored else len(self.echo(i)) for i in range(len(job.prompts) * job.choices)]

    def echo(self, i: int) -> str:
        return self.echoes[i // self.choices] if self.echoes else ""

    def choice(self, i: int, answer: TextAnswer) -> dict[str, Any]:
        """Return choice `i` of a response that is not streamed."""
        logprobs = self.logprobs(i, [each for token in answer.tokens for each in self.reported(token)])
        text, end = self.echo(i) + answer.text, answer.finished
        choice = self.piece(i, text, logprobs) | {"finish_reason": end.reason, "stop_reason": end.stop}
        choice |= self.token_ids(answer.tokens)
        if self.ids:
            choice["prompt_token_ids"] = self.inputs[i // self.choices]
        if self.prompt_count is not None:
            prompt = answer.tokens[0].prompt if answer.tokens else ()
            choice["prompt_logprobs"] = [self.prompt_logprob(token, self.prompt_count) for token in prompt]
        return choice

    def prompt_logprob(self, token: Token, most: int) -> dict[str, Any] | None:
        """Return the entry of one prompt token in vLLM's prompt_logprobs.

        The entry has the `most` most likely tokens, by id, and the prompt token itself. A token that is not
        in `token.top` has no rank.
        """
        if token.logprob is None:
            return None
        ranks = {id: rank for rank, (id, _, _) in enumerate(token.top, 1)}
        best = {id: logprob for id, _, logprob in token.top[:most]} | {token.id: token.logprob}
        return {
            str(id): {
                "logprob": finite_logprob(logprob),
                "rank": ranks.get(id),
                "decoded_token": self.prompts.piece(id)[0],
            }
            for id, logprob in best.items()
        }

    def first(self, i: int) -> list[dict[str, Any]]:
        echo = self.echo(i)
        return [self.piece(i, echo, None)] if echo and not self.scored else []

    def pieces(self, i: int, event: EngineEvent) -> list[dict[str, Any]]:
        if isinstance(event, Started):
            return []
        if isinstance(event, Finished):
            return [self.piece(i, event.text, None) | {"finish_reason": event.reason, "stop_reason": event.stop}]
        reported = self.reported(event)
        logprobs = self.logprobs(i, reported) if reported else None
        text = (self.echo(i) if event.prompt else "") + event.text
        ids = self.token_ids([event])
        return [self.piece(i, text, logprobs) | ids] if text or logprobs or ids else []

    def token_ids(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the ids, and the log-probabilities in the distribution that the tokens were sampled from.

        `sampling_logprobs` are missing if the engine does not report them. Tokens without an id only carry text.
        """
        if not self.ids:
            return {}
        tokens = [token for token in tokens if token.id >= 0]
        logprobs = [finite_logprob(token.sampled_logprob) for token in tokens if token.sampled_logprob is not None]
        known = {"sampling_logprobs": logprobs} if self.count is not None and len(logprobs) == len(tokens) else {}
        return {"token_ids": [token.id for token in tokens], **known}

    def piece(self, i: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": None}

    def reported(self, token: Token) -> list[Token]:
        """Return the tokens whose log-probabilities are sent with this token.

        If the client also requests the prompt's log-probabilities, the first token is sent with the prompt's
        tokens, and the end token is included, because such clients count tokens. With token ids, each token
        with an id has a log-probability.
        """
        if self.scored:
            return [*token.prompt, token]
        return [token] if (token.id >= 0 if self.ids else _is_visible(token)) else []

    def logprobs(self, i: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return log-probabilities in OpenAI's older format.

        The format has parallel lists. Alternatives are keyed by text and always include the sampled token.
        """
        if self.count is None:
            return None
        lists: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token in tokens:
            text = self.word(token.id)
            logprob = None if token.logprob is None else finite_logprob(token.logprob)
            best = {self.word(id): finite_logprob(p) for id, p in _best(token, self.count)}
            lists["text_offset"].append(self.offsets[i])
            lists["token_logprobs"].append(logprob)
            lists["tokens"].append(text)
            lists["top_logprobs"].append(None if logprob is None else best | {text: logprob})
            self.offsets[i] += 0 if self.prompts.special(token.id) else len(self.prompts.piece(token.id)[0])
        return lists
