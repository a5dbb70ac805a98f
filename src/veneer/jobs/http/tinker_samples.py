"""Tinker's routes for sampling sessions and samples.

A sampling session samples from a checkpoint or from the base."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.responses import Response

from veneer.jobs.http.tinker import (
    MAX_NUMBER,
    Call,
    TinkerBody,
    TinkerRoutes,
    future_response,
    tinker_blocking,
    tinker_router,
)
from veneer.jobs.tinker.service import FutureResult, SamplerSource
from veneer.jobs.tinker.wire import sample_bytes
from veneer.serve.access import ResolvedModel
from veneer.serve.http.answers import TextAnswer, TextJob, run
from veneer.serve.http.bodies import Strict
from veneer.serve.http.errors import Json, as_refused, message_of
from veneer.serve.http.service import Service
from veneer.serve.names.adapter_sources import AdapterLocation
from veneer.serve.quota import QuotaHold
from veneer.serve.request import Refused, invalid
from veneer.serve.request import Sampling as SamplingParams

_SAMPLE, _PROMPT_TOKEN, _ANSWER_TOKEN = 2048, 64, 400
"""Bytes charged per waiting sample, per prompt token and per sampled token."""
_REFUSED = (
    "topk_prompt_logprobs", "topk_sample_logprobs", "prompt_logprobs_last_n", "target_prompt_logprobs",
    "prompt_alt_tokens_k", "record_stability_info",
)  # fmt: skip
"""Options of the SDK that this server does not support."""


class SamplerBody(TinkerBody):
    session_id: str
    sampling_session_seq_id: int = Field(ge=0, lt=MAX_NUMBER)
    base_model: str | None = None
    model_path: str | None = None


class SamplingBody(Strict):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class ChunkBody(Strict):
    type: str = "encoded_text"
    tokens: list[int]


class PromptBody(Strict):
    chunks: list[ChunkBody]


class SampleBody(TinkerBody):
    refused: ClassVar[Mapping[str, Any]] = dict.fromkeys(_REFUSED, 0)
    num_samples: int = Field(default=1, ge=1, le=4096)
    prompt: PromptBody
    sampling_params: SamplingBody
    sampling_session_id: str
    seq_id: int = Field(ge=0, lt=MAX_NUMBER)
    prompt_logprobs: bool | None = None


class FutureBody(Strict):
    request_id: str
    allow_metadata_only: bool = False


@dataclass(eq=False)
class Sampling:
    """The pending sampling requests of all tenants.

    Samples can use half of the engine's queue, which is divided equally between the tenants that have pending
    requests.

    requests: tenant -> number of pending requests.
    running: tenant -> number of samples in the engine."""

    results: TinkerRoutes
    requests: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    _turn: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def submit(self, call: Call, body: SampleBody) -> Response:
        number = f"{body.sampling_session_id}:{body.seq_id}"
        source = call.service.sampler(call.tenant, body.sampling_session_id)
        if number not in self.results.results:
            most, tokens = _most_samples(call.http), sum(len(chunk.tokens) for chunk in body.prompt.chunks)
            if body.num_samples > most:
                raise invalid(f"num_samples is {body.num_samples}", "num_samples", f"at most {most} at once")
            if not tokens:
                raise invalid("the prompt has no tokens", "prompt")
            hold = self.results.take_quota(call, _PROMPT_TOKEN * tokens)
            self.results.add(call, number, hold, self._sample(call, source, body, hold))
        return future_response(number, None, [f"{number}:{i}" for i in range(body.num_samples)])

    async def _sample(self, call: Call, source: SamplerSource, body: SampleBody, hold: QuotaHold) -> FutureResult:
        """Return a request's samples, or its error as a failed result.

        If the samples exceed a temporary limit, waits and tries again, because the SDK does not retry a failed
        result."""
        count, tenant, most = body.num_samples, call.tenant, _most_samples(call.http)
        self.requests[tenant] += 1
        try:
            job = await tinker_blocking(lambda: _job(call, source, body))
            tokens = job.sampling.max_tokens or call.http.reader.context
            memory = _SAMPLE + count * tokens * _ANSWER_TOKEN

            def fits() -> bool:
                tenants = sum(waiting > 0 for waiting in self.requests.values())
                return not self.running[tenant] or (self.running[tenant] + count) * tenants <= most

            async with self._turn:
                await self._turn.wait_for(fits)
                self.running[tenant] += count
            try:
                answers = await _answers(call.http, job, hold, memory)
            finally:
                self.running[tenant] -= count
                async with self._turn:
                    self._turn.notify_all()
            return FutureResult("proto", await asyncio.to_thread(_sample_bytes, body, answers))
        except Exception as error:
            refused = as_refused(error)
            category = "server" if refused.status >= 500 else "user"
            return FutureResult("failed", json.dumps({"error": message_of(refused), "category": category}).encode())
        finally:
            self.requests[tenant] -= 1


def _most_samples(http: Service) -> int:
    """Return the maximum number of samples per request: half of the engine's queue."""
    return max(1, http.settings.queue // 2)


async def _answers(http: Service, job: TextJob, hold: QuotaHold, memory: int) -> list[TextAnswer]:
    """Return the engine's completions. Retries while a temporary limit is exceeded."""
    while True:
        answers = [TextAnswer() for _ in range(job.choices)]
        try:
            hold.change(memory=memory)
            async with aclosing(run(http, job)) as events:
                async for i, event in events:
                    answers[i].add(event)
            return answers
        except Refused as error:
            if error.status != 429:
                raise
            await asyncio.sleep(error.retry_after or 0.5)
            job = replace(job, id=secrets.token_hex(16))


def _job(call: Call, source: SamplerSource, body: SampleBody) -> TextJob:
    """Return a sampling request as a TextJob. Raises Refused if it is invalid."""
    params, context = body.sampling_params, call.http.reader.context
    prompt = tuple(token for chunk in body.prompt.chunks for token in chunk.tokens)
    stop = [params.stop] if isinstance(params.stop, str) else list(params.stop or [])
    sampling = SamplingParams(
        max_tokens=max(1, context - len(prompt)) if params.max_tokens is None else params.max_tokens,
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        seed=params.seed,
        stop=tuple(text for text in stop if isinstance(text, str)),
        stop_ids=tuple(token for token in stop if isinstance(token, int)),
        ignore_eos=params.stop == [],
        logprobs=0,
        prompt_logprobs=bool(body.prompt_logprobs),
    )
    model, n = _resolved(call, source), body.num_samples
    return TextJob(call.principal, model, [prompt], sampling, choices=n, label="tinker")


def _resolved(call: Call, source: SamplerSource) -> ResolvedModel:
    catalog = call.http.catalog
    if not source.digest:
        return catalog.resolve(source.reference or catalog.base, call.principal)
    if not Path(source.folder).is_dir():
        message = "the weights of this sampling client were deleted: newer weights of its run replaced them"
        fix = "save_weights_for_sampler(name) keeps weights until they are deleted"
        raise Refused(message, status=410, code="gone", fix=fix)
    catalog.sources.keep(source.digest, AdapterLocation(source.name, path=Path(source.folder)))
    return ResolvedModel(((source.digest, 1.0),), source.name, source.name, adapters=(source.name,))


def _sample_bytes(body: SampleBody, answers: Sequence[TextAnswer]) -> bytes:
    samples = [
        ([(token.id, token.logprob or 0.0) for token in answer.tokens], answer.finished.reason == "stop")
        for answer in answers
    ]
    prompt = next((answer.tokens[0].prompt for answer in answers if answer.tokens), ())
    logprobs = [token.logprob if i else None for i, token in enumerate(prompt)] if body.prompt_logprobs else None
    return sample_bytes(samples, prompt=logprobs, cached=answers[0].cached)


def sampling_routes(state: TinkerRoutes) -> APIRouter:
    """Return the routes for sampling and for the results of all requests."""
    router, current_call, sampling = tinker_router(), Depends(state.call), Sampling(state)

    @router.post("/create_sampling_session", summary="Create a sampling session of the base or a checkpoint")
    def create_sampler(body: SamplerBody, call: Call = current_call) -> Any:
        if body.model_path is None:
            if body.base_model is None:
                raise invalid("base_model or model_path is needed", "base_model")
            call.use_base(body.session_id, body.base_model)
        number = body.sampling_session_seq_id
        sampler_source = call.service.create_sampler(call.tenant, body.session_id, number, body.model_path)
        return {"type": "create_sampling_session", "sampling_session_id": sampler_source.id}

    @router.get("/samplers/{id}", summary="Get a sampling session's weights")
    def sampler(id: str, call: Call = current_call) -> Any:
        source = call.service.sampler(call.tenant, id)
        name = call.model_name(call.service.session(call.tenant, id.partition(":")[0]).base_name)
        return {"sampler_id": source.id, "base_model": name, "model_path": source.path}

    @router.post("/asample", summary="Sample from one prompt")
    async def sample(body: SampleBody, call: Call = current_call) -> Response:
        return await sampling.submit(call, body)

    @router.post("/retrieve_future", summary="Get a request's result; 408 while it is pending")
    async def retrieve(body: FutureBody, call: Call = current_call) -> Response:
        number = body.request_id
        result = await state.result(call, number)
        if result is None:
            return Json({"type": "try_again", "request_id": number, "queue_state": "active"}, status_code=408)
        kind = "application/x-protobuf" if result.kind == "proto" else "application/json"
        return Response(result.data, media_type=kind)

    return router
