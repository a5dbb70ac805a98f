"""Build the rewards of a configuration from `reinforcement.rewards`.

    with build_rewards(config.reinforcement.rewards, ask=ask) as rewards: …

`ask` sends questions to models in this process: the base, or adapters by name (`judge.AskModel`). The owner
of the engine provides `ask`. A judge with a `url` does not use `ask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from veneer.errors import ConfigError
from veneer.train.config.rewards import (
    GraderReward,
    JudgeReward,
    ModelReward,
    PythonReward,
    ReasoningGymReward,
    RewardSection,
)
from veneer.train.config.section import SERVER_KEYS
from veneer.train.rewards import rules
from veneer.train.rewards.graders import grader_models, grader_reward, has_python, parse_grader
from veneer.train.rewards.judge import AskModel, judge_reward
from veneer.train.rewards.limited import LimitedFunction, working_sandbox
from veneer.train.rewards.reasoning_gym import reasoning_gym_reward
from veneer.train.rewards.reward import NamedReward, Reward, Rewards
from veneer.train.rewards.server import ServerJudge
from veneer.train.rewards.template import template_sample

_RULES: dict[str, Callable[[Any], Reward]] = {
    "exact_match": rules.exact_match,
    "json_schema": rules.json_schema,
    "json_fields": rules.json_fields,
    "regex": rules.regular_expression,
    "length": rules.length,
}


@contextmanager
def build_rewards(
    sections: Sequence[RewardSection], *, ask: AskModel | None = None, most_failed: float = 0.1
) -> Iterator[Rewards]:
    """Yield the rewards of a configuration, and close the rewards' processes and connections at the end.

    Raises ConfigError for an invalid schema, grader or file, and for a judge without a model;
    MissingExtraError for a missing package; ResourceError if a grader needs a sandbox but no sandbox works on
    this machine."""
    with ExitStack() as opened:
        rewards = [NamedReward(each.called, _reward(each, ask, opened), each.weight) for each in sections]
        yield Rewards(rewards, most_failed)


def local_judge_models(sections: Sequence[RewardSection]) -> set[str]:
    """Return the names of the models in this process that the rewards use.

    These are `BASE_MODEL` and adapters. Raises ConfigError for an invalid grader."""
    models: set[str] = set()
    for section in sections:
        if isinstance(section, JudgeReward) and section.url is None:
            models.add(section.model)
        if isinstance(section, GraderReward) and section.url is None:
            models |= grader_models(_grader(section))
    return models


def _grader(section: GraderReward) -> Any:
    return parse_grader(section.grader, f"reinforcement.rewards, {section.called}")


def _reward(section: RewardSection, ask: AskModel | None, opened: ExitStack) -> Reward:
    """Build one reward, and register in `opened` the resources that must be closed."""
    if isinstance(section, JudgeReward):
        return judge_reward(section, _model_of(section, ask, opened))
    if isinstance(section, PythonReward):
        limits = {key: getattr(section, key) for key in ("file", "timeout", "at_once")}
        process = LimitedFunction(section.function, memory=section.memory_gb * 1e9, **limits)
        function = opened.enter_context(process)
        return lambda answers: function.score(
            [(template_sample(a) | {"messages": list(a.prompt)}, a.row) for a in answers]
        )
    if isinstance(section, GraderReward):
        grader = _grader(section)
        model = _model_of(section, ask, opened) if grader_models(grader) else None
        sandbox = working_sandbox() if section.sandbox and has_python(section.grader) else None
        return grader_reward(grader, opened, ask=model, sandbox=sandbox)
    if isinstance(section, ReasoningGymReward):
        return reasoning_gym_reward(section)
    return _RULES[section.kind](section)


def _model_of(section: ModelReward, ask: AskModel | None, opened: ExitStack) -> AskModel:
    """Return the function that sends the reward's questions to its model."""
    if section.url is not None:
        settings = {key: getattr(section, key) for key in SERVER_KEYS}
        return opened.enter_context(ServerJudge(section.url, **settings))
    if ask is None:
        text = f"the reward {section.called} needs a model in this process, but no model is available"
        raise ConfigError(text, where="reinforcement.rewards", fix="set `url` to a model server")
    return ask
