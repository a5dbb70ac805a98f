"""What links of the Studio say: a view's path, and behind the question mark all that it is to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from veneer.errors import shown


@dataclass(frozen=True)
class Query:
    """What a link says behind its question mark."""

    pairs: tuple[tuple[str, str], ...] = ()

    def get(self, name: str, default: str = "") -> str:
        return next((value for key, value in self.pairs if key == name), default)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name]

    def number(self, name: str, default: float) -> float:
        """What stands there, where it is a number."""
        try:
            return float(self.get(name))
        except ValueError:
            return default


def query_of(pairs: Iterable[tuple[str, str]]) -> Query:
    """Of a link, which anybody may have made."""
    return Query(tuple((shown(key), shown(value, lines=True)) for key, value in islice(pairs, 200)))


def query_pairs(query: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of texts, numbers or lists of them; None and "" are left out."""
    return [
        (name, f"{each:g}" if isinstance(each, float) else str(each))
        for name, value in query.items()
        for each in (value if isinstance(value, list | tuple) else [value])
        if each is not None and each != ""
    ]
