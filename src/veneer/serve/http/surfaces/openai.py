"""OpenAI's text API: chat completions, completions, models.

`model` can be an adapter, and `mix` several.

bodies    OpenAI's keys, vLLM's extensions, and the ways to name a mix
routes    a form (`_ChatForm`, `_TextForm`) writes answers, whole and streamed; the rest is shared
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer import __version__
from veneer.library.names import organisation_of, parse_tuned, tuned_of
from veneer.serve.access import ModelCard
from veneer.serve.http.answers import (
    IndexedEvent,
    OpenStream,
    TextAnswer,
    TextJob,
    collect,
    finite_logprob,
    stream,
    total,
)
from veneer.serve.http.bodies import (
    FAIL_FAST,
    ITEMS,
    Body,
    BodyRoute,
    MixField,
    Neutral,
    Objects,
    Strict,
    at_most,
    checked,
    mix_of,
)
from veneer.serve.http.errors import Json, error_body
from veneer.serve.http.guard import needs
from veneer.serve.http.prompts import Prompts
from veneer.serve.http.sampling import (
    Bias,
    Ids,
    Paths,
    Seed,
    Stop,
    Texts,
    bias_of,
    choices_regex,
    limited,
    one_grammar,
    sampling_of,
    schema_text,
    stops_of,
)
from veneer.serve.http.service import Service, admission_of, caller_of, service_of
from veneer.serve.http.sse import data
from veneer.serve.http.text_requests import AskedChat, chat_job
from veneer.serve.http.tools import ToolCall, ToolReader, ToolUse, tool_use
from veneer.serve.principal import Principal
from veneer.serve.request import EngineEvent, Finished, GrammarSpec, Refused, Sampling, Started, Token, Usage, invalid

openai_routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute, dependencies=[needs("infer")])


# -- bodies ------------------------------------------------------------------------------------------------------------

_NO_BEAMS = "answers are sampled, not searched in beams"
_GREEDY_OR_NOT = "the answer would be another one"
Choices = Annotated[list[str], FAIL_FAST, at_most(1000)]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Shared(Body):
    """The keys that chat and completions share."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "service_tier",
            "parallel_tool_calls",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prediction",
            "guided_decoding_backend",
            "guided_whitespace_pattern",
            "request_id",
        }
    )
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        "use_beam_search": ((False,), _NO_BEAMS),
        "length_penalty": ((1.0,), _NO_BEAMS),
        "early_stopping": ((False,), _NO_BEAMS),
        "prompt_logprobs": ((), "/v1/completions has them"),
        "guided_grammar": ((), "grammars in EBNF are not read; use a JSON schema or a regular expression"),
        "bad_words": (([],), "use logit_bias"),
        "allowed_token_ids": (([],), "use logit_bias, or a grammar"),
        "logits_processors": (([],), "no code of a client's is run"),
        "skip_special_tokens": ((True,), "answers are text without special tokens"),
        "spaces_between_special_tokens": ((True, False), _GREEDY_OR_NOT),
        "include_stop_str_in_output": ((False,), "a stop text is never part of the answer; stop_reason names it"),
        "truncate_prompt_tokens": ((), "nothing is cut unasked; send a shorter prompt"),
        "return_tokens_as_token_ids": ((False,), "ask for logprobs, or use /tokenize"),
        "return_token_ids": ((False,), "ask for logprobs, or use /tokenize"),
        "priority": ((0,), "the operator sets each tenant's weight"),
        "kv_transfer_params": ((), "this server is one process"),
        "mm_processor_kwargs": (({},), "this base reads text alone"),
        "vllm_xargs": (({},), _GREEDY_OR_NOT),
        "structural_tag": ((), "use tools, or response_format"),
    }

    model: str = Field(default="", max_length=512, description="the base, an adapter, a route, or base:adapter")
    mix: MixField | None = None
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="prompts share what was computed under equal salts alone",
    )
    lora_path: Paths | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[Ids, at_most(64)] | None = None
    min_tokens: int = Field(default=0, ge=0, lt=1 << 31)
    ignore_eos: bool = False
    logit_bias: Bias | None = None
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    store: bool | None = Field(default=None, description="false: not kept for feedback")
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(default=None, max_length=20_000)
    guided_choice: Choices | None = None
    structured_outputs: dict[str, Any] | None = None

    def choices(self, service: Service) -> int:
        n, most = self.n or 1, service.settings.max_choices
        if n > most:
            raise invalid(f"n is {n}", "n", f"at most {most} answers to a prompt")
        if self.best_of not in (None, n):
            raise invalid(f"best_of is {self.best_of} and n {n}", "best_of", "leave best_of out: every answer is sent")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options goes with stream", "stream_options")
        return n

    def path(self) -> str | None:
        """SGLang's lora_path, if it is the same for every prompt."""
        if not isinstance(self.lora_path, list):
            return self.lora_path
        if len(set(self.lora_path)) > 1:
            raise invalid(
                "lora_path names different adapters for one request's prompts", "lora_path", "one request each"
            )
        return self.lora_path[0] if self.lora_path else None

    def adapters(self) -> dict[str, Any]:
        """The arguments of MixChooser.choose."""
        return {"model": self.model, "mix": mix_of(self.mix), "lora_path": self.path()}

    def sampling(
        self,
        service: Service,
        *,
        room: int,
        max_tokens: int | None,
        default: int,
        logprobs: int | None,
        prompt_logprobs: bool = False,
        grammar: GrammarSpec | None = None,
    ) -> Sampling:
        """The Sampling of a request.

        `room`: tokens that the context leaves; `default`: max_tokens if unset.
        """
        wanted = min(default, room) if max_tokens is None else max_tokens
        return sampling_of(
            max_tokens=limited(wanted, room, service, asked=max_tokens is not None),
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=bias_of(self.logit_bias, service.prompts),
            seed=self.seed,
            stop=stops_of(self.stop, service.settings.max_stops),
            stop_ids=service.prompts.of_ids(self.stop_token_ids or [], "stop_token_ids"),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=one_grammar([grammar, grammar_of(self)]),
        )


