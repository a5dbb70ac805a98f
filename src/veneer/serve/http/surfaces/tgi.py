"""TGI's and LoRAX's routes: /generate, /generate_stream, /info.

`adapter_id` names a single adapter; `mix` names several. For an unknown adapter_id, TGI serves the base, but
veneer returns 404.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer import __version__
from veneer.serve.http.answers import IndexedEvent, TextAnswer, TextJob, collect, finite_logprob, stream
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, Body, BodyRoute, MixField, Strict, at_most, mix_of
from veneer.serve.http.errors import Json, error_body
from veneer.serve.http.guard import needs
from veneer.serve.http.service import Service, admission_of, caller_of, service_of
from veneer.serve.http.sse import data
from veneer.serve.http.text_bodies import Limit, Seed, limited, sampling_of, schema_text, stops_of
from veneer.serve.request import Finished, GrammarSpec, Refused, Token, invalid

tgi_routes = APIRouter(tags=["TGI"], route_class=BodyRoute, dependencies=[needs("infer")])


class Grammar(Strict):
    type: Literal["json", "regex"]
    value: Any

    def spec(self) -> GrammarSpec:
        if self.type == "json":
            return "json_schema", schema_text(self.value, "grammar")
        if not isinstance(self.value, str):
            raise invalid("grammar.value is not a regular expression", "grammar")
        return "regex", self.value


class Parameters(Body):
    refused: ClassVar = {
        **dict.fromkeys(("watermark", "apply_chat_template", "decoder_input_details"), False),
        **dict.fromkeys(("truncate", "api_token", "schema", "merged_adapters"), None),
        "adapter_source": "local",
        "typical_p": 1.0,
        "return_k_alternatives": 0,
        "best_of": 1,
    }
    adapter_id: str | None = Field(default=None, max_length=512)
    mix: MixField | None = None
    temperature: float | None = Field(default=None, gt=0)
    repetition_penalty: float | None = Field(default=None, gt=0)
    frequency_penalty: float | None = None
    top_k: int | None = Field(default=None, gt=0, lt=1 << 31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    do_sample: bool = False
    max_new_tokens: Limit | None = None
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: Annotated[list[str], FAIL_FAST, at_most(ITEMS)] | None = None
    details: bool | None = True
    seed: Seed | None = None
    top_n_tokens: int | None = Field(default=None, ge=0, le=20)
    grammar: Grammar | None = None


class Generate(Body):
    inputs: str
    parameters: Parameters = Field(default_factory=Parameters)
    stream: bool = False


# -- routes ------------------------------------------------------------------------------------------------------------


@tgi_routes.post("/generate", summary="Complete a text.")
async def generate(request: HttpRequest, body: Generate) -> Response:
    return Json(await _complete_generation(request, body), headers=body.parameters.headers)


@tgi_routes.post("/generate_stream", summary="Stream the completion of a text.")
async def generate_stream(request: HttpRequest, body: Generate) -> Response:
    service = service_of(request)
    job = await _job(request, service, body)

    def error_event(error: Refused) -> bytes:
        return data(error_body(error, "TGI")[1], tight=True)

    lines = partial(_lines, service, job, body)
    return await stream(request, service, job, lines, error_event, body.parameters.headers)


@tgi_routes.post("/", summary="Complete a text, and stream the completion if `stream` is true.")
async def compatible(request: HttpRequest, body: Generate) -> Response:
    return await generate_stream(request, body) if body.stream else Json([await _complete_generation(request, body)])


@tgi_routes.get("/info", summary="Get the server's model and limits.")
async def info(request: HttpRequest) -> Response:
    service = service_of(request)
    return Json(
        {
            "model_id": service.catalog.base,
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": service.settings.slots,
            "max_best_of": 1,
            "max_stop_sequences": service.settings.max_stops,
            "max_input_tokens": service.prompts.context - 1,
            "max_total_tokens": service.prompts.context,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "router": "veneer",
            "version": __version__,
            "sha": None,
            "docker_label": None,
        }
    )


async def _job(request: HttpRequest, service: Service, body: Generate) -> TextJob:
    parameters, principal = body.parameters, caller_of(request)
    model = service.choose(principal, model=parameters.adapter_id, mix=mix_of(parameters.mix))
    # As in TGI, temperature, top_k or top_p turns sampling on.
    sampled = (
        parameters.do_sample
        or parameters.temperature not in (None, 1.0)
        or bool(parameters.top_k)
        or parameters.top_p not in (None, 1)
    )
    admitted = admission_of(request)
    admitted.reserve("answers", 1)
    (prompt,) = await service.prompts.of_parts([body.inputs], admitted)
    most = limited(parameters.max_new_tokens, service.prompts.fits(prompt, "inputs"), service)
    settings = sampling_of(
        max_tokens=min(100, most) if parameters.max_new_tokens is None else most,
        temperature=(parameters.temperature or 1.0) if sampled else 0.0,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
        seed=parameters.seed,
        stop=stops_of(parameters.stop, service.settings.max_stops),
        ignore_eos=parameters.ignore_eos_token,
        logprobs=parameters.top_n_tokens or 0,
        grammar=None if parameters.grammar is None else parameters.grammar.spec(),
    )
    return TextJob(principal, model, [prompt], settings, id=f"gen-{request.scope['veneer.id']}")


# -- answers -----------------------------------------------------------------------------------------------------------


def _reason(end: Finished) -> str:
    if end.reason == "length":
        return "length"
    return "stop_sequence" if isinstance(end.stop, str) else "eos_token"


def _text(body: Generate, answer: TextAnswer) -> str:
    """Return the completion, including the stop text that ended it, as in TGI."""
    stop = answer.finished.stop
    text = answer.text + (stop if isinstance(stop, str) else "")
    return body.inputs + text if body.parameters.return_full_text else text


def _token(service: Service, token: Token, text: str | None = None) -> dict[str, Any]:
    text = service.prompts.piece(token.id)[0] if text is None else text
    return {"id": token.id, "text": text, "logprob": finite_logprob(token.logprob), "special": token.special}


def _top_tokens(service: Service, token: Token, count: int | None) -> list[dict[str, Any]]:
    best = sorted(token.top, key=lambda t: -t[2])[: count or 0]
    return [_token(service, Token(i, text, p, special=service.prompts.special(i))) for i, text, p in best]


async def _complete_generation(request: HttpRequest, body: Generate) -> dict[str, Any]:
    service = service_of(request)
    job = await _job(request, service, body)
    parameters = body.parameters
    (answer,) = await collect(request, service, job)
    end = answer.finished
    body_json: dict[str, Any] = {"generated_text": _text(body, answer)}
    if body.parameters.details is not False:
        body_json["details"] = {
            "finish_reason": _reason(end),
            "generated_tokens": end.usage.completion,
            "seed": job.sampling.seed,
            "prefill": [],
            "tokens": [_token(service, token) for token in answer.tokens],
        }
        if parameters.top_n_tokens:
            body_json["details"]["top_tokens"] = [
                _top_tokens(service, token, parameters.top_n_tokens) for token in answer.tokens
            ]
    return body_json


async def _lines(
    service: Service, job: TextJob, body: Generate, events: AsyncIterator[IndexedEvent]
) -> AsyncIterator[bytes]:
    """Yield one event per token; the last event has the full text and the details.

    Until the completion ends, the server does not know which token is the last. So a token that could be the
    last (because it has no text, or because it reaches max_tokens) is held back until the next event. All
    other tokens are sent at once.
    """
    answer, last_token = TextAnswer(), None
    async for _, event in events:
        answer.add(event)
        count = len(answer.tokens)
        if isinstance(event, Token):
            if last_token is not None:
                yield data(_line(service, body, count - 1, last_token), tight=True)
            last_token = event if not event.text or count >= job.sampling.max_tokens else None
            if last_token is None:
                yield data(_line(service, body, count, event), tight=True)
        elif isinstance(event, Finished):
            last = last_token or (
                replace(answer.tokens[-1], text="", special=True) if answer.tokens else Token(0, "", 0.0)
            )
            line = _line(service, body, count, last, event.text)
            line["generated_text"] = _text(body, answer)
            line["details"] = {
                "finish_reason": _reason(event),
                "generated_tokens": event.usage.completion,
                "seed": job.sampling.seed,
                "input_length": event.usage.prompt,
            }
            yield data(line, tight=True)


def _line(service: Service, body: Generate, index: int, token: Token, more: str = "") -> dict[str, Any]:
    line: dict[str, Any] = {"index": index, "token": _token(service, token, token.text + more)}
    if body.parameters.top_n_tokens:
        line["top_tokens"] = _top_tokens(service, token, body.parameters.top_n_tokens)
    return line | {"generated_text": None, "details": None}
