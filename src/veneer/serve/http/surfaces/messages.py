"""Anthropic's routes: messages, token counts, and the model list for clients that send `anthropic-version`.

    conversation    Anthropic's system and content blocks -> the messages of chat completions
    AnswerWriter    the texts of a completion -> Anthropic's stream events; `content` has the finished blocks

Both forms of an answer, streamed and whole, are written by `AnswerWriter`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import APIRouter
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.errors import nearest
from veneer.serve.access import ModelCard
from veneer.serve.http.answers import IndexedEvent, TextJob, collect, stream
from veneer.serve.http.bodies import FAIL_FAST, ITEMS, Body, BodyRoute, MixField, at_most, mix_of
from veneer.serve.http.errors import Json, error_body
from veneer.serve.http.guard import needs
from veneer.serve.http.prompts import Prompts
from veneer.serve.http.service import Service, admission_of, caller_of, service_of
from veneer.serve.http.sse import typed
from veneer.serve.http.text_bodies import Limit, limited, sampling_of, schema_text, stops_of
from veneer.serve.http.text_requests import chat_job
from veneer.serve.http.thinking import ThinkingReader
from veneer.serve.http.tools import CLOSE, ToolCall, ToolReader, ToolUse, tool_use
from veneer.serve.request import Finished, Refused, Sampling, Started, Usage, invalid

messages_routes = APIRouter(tags=["Anthropic"], route_class=BodyRoute, dependencies=[needs("infer")])


# -- content blocks ----------------------------------------------------------------------------------------------------


class _Block(Body):
    ignored: ClassVar = frozenset({"cache_control"})


class TextBlock(_Block):
    ignored: ClassVar = frozenset({"cache_control", "citations"})
    type: Literal["text"]
    text: str


class ImageBlock(_Block):
    type: Literal["image"]
    source: dict[str, Any]
    transformations: Any = None


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(_Block):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Block):
    ignored: ClassVar = frozenset({"cache_control", "caller", "toolset_name"})
    type: Literal["tool_use"]
    id: str = Field(max_length=512)
    name: str = Field(max_length=512)
    input: dict[str, Any]


def _blocks(*kinds: type[_Block]) -> Any:
    """Return the type of a list of blocks of these kinds. An unknown type is an error that names the nearest one."""
    names = [kind.model_fields["type"].annotation.__args__[0] for kind in kinds]  # type: ignore[union-attr]

    def check_type(value: Any) -> Any:
        name = value.get("type") if isinstance(value, dict) else None
        if name not in names:
            close = nearest(str(name), names, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"supported here: {', '.join(names)}"
            texts = {"name": repr(name)[:60], "fix": fix}
            raise PydanticCustomError("block", "unsupported content block of type {name}, {fix}", texts)
        return value

    union: Any = Annotated[kinds[0], Tag(f"={names[0]}")]
    for kind, name in zip(kinds[1:], names[1:], strict=True):
        union |= Annotated[kind, Tag(f"={name}")]
    block: Any = Annotated[
        union,
        Discriminator(lambda value: f"={value['type'] if isinstance(value, dict) else value.type}"),
        BeforeValidator(check_type),
    ]
    if len(kinds) == 1:
        block = Annotated[kinds[0], BeforeValidator(check_type)]
    return Annotated[list[block], FAIL_FAST, at_most(ITEMS)]


def _text_or(blocks: Any) -> Any:
    return Annotated[
        Annotated[str, Tag("=text")] | Annotated[blocks, Tag("=blocks")],
        Discriminator(lambda value: "=blocks" if isinstance(value, list) else "=text"),
    ]


class ToolResultBlock(_Block):
    ignored: ClassVar = frozenset({"cache_control", "toolset_name"})
    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=512)
    content: _text_or(_blocks(TextBlock, ImageBlock)) = ""  # type: ignore[valid-type]
    is_error: bool | None = False


_System = _text_or(_blocks(TextBlock))
_Content = _text_or(_blocks(TextBlock, ImageBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock, ToolResultBlock))


# -- bodies ------------------------------------------------------------------------------------------------------------


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: _Content  # type: ignore[valid-type]


class Tool(Body):
    ignored: ClassVar = frozenset({"cache_control", "defer_loading", "eager_input_streaming", "input_examples"})
    ignored |= {"allowed_callers", "strict"}
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _declared(cls, value: Any, build: Any) -> Self:
        """Refuse tools whose schema only Anthropic's models know, before their other keys are checked."""
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            texts = {"kind": repr(kind)[:60]}
            message = "this server has no tool of type {kind}: declare a tool with a name and an input_schema"
            raise PydanticCustomError("tool", message, texts)
        tool: Self = build(value)
        return tool


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = False