class _JsonSchema(Strict):
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None
    wanted: dict[str, Any] = Field(alias="schema")


class _Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _Structured(Strict):
    wanted: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = Field(default=None, max_length=20_000)
    choice: Choices | None = None
    json_object: bool | None = None


def grammar_of(body: Shared) -> GrammarSpec | None:
    """The grammar of the answer, from whichever key names it; at most one."""
    found: list[GrammarSpec | None] = []
    if body.response_format is not None:
        form: _Format = checked(_Format, body.response_format, "response_format")
        if form.type == "json_schema":
            if form.json_schema is None:
                raise invalid("response_format has no json_schema", "response_format")
            found.append(("json_schema", schema_text(form.json_schema.wanted, "response_format")))
        elif form.type == "json_object":
            found.append(("json_object", ""))
    structured: _Structured = checked(_Structured, body.structured_outputs or {}, "structured_outputs")
    for schema in (body.guided_json, structured.wanted):
        found.append(None if schema is None else ("json_schema", schema_text(schema, "guided_json")))
    for regex in (body.guided_regex, structured.regex):
        found.append(None if regex is None else ("regex", regex))
    for choice in (body.guided_choice, structured.choice):
        found.append(None if choice is None else ("regex", choices_regex(choice)))
    found.append(("json_object", "") if structured.json_object else None)
    return one_grammar(found)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Objects | None = None
    name: str | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # Returned by OpenAI's client with an assistant's turn; always empty here.
    refusal: None = None
    audio: None = None
    annotations: None = None
    function_call: None = None


