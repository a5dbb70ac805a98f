"""OpenAI's grader routes: test a grader on one completion before starting a job.

    POST /v1/fine_tuning/alpha/graders/validate   {grader}                        -> {grader}
    POST /v1/fine_tuning/alpha/graders/run        {grader, model_sample, item?}   -> {reward, metadata, sub_rewards, …}

Graders are parsed and run in a thread pool with a share per tenant; their seconds count against the tenant's
quota. `score_model` sends a request to a model of this server with the caller's permissions, limits and
billing. `python` runs in a sandbox, and only if the operator allows it (`veneer serve --train
--python-graders`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.errors import ConfigError, MissingExtraError
from veneer.serve.engine.admission import AdmittedRequest, FairPool
from veneer.serve.http.answers import TextAnswer, TextJob, run, total
from veneer.serve.http.bodies import Body, BodyRoute
from veneer.serve.http.errors import in_thread, json_bytes
from veneer.serve.http.guard import needs
from veneer.serve.http.service import Service, admission_of, caller_of, service_of
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Sampling, Usage, invalid
from veneer.serve.settings import QuotaLimits
from veneer.train.rewards.graders import (
    TOO_LARGE,
    Grade,
    GraderRun,
    PythonGrader,
    has_python,
    parse_grader,
    single_graders,
)
from veneer.train.rewards.judge import Question, Reply
from veneer.train.rewards.reward import Answer
from veneer.train.rewards.sandbox import Sandbox
from veneer.train.rewards.template import template_sample

_SECONDS = 60.0
"""Total seconds of all Python graders of one request."""
_ERRORS = (
    "formula_parse_error", "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
    "invalid_variable_error", "other_error", "python_grader_server_error", "python_grader_runtime_error",
    "model_grader_server_error", "model_grader_refusal_error", "model_grader_parse_error",
)  # fmt: skip


class GraderBody(Body):
    grader: dict[str, Any]


class GraderRunBody(GraderBody):
    model_sample: Annotated[str, Field(max_length=1 << 20)]
    item: dict[str, Any] | None = None


ParseGrader = Callable[[Any, str], Any]


def grader_of(source: Any, param: str = "grader", sandbox: Sandbox | None = None) -> Any:
    """Parse a client's grader. Blocks.

    Raises Refused for an invalid grader. Refuses a Python grader without a sandbox before parsing any
    source."""
    if sandbox is None and has_python(source):
        raise Refused(
            "this server runs no Python graders",
            status=403,
            code="grader_not_allowed",
            param=f"{param}.type",
            fix="the operator can allow them: veneer serve --train --python-graders",
        )
    try:
        return parse_grader(source, param)
    except ConfigError as error:
        raise invalid(error.what, error.where, error.fix) from error


def grader_routes(limits: QuotaLimits | None = None, *, sandbox: Sandbox | None = None) -> APIRouter:
    """Return the grader routes.

    `limits`: number of concurrent graders. `sandbox`: sandbox of Python graders; None refuses them."""
    router = APIRouter(tags=["OpenAI fine-tuning"], route_class=BodyRoute, dependencies=[needs("train")])
    limits = limits or QuotaLimits()
    helpers = FairPool(limits.helpers, "veneer-graders", limits.helper_share)

    async def run_in_pool(request: HttpRequest, work: Callable[[], bytes]) -> Response:
        """Run `work` in a thread of the caller's share; return a response with its bytes."""
        principal, quotas = caller_of(request), service_of(request).quotas
        size = len(await request.body())
        with quotas.take(principal.tenant, requests=1, memory=size):
            run = partial(helpers.run, principal.tenant, principal.weight, size)
            return Response(await in_thread("the grader", work, run), media_type="application/json")

    @router.post("/v1/fine_tuning/alpha/graders/validate", summary="Check a grader without running it")
    async def validate(request: HttpRequest, body: GraderBody) -> Response:
        def read() -> bytes:
            with _Timed(request):
                return json_bytes(
                    {"grader": grader_of(body.grader, sandbox=sandbox).model_dump(mode="json", exclude_unset=True)}
                )

        return await run_in_pool(request, read)

    @router.post("/v1/fine_tuning/alpha/graders/run", summary="Grade one completion")
    async def run_grader(request: HttpRequest, body: GraderRunBody) -> Response:
        service, principal, loop = service_of(request), caller_of(request), asyncio.get_running_loop()
        number, admission = f"grader-{request.scope['veneer.id']}", admission_of(request)

        def grade() -> bytes:
            began = time.perf_counter()
            with _Timed(request) as timed:

                def reply_all(questions: Sequence[Question]) -> list[Reply]:
                    """Ask the engine on the server's event loop."""
                    replies = _ask_all(service, principal, number, questions, admission)
                    with timed.waiting():
                        return asyncio.run_coroutine_threadsafe(replies, loop).result()

                try:
                    grader = grader_of(body.grader, sandbox=sandbox)
                    functions = sum(isinstance(each, PythonGrader) for each in single_graders(grader).values())
                    with GraderRun(
                        grader, ask=reply_all, timeout=_SECONDS / max(1, functions), sandbox=sandbox
                    ) as ready:
                        sample = template_sample(Answer((), body.model_sample))
                        result = ready.grade([(sample, body.item or {})])[0]
                except MissingExtraError as error:
                    raise invalid(error.what, "grader", error.fix) from error
            if (refusal := result.errors.get(TOO_LARGE)) is not None:
                raise Refused(refusal, status=413, code=TOO_LARGE, param="grader")
            return json_bytes(_grade_to_openai(grader, result, time.perf_counter() - began))

        return await run_in_pool(request, grade)

    return router