class Thinking(Body):
    ignored: ClassVar = frozenset({"budget_tokens"})
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    ignored: ClassVar = frozenset({"effort", "task_budget"})
    format: OutputFormat | None = None


class Metadata(Body):
    user_id: str | None = Field(default=None, max_length=512)


class CountBody(Body):
    """The fields that messages and token counts share. `mix` is this server's own."""

    ignored: ClassVar = frozenset(
        ("cache_control", "container", "context_management", "diagnostics", "inference_geo", "service_tier", "speed")
    ) | {"billing_policy", "user_profile_id", "workspace_id"}
    refused: ClassVar = {"mcp_servers": [], **dict.fromkeys(("fallbacks", "fallback_credit_token", "thread"), None)}
    refused |= {"compaction": None}
    model: str = Field(min_length=1, max_length=512, description="the base, an adapter, a route, or base:adapter")
    mix: MixField | None = None
    messages: Annotated[list[Turn], FAIL_FAST, at_most(ITEMS)] = Field(min_length=1)
    system: _System | None = None  # type: ignore[valid-type]
    tools: Annotated[list[Tool], FAIL_FAST, at_most(128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    def use(self, takes_tools: bool) -> ToolUse:
        """Return how the answer can call tools. Raises Refused (400) for a choice that names no tool."""
        tools = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description or "", "parameters": t.input_schema},
            }
            for t in self.tools or []
        ]
        wanted, choice = self.tool_choice, None
        if wanted is not None:
            choice = {"any": "required", "tool": {"type": "function", "function": {"name": wanted.name}}}.get(
                wanted.type, wanted.type
            )
            names = [tool.name for tool in self.tools or []]
            if wanted.type == "tool" and wanted.name not in names:
                close = nearest(str(wanted.name), names, n=1)
                fix = f"did you mean {close[0]!r}?" if close else "name one of the request's tools"
                raise invalid(f"tool_choice names {str(wanted.name)[:64]!r}, which no tool has", "tool_choice", fix)
        return tool_use(tools, choice, takes_tools)

    def note_headers(self, headers: Mapping[str, str]) -> None:
        """Report Anthropic's request headers as ignored."""
        for name in ("anthropic-beta", "anthropic-version"):
            if name in headers:
                self.ignore(name)


class MessagesBody(CountBody):
    max_tokens: Limit
    metadata: Metadata | None = None
    stop_sequences: Annotated[list[str], FAIL_FAST, at_most(ITEMS)] | None = None
    stream: bool | None = False
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31)

    def sampling(self, service: Service, available: int, use: ToolUse) -> Sampling:
        """Return the request's sampling parameters. `available`: tokens left in the context.

        As at Anthropic, `max_tokens` can exceed the context: the answer then ends with the context.
        """
        stops, grammar = stops_of(self.stop_sequences, service.settings.max_stops), use.grammar
        forms = [form for form in (self.output_config and self.output_config.format, self.output_format) if form]
        if forms:
            if grammar is not None or len(forms) > 1:
                raise invalid("several fields set the format of the answer", "output_config", "keep one")
            grammar = ("json_schema", schema_text(forms[0].json_schema, "output_config"))
        if use.mode == "auto" and self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use:
            stops = (*stops, CLOSE)  # the answer ends with its first call
        return sampling_of(
            max_tokens=limited(min(self.max_tokens, available), available, service),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=stops,
            grammar=grammar,
        )


