"""Ollama's routes: /api/chat, /api/generate, and the descriptions of models.

`model` names the base, an adapter or a route; Ollama's tag `:latest` can follow it. `mix` names several adapters.
Shapes and defaults are those of Ollama's api/types.go and docs/api.md. An unknown name is a 404: Ollama would pull
the model. Adapters stay in memory as the server's cache decides, whatever `keep_alive` says.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import BeforeValidator, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from veneer import __version__
from veneer.serve.access import ModelCard, ResolvedModel
from veneer.serve.http.answers import IndexedEvent, TextJob, collect, stream
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, Body, BodyRoute, MixField, Objects, Strict, at_most, mix_of
from veneer.serve.http.errors import Json, error_body, json_bytes
from veneer.serve.http.guard import needs
from veneer.serve.http.prompts import Prompts
from veneer.serve.http.service import Service, admission_of, caller_of, service_of
from veneer.serve.http.surfaces.openai import logprob_entries
from veneer.serve.http.text_bodies import Seed, Stop, limited, sampling_of, schema_text, stops_of
from veneer.serve.http.text_requests import chat_job
from veneer.serve.http.thinking import THINK, ThinkingReader
from veneer.serve.http.tools import ToolCall, ToolReader, ToolUse, tool_use
from veneer.serve.principal import Principal
from veneer.serve.request import Finished, GrammarSpec, Refused, Sampling, Started, Token, invalid

ollama_routes = APIRouter(tags=["Ollama"], route_class=BodyRoute, dependencies=[needs("infer")])

_LATEST = ":latest"
_FOREVER = "9999-12-31T23:59:59Z"
"""When an adapter leaves the memory: at no set time."""
_IGNORED = """
    num_ctx num_keep num_batch num_gpu main_gpu num_thread use_mmap use_mlock numa draft_num_predict low_vram f16_kv
    logits_all vocab_only repeat_last_n penalize_newline mirostat_tau mirostat_eta"""
"""Options without effect: most of them load a model, which is already loaded."""


# -- bodies ------------------------------------------------------------------------------------------------------------


class Options(Body):
    """Sampling options with Ollama's defaults. -1 as a seed is random; num_predict below 1 has no limit."""

    ignored: ClassVar = frozenset(_IGNORED.split())
    refused: ClassVar = {"typical_p": 1.0, "tfs_z": 1.0, "mirostat": 0, "embedding_only": False}
    temperature: float = Field(default=0.8, ge=0, le=100)
    top_k: int = Field(default=40, ge=-1, lt=1 << 31)
    top_p: float = Field(default=0.9, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: Seed = -1
    num_predict: int = Field(default=-1, ge=-2, lt=1 << 31)
    stop: Stop | None = None
    repeat_penalty: float = Field(default=1.0, ge=0.01, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)


class _Answering(Body):
    """Fields shared by the bodies of /api/chat and /api/generate."""

    ignored: ClassVar = frozenset(("truncate", "shift"))
    refused: ClassVar = {"_debug_render_only": False}
    model: str = Field(min_length=1, max_length=512, description="the base, an adapter, a route, or base:adapter")
    mix: MixField | None = None
    stream: bool | None = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Annotated[Options, BeforeValidator(lambda options: options or {})] = Field(default_factory=Options)
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: float | str | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    def sampling(self, service: Service, available: int) -> Sampling:
        o, most = self.options, limited(None, available, service)
        grammar: GrammarSpec | None = ("json_object", "") if self.format == "json" else None
        if isinstance(self.format, dict):
            grammar = ("json_schema", schema_text(self.format, "format"))
        same = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        return sampling_of(
            **{name: getattr(o, name) for name in same},
            max_tokens=min(o.num_predict, most) if o.num_predict > 0 else most,
            top_k=max(o.top_k, 0),
            seed=o.seed if o.seed >= 0 else None,
            stop=stops_of(o.stop, service.settings.max_stops),
            repetition_penalty=o.repeat_penalty,
            logprobs=self.top_logprobs if self.logprobs else None,
            grammar=grammar,
        )

    def thinking(self, *, possible: bool) -> dict[str, Any]:
        """Return the chat template's variables. Raises Refused (400) for `think` where thinking is not possible."""
        if self.think and not possible:
            raise invalid(f"{self.model!r} does not support thinking", "think", "leave it out")
        if isinstance(self.think, str):  # a template can only turn thinking on or off
            self.ignore("think level")
        return {} if self.think is None or not possible else {"enable_thinking": bool(self.think)}

    @property
    def headers(self) -> dict[str, str]:
        if self.keep_alive is not None:
            self.ignore("keep_alive")
        return super().headers


class Function(Strict):
    index: int | None = None
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(Strict):
    id: str | None = None
    type: Literal["function"] | None = None
    function: Function


class Turn(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str], FAIL_FAST, at_most(ITEMS)] | None = None
    tool_calls: Annotated[list[Call], FAIL_FAST, at_most(ITEMS)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def message(self) -> dict[str, Any]:
        """Return this message in OpenAI's format, which chat completions also pass to the template."""
        functions = [call.function for call in self.tool_calls or ()]
        calls: list[dict[str, Any]] = [{"name": f.name, "arguments": json.dumps(f.arguments)} for f in functions]
        told = {"name": self.tool_name, "tool_call_id": self.tool_call_id, "reasoning_content": self.thinking}
        more: dict[str, Any] = {key: value for key, value in told.items() if value}
        if calls:
            more["tool_calls"] = [{"type": "function", "function": each} for each in calls]
        return {"role": self.role, "content": self.content or "", **more}


class Chat(_Answering):
    messages: Annotated[list[Turn], FAIL_FAST, at_most(ITEMS)] | None = None
    tools: Annotated[Objects, at_most(128)] | None = None


class Generate(_Answering):
    refused: ClassVar = {**_Answering.refused, "suffix": "", "template": "", "context": []}
    prompt: str | None = None
    system: str | None = None
    raw: bool = False
    images: Annotated[list[str], FAIL_FAST, at_most(ITEMS)] | None = None


class Show(Body):
    ignored: ClassVar = frozenset(("verbose",))
    refused: ClassVar = {"system": "", "template": "", "options": {}}
    model: str = Field(default="", max_length=512)
    name: str = Field(default="", max_length=512, description="Ollama's older name for model")


# -- answers -----------------------------------------------------------------------------------------------------------


@ollama_routes.post("/api/chat", summary="Answer a conversation.")
async def chat(request: HttpRequest, body: Chat) -> Response:
    service = service_of(request)
    model = _choose(service, caller_of(request), body.model, body.mix)
    if not body.messages:
        return _loaded(body, {"message": {"role": "assistant", "content": ""}})
    _check_images(any(turn.images for turn in body.messages))
    use = tool_use(body.tools, None, service.prompts.takes_tools)
    return await _answer(request, body, model, [turn.message() for turn in body.messages], use)


@ollama_routes.post("/api/generate", summary="Answer a prompt, or continue it if `raw` is true.")
async def generate(request: HttpRequest, body: Generate) -> Response:
    service, principal = service_of(request), caller_of(request)
    model = _choose(service, principal, body.model, body.mix)
    if not body.prompt:
        return _loaded(body, {"response": ""})
    _check_images(bool(body.images))
    if body.raw and body.system:
        raise invalid("raw mode does not support system", "system", "write it into the prompt")
    if not body.raw and (service.prompts.template or body.system):
        turns = {"system": body.system, "user": body.prompt}
        messages = [{"role": role, "content": text} for role, text in turns.items() if text]
        return await _answer(request, body, model, messages, ToolUse())
    body.thinking(possible=False)
    admitted = admission_of(request)
    admitted.reserve("answers", 1)
    (prompt,) = await service.prompts.of_parts([body.prompt], admitted)
    settings = body.sampling(service, service.prompts.fits(prompt))
    job = TextJob(principal, model, [prompt], settings, id=f"gen-{request.scope['veneer.id']}")
    return await _respond(request, service, job, _Format(service.prompts, job, body, ToolUse()))


async def _answer(
    request: HttpRequest, body: _Answering, model: ResolvedModel, messages: Any, use: ToolUse
) -> Response:
    """Answer messages, which the chat template renders."""
    service, id = service_of(request), f"chat-{request.scope['veneer.id']}"
    variables = body.thinking(possible=_thinks(service.prompts))
    asked = (service, caller_of(request), model, messages, partial(body.sampling, service), admission_of(request))
    job = await chat_job(*asked, id, use=use, variables=variables)
    return await _respond(request, service, job, _Format(service.prompts, job, body, use))


async def _respond(request: HttpRequest, service: Service, job: TextJob, form: _Format) -> Response:
    if form.body.stream is False:
        (answer,) = await collect(request, service, job)
        said = form.said(answer.text, answer.tokens, end=True)
        return Json(form.line(said, answer.finished), headers=form.body.headers)

    def error_line(error: Refused) -> bytes:
        return json_bytes(error_body(error, "Ollama")[1]) + b"\n"

    response = await stream(request, service, job, form.lines, error_line, form.body.headers)
    response.headers["content-type"] = "application/x-ndjson"
    return response


def _loaded(body: _Answering, answer: dict[str, Any]) -> Response:
    """Answer a request without a prompt, by which Ollama's clients load or unload a model."""
    reason = "unload" if body.keep_alive in (0, "0", "0s") else "load"
    head = {"model": body.model, "created_at": _time(time.time()), **answer, "done": True}
    return Json(head | {"done_reason": reason}, headers=body.headers)


def _check_images(given: bool) -> None:
    if given:
        raise invalid("this base reads only text", "images", "leave the images out")


def _thinks(prompts: Prompts) -> bool:
    return "enable_thinking" in prompts.template or THINK in prompts.template


class _Format:
    """Formats one answer, as one object or as lines."""

    def __init__(self, prompts: Prompts, job: TextJob, body: _Answering, use: ToolUse) -> None:
        self.prompts, self.body, self.count = prompts, body, job.sampling.logprobs
        self.reader, self.thoughts = ToolReader(use), ThinkingReader("answer")
        if not (isinstance(body, Generate) and body.raw) and _thinks(prompts):
            begun = "".join(prompts.piece(id)[0] for id in job.prompts[0][-8:]).rstrip().endswith(THINK)
            self.thoughts = ThinkingReader("thinking" if begun else "start")

    async def lines(self, events: AsyncIterator[IndexedEvent]) -> AsyncIterator[bytes]:
        async for _, event in events:
            if isinstance(event, Started):
                continue
            end = isinstance(event, Finished)
            said = self.said(event.text, () if isinstance(event, Finished) else (event,), end=end)
            if any(said.values()):
                yield json_bytes(self.line(said, None)) + b"\n"
            if isinstance(event, Finished):
                yield json_bytes(self.line({"content": ""}, event)) + b"\n"

    def said(self, text: str, tokens: Sequence[Token], *, end: bool) -> dict[str, Any]:
        """Return the next part of the answer: its content, thinking, tool calls and log-probabilities.

        `end`: whether this is the last part."""
        thinking, content = self.thoughts.feed(text, end=end)
        pieces = [*self.reader.feed(content), *(self.reader.end() if end else ())]
        calls = [_call(piece) if isinstance(piece, ToolCall) else piece for piece in pieces]
        said: dict[str, Any] = {"content": "".join(each for each in calls if isinstance(each, str))}
        parts = {"thinking": thinking, "tool_calls": [each for each in calls if not isinstance(each, str)]}
        said |= {key: value for key, value in parts.items() if value}
        if self.count is not None and (entries := logprob_entries(self.prompts, tokens, self.count)):
            said["logprobs"] = [{key: e[key] for key in e if key != "top_logprobs" or e[key]} for e in entries]
        return said

    def line(self, said: dict[str, Any], end: Finished | None) -> dict[str, Any]:
        """Return one object of the response. `end`: the last event, for the last object."""
        logprobs = {"logprobs": said.pop("logprobs")} if "logprobs" in said else {}
        line: dict[str, Any] = {"model": self.body.model, "created_at": _time(time.time())}
        chat = isinstance(self.body, Chat)
        line |= {"message": {"role": "assistant", **said}} if chat else {"response": said.pop("content"), **said}
        line |= logprobs
        line["done"] = end is not None
        if end is not None:
            line["done_reason"] = "length" if end.reason == "length" else "stop"
            spans = {"load": end.usage.queued, "prompt_eval": end.usage.prefill, "eval": end.usage.decode}
            spans["total"] = sum(spans.values())
            line |= {f"{name}_duration": round(seconds * 1e9) for name, seconds in spans.items()}
            line |= {"prompt_eval_count": end.usage.prompt, "eval_count": end.usage.completion}
        return line


def _call(call: ToolCall) -> dict[str, Any] | str:
    """Return a call in Ollama's format, or as text if its arguments are not an object."""
    with suppress(ValueError):
        if isinstance(arguments := json.loads(call.arguments), dict):
            return {"id": call.id, "function": {"index": call.index, "name": call.name, "arguments": arguments}}
    return json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)


