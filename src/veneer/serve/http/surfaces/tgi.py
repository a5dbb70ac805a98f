"""TGI's and LoRAX's routes: /generate, /generate_stream, /info.

`adapter_id` names one adapter, `mix` several. TGI serves the base for an unknown adapter_id; here that is
404.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer import __version__
from veneer.serve.http.answers import (
    IndexedEvent,
    OpenStream,
    TextAnswer,
    TextJob,
    collect,
    finite_logprob,
    seed_of,
    stream,
)
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, Body, BodyRoute, MixField, Neutral, Strict, at_most, mix_of
from veneer.serve.http.errors import Json, error_body
from veneer.serve.http.guard import needs
from veneer.serve.http.sampling import Seed, limited, sampling_of, schema_text, stops_of
from veneer.serve.http.service import ChosenMix, Service, admission_of, caller_of, service_of
from veneer.serve.http.sse import data
from veneer.serve.request import Finished, GrammarSpec, Refused, Token, invalid

tgi_routes = APIRouter(tags=["TGI"], route_class=BodyRoute, dependencies=[needs("infer")])


class Form(Strict):
    type: Literal["json", "regex", "json_schema", "json_object"]
    value: Any = None

    def grammar(self) -> GrammarSpec:
        if self.type == "json_object" or (self.type == "json" and self.value is None):
            return "json_object", ""
        if self.type == "regex":
            if not isinstance(self.value, str) or len(self.value) > 20_000:
                raise invalid("grammar.value is not a regular expression of at most 20,000 characters", "grammar")
            return "regex", self.value
        value = self.value
        if self.type == "json_schema" and isinstance(value, dict) and "schema" in value:
            value = value["schema"]
        return "json_schema", schema_text(value, "grammar")


class Parameters(Body):
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        "typical_p": ((1.0,), "answers are drawn with top_k, top_p and min_p"),
        "watermark": ((False,), "answers are not watermarked"),
        "truncate": ((), "nothing is cut unasked; send a shorter prompt"),
        "apply_chat_template": ((False,), "use /v1/chat/completions"),
        "return_k_alternatives": ((0,), "use top_n_tokens"),
        "api_token": ((), "it is for a hub; adapters come from this server's library"),
        "schema": ((), "use grammar"),
        "merged_adapters": ((), "use mix: a list of {adapter, strength}"),
    }
    adapter_id: str | None = Field(default=None, max_length=512)
    adapter_source: str | None = None
    mix: MixField | None = None
    best_of: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, gt=0)
    repetition_penalty: float | None = Field(default=None, gt=0)
    frequency_penalty: float | None = None
    top_k: int | None = Field(default=None, gt=0, lt=1 << 31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    do_sample: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: Annotated[list[str], FAIL_FAST, at_most(ITEMS)] | None = None
    details: bool | None = True
    decoder_input_details: bool = False
    seed: Seed | None = None
    top_n_tokens: int | None = Field(default=None, ge=0, le=20)
    grammar: Form | None = None
    response_format: Form | None = None


class Generate(Body):
    inputs: str
    parameters: Parameters = Field(default_factory=Parameters)
    stream: bool = False


# -- routes ------------------------------------------------------------------------------------------------------------


@tgi_routes.post("/generate", summary="Continue a text.")
async def generate(request: HttpRequest, body: Generate) -> Response:
    service = service_of(request)
    job = await _ask(request, service, body)
    answers = await collect(request, service, job)
    return Json(_whole(service, job, body, answers), headers=body.parameters.headers)


@tgi_routes.post("/generate_stream", summary="Continue a text, token by token.")
async def generate_stream(request: HttpRequest, body: Generate) -> Response:
    service = service_of(request)
    if (body.parameters.best_of or 1) > 1:
        raise invalid("best_of with a stream", "best_of", "the best is known when all have ended; use /generate")
    if body.parameters.decoder_input_details:
        raise invalid("decoder_input_details with a stream", "decoder_input_details", "use /generate")
    job = await _ask(request, service, body)

    def told(error: Refused) -> bytes:
        return data(error_body(error, "TGI")[1], tight=True)

    lines = partial(_lines, service, job, body)
    return await stream(request, service, job, lines, told, body.parameters.headers)


@tgi_routes.post("/", summary="/generate_stream where `stream` is true, else /generate's answer in a list.")
async def compatible(request: HttpRequest, body: Generate) -> Response:
    if body.stream:
        return await generate_stream(request, body)
    service = service_of(request)
    job = await _ask(request, service, body)
    return Json([_whole(service, job, body, await collect(request, service, job))])


@tgi_routes.get("/info", summary="What this server is.")
async def info(request: HttpRequest) -> Response:
    service = service_of(request)
    return Json(
        {
            "model_id": service.catalog.base,
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": service.settings.slots,
            "max_best_of": service.settings.max_best_of,
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


async def _ask(request: HttpRequest, service: Service, body: Generate) -> TextJob:
    given, caller = body.parameters, caller_of(request)
    chosen = _chosen(service, caller, given)
    best = given.best_of or 1
    if best > service.settings.max_best_of:
        raise invalid(f"best_of is {best}", "best_of", f"at most {service.settings.max_best_of}")
    # As in TGI, any setting that only affects sampling enables sampling.
    sampled = (
        given.do_sample or given.temperature not in (None, 1.0) or bool(given.top_k) or given.top_p not in (None, 1)
    )
    if best > 1 and not sampled:
        raise invalid("best_of without sampling gives the same answer each time", "best_of", "do_sample: true")
    place = admission_of(request)
    place.take("answers", best)
    (prompt,) = await service.prompts.of_parts([body.inputs], place=place)
    room = service.prompts.fits(prompt, "inputs")
    if given.grammar is not None and given.response_format is not None:
        raise invalid("grammar and response_format are the same thing", "grammar", "keep one")
    form = given.grammar or given.response_format
    settings = sampling_of(
        max_tokens=limited(given.max_new_tokens or 100, room, service, asked=given.max_new_tokens is not None),
        temperature=(given.temperature or 1.0) if sampled else 0.0,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        seed=given.seed,
        stop=stops_of(given.stop, service.settings.max_stops),
        ignore_eos=given.ignore_eos_token,
        logprobs=given.top_n_tokens or 0,
        prompt_logprobs=given.decoder_input_details,
        grammar=form.grammar() if form is not None else None,
    )
    return TextJob(caller, chosen, [prompt], settings, best, id=f"gen-{request.scope['veneer.id']}")


def _chosen(service: Service, caller: Any, given: Parameters) -> ChosenMix:
    if given.adapter_source not in (None, "", "local"):
        what = f"adapter_source {given.adapter_source[:40]!r}: adapters come from this server's library"
        raise invalid(what, "adapter_source", "leave it out; `veneer library pull` brings an adapter there")
    return service.mixes.choose(caller, model=given.adapter_id, mix=mix_of(given.mix))


# -- answers -----------------------------------------------------------------------------------------------------------


def _reason(end: Finished) -> str:
    if end.reason == "length":
        return "length"
    return "stop_sequence" if isinstance(end.stop, str) else "eos_token"


def _text(body: Generate, answer: TextAnswer) -> str:
    """The answer's text with its stop text, as in TGI."""
    stop = answer.finished.stop
    text = answer.text + (stop if isinstance(stop, str) else "")
    return body.inputs + text if body.parameters.return_full_text else text


