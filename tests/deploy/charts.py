"""A renderer for the part of Helm's template language that the project's chart uses.

It supports `if`, `if not` and `end`; values by path; the functions default, quote, printf, toYaml and nindent;
and the trimming of white space by `{{-`. Anything else is an error. Facts: https://helm.sh/docs/chart_template_guide
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

_ACTION = re.compile(r"(\s*)\{\{-\s*(.*?)\s*\}\}|\{\{\s*(.*?)\s*\}\}", re.S)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\([^()]*\)|\S+')


def merged(base: Any, over: Any) -> Any:
    """Return values with those of `over` on top, as `helm install --values` merges them."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return {key: merged(base.get(key), over[key]) if key in over else base[key] for key in {**base, **over}}


def rendered(chart: Path, over: dict[str, Any] | None = None, release: str = "shop") -> list[dict[str, Any]]:
    """Return the manifests of a chart, with `over` on top of its values."""
    about = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    scope = {
        "Values": merged(values_of(chart), over or {}),
        "Release": {"Name": release, "Namespace": "default"},
        "Chart": {key[0].upper() + key[1:]: value for key, value in about.items()},
    }
    texts = [render(path.read_text(encoding="utf-8"), scope) for path in sorted((chart / "templates").glob("*.yaml"))]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def values_of(chart: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    return values


def render(template: str, scope: dict[str, Any]) -> str:
    """Render one template. Raises ValueError for syntax that is not supported."""
    out, at, shown = [], 0, [True]
    for found in _ACTION.finditer(template):
        before = template[at : found.start()]
        action = found[2] if found[2] is not None else found[3]
        space = (found[1] or "") if found[2] is None else ""
        if shown[-1]:
            out.append(before + space)
        at = found.end()
        if action == "end":
            shown.pop()
            if not shown:
                raise ValueError("there is an end without an if")
        elif action.startswith("if "):
            shown.append(shown[-1] and _is_true(action.removeprefix("if "), scope))
        elif shown[-1]:
            out.append(_text(_value(action, scope)))
    if len(shown) != 1:
        raise ValueError("there is an if without an end")
    return "".join([*out, template[at:]])


def _is_true(condition: str, scope: dict[str, Any]) -> bool:
    wanted = not condition.startswith("not ")
    return bool(_value(condition.removeprefix("not "), scope)) is wanted


def _value(expression: str, scope: dict[str, Any]) -> Any:
    parts = _split(expression)
    value = _call(parts[0], [], scope)
    for part in parts[1:]:
        value = _call(part, [value], scope)
    return value


def _split(expression: str) -> list[str]:
    """Split a pipeline at its bars, but not inside parentheses or quotes."""
    words = [[]]  # type: list[list[str]]
    for word in _WORD.findall(expression):
        if word == "|":
            words.append([])
        else:
            words[-1].append(word)
    return [" ".join(each) for each in words]


def _call(text: str, piped: list[Any], scope: dict[str, Any]) -> Any:
    name, *words = _WORD.findall(text)
    if not words and not piped:
        return _atom(name, scope)
    arguments = [*(_atom(word, scope) for word in words), *piped]
    if name == "default":
        fallback, value = arguments
        return value or fallback
    if name == "quote":
        return json.dumps(_text(arguments[0]))
    if name == "printf":
        return arguments[0] % tuple(arguments[1:])
    if name == "toYaml":
        return yaml.safe_dump(arguments[0], sort_keys=True).rstrip("\n")
    if name == "nindent":
        count, value = arguments
        return "\n" + "\n".join(" " * count + line for line in value.splitlines())
    raise ValueError(f"the function {name} is not supported")


def _atom(word: str, scope: dict[str, Any]) -> Any:
    if word.startswith("("):
        return _value(word[1:-1], scope)
    if word.startswith('"'):
        return json.loads(word)
    if word.isdecimal():
        return int(word)
    if not word.startswith("."):
        raise ValueError(f"{word!r} is not supported")
    value: Any = scope
    for key in word[1:].split("."):
        value = value[key]  # Helm renders a missing value as nothing; here, it is an error
    return value


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
