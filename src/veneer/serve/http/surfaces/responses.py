"""OpenAI's Responses: /v1/responses, with the prompts, tools, mixes, limits and ledger of chat completions.

A response's input is a list of items. The prompt's messages are made from the items of `previous_response_id`
(input and output), then the request's items:

| item | message |
| --- | --- |
| instructions, and the first items with role system or developer | one system message |
| message | a message with the item's role |
| function_call, custom_tool_call | a tool call of the assistant's message before it, or of a new one |
| function_call_output, custom_tool_call_output | a message with role tool |
| reasoning | none |
| item_reference | the item that it names |

A tool of a namespace is called `namespace.name` in the prompt. A custom tool is a function with one text, `input`.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Query
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from veneer.errors import quoted
from veneer.serve.http.answers import IndexedEvent, TextAnswer, TextJob, collect, stream
from veneer.serve.http.bodies import BodyRoute, Objects, Strict, at_most
from veneer.serve.http.errors import Json, error_body, json_bytes
from veneer.serve.http.guard import needs, principal_of
from veneer.serve.http.service import Service, admission_of, caller_of, service_of
from veneer.serve.http.sse import typed
from veneer.serve.http.surfaces.openai import logprob_entries
from veneer.serve.http.text_bodies import Limit, TextBody, schema_text
from veneer.serve.http.text_requests import chat_job
from veneer.serve.http.tools import CLOSE, ToolCall, ToolReader, ToolUse, tool_use
from veneer.serve.request import EngineEvent, Finished, GrammarSpec, Refused, Sampling, Started, Token, Usage, invalid

_Item = dict[str, Any]
_LOGPROBS = "message.output_text.logprobs"
_INCLUDE = (
    *("code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results"),
    *("message.input_image.image_url", "reasoning.encrypted_content"),
    *("web_search_call.action.sources", "web_search_call.results"),
)
"""Values of `include` without effect: no answer has such parts."""
_SHORT = Field(default=None, max_length=512)

responses_routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute, dependencies=[needs("infer")])


# -- bodies ------------------------------------------------------------------------------------------------------------


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class TextSettings(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseBody(TextBody):
    ignored: ClassVar = frozenset(("client_metadata", "max_tool_calls", "prompt_cache_key", "prompt_cache_options")) | {
        *("prompt_cache_retention", "reasoning", "service_tier")
    }
    refused: ClassVar = {
        **TextBody.refused,
        **dict.fromkeys(("conversation", "prompt", "moderation", "context_management", "response_format"), None),
        **{"background": False, "n": 1},
    }
    limit_name: ClassVar = "max_output_tokens"
    input: Annotated[
        Annotated[str, Tag("=text")] | Annotated[Objects, Tag("=items")],
        Discriminator(lambda value: "=items" if isinstance(value, list) else "=text"),
    ]
    instructions: str | None = None
    previous_response_id: str | None = _SHORT
    tools: Annotated[Objects, at_most(128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    max_output_tokens: Limit | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: Annotated[list[Annotated[str, Field(max_length=100)]], at_most(16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], at_most(16)] | None = None
    safety_identifier: str | None = _SHORT

    def count(self) -> int | None:
        """Return the number of alternatives to report for each token, or None for no log-probabilities."""
        wanted = self.top_logprobs is not None or _LOGPROBS in (self.include or [])
        return (self.top_logprobs or 0) if wanted else None

    def form(self) -> TextFormat:
        return (None if self.text is None else self.text.format) or TextFormat()

    def report(self) -> None:
        """Report the values that have no effect on the answer. Raises Refused (400) for an unknown `include`."""
        for value in sorted(set(self.include or []) - {_LOGPROBS}):
            if value not in _INCLUDE:
                raise invalid(f"include: {quoted(value)} is not known", "include", f"use {_LOGPROBS}")
            self.ignore(f"include.{value}")
        if self.text is not None and self.text.verbosity is not None:
            self.ignore("text.verbosity")

    def _grammars(self) -> list[GrammarSpec | None]:
        form = self.form()
        if form.type == "json_schema" and form.json_schema is None:
            raise invalid("text.format has no schema", "text")
        schema = schema_text(form.json_schema, "text.format") if form.type == "json_schema" else ""
        return [*super()._grammars(), None if form.type == "text" else (form.type, schema)]


# -- routes ------------------------------------------------------------------------------------------------------------


@responses_routes.post("/v1/responses", summary="Answer items, or continue a stored response.")
async def create(request: HttpRequest, body: ResponseBody) -> Response:
    service, principal = service_of(request), caller_of(request, body.user or body.safety_identifier)
    body.choices(service)
    body.report()
    model = service.choose(principal, **body.adapters())
    tools = _tools(body)
    use = tool_use(tools.functions, tools.choice, service.prompts.takes_tools)
    for key in tools.without_effect(body, use):
        body.ignore(key)
    number: str = request.scope["veneer.id"]
    items = _items(request, body, number)
    messages = _messages(items, body.instructions)
    if body.truncation == "auto":
        messages = await _shortened(request, body, messages, use)

    def sampling(available: int) -> Sampling:
        settings: dict[str, Any] = {"max_tokens": body.max_output_tokens, "logprobs": body.count()}
        made = body.sampling(service, available=available, grammar=use.grammar, **settings)
        one = body.parallel_tool_calls is False and use.mode == "auto"  # the first call ends the answer
        return replace(made, stop=(*made.stop, CLOSE)) if one else made

    admitted, salt = admission_of(request), body.cache_salt or ""
    how: dict[str, Any] = {"use": use, "cache_salt": salt, "stores": body.store is not False}
    job = await chat_job(service, principal, model, messages, sampling, admitted, f"resp_{number}", **how)
    answer = _Answer(service, job, body, tools, use, items)
    if not body.stream:
        (whole,) = await collect(request, service, job)
        answer.read(whole)
        return Json(answer.response, headers=body.headers)
    return await stream(request, service, job, answer.lines, answer.failed, body.headers)


@responses_routes.get("/v1/responses/{id}", summary="Get a stored response.")
async def retrieve(request: HttpRequest, id: str, stream: bool = False) -> Response:
    if stream:
        raise invalid("a stored response cannot be streamed", "stream", "leave stream out")
    return Json(_stored(request, id)["response"])


@responses_routes.delete("/v1/responses/{id}", summary="Delete a stored response.")
async def delete(request: HttpRequest, id: str) -> Response:
    if not service_of(request).responses.delete(principal_of(request.scope).tenant, id):
        raise _not_found(id)
    return Json({"id": id, "object": "response", "deleted": True})


@responses_routes.post("/v1/responses/{id}/cancel", summary="Refuse: only background responses can be cancelled.")
async def cancel(request: HttpRequest, id: str) -> Response:
    _stored(request, id)
    raise invalid("only a background response can be cancelled", None, "close the connection of a running request")


@responses_routes.get("/v1/responses/{id}/input_items", summary="List the input of a stored response.")
async def input_items(
    request: HttpRequest,
    id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=512)] = None,
) -> Response:
    items: list[_Item] = _stored(request, id)["input"][:: -1 if order == "desc" else 1]
    if after is not None:
        start = next((i for i, item in enumerate(items, 1) if item["id"] == after), None)
        if start is None:
            raise invalid(f"the response has no input item {quoted(after)}", "after")
        items = items[start:]
    ids = [item["id"] for item in items[:limit]] or [None]
    page = {"object": "list", "data": items[:limit], "first_id": ids[0], "last_id": ids[-1]}
    return Json(page | {"has_more": len(items) > limit})


def _stored(request: HttpRequest, id: str, **error: str) -> dict[str, Any]:
    """Return {"input": items, "response"} of the caller's response. Raises Refused (404).

    Its bytes are reserved before they are unpacked."""
    stored = service_of(request).responses.get(principal_of(request.scope).tenant, id)
    if stored is None:
        raise _not_found(id, **error)
    admission_of(request).reserve("bodies", len(stored))
    found: dict[str, Any] = json.loads(stored)
    return found


def _not_found(id: str, code: str = "not_found", param: str | None = None) -> Refused:
    fix = "a response is kept for 24 hours by the server that made it, unless store is false or newer ones replace it"
    return Refused(f"response {quoted(id[:100])} not found", status=404, code=code, param=param, fix=fix)


# -- items -------------------------------------------------------------------------------------------------------------

_KINDS = {
    "message": ("msg", ("role", "content"), ("phase",)),
    "function_call": ("fc", ("call_id", "name", "arguments"), ("namespace", "parsed_arguments")),
    "custom_tool_call": ("ctc", ("call_id", "name", "input"), ("namespace",)),
    "function_call_output": ("fco", ("call_id", "output"), ()),
    "custom_tool_call_output": ("ctco", ("call_id", "output"), ()),
}
"""Type of an item -> (prefix of its id, required keys, optional keys)."""


def _items(request: HttpRequest, body: ResponseBody, number: str) -> list[_Item]:
    """Return the whole input: the items of the previous response, and the request's.

    `number`: the response's id without its prefix; part of the ids of items that have none."""
    items: list[_Item] = []
    if body.previous_response_id is not None:
        error = {"code": "previous_response_not_found", "param": "previous_response_id"}
        before = _stored(request, body.previous_response_id, **error)
        items = [*before["input"], *before["response"]["output"]]
    new = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for i, each in enumerate(new):
        item = {key: value for key, value in each.items() if value is not None}
        kind = item.get("type", "message" if "role" in item else "item_reference")
        if kind == "reasoning":
            body.ignore("input.reasoning")
        elif kind == "item_reference":
            items.append(_referenced(request, i, item, items))
        else:
            items.append(_item(f"input.{i}", str(kind), item, f"{number}_{len(items)}"))
    if not items:
        raise invalid("the input has no items", "input", "write something")
    return items


