"""llama.cpp's routes: /completion, /lora-adapters, /props. An adapter is a number here, given once and never again.

Global scales (POST /lora-adapters) act on this surface's requests that name no adapter, as far as the caller may see
the adapters; they start at nothing, as with llama.cpp's --lora-init-without-apply, or at what the server gives every
request that names none. A request's own `lora` replaces them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer import __version__
from veneer.serve.engine.admission import AdmittedRequest
from veneer.serve.http.answers import IndexedEvent, OpenStream, TextAnswer, TextJob, collect, finite_logprob, stream
from veneer.serve.http.bodies import FAIL_FAST, Body, BodyRoute, MixField, Neutral, at_most
from veneer.serve.http.errors import Json, error_body
from veneer.serve.http.guard import needs
from veneer.serve.http.sampling import (
    Bias,
    Biases,
    LoraScale,
    Seed,
    Stop,
    TextOrIds,
    bias_of,
    limited,
    one_grammar,
    sampling_of,
    schema_text,
    stops_of,
)
from veneer.serve.http.service import Service, admission_of, caller_of, service_of
from veneer.serve.http.sse import data
from veneer.serve.request import Finished, GrammarSpec, Refused, Sampling, Token, invalid

llama_cpp_routes = APIRouter(tags=["llama.cpp"], route_class=BodyRoute, dependencies=[needs("infer")])

_ANOTHER = "it would draw from another distribution; temperature, top_k, top_p, min_p and the penalties are there"


class Completion(Body):
    """llama.cpp's keys with its defaults."""

    ignored: ClassVar[frozenset[str]] = frozenset({"cache_prompt", "id_slot", "n_keep", "n_indent", "samplers"})
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {
        "dynatemp_range": ((0.0,), _ANOTHER),
        "dynatemp_exponent": ((1.0,), _ANOTHER),
        "typical_p": ((1.0,), _ANOTHER),
        "top_n_sigma": ((-1.0,), _ANOTHER),
        "xtc_probability": ((0.0,), _ANOTHER),
        "xtc_threshold": ((0.1,), _ANOTHER),
        "dry_multiplier": ((0.0,), _ANOTHER),
        "dry_base": ((1.75,), _ANOTHER),
        "dry_allowed_length": ((2,), _ANOTHER),
        "dry_penalty_last_n": ((-1, 0), _ANOTHER),
        "dry_sequence_breakers": ((["\n", ":", '"', "*"], []), _ANOTHER),
        "mirostat": ((0,), _ANOTHER),
        "mirostat_tau": ((5.0,), _ANOTHER),
        "mirostat_eta": ((0.1,), _ANOTHER),
        "penalize_nl": ((True,), _ANOTHER),
        "repeat_last_n": ((-1,), "penalties see the whole prompt and answer; -1 says so"),
        "min_keep": ((0,), _ANOTHER),
        "grammar": (("",), "GBNF is not read; use json_schema"),
        "grammar_lazy": ((False,), "GBNF is not read"),
        "t_max_predict_ms": ((0,), "an answer ends by tokens, not by time"),
        "image_data": (([],), "this base reads text alone"),
        "multimodal_data": (([],), "this base reads text alone"),
        "post_sampling_probs": ((False,), "probabilities are the model's own"),
        "response_fields": (([],), "the answer is whole"),
        "timings_per_token": ((False,), "timings come with the last event"),
        "n_cmpl": ((1,), "one answer a request; /v1/completions takes n"),
    }
    prompt: TextOrIds
    model: str = Field(default="", max_length=512)
    mix: MixField | None = None
    lora: Annotated[list[LoraScale], FAIL_FAST, at_most(64)] | None = None
    n_predict: int | None = Field(default=None, ge=-1, lt=1 << 31)
    max_tokens: int | None = Field(default=None, ge=-1, lt=1 << 31)
    temperature: float = 0.8
    top_k: int = Field(default=40, ge=-1, lt=1 << 31)
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Seed | None = None
    ignore_eos: bool = False
    stop: Stop | None = None
    logit_bias: Biases | None = None
    n_probs: int = Field(default=0, ge=0, le=20)
    json_schema: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    return_tokens: bool = False
    stream: bool = False

    def sampling(self, service: Service, room: int) -> Sampling:
        wanted = self.n_predict if self.n_predict is not None else self.max_tokens
        free = wanted is None or wanted == -1
        if wanted == 0:
            raise invalid("n_predict is 0", "n_predict", "-1 (as many as there is room for) or 1 and more")
        return sampling_of(
            max_tokens=limited(room if free or wanted is None else wanted, room, service, asked=not free),
            temperature=max(self.temperature, 0.0),
            top_k=max(self.top_k, 0),
            top_p=self.top_p or 1e-9,  # llama.cpp's 0 keeps one token
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed == -1 else self.seed,
            ignore_eos=self.ignore_eos,
            stop=stops_of(self.stop, service.settings.max_stops),
            logit_bias=bias_of(self._bias(), service.prompts),
            logprobs=self.n_probs or None,
            grammar=one_grammar([self._schema(), self._format()]),
        )

    def _bias(self) -> Bias:
        """llama.cpp's pairs too; false is "never"."""
        if not isinstance(self.logit_bias, list):
            return self.logit_bias or {}
        if any(value is True for _, value in self.logit_bias):
            raise invalid("a logit_bias is a number, or false for never", "logit_bias")
        return {str(token): -100.0 if value is False else float(value) for token, value in self.logit_bias}

    def _schema(self) -> GrammarSpec | None:
        return None if self.json_schema is None else ("json_schema", schema_text(self.json_schema, "json_schema"))

    def _format(self) -> GrammarSpec | None:
        form = self.response_format or {"type": "text"}
        if form.get("type") == "text":
            return None
        if form.get("type") not in ("json_object", "json_schema"):
            raise invalid("response_format.type is text, json_object or json_schema", "response_format")
        inner = form.get("json_schema")
        schema = form.get("schema") or (inner.get("schema") if isinstance(inner, dict) else None)
        return ("json_object", "") if schema is None else ("json_schema", schema_text(schema, "response_format"))