def _token(service: Service, token: Token, text: str | None = None) -> dict[str, Any]:
    text = service.prompts.piece(token.id)[0] if text is None else text
    return {"id": token.id, "text": text, "logprob": finite_logprob(token.logprob), "special": token.special}


def _prefill(service: Service, token: Token) -> dict[str, Any]:
    """A token of the prompt; the first has no predecessor, so no logprob."""
    logprob = None if token.logprob is None else finite_logprob(token.logprob)
    return {"id": token.id, "text": service.prompts.piece(token.id)[0], "logprob": logprob}


def _tops(service: Service, token: Token, wanted: int | None) -> list[dict[str, Any]]:
    best = sorted(token.top, key=lambda t: -t[2])[: wanted or 0]
    return [
        {
            "id": i,
            "text": service.prompts.piece(i)[0],
            "logprob": finite_logprob(p),
            "special": service.prompts.special(i),
        }
        for i, _, p in best
    ]


def _whole(service: Service, job: TextJob, body: Generate, answers: list[TextAnswer]) -> dict[str, Any]:
    given = body.parameters
    order = sorted(range(len(answers)), key=lambda i: -_mean(answers[i]))
    best, *others = [(answers[i], seed_of(job.sampling.seed, i)) for i in order]
    found: dict[str, Any] = {"generated_text": _text(body, best[0])}
    if given.details is not False:
        found["details"] = _details(service, given, *best)
        if others:
            rest = [_details(service, given, *o) | {"generated_text": _text(body, o[0])} for o in others]
            found["details"]["best_of_sequences"] = rest
    return found


def _mean(answer: TextAnswer) -> float:
    """The mean logprob by which TGI ranks `best_of`."""
    return sum(finite_logprob(t.logprob) for t in answer.tokens) / max(1, len(answer.tokens))


def _details(service: Service, given: Parameters, answer: TextAnswer, seed: int | None) -> dict[str, Any]:
    end = answer.finished
    found: dict[str, Any] = {
        "finish_reason": _reason(end),
        "generated_tokens": end.usage.completion,
        "seed": seed,
        "prefill": [_prefill(service, token) for token in (answer.tokens[0].prompt if answer.tokens else ())],
        "tokens": [_token(service, token) for token in answer.tokens],
    }
    if given.top_n_tokens:
        found["top_tokens"] = [_tops(service, token, given.top_n_tokens) for token in answer.tokens]
    return found


async def _lines(
    service: Service, job: TextJob, body: Generate, events: OpenStream[IndexedEvent]
) -> AsyncIterator[bytes]:
    """One event per token; the last carries the whole text and the details.

    Which token is the last is known only when the answer ends, so a token that can be the last (without text,
    or at max_tokens) waits for its successor; all others are sent at once.
    """
    answer, held = TextAnswer(), None
    async for _, event in events:
        answer.add(event)
        count = len(answer.tokens)
        if isinstance(event, Token):
            if held is not None:
                yield data(_line(service, body, count - 1, held), tight=True)
            held = event if not event.text or count >= job.sampling.max_tokens else None
            if held is None:
                yield data(_line(service, body, count, event), tight=True)
        elif isinstance(event, Finished):
            last = held or (replace(answer.tokens[-1], text="", special=True) if answer.tokens else Token(0, "", 0.0))
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
        line["top_tokens"] = _tops(service, token, body.parameters.top_n_tokens)
    return line | {"generated_text": None, "details": None}
