"""Tools: prompt a model to call functions, and parse calls from completions.

| tool_choice | completion | parsed as |
| --- | --- | --- |
| none, or no tools | text | text |
| auto | text with `<tool_call>{"name": …, "arguments": {…}}</tool_call>` | text and calls |
| required | one object {"name", "arguments"} for any of the tools, enforced by a grammar | one call |
| a function | one such object for this function, enforced by a grammar | one call |

Hermes, Qwen and SmolLM3 write calls in the format of `auto`. The tools are passed to the chat template. If a
base's template does not support tools, a request with tools is refused.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.serve.http.text_bodies import schema_text
from veneer.serve.request import GrammarSpec, invalid

_OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A tool call. `arguments`: JSON text."""

    index: int
    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def delta(self) -> dict[str, Any]:
        return {"index": self.index, **self.to_dict()}


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request, and how the completion can call them."""

    mode: Literal["none", "auto", "required", "named"] = "none"
    tools: tuple[Mapping[str, Any], ...] = ()
    grammar: GrammarSpec | None = None


def tool_use(tools: Sequence[Mapping[str, Any]] | None, choice: Any, takes_tools: bool) -> ToolUse:
    """Return the `ToolUse` of a request.

    Raises Refused (400) for tools that are not functions, an unknown tool_choice, or a base without tool
    support.
    """
    functions = {}
    for i, tool in enumerate(tools or []):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise invalid(f'tools.{i} is not {{"type": "function", "function": {{…}}}}', "tools")
        name, parameters = function.get("name"), function.get("parameters") or {}
        if not isinstance(name, str) or not 0 < len(name) <= 64 or not isinstance(parameters, Mapping):
            raise invalid(
                f"tools.{i}.function needs a name of 1 to 64 characters, and a schema as its parameters", "tools"
            )
        functions[name] = parameters
    if not functions:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice requires a call, but the request has no tools", "tool_choice")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    if not takes_tools:
        raise invalid("the chat template of this base does not support tools", "tools", "describe them in a message")
    tools = tuple(tools or [])
    if choice in (None, "auto"):
        return ToolUse("auto", tools)
    mode: Literal["required", "named"] = "required"
    if choice != "required":
        function_choice = (
            choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
        )
        name = function_choice.get("name") if isinstance(function_choice, Mapping) else None
        if not isinstance(name, str) or name not in functions:
            fix = 'none, auto, required or {"type": "function", "function": {"name": one of the tools}}'
            raise invalid("tool_choice does not name one of the tools", "tool_choice", fix)
        mode, functions = "named", {name: functions[name]}
    forms = [_call_schema(name, parameters) for name, parameters in functions.items()]
    schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
    # Models have learned to write calls with whitespace.
    schema = {**schema, "x-guidance": {"whitespace_flexible": True}}
    return ToolUse(mode, tools, ("json_schema", schema_text(schema, "tools")))


def _call_schema(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": name}, "arguments": {"type": "object", **parameters}}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class ToolReader:
    """A parser for one completion: `feed` and `end` yield its texts and tool calls.

    `calls`: number of calls parsed so far.
    """

    def __init__(self, use: ToolUse) -> None:
        self.use, self.buffer, self.calls, self.inside = use, "", 0, False

    def feed(self, text: str) -> Iterator[str | ToolCall]:
        if self.use.mode == "none":
            if text:
                yield text
        else:
            self.buffer += text
            if self.use.mode == "auto":
                yield from self._sorted()

    def end(self) -> Iterator[str | ToolCall]:
        """Yield the remaining buffered text: as a tool call if it parses as one, otherwise as text."""
        rest, self.buffer = self.buffer, ""
        if not rest:
            return
        body = rest.removeprefix(_OPEN) if self.inside else rest
        wants_call = self.inside or self.use.mode in ("required", "named")
        yield (self._call(body) if wants_call else None) or rest

    def _sorted(self) -> Iterator[str | ToolCall]:
        while True:
            if self.inside:
                body, closed, rest = self.buffer.removeprefix(_OPEN).partition(CLOSE)
                if not closed:
                    return
                yield self._call(body) or _OPEN + body + CLOSE
                self.buffer, self.inside = rest, False
            start = self.buffer.find(_OPEN)
            if start < 0:
                held_back = next((n for n in range(len(_OPEN) - 1, 0, -1) if self.buffer.endswith(_OPEN[:n])), 0)
                end = len(self.buffer) - held_back
                free, self.buffer = self.buffer[:end], self.buffer[end:]
                if free.strip() or (free and not self.calls):  # whitespace between calls is dropped
                    yield free
                return
            if self.buffer[:start].strip() or (start and not self.calls):
                yield self.buffer[:start]
            self.buffer, self.inside = self.buffer[start:], True

    def _call(self, body: str) -> ToolCall | None:
        try:
            parsed = json.loads(body)
            name, arguments = parsed["name"], parsed.get("arguments", parsed.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str):
            return None
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.calls += 1
        return ToolCall(self.calls - 1, name, text)


def message_of_answer(reader: ToolReader, text: str) -> dict[str, Any]:
    """Return a finished completion as an assistant message, with its tool calls if any."""
    pieces = [*reader.feed(text), *reader.end()]
    calls = [piece.to_dict() for piece in pieces if isinstance(piece, ToolCall)]
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