class _Timed:
    """Counts its block's seconds as helper seconds, except waiting for the engine.

    Raises Refused (429) at the beginning if the caller has no helper seconds left."""

    def __init__(self, request: HttpRequest) -> None:
        self._owner, self._quotas, self._waited = caller_of(request).tenant, service_of(request).quotas, 0.0

    def __enter__(self) -> _Timed:
        self._quotas.check_helpers(self._owner)
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._quotas.spend(self._owner, time.monotonic() - self._began - self._waited)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - began


async def _ask_all(
    service: Service, principal: Principal, number: str, questions: Sequence[Question], admission: AdmittedRequest
) -> list[Reply]:
    """Return replies to questions. Raises Refused, as for a chat completion."""
    return [
        await _ask(service, principal, f"{number}-{i}", question, admission) for i, question in enumerate(questions)
    ]


async def _ask(
    service: Service, principal: Principal, number: str, question: Question, admission: AdmittedRequest
) -> Reply:
    resolved = service.choose(principal, model=question.model)
    prompt = await service.prompts.of_messages(question.messages, admission)
    available = service.prompts.fits(prompt, "grader.input")
    sampling = Sampling(
        max_tokens=min(question.tokens, available, service.settings.max_tokens or available),
        temperature=question.temperature,
        top_p=question.top_p,
        seed=question.seed,
        grammar=question.grammar,
    )
    answer = TextAnswer()
    async with aclosing(run(service, TextJob(principal, resolved, [prompt], sampling, id=number))) as events:
        async for _, event in events:
            answer.add(event)
    usage = _usage(total([answer.took(len(prompt))], 1))
    return Reply(answer.text, usage, cut=answer.finished.reason == "length")


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "cached_tokens": usage.cached,
    }


def _grade_to_openai(grader: Any, grade: Grade, seconds: float) -> dict[str, Any]:
    """Return a grade in OpenAI's format.

    A grader without a value has the reward 0 and the reason in `errors`."""
    errors: dict[str, Any] = {word: word in grade.errors for word in _ERRORS}
    for word in ("python_grader_runtime_error", "model_grader_server_error"):
        errors[f"{word}_details"] = grade.errors.get(word)
    errors["python_grader_server_error_type"] = None
    models = list(grade.usage)
    return {
        "reward": grade.value if grade.value is not None else 0.0,
        "metadata": {
            "name": grader.name,
            "type": grader.type,
            "errors": errors,
            "execution_time": seconds,
            "scores": dict(grade.parts),
            "sampled_model_name": models[0] if models else None,
            "token_usage": sum(u.get("total_tokens", 0) for u in grade.usage.values()) if models else None,
        },
        "sub_rewards": dict(grade.parts),
        "model_grader_token_usage_per_model": {model: dict(usage) for model, usage in grade.usage.items()},
    }
