"""OpenAI's routes of graders: tried on one answer before a job is paid for.

    POST /v1/fine_tuning/alpha/graders/validate   {grader}                        -> {grader}
    POST /v1/fine_tuning/alpha/graders/run        {grader, model_sample, item?}   -> {reward, metadata, sub_rewards, …}

`score_model` asks a model of this server as its caller may ask it: admitted, within its limits, and billed as any other
request. `python` runs in a process with limits of time and memory, which is no jail: it is off unless the operator
allows it (`veneer serve --train --python-graders`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.errors import ConfigError, MissingExtraError
from veneer.serve.http.answers import TextAnswer, TextJob, run, total
from veneer.serve.http.bodies import Body, BodyRoute
from veneer.serve.http.errors import Json, in_thread
from veneer.serve.http.guard import needs
from veneer.serve.http.service import Service, caller_of, service_of
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Sampling, Usage, invalid
from veneer.train.rewards.graders import Grade, GraderRun, PythonGrader, parse_grader, single_graders
from veneer.train.rewards.judge import Question, Reply
from veneer.train.rewards.reward import Answer
from veneer.train.rewards.template import sample_of

_AT_ONCE = 4
"""Graders that may run at a time; the next ones wait."""
_SECONDS = 60.0
"""How long a python grader may take."""
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


def grader_of(given: Any, python: bool, param: str = "grader") -> Any:
    """A grader that a client gave. Raises Refused for one that is none, and for python where that is off."""
    try:
        grader = parse_grader(given, param)
    except ConfigError as error:
        raise invalid(error.what, error.where, error.fix) from error
    if not python and any(isinstance(each, PythonGrader) for each in single_graders(grader).values()):
        raise Refused(
            "graders of Python are off on this server", status=403, code="grader_not_allowed", param=f"{param}.type",
            fix="its operator may turn them on: veneer serve --train --python-graders",
        )  # fmt: skip
    return grader


def grader_routes(*, python: bool = False) -> APIRouter:
    """`python`: whether graders of Python are run."""
    router = APIRouter(tags=["OpenAI fine-tuning"], route_class=BodyRoute, dependencies=[needs("train")])
    room = asyncio.Semaphore(_AT_ONCE)

    @router.post("/v1/fine_tuning/alpha/graders/validate", summary="Look at a grader; nothing of it is run.")
    async def validate(request: HttpRequest, body: GraderBody) -> Response:
        return Json({"grader": grader_of(body.grader, python).model_dump(mode="json", exclude_unset=True)})

    @router.post("/v1/fine_tuning/alpha/graders/run", summary="What a grader gives for one answer.")
    async def run_grader(request: HttpRequest, body: GraderRunBody) -> Response:
        grader = grader_of(body.grader, python)
        service, caller = service_of(request), caller_of(request)
        sample = sample_of(Answer((), body.model_sample))
        began, loop = time.perf_counter(), asyncio.get_running_loop()

        def ask(questions: Sequence[Question]) -> list[Reply]:
            """Called in a thread of its own; the engine is asked on the server's loop."""
            number = f"grader-{request.scope['veneer.id']}"
            asked = _asked(service, caller, number, questions)
            return asyncio.run_coroutine_threadsafe(asked, loop).result()

        def grade() -> Grade:
            try:
                with GraderRun(grader, ask=ask, timeout=_SECONDS) as ready:
                    return ready.grade([(sample, body.item or {})])[0]
            except MissingExtraError as error:
                raise invalid(error.what, "grader", error.fix) from error

        async with room:
            grade_ = await in_thread("the grader", grade)
        return Json(_shown(grader, grade_, time.perf_counter() - began))

    return router


async def _asked(service: Service, caller: Principal, number: str, questions: Sequence[Question]) -> list[Reply]:
    """Raises Refused, as a chat completion of the same would."""
    return [await _ask(service, caller, f"{number}-{i}", question) for i, question in enumerate(questions)]


async def _ask(service: Service, caller: Principal, number: str, question: Question) -> Reply:
    chosen = service.mixes.choose(caller, model=question.model)
    prompt = await service.prompts.of_messages(question.messages)
    room = service.prompts.fits(prompt, "grader.input")
    sampling = Sampling(
        max_tokens=min(question.tokens, room, service.settings.max_tokens or room), temperature=question.temperature,
        top_p=question.top_p, seed=question.seed, grammar=question.grammar,
    )  # fmt: skip
    answer = TextAnswer()
    async with aclosing(run(service, TextJob(caller, chosen, [prompt], sampling, id=number))) as events:
        async for _, event in events:
            answer.add(event)
    usage = _usage(total([answer.took(len(prompt))], 1))
    return Reply(answer.text, usage, cut=answer.finished.reason == "length")


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt, "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion, "cached_tokens": usage.cached,
    }  # fmt: skip


def _shown(grader: Any, grade: Grade, seconds: float) -> dict[str, Any]:
    """As OpenAI's clients read it. What has no value has the reward 0 and says why in `errors`."""
    errors: dict[str, Any] = {word: word in grade.errors for word in _ERRORS}
    for word in ("python_grader_runtime_error", "model_grader_server_error"):
        errors[f"{word}_details"] = grade.errors.get(word)
    errors["python_grader_server_error_type"] = None
    models = list(grade.usage)
    return {
        "reward": grade.value if grade.value is not None else 0.0,
        "metadata": {
            "name": grader.name, "type": grader.type, "errors": errors, "execution_time": seconds,
            "scores": dict(grade.parts), "sampled_model_name": models[0] if models else None,
            "token_usage": sum(u.get("total_tokens", 0) for u in grade.usage.values()) if models else None,
        },
        "sub_rewards": dict(grade.parts),
        "model_grader_token_usage_per_model": {model: dict(usage) for model, usage in grade.usage.items()},
    }  # fmt: skip
