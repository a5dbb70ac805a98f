"""Links of the Studio: a view's path, and its state as a query string."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from veneer.errors import shown


@dataclass(frozen=True)
class Query:
    """The query string of a link."""

    pairs: tuple[tuple[str, str], ...] = ()

    def get(self, name: str, default: str = "") -> str:
        return next((value for key, value in self.pairs if key == name), default)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name]

    def number(self, name: str, default: float) -> float:
        """Return a value as a number, or `default`."""
        try:
            return float(self.get(name))
        except ValueError:
            return default


def query_of(pairs: Iterable[tuple[str, str]]) -> Query:
    """Return the Query of an untrusted link, with at most 200 pairs."""
    return Query(tuple((shown(key), shown(value, lines=True)) for key, value in islice(pairs, 200)))


def query_pairs(query: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, text) pairs of texts, numbers or lists; omit None and ""."""
    return [
        (name, f"{each:g}" if isinstance(each, float) else str(each))
        for name, value in query.items()
        for each in (value if isinstance(value, list | tuple) else [value])
        if each is not None and each != ""
    ]