# -- models ------------------------------------------------------------------------------------------------------------


@ollama_routes.get("/api/tags", summary="List the base, adapters and routes that are visible to the caller.")
async def tags(request: HttpRequest) -> Response:
    service = service_of(request)
    return Json({"models": [_entry(service, card) for card in service.catalog.models(caller_of(request))]})


@ollama_routes.get("/api/ps", summary="List the adapters in memory that are visible to the caller.")
async def running(request: HttpRequest) -> Response:
    service, principal = service_of(request), caller_of(request)
    base, now = service.catalog.base, {"expires_at": _FOREVER, "size_vram": 0}
    cards = [ModelCard(name, name, base, 0, a.digest, a.bytes) for name, a in service.catalog.in_memory()]
    entries = [_entry(service, card) for card in (ModelCard(base, base, None, 0), *cards) if principal.sees(card.id)]
    now["context_length"] = service.prompts.context
    return Json({"models": [{key: e[key] for key in e if key != "modified_at"} | now for e in entries]})


@ollama_routes.post("/api/show", summary="Describe a model.")
async def show(request: HttpRequest, body: Show) -> Response:
    service, principal = service_of(request), caller_of(request)
    name = body.model or body.name
    if not name:
        raise invalid("model is required", "model")
    model = _choose(service, principal, name)
    digest, source = next(((digest, source) for digest, source, _ in model.parts()), ("", ""))
    known = (
        card for card in service.catalog.models(principal) if card.digest == digest and (digest or not card.parent)
    )
    card = next(known, None) or ModelCard(name, source, service.catalog.base, 0, digest)
    base, prompts, entry = service.reader, service.prompts, _entry(service, card)
    family, able = base.family or "unknown", {"tools": prompts.takes_tools, "thinking": _thinks(prompts)}
    info: dict[str, Any] = {"general.architecture": family, "general.basename": service.catalog.base}
    info |= {"general.parameter_count": base.parameters, f"{family}.vocab_size": prompts.size}
    described = {
        "modelfile": f"FROM {service.catalog.base}\n" + (f"# ADAPTER {source} {digest}\n" if digest else ""),
        "parameters": f"{'num_ctx':30} {prompts.context}",
        "template": prompts.template,
        "details": entry["details"],
        "model_info": info | {f"{family}.context_length": prompts.context},
        "capabilities": ["completion", *(name for name, is_able in able.items() if is_able)],
        "modified_at": entry["modified_at"],
    }
    return Json(described, headers=body.headers)


