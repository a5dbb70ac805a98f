"""Rows and rewards of reasoning-gym's tasks and verifiers' tasksets (extras).

    data.train: reasoning-gym:chain_sum@2000?seed=7&max_terms=3  rows of the task with these settings
    rewards: [{kind: reasoning_gym}]                             the task's score of an answer, from 0 to 1

    data.train: verifiers:wordle@200                             the tasks of an installed taskset
    rewards: [{kind: verifiers, taskset: wordle}]                Σ weight · reward of the task; parts: metrics

Both packages compute the scores. A row is {prompt, completion, …}: the question, the expected answer if there
is one, and the data for scoring. A verifiers taskset that needs a sandbox or tool servers is refused, because
omitting a part would change the reward.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl

import regex  # type: ignore[import-untyped]

from veneer.errors import ConfigError, DataError, MissingExtraError, nearest, quoted
from veneer.train.config.rewards import ReasoningGymReward, VerifiersReward
from veneer.train.rewards.reward import Answer, Reward, RewardScore, column, each_answer

_SPEC = re.compile(r"(?P<name>[^@?]+)(?:@(?P<rows>\d+))?(?:\?(?P<settings>.*))?", re.DOTALL)
_ROWS = 500
_ANSWER = r"<answer>\s*(.*?)\s*</answer>"


def generated_rows(spec: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of a task or taskset.

    `spec`: `reasoning-gym:TASK@ROWS?key=value…` or `verifiers:TASKSET@ROWS?key=value…`; values are JSON if
    they parse, else text. Raises DataError, MissingExtraError."""
    source, _, rest = spec.partition(":")
    found = _SPEC.fullmatch(rest)
    if found is None:
        raise DataError("this source of rows cannot be read", where=spec, fix=f"{source}:NAME@ROWS?key=value&key=value")
    settings = {key: _value(value) for key, value in parse_qsl(found["settings"] or "", keep_blank_values=True)}
    rows = min(int(found["rows"] or _ROWS), limit or int(found["rows"] or _ROWS))
    make = _gym_rows if source == "reasoning-gym" else _verifiers_rows
    return make(found["name"], rows, settings, spec)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# -- reasoning-gym -----------------------------------------------------------------------------------------------------


def _gym_factory(where: str) -> Any:
    try:
        import reasoning_gym  # noqa: F401
        from reasoning_gym import factory
    except ImportError as error:
        raise MissingExtraError(
            "tasks of reasoning-gym need it", where=where, fix="pip install 'veneer[reasoning-gym]'"
        ) from error
    return factory


def _gym_rows(task: str, rows: int, settings: dict[str, Any], where: str) -> list[dict[str, Any]]:
    factory = _gym_factory(where)
    if task not in factory.DATASETS:
        near = nearest(task, factory.DATASETS, 1)
        hint = f"did you mean {near[0]}?" if near else "see reasoning_gym.factory.DATASETS"
        raise DataError(f"reasoning-gym has no task {quoted(task)}", where=where, fix=hint)
    try:
        made = factory.create_dataset(task, **{"size": rows, "seed": 0, **settings})
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"the task {task} cannot be set so: {error}", where=where) from error
    return [
        {
            "prompt": entry["question"],
            "completion": str(entry["answer"]),
            "answer": entry["answer"],
            "metadata": {"source_dataset": task, **_plain(entry["metadata"])},
        }
        for entry in (made[i] for i in range(rows))
    ]


def _plain(value: Any) -> Any:
    """Return the value after a round trip through JSON, as if read from a file."""
    return json.loads(json.dumps(value, default=str))


def reasoning_gym_reward(section: ReasoningGymReward) -> Reward:
    """Return the reward: `score_answer` of the row's task.

    It scores the last <answer>, or the whole answer if there is none."""
    factory = _gym_factory(section.called)
    pattern = regex.compile(section.answer or _ANSWER, regex.DOTALL)
    scores: dict[str, Any] = {}

    def score(answer: Answer) -> RewardScore:
        metadata = column(answer, "metadata")
        task = str(metadata.get("source_dataset"))
        if task not in scores:
            if task not in factory.DATASETS:
                raise DataError(
                    f"a row is of no task of reasoning-gym: {quoted(task)}", fix="data.train: reasoning-gym:TASK"
                )
            scores[task] = factory.get_score_answer_fn(task)
        said = pattern.findall(answer.text)
        final = said[-1] if said else None if section.answer else answer.text.strip()
        entry = {"question": answer.row.get("prompt", ""), "answer": column(answer, "answer"), "metadata": metadata}
        try:
            return RewardScore(float(scores[task](final, entry)), parts={"found": float(bool(said))})
        except Exception as error:  # a task's own arithmetic on arbitrary model output
            return RewardScore(None, f"{task}: {type(error).__name__}: {error}")

    return each_answer(score)