# -- completion --------------------------------------------------------------------------------------------------------


@llama_cpp_routes.post("/completion", summary="Continue a text.")
async def completion(request: HttpRequest, body: Completion) -> Response:
    service, caller = service_of(request), caller_of(request)
    lora = None if body.lora is None else [(part.id, part.scale) for part in body.lora]
    mix = None if body.mix is None else [(part.adapter, part.strength) for part in body.mix]
    chosen = service.mixes.choose(caller, model=body.model, mix=mix, lora=lora, default=service.mixes.numbers.scales)
    place = admission_of(request)
    place.take("answers", 1)
    prompt = await _prompt(service, body.prompt, place)
    settings = body.sampling(service, service.prompts.fits(prompt))
    job = TextJob(caller, chosen, [prompt], settings, id=f"cmpl-{request.scope['veneer.id']}")
    if not body.stream:
        (answer,) = await collect(request, service, job)
        return Json(await _last(service, job, body, answer, answer.text, answer.tokens), headers=body.headers)

    def told(error: Refused) -> bytes:
        return data(error_body(error, "llama.cpp")[1])

    return await stream(request, service, job, partial(_lines, service, job, body), told, body.headers)


async def _prompt(service: Service, given: str | list[int | str], place: AdmittedRequest) -> tuple[int, ...]:
    """A text, or texts and token ids one after another; the tokenizer's own beginning (bos) where text comes first."""
    parts = [given] if isinstance(given, str) else given
    service.prompts.of_ids([part for part in parts if isinstance(part, int)])
    texts = {i: part for i, part in enumerate(parts) if isinstance(part, str)}
    most = service.settings.max_prompts
    if len(texts) > most:
        raise invalid(f"the prompt is made of {len(texts):,} texts", "prompt", f"at most {most}")
    service.prompts.measure(sum(map(len, texts.values())))
    made = await service.prompts.of_parts(list(texts.values()), special=[i == 0 for i in texts], place=place)
    read = dict(zip(texts, made, strict=True))
    in_order = ((part,) if isinstance(part, int) else read[i] for i, part in enumerate(parts))
    return tuple(chain.from_iterable(in_order))


async def _lines(
    service: Service, job: TextJob, body: Completion, events: OpenStream[IndexedEvent]
) -> AsyncIterator[bytes]:
    answer = TextAnswer()
    async for _, event in events:
        answer.add(event)
        if isinstance(event, Token):
            piece: dict[str, Any] = {
                "index": 0,
                "content": event.text,
                "tokens": [event.id] if body.return_tokens else [],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": len(answer.tokens),
                "tokens_evaluated": len(job.prompts[0]),
            }
            if body.n_probs:
                piece["completion_probabilities"] = [_probabilities(service, event, body.n_probs)]
            yield data(piece)
        elif isinstance(event, Finished):
            yield data(await _last(service, job, body, answer, event.text, []))


