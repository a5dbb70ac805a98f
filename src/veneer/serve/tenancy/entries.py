"""A request as the ledger knows it: what was asked when it was admitted, a line for each part of its mix, and how it
ended.

A part's price is its own, whatever stands beside it: each line has its adapter's price for all of the request's tokens,
and the request costs the sum of its lines.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from veneer.serve.request import Usage
from veneer.serve.tenancy.store import Price

__all__ = ["Entry", "Line", "Owed", "State", "day_of", "end_text", "entry_of", "entry_text", "owed_of"]

State = Literal["open", "done", "interrupted"]
_NOTHING = Usage(0, 0, 0)


@dataclass(frozen=True)
class Line:
    """One part of a mix. `digest` "": the base. `adapter`: what the operator calls it."""

    digest: str
    adapter: str
    strength: float
    price: Price


@dataclass(frozen=True)
class Entry:
    """What is known of a request when it is admitted. `name`: the client's word for its mix."""

    request: str
    tenant: str
    name: str
    opened: float
    asked_prompt: int
    asked_completion: int
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Owed:
    """A request and how far it came; `usage` is there where it is done."""

    entry: Entry
    state: State = "open"
    closed: float | None = None
    usage: Usage = _NOTHING

    def costs(self) -> list[int]:
        """Of each line, in millionths; 0 unless it is done."""
        took = (self.usage.prompt, self.usage.cached, self.usage.completion)
        return [line.price.cost(*took) if self.state == "done" else 0 for line in self.entry.lines]

    def tokens(self) -> int:
        """What counts in a window of tokens."""
        if self.state == "open":
            return self.entry.asked_prompt + self.entry.asked_completion
        return self.usage.prompt + self.usage.completion


def day_of(opened: float) -> str:
    """In UTC, as 2026-11-25."""
    return datetime.fromtimestamp(opened, UTC).strftime("%Y-%m-%d")


def entry_text(entry: Entry) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":"))


def entry_of(text: str) -> Entry:
    found: dict[str, Any] = json.loads(text)
    lines = tuple(Line(**{**line, "price": Price(**line["price"])}) for line in found.pop("lines"))
    return Entry(**found, lines=lines)


def end_text(state: State, closed: float, usage: Usage) -> str:
    return json.dumps([state, closed, *asdict(usage).values()], separators=(",", ":"))


def owed_of(entry: Entry, end: str) -> Owed:
    """`end`: of `end_text`; blank where the request is open."""
    if not end.strip():
        return Owed(entry)
    state, closed, *usage = json.loads(end)
    return Owed(entry, state, closed, Usage(*usage))
