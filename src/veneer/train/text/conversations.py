"""Multi-turn rollouts: the model and an environment alternate.

The environment answers each turn (with a tool result or a further question) until it has nothing to say, or
the turns or tokens are used up.

    sampler = ConversationSampler(sampler, renderer, environment, turns=8)
    conversations = sampler.sample(requests, prompts, interrupted)     replaces `Sampler.sample`

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
from veneer.train.rewards.template import template_sample
from veneer.train.text.prompts import with_final_turn
from veneer.train.text.render import Renderer
from veneer.train.text.rollouts import CompletionRequest, Rollout, Sampler, sampling_seed
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
class ConversationSampler:
    """Samples conversations. `turns`: maximum turns of the model."""

    sampler: Sampler
    renderer: Renderer
    environment: LimitedFunction
    turns: int

    def sample(
        self, requests: Sequence[CompletionRequest], prompts: Sequence[Answer], interrupted: Callable[[], bool]
    ) -> list[Conversation] | None:
        """Return the conversations; None once interrupted.

        `prompts`: answers without text. Raises the sampler's errors; DataError for a template that cannot add
        messages after an answer."""
        conversations: list[Conversation] = []
        active = list(range(len(requests)))
        for turn in range(self.turns):
            if not active:
                break
            next_requests = [
                requests[i] if not turn else self._next(requests[i], conversations[i].rollout, turn) for i in active
            ]
            rollouts = self.sampler.sample(next_requests, interrupted)
            if rollouts is None:
                return None
            if not turn:
                conversations = [Conversation(rollout) for rollout in rollouts]
            for i, rollout in zip(active, rollouts, strict=True):
                conversations[i].rollout = rollout if not turn else _joined(conversations[i].rollout, rollout)
                conversations[i].turns.append(_assistant_turn(rollout.text))
            active = [i for i in active if not conversations[i].rollout.cut]
            if turn + 1 < self.turns:
                active = self._answered(active, conversations, requests, prompts)
        return conversations

    def _next(self, request: CompletionRequest, so_far: Rollout, turn: int) -> CompletionRequest:
        left = request.how.max_tokens - len(so_far.tokens)
        how = replace(request.how, max_tokens=left)
        return replace(
            request, prompt=(*so_far.prompt, *so_far.tokens), seed=sampling_seed(request.seed, turn), how=how
        )

    def _answered(
        self,
        active: Sequence[int],
        conversations: list[Conversation],
        requests: Sequence[CompletionRequest],
        prompts: Sequence[Answer],
    ) -> list[int]:
        """Append the environment's messages; return the conversations that continue."""
        pairs = [
            (
                template_sample(answer_so_far(prompts[i], conversations[i]))
                | {"messages": [*prompts[i].prompt, *conversations[i].turns]},
                prompts[i].row,
            )
            for i in active
        ]
        continuing = []
        for i, result in zip(active, self.environment.call(pairs), strict=True):
            conversation = conversations[i]
            messages = result if isinstance(result, NoAnswer) else _messages(result)
            if isinstance(messages, NoAnswer):
                conversation.error = str(messages)
            elif messages:
                ids = self._between(prompts[i], conversation, messages)
                if len(conversation.rollout.tokens) + len(ids) >= requests[i].how.max_tokens:
                    conversation.rollout = replace(conversation.rollout, cut=True)
                    continue
                conversation.turns += messages
                first = len(conversation.rollout.tokens)
                environment_spans = (*conversation.rollout.others, (first, first + len(ids)))
                conversation.rollout = replace(
                    conversation.rollout, tokens=(*conversation.rollout.tokens, *ids), others=environment_spans
                )
                continuing.append(i)
        return continuing

    def _between(self, prompt: Answer, conversation: Conversation, messages: Sequence[Turn]) -> tuple[int, ...]:
        """Return the tokens between the model's output and its next turn."""
        marked = [*prompt.prompt, *conversation.turns[:-1], {"role": "assistant", "content": _MARK}, *messages]
        row = with_final_turn(Row("messages", tuple(map(dict, marked)), tools=tuple(prompt.tools)))
        try:
            text = self.renderer.prompt(row)
        except ValueError as error:
            raise DataError(f"the chat template cannot continue a conversation: {error}") from error
        _, separator, behind = text.rpartition(_MARK)
        if not separator:
            raise DataError("the chat template drops an answer that other messages follow")
        tokenizer: Any = self.renderer.tokenizer
        last_text = tokenizer.decode(conversation.rollout.tokens[-1:], skip_special_tokens=False)
        return tuple(tokenizer(behind.removeprefix(last_text), add_special_tokens=False, verbose=False)["input_ids"])


def answer_so_far(prompt: Answer, conversation: Conversation) -> Answer:
    """Return the conversation in the form for rewards and the environment."""
    rollout = conversation.rollout
    turns = (
        conversation.turns
        if len(conversation.turns) > 1 or (conversation.turns and conversation.turns[-1].get("tool_calls"))
        else ()
    )
    return replace(
        prompt,
        text=str(conversation.turns[-1]["content"]) if conversation.turns else rollout.text,
        tokens=len(rollout.logps),
        cut=rollout.cut,
        turns=turns,
        error=conversation.error,
    )


def _assistant_turn(text: str) -> Turn:
    calls = []
    for i, call_text in enumerate(_CALL.findall(text)):
        try:
            call = json.loads(call_text)
            function = {"name": str(call["name"]), "arguments": call.get("arguments", {})}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        calls.append({"id": f"call_{i}", "type": "function", "function": function})
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}


def _messages(result: Any) -> list[Turn] | NoAnswer:
    """Return the environment's result as messages."""
    if result is None:
        return []
    if isinstance(result, str):
        return [{"role": "user", "content": result}]
    messages = result if isinstance(result, list) else [result]
    for message in messages:
        is_text = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not is_text or message.get("role") not in ("user", "tool", "system"):
            return NoAnswer(
                f"the environment returned {shown(result)[:100]}; expected a text or messages of user, tool or system"
            )
    return messages


def _joined(first: Rollout, then: Rollout) -> Rollout:
    """Return a conversation with one more model turn."""
    return replace(
        first,
        tokens=(*first.tokens, *then.tokens),
        logps=(*first.logps, *then.logps),
        sampling_logps=(*first.sampling_logps, *then.sampling_logps),
        text=then.text,
        cut=then.cut,
        others=first.others,
    )