class ChatBody(Shared):
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        **Shared.refused,
        "functions": (([],), "it is the old form of tools"),
        "function_call": (("none",), "it is the old form of tool_choice"),
        "modalities": ((["text"],), "this base writes text alone"),
        "audio": ((), "this base writes text alone"),
        "web_search_options": ((), "this server looks nothing up"),
        "reasoning_effort": ((), "this base has no such setting; chat_template_kwargs reaches its template"),
        "verbosity": ((), "this base has no such setting"),
        "echo": ((False,), "a conversation is not repeated"),
        "chat_template": ((), "no template of a client's is run"),
        "documents": (([],), "write them into a message"),
        "add_special_tokens": ((False,), "the chat template writes them"),
    }
    messages: Annotated[list[Message], FAIL_FAST, at_most(ITEMS)] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[Objects, at_most(128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def limit(self) -> int | None:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise invalid("max_tokens and max_completion_tokens differ", "max_completion_tokens", "keep one")
        return next(iter(both), None)

    def alternatives(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs goes with logprobs", "top_logprobs", "logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def variables(self) -> dict[str, Any]:
        """The template's variables besides messages and tools."""
        found = dict(self.chat_template_kwargs or {})
        if self.continue_final_message:
            if self.messages[-1].role != "assistant":
                raise invalid("the last message is not the assistant's", "continue_final_message")
            return {**found, "continue_final_message": True, "add_generation_prompt": False}
        return found if self.add_generation_prompt else {**found, "add_generation_prompt": False}


class CompletionBody(Shared):
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        **{name: why for name, why in Shared.refused.items() if name != "prompt_logprobs"},
        "suffix": (("",), "this base continues a text, and does not fill gaps"),
    }
    prompt: Texts
    max_tokens: int | None = Field(default=16, ge=1, lt=1 << 31)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="likeliest tokens of each place of the prompt, by id, as vLLM has it"
    )
    add_special_tokens: bool = True

    def texts(self, service: Service) -> list[str | list[int]]:
        """The prompts as a list."""
        given: Any = self.prompt
        prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        most = service.settings.max_prompts
        if not 0 < len(prompts) <= most:
            raise invalid(f"there are {len(prompts)} prompts", "prompt", f"from 1 to {most}")
        return prompts


# -- models ------------------------------------------------------------------------------------------------------------


@openai_routes.get("/v1/models", summary="The base, adapters and routes that exist for this caller.")
async def models(request: HttpRequest) -> Response:
    service, caller = service_of(request), caller_of(request)
    cards = service.catalog.models(caller)
    cards = [*cards, *_tuned(service.catalog.base, cards, caller)]
    return Json({"object": "list", "data": [_card(service, card) for card in cards]})


@openai_routes.get("/v1/models/{model:path}", summary="One of them.")
async def model(request: HttpRequest, model: str) -> Response:
    service = service_of(request)
    return Json(_card(service, service.catalog.card(model, caller_of(request))))


def _tuned(base: str, cards: Sequence[ModelCard], caller: Principal) -> list[ModelCard]:
    """Fine-tuned models of the caller again, under OpenAI's names."""
    names = {card.id: tuned_of(base, card.id) for card in cards if card.parent is not None}
    own = {id: str(name) for id, name in names.items() if name is not None and name.organisation == caller.tenant}
    return [replace(card, id=own[card.id]) for card in cards if card.id in own]


def _card(service: Service, card: ModelCard) -> dict[str, Any]:
    """A model in vLLM's format, with the adapter's digest.

    A fine-tuned model belongs to its organization.
    """
    tuned = parse_tuned(card.id)
    trainable = (
        service.fine_tunes
        and service.engine.makes == "texts"
        and (tuned is not None or card.id == service.catalog.base)
    )
    permission = {
        "id": f"modelperm-{card.digest[:24] or card.id}",
        "object": "model_permission",
        "created": card.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": trainable,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "root": card.root,
        "parent": card.parent,
        "owned_by": "veneer" if tuned is None else organisation_of(tuned.organisation),
        "max_model_len": service.prompts.context,
        "permission": [permission],
        "digest": card.digest,
        "pinned": card.pinned,
    }


# -- the two routes ----------------------------------------------------------------------------------------------------


@openai_routes.post("/v1/chat/completions", summary="Answer a conversation.")
async def chat(request: HttpRequest, body: ChatBody) -> Response:
    service, caller = service_of(request), caller_of(request, body.user)
    n = body.choices(service)
    chosen = service.mixes.choose(caller, **body.adapters())
    use = tool_use(body.tools, body.tool_choice, service.prompts.takes_tools)

    def sampling(room: int) -> Sampling:
        return body.sampling(
            service, room=room, max_tokens=body.limit(), default=room, logprobs=body.alternatives(), grammar=use.grammar
        )

    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    asked = AskedChat(
        chosen,
        messages,
        sampling,
        n,
        use,
        body.variables(),
        body.cache_salt or "",
        kept=body.store is not False,
        continued=body.continue_final_message,
    )
    job = await chat_job(service, caller, asked, admission_of(request), f"chatcmpl-{request.scope['veneer.id']}")
    if body.store and job.keep is None:
        body.ignore("store")
    return await _answered(request, service, job, body, _ChatForm(service.prompts, job, use))


@openai_routes.post("/v1/completions", summary="Continue one or several texts.")
async def completions(request: HttpRequest, body: CompletionBody) -> Response:
    service, caller = service_of(request), caller_of(request, body.user)
    n = body.choices(service)
    texts = body.texts(service)
    if len(texts) * n > service.settings.max_prompts:
        raise invalid(
            f"{len(texts)} prompts with {n} answers each", "n", f"at most {service.settings.max_prompts} answers"
        )
    if body.store:  # only conversations are stored
        body.ignore("store")
    chosen = service.mixes.choose(caller, **body.adapters())
    place = admission_of(request)
    place.take("answers", len(texts) * n)
    written = [text for text in texts if isinstance(text, str)]
    if written:
        prompts = await service.prompts.of_parts(written, special=body.add_special_tokens, place=place)
        echoes = written
    else:
        prompts = [service.prompts.of_ids(ids) for ids in texts if not isinstance(ids, str)]
        echoes = [await service.prompts.decode(ids, place=place) for ids in prompts] if body.echo else []
    room = min(service.prompts.fits(prompt) for prompt in prompts)
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs come with a whole answer", "prompt_logprobs", "leave stream out")
    scored = bool(body.echo) and body.logprobs is not None
    asked = [each for each in (body.logprobs, body.prompt_logprobs) if each is not None]
    settings = body.sampling(
        service,
        room=room,
        max_tokens=body.max_tokens,
        default=room,
        logprobs=max(asked, default=None),
        prompt_logprobs=scored or body.prompt_logprobs is not None,
    )
    job = TextJob(caller, chosen, prompts, settings, n, body.cache_salt or "", id=f"cmpl-{request.scope['veneer.id']}")
    return await _answered(request, service, job, body, _TextForm(service.prompts, job, body, echoes))


async def _answered(request: HttpRequest, service: Service, job: TextJob, body: Shared, form: _Form) -> Response:
    if not body.stream:
        return Json(form.whole(await collect(request, service, job)), headers=body.headers)
    options = body.stream_options or StreamOptions()

    def told(error: Refused) -> bytes:
        return data(error_body(error, "OpenAI")[1]) + data("[DONE]")

    return await stream(request, service, job, lambda events: form.stream(events, options), told, body.headers)


# -- response formats --------------------------------------------------------------------------------------------------


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class _Form:
    """Writes answers; subclasses define the format of a chunk and a whole choice."""

    kind = whole_kind = ""

    def __init__(self, prompts: Prompts, job: TextJob) -> None:
        self.prompts, self.job = prompts, job
        self.head = {
            "id": job.id,
            "object": self.kind,
            "created": int(time.time()),
            "model": job.chosen.served.name,
            "system_fingerprint": f"veneer-{__version__}",
        }
        self.count = len(job.prompts) * job.choices

    def whole(self, answers: Sequence[TextAnswer]) -> dict[str, Any]:
        choices = [self.choice(i, answer) for i, answer in enumerate(answers)]
        usage = total([answer.finished.usage for answer in answers], self.job.choices)
        return {**self.head, "object": self.whole_kind, "choices": choices, "usage": _usage(usage)}

    async def stream(self, events: OpenStream[IndexedEvent], options: StreamOptions) -> AsyncIterator[bytes]:
        usages = [Usage(0, 0, 0) for _ in range(self.count)]
        usage_last, usage_always = options.include_usage, options.continuous_usage_stats

        def chunk(choices: list[dict[str, Any]], usage: Usage | None) -> bytes:
            body: dict[str, Any] = {**self.head, "choices": choices}
            if usage_last or usage_always:
                body["usage"] = None if usage is None else _usage(usage)
            return data(body)

        def so_far() -> Usage | None:
            return total(usages, self.job.choices) if usage_always else None

        for i in range(self.count):
            for choice in self.first(i):
                yield chunk([choice], so_far())
        async for i, event in events:
            if isinstance(event, Started):
                usages[i] = Usage(len(self.job.prompts[i // self.job.choices]), event.cached, 0)
            elif isinstance(event, Token):
                usages[i] = replace(usages[i], completion=usages[i].completion + 1)
            else:
                usages[i] = event.usage
            for choice in self.pieces(i, event):
                yield chunk([choice], so_far())
        if usage_last:
            yield chunk([], total(usages, self.job.choices))
        yield data("[DONE]")

    def choice(self, i: int, answer: TextAnswer) -> dict[str, Any]:
        raise NotImplementedError

    def first(self, i: int) -> list[dict[str, Any]]:
        raise NotImplementedError

    def pieces(self, i: int, event: EngineEvent) -> list[dict[str, Any]]:
        raise NotImplementedError

    # -- logprobs

    @property
    def alternatives(self) -> int | None:
        """Number of most likely tokens requested per token; None for no logprobs."""
        return self.job.sampling.logprobs

    def best(self, token: Token) -> list[tuple[int, float]]:
        """The most likely tokens, best first, as many as requested.

        The chosen token competes with them.
        """
        known = {id: logprob for id, _, logprob in token.top}
        known.setdefault(token.id, token.logprob if token.logprob is not None else -9999.0)
        ranked = sorted(known.items(), key=lambda pair: -pair[1])
        return ranked[: self.alternatives or 0]


class _ChatForm(_Form):
    kind, whole_kind = "chat.completion.chunk", "chat.completion"

    def __init__(self, prompts: Prompts, job: TextJob, use: ToolUse) -> None:
        super().__init__(prompts, job)
        self.use = use
        self.readers = [ToolReader(use) for _ in range(self.count)]

    def choice(self, i: int, answer: TextAnswer) -> dict[str, Any]:
        reader = self.readers[i]
        found = [*reader.feed(answer.text), *reader.end()]
        calls = [piece.whole() for piece in found if isinstance(piece, ToolCall)]
        text = "".join(piece for piece in found if isinstance(piece, str))
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text.strip() else text}
        message["refusal"] = None
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if self.alternatives is not None:
            logprobs = {"content": [self.logprob(t) for t in answer.tokens if _is_visible(t)], "refusal": None}
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
        found = list(reader.feed(event.text))
        if isinstance(event, Finished):
            found += reader.end()
        deltas = [{"tool_calls": [p.delta()]} if isinstance(p, ToolCall) else {"content": p} for p in found]
        made = [self.piece(i, delta) for delta in deltas]
        if isinstance(event, Finished):
            return [*made, self.piece(i, {}) | self.ending(i, event)]
        if self.alternatives is not None and _is_visible(event):
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
        return {"token": text, "logprob": finite_logprob(logprob), "bytes": list(raw)}


class _TextForm(_Form):
    kind = whole_kind = "text_completion"

    def __init__(self, prompts: Prompts, job: TextJob, body: CompletionBody, echoes: list[str]) -> None:
        super().__init__(prompts, job)
        self.echoes = echoes if body.echo else []
        self.beside, self.places = body.logprobs, body.prompt_logprobs
        # then the first token carries the prompt with its logprobs
        self.scored = bool(body.echo) and body.logprobs is not None
        self.at = [0 if self.scored else len(self.echo(i)) for i in range(self.count)]

    def echo(self, i: int) -> str:
        return self.echoes[i // self.job.choices] if self.echoes else ""

    def choice(self, i: int, answer: TextAnswer) -> dict[str, Any]:
        logprobs = self.logprobs(i, [each for token in answer.tokens for each in self.told(token)])
        text = self.echo(i) + answer.text
        made = {"index": i, "text": text, "logprobs": logprobs, **self.ending(answer.finished)}
        if self.places is not None:
            prompt = answer.tokens[0].prompt if answer.tokens else ()
            made["prompt_logprobs"] = [self.place(token, self.places) for token in prompt]
        return made

    def place(self, token: Token, most: int) -> dict[str, Any] | None:
        """vLLM's prompt_logprobs: the most likely tokens by id, and the prompt's own.

        Other ranks are unknown.
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

    def ending(self, end: Finished) -> dict[str, Any]:
        return {"finish_reason": end.reason, "stop_reason": end.stop}

    def first(self, i: int) -> list[dict[str, Any]]:
        echo = self.echo(i)
        return [self.piece(i, echo, None)] if echo and not self.scored else []

    def pieces(self, i: int, event: EngineEvent) -> list[dict[str, Any]]:
        if isinstance(event, Started):
            return []
        if isinstance(event, Finished):
            return [self.piece(i, event.text, None) | self.ending(event)]
        told = self.told(event)
        logprobs = self.logprobs(i, told) if told else None
        text = (self.echo(i) if event.prompt else "") + event.text
        return [self.piece(i, text, logprobs)] if text or logprobs else []

    def told(self, token: Token) -> list[Token]:
        """The tokens whose logprobs come with this one.

        For the first, the prompt's tokens too. If the prompt's logprobs are requested, the ending token is
        included, because such clients count tokens.
        """
        if self.scored:
            return [*token.prompt, token]
        return [token] if _is_visible(token) else []

    def piece(self, i: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": None}

    def logprobs(self, i: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """OpenAI's older logprobs format: parallel lists.

        Alternatives by text, always with the chosen token.
        """
        if self.beside is None:
            return None
        texts = [self.prompts.piece(token.id)[0] for token in tokens]
        offsets = []
        for token, text in zip(tokens, texts, strict=True):
            offsets.append(self.at[i])
            self.at[i] += 0 if self.prompts.special(token.id) else len(text)
        tops: list[dict[str, float] | None] = []
        for token, text in zip(tokens, texts, strict=True):
            best = {self.prompts.piece(id)[0]: finite_logprob(p) for id, p in self.best(token)[: self.beside]}
            tops.append(None if token.logprob is None else best | {text: finite_logprob(token.logprob)})
        chosen = [None if token.logprob is None else finite_logprob(token.logprob) for token in tokens]
        return {"text_offset": offsets, "token_logprobs": chosen, "tokens": texts, "top_logprobs": tops}


def _is_visible(token: Token) -> bool:
    """Whether a token is part of the answer; the special token that ends it is not."""
    return not (token.special and not token.text)