@ollama_routes.get("/api/version", summary="Get veneer's version.")
async def version() -> Response:
    return Json({"version": __version__})


@ollama_routes.api_route("/", methods=["HEAD"], include_in_schema=False)
async def alive() -> Response:
    return PlainTextResponse("")


def _choose(service: Service, principal: Principal, name: str, mix: Any = None) -> ResolvedModel:
    """Return the mix that `model` names, with or without the tag `:latest`, or the body's `mix`.

    The whole name comes first: a server's `base:latest` can be an adapter named `latest`."""
    if name.endswith(_LATEST):
        try:
            service.catalog.resolve(name, principal)
        except Refused as error:
            if error.code != "model_not_found":
                raise
            name = name.removesuffix(_LATEST)
    return service.choose(principal, model=name, mix=mix_of(mix))


def _entry(service: Service, card: ModelCard) -> dict[str, Any]:
    base, adapter = service.reader, card.parent is not None
    family = [base.family] if base.family else []
    details: dict[str, Any] = {
        "parent_model": card.parent or "",
        "format": "gguf" if base.stored[:1] == "Q" else "safetensors",
    }
    details |= {"family": base.family, "families": family, "parameter_size": _count(base.parameters)}
    return {
        "name": card.id,
        "model": card.id,
        "modified_at": _time(card.created),
        "size": card.size if adapter else base.size,
        "digest": (card.digest if adapter else service.catalog.fingerprint).removeprefix("sha256:"),
        "details": details | {"quantization_level": base.stored},
    }


def _count(number: int) -> str:
    """Return a number of weights as Ollama writes it: 7.6B, 135M."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.3g}M" if number else ""


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


# -- routes that a server of adapters does not have --------------------------------------------------------------------

_INSTEAD = {
    "pull": ("POST", "add adapters with veneer library pull, or POST /v1/adapters"),
    "push": ("POST", "use veneer library push"),
    "create": ("POST", "train an adapter with veneer train, or add one with veneer library add"),
    "copy": ("POST", "give an adapter another name with veneer library alias"),
    "delete": ("DELETE", "use DELETE /v1/adapters/NAME, or veneer library remove"),
    **dict.fromkeys(("embed", "embeddings"), ("POST", "use a server of an embedding model")),
}


async def _unsupported(request: HttpRequest) -> Response:
    path = request.scope["route"].path
    raise Refused(f"{path} is not supported", status=501, code="unsupported", fix=_INSTEAD[path[5:]][1])


for _path, (_method, _) in _INSTEAD.items():
    ollama_routes.add_api_route(f"/api/{_path}", _unsupported, methods=[_method], include_in_schema=False)