async def _last(
    service: Service, job: TextJob, body: Completion, answer: TextAnswer, content: str, tokens: list[Token]
) -> dict[str, Any]:
    """The whole answer, or a stream's last event: `content` and `tokens` are what was not told before."""
    end, usage, settings = answer.finished, answer.finished.usage, job.sampling
    word = end.stop if isinstance(end.stop, str) else ""
    found: dict[str, Any] = {
        "index": 0,
        "content": content,
        "tokens": [t.id for t in tokens] if body.return_tokens else [],
        "id_slot": -1,
        "stop": True,
        "model": job.chosen.served.name,
        "tokens_predicted": usage.completion,
        "tokens_evaluated": usage.prompt,
        "generation_settings": _settings(settings),
        "prompt": await service.prompts.decode(job.prompts[0]),
        "has_new_line": "\n" in answer.text,
        "truncated": False,
        "stop_type": "limit" if end.reason == "length" else "word" if word else "eos",
        "stopping_word": word,
        "tokens_cached": usage.cached,
        "timings": _timings(usage.prompt - usage.cached, usage.prefill, usage.completion, usage.decode),
    }
    if body.n_probs and tokens:
        found["completion_probabilities"] = [_probabilities(service, token, body.n_probs) for token in tokens]
    return found


def _settings(s: Sampling) -> dict[str, Any]:
    return {
        "n_predict": s.max_tokens,
        "seed": -1 if s.seed is None else s.seed,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_p": s.min_p,
        "repeat_penalty": s.repetition_penalty,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "stop": list(s.stop),
        "ignore_eos": s.ignore_eos,
        "n_probs": s.logprobs or 0,
    }


def _timings(prompt: int, prefill: float, made: int, decode: float) -> dict[str, Any]:
    def rate(n: int, seconds: float, name: str) -> dict[str, Any]:
        return {
            f"{name}_n": n,
            f"{name}_ms": seconds * 1e3,
            f"{name}_per_token_ms": seconds * 1e3 / max(n, 1),
            f"{name}_per_second": n / seconds if seconds > 0 else 0.0,
        }

    return rate(prompt, prefill, "prompt") | rate(made, decode, "predicted")


def _probabilities(service: Service, token: Token, wanted: int) -> dict[str, Any]:
    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        text, raw = service.prompts.piece(id)
        return {"id": id, "token": text, "bytes": list(raw), "logprob": finite_logprob(logprob)}

    best = sorted(token.top, key=lambda t: -t[2])[:wanted]
    return entry(token.id, token.logprob) | {"top_logprobs": [entry(id, logprob) for id, _, logprob in best]}


# -- adapters and the server -------------------------------------------------------------------------------------------


@llama_cpp_routes.get("/lora-adapters", summary="Adapters with their numbers and global scales.")
async def lora_adapters(request: HttpRequest) -> Response:
    service = service_of(request)
    numbers = service.mixes.numbers
    return Json(
        [
            {
                "id": numbers.of(card.id),
                "path": card.root,
                "scale": numbers.scales.get(card.id, 0.0),
                "name": card.id,
                "task_name": "",
                "prompt_prefix": "",
            }
            for card in service.mixes.adapters(caller_of(request))
        ]
    )


@llama_cpp_routes.post(
    "/lora-adapters",
    dependencies=[needs("operate")],
    summary="Set all global scales; adapters missing from the list get 0.",
)
async def set_lora_adapters(
    request: HttpRequest, body: Annotated[list[LoraScale], FAIL_FAST, at_most(1024)]
) -> Response:
    service, caller = service_of(request), caller_of(request)
    visible = service.mixes.adapters(caller)
    scales = {service.mixes.numbers.name(part.id, visible): part.scale for part in body}
    if len(scales) != len(body):
        raise invalid("an adapter is in the list twice", "id")
    if scales:
        # What cannot be mixed is refused now, not by the next request.
        service.mixes.choose(caller, mix=list(scales.items()))
    service.mixes.numbers.scales = {name: scale for name, scale in scales.items() if scale}
    return Json({"success": True})


@llama_cpp_routes.get("/props", summary="What this server is.")
async def props(request: HttpRequest) -> Response:
    service = service_of(request)
    template, base = service.reader.tokenizer.chat_template, service.catalog.base
    defaults = Completion(prompt="").sampling(service, service.prompts.context)
    return Json(
        {
            "default_generation_settings": {"n_ctx": service.prompts.context, "params": _settings(defaults)},
            "total_slots": service.settings.slots,
            "model_path": base,
            "model_alias": base,
            "chat_template": template if isinstance(template, str) else "",
            "modalities": {"vision": False, "audio": False},
            "build_info": f"veneer-{__version__}",
        }
    )
