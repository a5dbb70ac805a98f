"""A message as chat templates take it: one reading for training and for inference.

Knows JSON alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def template_turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without `weight`, which says what is learned of it, and in the words that templates know:
    `developer`, OpenAI's newer one, is `system`; a call's arguments are a mapping, as transformers has it, where OpenAI
    has a text of JSON, of which `arguments | tojson` in a template would make JSON in JSON."""
    turn = {key: value for key, value in message.items() if key != "weight"}
    if turn.get("role") == "developer":
        turn["role"] = "system"
    if isinstance(calls := turn.get("tool_calls"), list | tuple):
        turn["tool_calls"] = [_call(call) for call in calls]
    return turn


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _call(function)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except ValueError:
            return call
        if isinstance(read, dict):
            return {**call, "arguments": read}
    return call
