"""Conversations that an environment carries on: the tokens are what the chat template writes, the model's own are all
that is learned, and each is drawn with the log-probability that transformers' forward gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_base import tiny_base_dir
from tests.train.text.drawn_runs import REWARDED, config_of, measured, run_drawn
from veneer.core.attach import attach
from veneer.errors import TrainingError
from veneer.models.text.base import TextBase
from veneer.serve.engine.live import live_sampler
from veneer.train.rewards.limited import LimitedFunction
from veneer.train.rewards.reward import Answer
from veneer.train.text.conversations import Conversation, ConversationSampler, answer_so_far
from veneer.train.text.render import Renderer
from veneer.train.text.rollouts import CompletionRequest, SamplerSettings, SamplingParams

REPLY = """
def reply(sample, item):
    said = [m for m in sample["messages"] if m["role"] == "assistant"]
    assert said[-1]["content"] == sample["output_text"]
    if item.get("broken"):
        raise ValueError("no such tool")
    if item.get("odd"):
        return {"role": "assistant", "content": "I speak for the model"}
    if len(said) == 1:
        return {"role": "tool", "content": f"{sample['output_text']} is in stock"}
    if len(said) == 2:
        return "And now?"
"""
PROMPT = ({"role": "user", "content": "Is it there?"},)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    tiny_base_dir(folder)
    (folder / "reply.py").write_text(REPLY, encoding="utf-8")
    lines = [{"prompt": f"Is number {i} there?", "odd": False} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def held(
    base: TextBase, shared: Path, rows: list[dict[str, Any]], turns: int = 8, most: int = 64
) -> list[Conversation]:
    """Conversations in which every turn of the model's is three letters."""
    text = base.tokenizer.apply_chat_template(list(PROMPT), tokenize=False, add_generation_prompt=True)
    ids = tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])
    how = SamplingParams(most, grammar=("regex", "[a-z]{3}"))
    requests = [CompletionRequest(ids, seed, how) for seed in range(len(rows))]
    with (
        attach(base.model) as attachment,
        live_sampler(base, attachment, SamplerSettings(rows=4)) as sampler,
        LimitedFunction("reply", file=str(shared / "reply.py")) as environment,
    ):
        conversing = ConversationSampler(sampler, Renderer(base.tokenizer), environment, turns)
        actual = conversing.sample(requests, [Answer(PROMPT, "", row) for row in rows], lambda: False)
    return actual


def test_conversation_tokens_equal_the_template(base: TextBase, shared: Path) -> None:
    for own in held(base, shared, [{}, {}]):
        roles = [turn["role"] for turn in own.turns]
        assert roles == ["assistant", "tool", "assistant", "user", "assistant"]
        assert own.turns[1]["content"] == f"{own.turns[0]['content']} is in stock"
        rollout = own.rollout
        text = base.tokenizer.decode([*rollout.prompt, *rollout.tokens])
        whole = base.tokenizer.apply_chat_template([*PROMPT, *own.turns], tokenize=False)
        assert whole.removeprefix(text).strip() == ""
        assert whole.startswith(text)
        mine = [token for token, trained in zip(rollout.tokens, rollout.trained, strict=True) if trained]
        ended = base.tokenizer.decode(rollout.tokens[-1:])
        assert base.tokenizer.decode(mine) == "".join(
            t["content"] + ended for t in own.turns if t["role"] == "assistant"
        )
        with torch.no_grad():
            ids = torch.tensor([[*rollout.prompt, *rollout.tokens]])
            logps = base.model(ids).logits[0].float().log_softmax(-1)
        at = [len(rollout.prompt) + i for i, trained in enumerate(rollout.trained) if trained]
        assert torch.tensor(rollout.logps) == pytest.approx(
            torch.stack([logps[i - 1, ids[0, i]] for i in at]), abs=1e-4
        )
        answer = answer_so_far(Answer(PROMPT, "", {}), own)
        assert (answer.text, answer.tokens, answer.cut) == (own.turns[-1]["content"], len(mine), False)
        assert list(answer.turns) == own.turns


def test_turn_and_token_limits_end_a_conversation(base: TextBase, shared: Path) -> None:
    (own,) = held(base, shared, [{}], turns=2)
    assert [turn["role"] for turn in own.turns] == ["assistant", "tool", "assistant"]
    (short,) = held(base, shared, [{}], most=12)  # no room for what the tool says
    assert short.rollout.cut
    assert len(short.rollout.tokens) <= 12


def test_failing_environment_leaves_no_reward(base: TextBase, shared: Path) -> None:
    broken, odd, fine = held(base, shared, [{"broken": True}, {"odd": True}, {}])
    assert "ValueError: no such tool" in broken.error
    assert "expected a text or messages" in odd.error
    assert not fine.error


def run(base: TextBase, shared: Path, output: Path, prompts: str = "prompts.jsonl") -> list[dict[str, Any]]:
    reinforcement = {
        "environment": str(shared / "reply.py"),
        "grammar": {"regex": "[a-z]{3}"},
        "group": 4,
        "max_tokens": 64,
        "rewards": [{"kind": "regex", "pattern": "[a-k]"}],
    }
    own = {"data": {"train": str(shared / prompts)}, "schedule": {"steps": 2}, "evaluation": {"keep": "last"}}
    run_drawn(config_of(REWARDED, shared, output, reinforcement=reinforcement, **own), base)
    return measured(output)


def test_run_on_conversations_has_no_mismatch(base: TextBase, shared: Path, tmp_path: Path) -> None:
    metrics = run(base, shared, tmp_path)
    assert [x["gap_max"] for x in metrics] == [0.0, 0.0]
    assert all(8 < x["answer_tokens"] <= 3 * 4 for x in metrics)  # three turns of three letters, and their ends


def test_failing_environment_stops_the_run_with_its_reason(base: TextBase, shared: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"Is number {i} there?", "odd": True} for i in range(6)]
    (shared / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TrainingError, match="expected a text or messages"):
        run(base, shared, tmp_path, "odd.jsonl")