def _item(where: str, kind: str, item: Mapping[str, Any], number: str) -> _Item:
    """Return an item in one form: with type and id, and with a list as a message's content."""
    if kind not in _KINDS:
        fix = f"use {', '.join(_KINDS)}"
        raise invalid(f"{where}: items of type {quoted(kind[:40])} are not supported", "input", fix)
    prefix, required, optional = _KINDS[kind]
    unknown = sorted(set(item) - {"id", "type", "status", *required, *optional})
    if unknown:
        raise invalid(f"{where}: unknown key {quoted(unknown[0][:40])}", "input")
    for key in required:
        if not isinstance(item.get(key), (str, list) if key in ("content", "output") else str):
            raise invalid(f"{where}.{key} must be a text", "input")
    if kind == "message" and item["role"] not in ("user", "assistant", "system", "developer"):
        raise invalid(f"{where}.role must be user, assistant, system or developer", "input")
    made = {"id": f"{prefix}_{number}", "status": "completed", **item, "type": kind}
    for key in ("content", "output"):
        if isinstance(made.get(key), list):
            made[key] = [_part(f"{where}.{key}.{i}", part) for i, part in enumerate(made[key])]
    if kind == "message" and isinstance(made["content"], str):
        written = "output_text" if item["role"] == "assistant" else "input_text"
        made["content"] = [_part(where, {"type": written, "text": made["content"]})]
    if not isinstance(made["id"], str):
        raise invalid(f"{where}.id must be a text", "input")
    return made