# -- verifiers ---------------------------------------------------------------------------------------------------------


def _verifiers(where: str) -> Any:
    try:
        import verifiers.v1 as package
    except ImportError as error:
        raise MissingExtraError(
            "tasksets of verifiers need it", where=where, fix="pip install 'veneer[verifiers]'"
        ) from error
    return package


def _taskset(name: str, settings: dict[str, Any], where: str) -> Any:
    package = _verifiers(where)
    try:
        config = package.taskset_config_type(name).model_validate({**settings, "id": name})
        return package.load_taskset(config)
    except ModuleNotFoundError as error:
        raise ConfigError(f"the taskset {quoted(name)} is not installed: {error}", where=where) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"the taskset {quoted(name)} cannot be loaded: {error}", where=where) from error


def _verifiers_rows(name: str, rows: int, settings: dict[str, Any], where: str) -> list[dict[str, Any]]:
    found = []
    for task in islice(iter(_taskset(name, settings, where)), rows):
        data = task.data.model_dump(mode="json", exclude_none=True)
        prompt = data.get("prompt")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
        if not messages:
            raise DataError(f"task {data.get('idx')} of {name} has no prompt: its user speaks first", where=where)
        if data.get("system_prompt"):
            messages.insert(0, {"role": "system", "content": data["system_prompt"]})
        messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
        found.append({"prompt": messages, "completion": str(data.get("answer", "")), "task": data})
    return found


def verifiers_reward(section: VerifiersReward) -> Reward:
    """Return the reward: the rewards of the row's task over the conversation.

    Raises ConfigError for a taskset whose tasks need containers, tool servers, or a runtime for scoring."""
    package = _verifiers(section.called)
    taskset = _taskset(section.taskset, dict(section.arguments), section.called)
    kind = type(taskset).task_type()
    needs = [
        word
        for word, needed in {
            "a container": kind.NEEDS_CONTAINER,
            "tools on servers": kind.toolsets(taskset.config.task) or type(taskset).toolsets(taskset.config),
        }.items()
        if needed
    ]
    if needs:
        raise ConfigError(f"the tasks of {section.taskset} need {' and '.join(needs)}", where=section.called)

    def trace_of(task: Any, answer: Answer) -> Any:
        said = answer.turns or [{"role": "assistant", "content": answer.text}]
        nodes = []
        for i, message in enumerate([*answer.prompt, *said]):
            sampled = i >= len(answer.prompt) and message["role"] == "assistant"
            nodes.append({"parent": i - 1 if i else None, "message": _wire(message), "sampled": sampled})
        about = package.TraceTask(type=type(task).__name__, data=task.data)
        agent = package.AgentInfo(config=package.AgentConfig())
        return package.Trace(
            task=about,
            agent=agent,
            nodes=[package.MessageNode.model_validate(n) for n in nodes],
            is_completed=True,
            ok=True,
            stop_condition="max_output_tokens" if answer.cut else None,
        )

    async def score(answer: Answer) -> RewardScore:
        data = kind.data_type().model_validate(column(answer, "task"))
        task = kind(data, taskset.config.task)
        if asks := [fn.__name__ for fn in task.hooks("reward") if _needs_runtime(fn)]:
            raise ConfigError(f"the reward {asks[0]} of {section.taskset} is given in a sandbox", where=section.called)
        trace = trace_of(task, answer)
        try:
            await task.score(trace)
        except Exception as error:  # a task's own code on arbitrary model output
            return RewardScore(None, f"{type(error).__name__}: {error}")
        parts = {name: each.score for name, each in trace.rewards.items() if each is not None}
        parts |= {name: float(each) for name, each in trace.metrics.items() if each is not None}
        return RewardScore(float(trace.reward), parts=parts if len(parts) > 1 else {})

    def reward(answers: Sequence[Answer], /) -> list[RewardScore]:
        async def all_of_them() -> list[RewardScore]:
            return list(await asyncio.gather(*(score(answer) for answer in answers)))

        return asyncio.run(all_of_them())

    return reward


def _needs_runtime(fn: Any) -> bool:
    parameter = inspect.signature(fn).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _wire(message: Any) -> dict[str, Any]:
    """Return a chat template message in verifiers' form.

    Tool calls are flat, with their arguments as text."""
    made = {key: message[key] for key in ("role", "content", "tool_call_id", "name") if message.get(key) is not None}
    calls = []
    for i, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append({"id": call.get("id", f"call_{i}"), "name": function["name"], "arguments": text})
    return made | ({"tool_calls": calls} if calls else {})
