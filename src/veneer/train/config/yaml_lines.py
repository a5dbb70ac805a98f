"""YAML as people expect it, with the line of every key.

Differs from PyYAML's defaults (YAML 1.1) where those surprise: `5e-4` is a number, only `true` and `false` are
booleans (`on`, `off`, `yes`, `no` are text), `1:30` and dates are text, a key given twice is an error.
Knows nothing about what the keys mean.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from veneer.errors import ConfigError

__all__ = ["parse", "parse_value"]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core rules for plain scalars; underscores in numbers (10_000) stay allowed."""


_RULES = {
    "tag:yaml.org,2002:null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "tag:yaml.org,2002:int": (r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
        list("-+0123456789."),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _RULES.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def parse(text: str, where: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The value of a YAML text and the 1-based line of each key, by its path from the root.

    Raises ConfigError with `where:line` for text that is not YAML, and for a key given twice."""
    loader = _Loader(text)
    lines: dict[tuple[str, ...], int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, (), lines, where)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}" if mark else where
        if (tab := _tab(text, error)) is not None:
            raise ConfigError(
                "not valid YAML: a tab, where YAML takes spaces alone",
                where=f"{where}:{tab}",
                fix="write spaces for it",
            ) from None
        raise ConfigError(
            f"not valid YAML: {error.problem}", where=at, fix="check the indentation and quotes"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {error}", where=where) from None
    finally:
        loader.dispose()


def _tab(text: str, error: yaml.MarkedYAMLError) -> int | None:
    """The 1-based line of the tab that an error is about; None where it is about something else."""
    if error.problem_mark is None:
        return None
    line = error.problem_mark.line
    found = text.splitlines()[line : line + 1]
    indented = any("\t" in each[: len(each) - len(each.lstrip())] for each in found)
    return line + 1 if indented or "'\\t'" in str(error.problem) else None


def parse_value(text: str, where: str) -> Any:
    """One value as it would read after `key: ` in a file: `5e-4` a number, `[a, b]` a list, `` nothing."""
    return parse(text, where)[0]


def _walk(node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int], where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            here = (*path, str(key_node.value))
            line = key_node.start_mark.line + 1
            if here in lines:
                raise ConfigError(
                    f"`{'.'.join(here)}` is given twice, on lines {lines[here]} and {line}",
                    where=f"{where}:{line}",
                    fix="keep one of the two",
                )
            lines[here] = line
            _walk(value_node, here, lines, where)
