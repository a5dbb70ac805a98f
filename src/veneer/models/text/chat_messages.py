"""Convert messages to the form that chat templates expect.

Training and inference share this conversion. Messages are plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def template_turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a message to the form that chat templates expect; drop its loss weight.

    OpenAI's newer role `developer` becomes `system`. The arguments of a tool call become a mapping, as
    transformers expects. OpenAI sends the arguments as JSON text, which `arguments | tojson` in a template
    would encode a second time."""
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
