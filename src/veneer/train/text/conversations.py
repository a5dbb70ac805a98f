"""Multi-turn rollouts: the model and an environment alternate.

The environment answers each turn (with a tool result or a further question) until it has nothing to say, or
the turns or tokens are used up.

    draw = Conversing(sampler, renderer, environment, turns=8).draw        replaces `Sampler.draw`
    held = draw(asked, prompts, interrupted)

The environment is a function of the user's file, `reply(sample, item)`, in a limited process
(`rewards.limited`). Its arguments are the model's output, with the conversation so far as `messages`, and the
row. It returns None (the conversation has ended), a text (a user turn) or messages, such as {"role": "tool",
"content": …}. If it fails, the conversation has no reward.

The model's own tokens stay as sampled: the template's text between two turns is found around a mark that
replaces the model's output, and is appended to the output. Only the model's tokens are targets
(`Rollout.others` are not). `max_tokens` counts all tokens after the prompt, so a conversation is no longer
than a single completion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.errors import DataError, shown
from veneer.train.rewards.limited import LimitedFunction, NoAnswer
from veneer.train.rewards.reward import Answer, Turn
from veneer.train.rewards.template import sample_of
from veneer.train.text.prompts import prompt_of
from veneer.train.text.render import Renderer
from veneer.train.text.rollouts import CompletionRequest, Rollout, Sampler, draw_seed
from veneer.train.text.rows import Row

_MARK = "\ue100veneer\ue101"  # private use: occurs in no text
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # Hermes, Qwen, SmolLM3


@dataclass
class Conversation:
    """A rollout of one or more turns.

    `turns`: every message after the prompt; empty for a single answer. `error`: why the environment failed.
    """

    rollout: Rollout
    turns: list[Turn] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Conversing:
    """Samples conversations. `turns`: maximum turns of the model."""

    sampler: Sampler
    renderer: Renderer
    environment: LimitedFunction
    turns: int

    def draw(
        self, asked: Sequence[CompletionRequest], prompts: Sequence[Answer], interrupted: Callable[[], bool]
    ) -> list[Conversation] | None:
        """Return the conversations; None once interrupted.

        `prompts`: answers without text. Raises the sampler's errors; DataError for a template that cannot add
        messages after an answer."""
        held: list[Conversation] = []
        going = list(range(len(asked)))
        for turn in range(self.turns):
            if not going:
                break
            wanted = [asked[i] if not turn else self._next(asked[i], held[i].rollout, turn) for i in going]
            drawn = self.sampler.draw(wanted, interrupted)
            if drawn is None:
                return None
            if not turn:
                held = [Conversation(rollout) for rollout in drawn]
            for i, rollout in zip(going, drawn, strict=True):
                held[i].rollout = rollout if not turn else _joined(held[i].rollout, rollout)
                held[i].turns.append(_said(rollout.text))
            going = [i for i in going if not held[i].rollout.cut]
            if turn + 1 < self.turns:
                going = self._answered(going, held, asked, prompts)
        return held

    def _next(self, asked: CompletionRequest, so_far: Rollout, turn: int) -> CompletionRequest:
        left = asked.how.max_tokens - len(so_far.tokens)
        how = replace(asked.how, max_tokens=left)
        return replace(asked, prompt=(*so_far.prompt, *so_far.tokens), seed=draw_seed(asked.seed, turn), how=how)

    def _answered(
        self,
        going: Sequence[int],
        held: list[Conversation],
        asked: Sequence[CompletionRequest],
        prompts: Sequence[Answer],
    ) -> list[int]:
        """Append the environment's messages; return the conversations that continue."""
        pairs = [
            (
                sample_of(said_so_far(prompts[i], held[i])) | {"messages": [*prompts[i].prompt, *held[i].turns]},
                prompts[i].row,
            )
            for i in going
        ]
        still = []
        for i, given in zip(going, self.environment.call(pairs), strict=True):
            own = held[i]
            messages = given if isinstance(given, NoAnswer) else _messages(given)
            if isinstance(messages, NoAnswer):
                own.error = messages.why
            elif messages:
                ids = self._between(prompts[i], own, messages)
                if len(own.rollout.tokens) + len(ids) >= asked[i].how.max_tokens:
                    own.rollout = replace(own.rollout, cut=True)
                    continue
                own.turns += messages
                first = len(own.rollout.tokens)
                others = (*own.rollout.others, (first, first + len(ids)))
                own.rollout = replace(own.rollout, tokens=(*own.rollout.tokens, *ids), others=others)
                still.append(i)
        return still

    def _between(self, prompt: Answer, own: Conversation, messages: Sequence[Turn]) -> tuple[int, ...]:
        """Return the tokens between the model's output and its next turn."""
        marked = [*prompt.prompt, *own.turns[:-1], {"role": "assistant", "content": _MARK}, *messages]
        row = prompt_of(Row("messages", tuple(map(dict, marked)), tools=tuple(prompt.tools)))
        try:
            text = self.renderer.prompt(row)
        except ValueError as error:
            raise DataError(f"a conversation cannot go on: {error}") from error
        _, found, behind = text.rpartition(_MARK)
        if not found:
            raise DataError("the chat template leaves out what the model said once messages follow it")
        tokenizer: Any = self.renderer.tokenizer
        ended = tokenizer.decode(own.rollout.tokens[-1:], skip_special_tokens=False)
        return tuple(tokenizer(behind.removeprefix(ended), add_special_tokens=False, verbose=False)["input_ids"])


def said_so_far(prompt: Answer, own: Conversation) -> Answer:
    """Return the conversation in the form for rewards and the environment."""
    rollout = own.rollout
    turns = own.turns if len(own.turns) > 1 or (own.turns and own.turns[-1].get("tool_calls")) else ()
    return replace(
        prompt,
        text=str(own.turns[-1]["content"]) if own.turns else rollout.text,
        tokens=len(rollout.logps),
        cut=rollout.cut,
        turns=turns,
        error=own.error,
    )


def _said(text: str) -> Turn:
    calls = []
    for i, found in enumerate(_CALL.findall(text)):
        try:
            call = json.loads(found)
            function = {"name": str(call["name"]), "arguments": call.get("arguments", {})}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        calls.append({"id": f"call_{i}", "type": "function", "function": function})
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}


def _messages(given: Any) -> list[Turn] | NoAnswer:
    """Return the environment's result as messages."""
    if given is None:
        return []
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    listed = given if isinstance(given, list) else [given]
    for message in listed:
        fine = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not fine or message.get("role") not in ("user", "tool", "system"):
            return NoAnswer(
                f"the environment gave {shown(given)[:100]}, and neither a text nor messages of user, tool or system"
            )
    return listed


def _joined(first: Rollout, then: Rollout) -> Rollout:
    """Return a conversation with one more model turn."""
    return replace(
        first,
        tokens=(*first.tokens, *then.tokens),
        logps=(*first.logps, *then.logps),
        drawn=(*first.drawn, *then.drawn),
        text=then.text,
        cut=then.cut,
        others=first.others,
    )
