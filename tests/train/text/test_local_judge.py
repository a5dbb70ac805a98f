"""A judge in this process: the base or an adapter gives the answers that transformers would generate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from veneer.core.adapter import Adapter, LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.models.text.base import TextBase
from veneer.models.text.generate import complete
from veneer.serve.engine.live import live_sampler
from veneer.train.rewards.judge import Question
from veneer.train.text.reinforce import sampled_judge
from veneer.train.text.rollouts import SamplerSettings

MESSAGES = [[{"role": "user", "content": text}] for text in ("The printer is on fire.", "Where is my invoice?")]


def strong(base: TextBase, seed: int) -> Adapter:
    """Return an adapter that changes completions noticeably."""
    made = create(base.model, LoraSpec(rank=4), seed=seed)
    torch.manual_seed(seed)
    return made.mapped(lambda t: t + torch.randn_like(t) if t.is_floating_point() else t)


def said(base: TextBase) -> list[str]:
    return [each.text for each in complete(base, MESSAGES, max_new_tokens=8)]


def test_base_or_adapter_can_judge_during_training(base: TextBase, tmp_path: Path) -> None:
    critic = strong(base, 1)
    peft.write_folder(critic, tmp_path / "critic")
    bare = said(base)
    with attach(base.model) as own:
        own.add("critic", critic)
        own.use("critic")
        other = said(base)
    assert bare != other
    name = str(tmp_path / "critic")
    with attach(base.model) as attachment:
        attachment.add("run", strong(base, 2), trainable=True)
        with live_sampler(base, attachment, SamplerSettings(rows=4)) as sampler:
            ask = sampled_judge(base, attachment, sampler, {"base", name})
            questions = [Question(messages, model, tokens=8) for model in ("base", name) for messages in MESSAGES]
            properties = {"result": {"enum": [3]}}
            form = {"type": "object", "properties": properties, "required": ["result"], "additionalProperties": False}
            formed = Question(MESSAGES[0], name, tokens=40, form=form)
            replies = ask([*questions, Question(MESSAGES[0], "base", tokens=10**6), formed, replace(formed, tokens=3)])
    assert [reply.text for reply in replies[:4]] == bare + other
    assert [reply.cut for reply in replies[5:]] == [False, True]
    assert json.loads(replies[5].text) == {"result": 3}
    assert "exceed the base's context" in replies[4].error


def test_missing_judge_is_refused_before_sampling(base: TextBase) -> None:
    with (
        attach(base.model) as attachment,
        live_sampler(base, attachment, SamplerSettings(rows=4)) as sampler,
        pytest.raises(AdapterError, match="there is no adapter"),
    ):
        sampled_judge(base, attachment, sampler, {"nobody/here"})