# -- prompts -----------------------------------------------------------------------------------------------------------


def conversation(body: CountBody, keeps_thinking: bool) -> list[dict[str, Any]]:
    """Return the conversation in the form of chat completions; turns of one role in a row become one.

    A tool result becomes a message with the role `tool`. `keeps_thinking`: whether the chat template renders
    earlier thinking. Raises Refused (400) for blocks that a role cannot have, and for images.
    """
    turns: list[dict[str, Any]] = []
    if body.system:
        turns.append({"role": "system", "content": _joined(body.system, "system")})
    called: set[str] = set()
    for i, turn in enumerate(body.messages):
        where = f"messages.{i}.content"
        blocks = [TextBlock(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        for k, block in enumerate(blocks):
            at = f"{where}.{k}"
            allowed: tuple[type[_Block], ...] = (TextBlock, ImageBlock, ToolResultBlock)
            if turn.role == "assistant":
                allowed = (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock)
            if not isinstance(block, allowed[: 1 if turn.role == "system" else None]):
                raise invalid(f"{at}: a message of role {turn.role!r} has no block of type {block.type!r}", "messages")
            if isinstance(block, ToolResultBlock):
                if block.tool_use_id not in called:
                    message = f"{at}: no earlier tool_use block has the id {block.tool_use_id[:64]!r}"
                    raise invalid(message, "messages", "send the assistant's tool_use block before its tool_result")
                text = _joined(block.content, at)
                text = f"Error: {text}" if block.is_error else text
                turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
                continue
            if not turns or turns[-1]["role"] != turn.role:
                turns.append({"role": turn.role, "content": ""})
            if isinstance(block, ToolUseBlock):
                called.add(block.id)
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                call = {"id": block.id, "type": "function", "function": function}
                turns[-1].setdefault("tool_calls", []).append(call)
            elif isinstance(block, ThinkingBlock) and keeps_thinking:
                turns[-1]["reasoning_content"] = turns[-1].get("reasoning_content", "") + block.thinking
            elif isinstance(block, ThinkingBlock | RedactedThinkingBlock):
                body.ignore(block.type)
            else:
                turns[-1]["content"] += _joined([block], at)
    return turns


def _joined(content: str | list[Any], where: str) -> str:
    """Return the text of a system prompt, of a tool result, or of a block. Raises Refused (400) for an image."""
    if isinstance(content, str):
        return content
    if any(isinstance(block, ImageBlock) for block in content):
        raise invalid(f"{where} has an image, but this base supports only text", "messages", "leave the image out")
    return "".join(block.text for block in content)


@dataclass(frozen=True)
class _Asked:
    """A request's conversation, and how its answer is written."""

    turns: list[dict[str, Any]]
    use: ToolUse
    variables: dict[str, Any]
    thinks: bool = False


def _asked(prompts: Prompts, body: CountBody) -> _Asked:
    use = body.use(prompts.takes_tools)
    turns = conversation(body, prompts.template_mentions("reasoning_content"))
    variables: dict[str, Any] = {}
    if turns and turns[-1]["role"] == "assistant":
        if "tool_calls" in turns[-1]:
            raise invalid("the last message has tool_use blocks", "messages", "send their tool_result blocks")
        variables |= {"continue_final_message": True, "add_generation_prompt": False}
    wanted = body.thinking is not None and body.thinking.type != "disabled"
    # a grammar or a started answer leaves no room for thinking
    formed = use.grammar or body.output_format or (body.output_config and body.output_config.format)
    thinks = wanted and prompts.template_mentions("enable_thinking") and not formed and not variables
    if wanted and not thinks:
        body.ignore("thinking")
    if prompts.template_mentions("enable_thinking"):
        variables["enable_thinking"] = thinks
    return _Asked(turns, use, variables, thinks)


# -- routes ------------------------------------------------------------------------------------------------------------


@messages_routes.post("/v1/messages", summary="Answer a conversation, as Anthropic's API does.")
async def messages(request: HttpRequest, body: MessagesBody) -> Response:
    service = service_of(request)
    principal = caller_of(request, body.metadata.user_id if body.metadata is not None else None)
    model = service.choose(principal, model=body.model, mix=mix_of(body.mix))
    asked = _asked(service.prompts, body)
    body.note_headers(request.headers)
    job = await chat_job(
        service,
        principal,
        model,
        asked.turns,
        lambda available: body.sampling(service, available, asked.use),
        admission_of(request),
        f"msg_{request.scope['veneer.id']}",
        use=asked.use,
        variables=asked.variables,
    )
    writer = AnswerWriter(job, body, asked)
    if body.stream:

        def error_event(error: Refused) -> bytes:
            return typed(error_body(error, "Anthropic")[1])

        return await stream(request, service, job, writer.lines, error_event, body.headers)
    (answer,) = await collect(request, service, job)
    for _ in writer.feed(answer.text, last=True):
        pass  # `writer.content` has the blocks
    usage = answer.finished.usage
    return Json(writer.message(usage) | writer.ending(answer.finished), headers=body.headers)


@messages_routes.post("/v1/messages/count_tokens", summary="Count the tokens of a prompt, as Anthropic's API does.")
async def count_tokens(request: HttpRequest, body: CountBody) -> Response:
    service = service_of(request)
    service.choose(caller_of(request), model=body.model, mix=mix_of(body.mix))
    asked, admitted = _asked(service.prompts, body), admission_of(request)
    body.note_headers(request.headers)
    admitted.reserve("answers", 1)
    prompt = await service.prompts.of_messages(asked.turns, admitted, asked.use.tools, **asked.variables)
    return Json({"input_tokens": len(prompt)}, headers=body.headers)


# -- answers -----------------------------------------------------------------------------------------------------------


class AnswerWriter:
    """Writes one completion as Anthropic's content blocks and stream events.

    `content`: the blocks so far. White space before a tool call is dropped.
    """

    def __init__(self, job: TextJob, body: MessagesBody, asked: _Asked) -> None:
        self.job, self.reader, self.stops = job, ToolReader(asked.use), body.stop_sequences or []
        self.fills = body.max_tokens > job.sampling.max_tokens
        self.thinking = ThinkingReader("start" if asked.thinks else "answer")
        self.shows = body.thinking is None or body.thinking.display != "omitted"
        self.content: list[dict[str, Any]] = []
        self.blank, self.open, self.calls = "", "", 0

    async def lines(self, events: AsyncIterator[IndexedEvent]) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a stream."""
        begun = False
        async for _, event in events:
            if not begun:
                begun = True
                cached = event.cached if isinstance(event, Started) else 0
                start = self.message(Usage(len(self.job.prompts[0]), cached, 0))
                yield typed({"type": "message_start", "message": start | {"content": []}})
                yield typed({"type": "ping"})
            if not isinstance(event, Started):
                for each in self.feed(event.text, last=isinstance(event, Finished)):
                    yield typed(each)
            if isinstance(event, Finished):
                yield typed({"type": "message_delta", "delta": self.ending(event), "usage": _usage(event.usage)})
                yield typed({"type": "message_stop"})

    def message(self, usage: Usage) -> dict[str, Any]:
        head = {"id": self.job.id, "type": "message", "role": "assistant", "model": self.job.model.name}
        return head | {"content": self.content, "stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}

    def ending(self, end: Finished) -> dict[str, Any]:
        stop = end.stop if end.stop in self.stops else None
        reason = "stop_sequence" if stop is not None else "tool_use" if self.calls else "end_turn"
        if end.reason == "length":
            reason = "model_context_window_exceeded" if self.fills else "max_tokens"
        return {"stop_reason": reason, "stop_sequence": stop}

    def feed(self, text: str, *, last: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the events of the next text of the completion; `last`: the completion has ended."""
        thinking, answer = self.thinking.feed(text, end=last)
        if thinking:
            yield from self._write("thinking", thinking)
        for each in self.reader.feed(answer):
            yield from self._answer(each)
        if last:
            for each in self.reader.end():
                yield from self._answer(each)
            if self.blank and not self.content:
                yield from self._write("text", self.blank)
            yield from self._close()

    def _answer(self, piece: str | ToolCall) -> Iterator[dict[str, Any]]:
        if isinstance(piece, str):
            if self.open != "text" and not (self.blank + piece).strip():
                self.blank += piece
                return
            text, self.blank = self.blank + piece, ""
            yield from self._write("text", text)
            return
        try:
            arguments = json.loads(piece.arguments)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):  # Anthropic's `input` is always an object, so this call stays text
            yield from self._write("text", json.dumps({"name": piece.name, "arguments": piece.arguments}))
            return
        self.calls, self.blank = self.calls + 1, ""
        block = {"type": "tool_use", "id": piece.id.replace("call_", "toolu_"), "name": piece.name, "input": {}}
        yield from self._begin("tool_use", block)
        self.content[-1]["input"] = arguments
        yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})

    def _write(self, kind: Literal["text", "thinking"], text: str) -> Iterator[dict[str, Any]]:
        if self.open != kind:
            more = {"citations": None} if kind == "text" else {"signature": ""}
            yield from self._begin(kind, {"type": kind, kind: "", **more})
        if kind == "text" or self.shows:
            self.content[-1][kind] += text
            yield self._delta({"type": f"{kind}_delta", kind: text})

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self.open = kind
        self.content.append(block)
        yield {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self.open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self.open:
            self.open = ""
            yield {"type": "content_block_stop", "index": len(self.content) - 1}


def _usage(usage: Usage) -> dict[str, Any]:
    """Return token counts as Anthropic defines them: `input_tokens` leaves out the tokens read from the cache."""
    read = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached}
    return {"input_tokens": usage.prompt - usage.cached, **read, "output_tokens": usage.completion}


