"""OpenAI's grader templates, such as `{{ sample.output_text }}`.

    filled("{{ item.city }}: {{ sample.output_json.total }}", sample, item)
    template_sample(answer)   the content of `sample`, below

    sample.output_text    the completion's text              sample.output_tools   empty: completions are text
    sample.output_json    the text as JSON, if it is JSON    sample.choices        as in chat completions
    sample.input_text     the prompt's last message (an extension by veneer)

A path is a name, followed by names and list indices after dots or in brackets: `item.tags[0]`, `item.tags.0`.
Texts are inserted unchanged, other values as JSON. Nothing is evaluated, and templates inside inserted text
are not filled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from veneer.errors import quoted
from veneer.train.rewards.reward import Answer

MAX_FILLED = 1 << 20
"""Maximum characters of a filled template. Without a limit, a template could repeat a long text."""
_FIELD = re.compile(r"\{\{([^{}]*)\}\}")
_PATH = re.compile(r"\s*(sample|item)((?:\.[\w-]+|\[\d+\])+)\s*")
_STEP = re.compile(r"[\w-]+")
_SAMPLE = ("output_text", "output_json", "output_tools", "choices", "input_text")


class TextTooLong(Exception):
    """Raised if a filled template is too long."""


class NoValue(Exception):
    """Raised if a template's path has no value.

    of_sample: whether the path begins with `sample`, so that the completion is at fault, not the row."""

    def __init__(self, path: str, of_sample: bool) -> None:
        super().__init__(f"{path} has no value")
        self.of_sample = of_sample


def template_sample(answer: Answer) -> dict[str, Any]:
    content = answer.prompt[-1].get("content") if answer.prompt else ""
    sample = {
        "output_text": answer.text,
        "output_tools": [],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": answer.text}}],
        "input_text": content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
    }
    with suppress(ValueError, RecursionError):
        sample["output_json"] = json.loads(answer.text)
    return sample


def filled(template: str, sample: Mapping[str, Any], item: Mapping[str, Any], most: int = MAX_FILLED) -> str:
    """Return the template with each path replaced by its text.

    Raises NoValue. Raises TextTooLong for more than `most` characters, before building the text."""
    parts: list[str] = []
    size = 0
    for i, text in enumerate(_FIELD.split(template)):  # alternates between literal texts and paths
        parts.append(_value(text, sample, item) if i % 2 else text)
        size += len(parts[-1])
        if size > most:
            raise TextTooLong(f"the filled template has more than {most:,} characters")
    return "".join(parts)


def _value(path: str, sample: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    value: Any = {"sample": sample, "item": item}
    for step in _STEP.findall(path):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list | tuple) and step.isdecimal() and len(step) < 10 and int(step) < len(value):
            value = value[int(step)]
        else:
            raise NoValue(path.strip(), path.strip().startswith("sample"))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def template_problem(template: str) -> str:
    """Return the error if a template is invalid for every row, otherwise ""."""
    texts = _FIELD.split(template)
    if any("{{" in text for text in texts[::2]):
        return "a {{ has no matching }}"
    for text in texts[1::2]:
        path = _PATH.fullmatch(text)
        if path is None:
            return f"{{{{ {text.strip()[:100]} }}}} is not a path of sample or item, such as item.answer"
        step = _STEP.findall(path[2])[0]
        if path[1] == "sample" and step not in _SAMPLE:
            return f"sample has no {quoted(step)}; it has {', '.join(_SAMPLE)}"
    return ""