def _part(where: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind not in ("input_text", "output_text", "text", "refusal"):
        raise invalid(f"{where}: a part of type {quoted(str(kind)[:40])}, but this base supports only text", "input")
    key = "refusal" if kind == "refusal" else "text"
    if not isinstance(part.get(key), str):
        raise invalid(f"{where}: a part of type {quoted(kind)} has no {key}", "input")
    return {"type": kind, key: part[key]} | ({"annotations": [], "logprobs": []} if kind == "output_text" else {})


def _referenced(request: HttpRequest, i: int, item: Mapping[str, Any], items: Sequence[_Item]) -> _Item:
    """Return the item that an item_reference names: one of `items`, or of a stored response of the caller."""
    id = str(item.get("id", ""))
    found = [each for each in items if each["id"] == id]
    stored = f"resp_{'_'.join(id.split('_')[1:2])}"
    if not found and service_of(request).responses.get(principal_of(request.scope).tenant, stored) is not None:
        before = _stored(request, stored)
        found = [each for each in (*before["input"], *before["response"]["output"]) if each["id"] == id]
    if not found:
        raise invalid(f"input.{i}: there is no item {quoted(id[:100])}", "input", "send the item itself")
    return found[0]


def _messages(items: Sequence[_Item], instructions: str | None) -> list[dict[str, Any]]:
    """Return the messages of the prompt. Raises Refused (400) for the output of an unknown call."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    calls: set[str] = set()
    for item in items:
        content: Any = item.get("content", item.get("output", ""))
        text = content if isinstance(content, str) else "".join(p.get("text", p.get("refusal")) for p in content)
        if item["type"] == "message":
            role = "system" if item["role"] == "developer" else item["role"]
            if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
                messages[0]["content"] += f"\n\n{text}"
            else:
                messages.append({"role": role, "content": text})
        elif "output" in item:
            if item["call_id"] not in calls:
                raise invalid(f"the input has an output, but no call {quoted(item['call_id'][:100])}", "input")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
        else:
            calls.add(item["call_id"])
            name = f"{item['namespace']}.{item['name']}" if "namespace" in item else item["name"]
            arguments = item["arguments"] if "arguments" in item else json.dumps({"input": item["input"]})
            function = {"name": name, "arguments": arguments}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
    return messages


async def _shortened(
    request: HttpRequest, body: ResponseBody, messages: list[dict[str, Any]], use: ToolUse
) -> list[dict[str, Any]]:
    """Return the messages without the oldest ones, as few as necessary for the prompt to fit in the context.

    The system message is kept. The first message that is kept after it is a user's, so that no output of a
    tool loses its call."""
    service, admitted = service_of(request), admission_of(request)
    head = messages[: messages[0]["role"] == "system"]
    starts = [0, *(i for i in range(len(head) + 1, len(messages)) if messages[i]["role"] == "user")]

    async def fits(start: int) -> bool:
        try:
            prompt = await service.prompts.of_messages([*head * (start > 0), *messages[start:]], admitted, use.tools)
        except Refused as error:
            if error.code != "context_exceeded":
                raise
            return False
        return len(prompt) + (body.max_output_tokens or 1) <= service.prompts.context

    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await fits(starts[middle]) else (middle + 1, high)
    if not low:
        return messages
    body.ignore(f"input (the {starts[low] - len(head)} oldest messages)")
    return [*head, *messages[starts[low] :]]


# -- tools -------------------------------------------------------------------------------------------------------------


@dataclass
class _Tools:
    """A request's tools.

    `functions`, `choice`: as in chat completions. `names`: name in the prompt -> (type, namespace, name).
    `strict`: whether a function needs strict arguments. `grammars`: whether a custom tool has a grammar.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    choice: Any = None
    names: dict[str, tuple[str, str | None, str]] = field(default_factory=dict)
    strict: bool = False
    grammars: bool = False

    def without_effect(self, body: ResponseBody, use: ToolUse) -> list[str]:
        """Return the names of the tools' values that do not constrain the answer."""
        names = ["tools"] if use.mode == "auto" and body.form().type != "text" else []
        names += ["tools.strict"] if self.strict and use.mode == "auto" else []
        return names + (["tools.format"] if self.grammars and use.mode != "none" else [])

    def add(self, where: str, tool: Any, namespace: str | None = None) -> None:
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind == "namespace" and namespace is None and isinstance(tool.get("tools"), list):
            for i, inner in enumerate(tool["tools"]):
                self.add(f"{where}.tools.{i}", inner, str(tool.get("name")))
            return
        if kind not in ("function", "custom"):
            fix = "leave it out; tools of type function, custom and namespace are supported"
            raise invalid(f"{where}: tools of type {quoted(str(kind)[:40])} are not supported", "tools", fix)
        name = f"{namespace}.{tool.get('name')}" if namespace else tool.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= 64 or name in self.names:
            raise invalid(f"{where}.name must be unique, with 1 to 64 characters", "tools")
        parameters, description = tool.get("parameters") or {}, str(tool.get("description") or "")
        if kind == "custom":
            parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
            parameters["additionalProperties"] = False
            form = tool.get("format")
            if isinstance(form, Mapping) and form.get("type") == "grammar":
                self.grammars = True
                description += f"\n\nThe input follows this grammar:\n{form.get('definition')}"
        if not isinstance(parameters, Mapping):
            raise invalid(f"{where}.parameters must be a JSON schema", "tools")
        self.strict |= tool.get("strict") is True
        function = {"name": name, "description": description, "parameters": parameters}
        self.functions.append({"type": "function", "function": function})
        self.names[name] = (kind, namespace, tool["name"])

    def named(self, choice: Any) -> str:
        """Return the prompt's name of the tool that a tool_choice names."""
        inner = choice if isinstance(choice, Mapping) else {}
        namespace, name = inner.get("namespace"), inner.get("name")
        found = f"{namespace}.{name}" if namespace else name
        if inner.get("type") not in ("function", "custom") or str(found) not in self.names:
            fix = 'none, auto, required, {"type": "function", "name": one of the tools} or allowed_tools'
            raise invalid("tool_choice does not name one of the tools", "tool_choice", fix)
        return str(found)


def _tools(body: ResponseBody) -> _Tools:
    """Return a request's tools and choice in the form of chat completions. Raises Refused (400)."""
    tools, choice = _Tools(), body.tool_choice
    for i, tool in enumerate(body.tools or []):
        tools.add(f"tools.{i}", tool)
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        allowed = {tools.named(each) for each in choice["tools"]}
        tools.functions = [each for each in tools.functions if each["function"]["name"] in allowed]
        choice = choice.get("mode", "auto")
    if isinstance(choice, Mapping):
        choice = {"type": "function", "function": {"name": tools.named(choice)}}
    elif choice not in (None, "none", "auto", "required"):
        tools.named(choice)
    tools.choice = choice
    return tools


# -- answers -----------------------------------------------------------------------------------------------------------


class _Answer:
    """The response of one job, made from the engine's events. `items`: the whole input."""

    def __init__(
        self, service: Service, job: TextJob, body: ResponseBody, tools: _Tools, use: ToolUse, items: list[_Item]
    ) -> None:
        self.service, self.job, self.tools, self.items = service, job, tools, items
        self.reader, self.prompts, self.count = ToolReader(use), service.prompts, job.sampling.logprobs
        self.stores, self.sequence, self.space = body.store is not False, 0, ""
        self.logprobs: list[dict[str, Any]] = []
        self.part: dict[str, Any] | None = None  # of the message that is being written
        self.output: list[_Item] = []
        self.response = _head(job, body) | {"output": self.output}

    def events(self, event: EngineEvent) -> Iterator[dict[str, Any]]:
        """Yield the stream's events for one event of the engine, and update the response."""
        if isinstance(event, Started):
            return
        if isinstance(event, Token) and self.count is not None:
            self.logprobs += logprob_entries(self.prompts, [event], self.count)
        for piece in (*self.reader.feed(event.text), *(self.reader.end() if isinstance(event, Finished) else ())):
            yield from self._call(piece) if isinstance(piece, ToolCall) else self._text(piece)
        if isinstance(event, Finished):
            yield from self._end(event)

    def read(self, answer: TextAnswer) -> None:
        """Update the response with a complete answer."""
        for token in answer.tokens:
            list(self.events(token))
        list(self.events(answer.finished))

    async def lines(self, events: AsyncIterator[IndexedEvent]) -> AsyncIterator[bytes]:
        """Yield the stream."""
        for kind in ("created", "in_progress"):
            yield typed(self._event(kind, response=self.response))
        async for _, event in events:
            for each in self.events(event):
                yield typed(each)

    def failed(self, error: Refused) -> bytes:
        """Return the last events of a stream that fails."""
        told = error_body(error, "OpenAI")[1]["error"]
        code = "rate_limit_exceeded" if told["type"] == "rate_limit_error" else "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": told["message"]}}
        first = {key: told[key] for key in ("code", "message", "param")}
        return typed(self._event("error", **first)) + typed(self._event("failed", response=self.response))

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.sequence += 1
        kind = kind if kind == "error" else f"response.{kind}"
        return {"type": kind, "sequence_number": self.sequence - 1, **fields}

    def _add(self, prefix: str, item: _Item, **empty: Any) -> Iterator[dict[str, Any]]:
        item = {"id": f"{prefix}_{self.job.id[5:]}_{len(self.items) + len(self.output)}", "status": "completed"} | item
        self.output.append(item)
        yield self._item("output_item.added", item=item | empty | {"status": "in_progress"})

    def _item(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return an event about the last item."""
        at = {"output_index": len(self.output) - 1}
        return self._event(kind, **at, **({} if "item" in fields else {"item_id": self.output[-1]["id"]}), **fields)

    def _text(self, text: str) -> Iterator[dict[str, Any]]:
        if self.part is None:
            text, self.space = self.space + text, ""
            if not text.strip():  # whitespace before a call is no message
                self.space = text
                return
            yield from self._open()
        yield from self._delta(text)

    def _open(self) -> Iterator[dict[str, Any]]:
        self.part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._add("msg", {"type": "message", "role": "assistant", "content": [self.part]}, content=[])
        yield self._item("content_part.added", content_index=0, part=self.part)

    def _delta(self, text: str) -> Iterator[dict[str, Any]]:
        assert self.part is not None
        logprobs, self.logprobs = self.logprobs, []
        self.part["text"] += text
        self.part["logprobs"] += logprobs
        yield self._item("output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        if self.part is None:
            return
        if self.logprobs:
            yield from self._delta("")
        text, logprobs = self.part["text"], self.part["logprobs"]
        yield self._item("output_text.done", content_index=0, text=text, logprobs=logprobs)
        yield self._item("content_part.done", content_index=0, part=self.part)
        self.output[-1]["status"] = status
        yield self._item("output_item.done", item=self.output[-1])
        self.part = None

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        self.space, self.logprobs = "", []  # log-probabilities are reported for texts only
        yield from self._close()
        kind, namespace, name = self.tools.names.get(call.name, ("function", None, call.name))
        shared = {"call_id": call.id, "name": name} | ({"namespace": namespace} if namespace else {})
        if kind == "custom":
            text = _input_of(call.arguments)
            yield from self._add("ctc", {"type": "custom_tool_call", **shared, "input": text}, input="")
            yield self._item("custom_tool_call_input.delta", delta=text)
            yield self._item("custom_tool_call_input.done", input=text)
        else:
            text = call.arguments
            yield from self._add("fc", {"type": "function_call", **shared, "arguments": text}, arguments="")
            yield self._item("function_call_arguments.delta", delta=text)
            yield self._item("function_call_arguments.done", arguments=text, name=name)
        yield self._item("output_item.done", item=self.output[-1])

    def _end(self, end: Finished) -> Iterator[dict[str, Any]]:
        """Yield the last events. The response is stored before the client learns that it is complete."""
        status = "incomplete" if end.reason == "length" else "completed"
        if not self.output:
            yield from self._open()
            yield from self._delta(self.space)
        yield from self._close(status)
        self.response |= {"status": status, "usage": _usage(end.usage), "store": self.stores}
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        if self.stores:
            stored = json_bytes({"input": self.items, "response": self.response})
            self.response["store"] = self.service.responses.put(self.job.principal.tenant, self.job.id, stored)
        yield self._event(status, response=self.response)


def _input_of(arguments: str) -> str:
    """Return the text of a custom tool's call; the arguments themselves if they have another form."""
    try:
        text = json.loads(arguments)["input"]
    except (ValueError, TypeError, KeyError):
        return arguments
    return text if isinstance(text, str) else arguments


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }


def _head(job: TextJob, body: ResponseBody) -> dict[str, Any]:
    """Return a response without its output, which repeats the request's settings."""
    defaults = {"description": None, "parameters": None, "strict": None}
    tools = [defaults | tool if tool.get("type") == "function" else tool for tool in body.tools or []]
    nothing = ("error", "incomplete_details", "completed_at", "usage", "max_tool_calls", "prompt_cache_key")
    repeated = ("instructions", "previous_response_id", "max_output_tokens", "safety_identifier", "user")
    return {
        "id": job.id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "model": job.model.name,
        **dict.fromkeys(nothing),
        **{key: getattr(body, key) for key in repeated},
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": None, "summary": None},
        "store": body.store is not False,
        "temperature": job.sampling.temperature,
        "top_p": job.sampling.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": body.form().model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "truncation": body.truncation or "disabled",
    }