# -- models ------------------------------------------------------------------------------------------------------------


def model_info(service: Service, card: ModelCard) -> dict[str, Any]:
    """Return a model in Anthropic's format. `max_tokens`: the longest answer that this server allows."""
    context = service.prompts.context
    return {
        "type": "model",
        "id": card.id,
        "display_name": card.id,
        "created_at": datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": min(service.settings.max_tokens or context, context),
    }


def model_page(service: Service, cards: Sequence[ModelCard], query: Mapping[str, str]) -> dict[str, Any]:
    """Return one page of models. `query`: Anthropic's `limit`, `after_id` and `before_id`."""
    limit = query.get("limit", "20")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= 1000:
        raise invalid(f"limit is {limit[:20]!r}", "limit", "a whole number from 1 to 1000")
    ids, start, end = [card.id for card in cards], 0, len(cards)
    for key in ("after_id", "before_id"):
        if key in query and query[key] not in ids:
            raise invalid(f"{key} is {query[key][:200]!r}, which is no model in this list", key)
    if "after_id" in query:
        start = ids.index(query["after_id"]) + 1
    if "before_id" in query:
        end = ids.index(query["before_id"])
        start = max(start, end - int(limit))
    page = cards[start : min(end, start + int(limit))]
    more = start > 0 if "before_id" in query else start + len(page) < end
    names = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
    return {"data": [model_info(service, card) for card in page], "has_more": more, **names}
