"""A request as the ledger records it.

The record has one line for each part of the request's mix, and the request's final state. The price of a part
does not depend on the other parts: each line charges its adapter's price for all tokens of the request, and a
request costs the sum of its lines.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from veneer.serve.request import Usage
from veneer.serve.tenancy.store import Price

EntryState = Literal["open", "done", "interrupted"]
_NOTHING = Usage(0, 0, 0)


@dataclass(frozen=True)
class LedgerLine:
    """One part of a mix.

    `digest`: "" for the base. `adapter`: the operator's name for the adapter.
    """

    digest: str
    adapter: str
    strength: float
    price: Price


@dataclass(frozen=True)
class LedgerEntry:
    """A request at admission. `name`: the client's name for the request's mix."""

    request: str
    tenant: str
    name: str
    opened: float
    asked_prompt: int
    asked_completion: int
    lines: tuple[LedgerLine, ...]


@dataclass(frozen=True)
class OwedEntry:
    """A request and its state. `usage` is valid only if the request is done."""

    entry: LedgerEntry
    state: EntryState = "open"
    closed: float | None = None
    usage: Usage = _NOTHING

    def costs(self) -> list[int]:
        """Return each line's cost in millionths of the currency; 0 unless the request is done."""
        tokens = (self.usage.prompt, self.usage.cached, self.usage.completion)
        return [line.price.cost(*tokens) if self.state == "done" else 0 for line in self.entry.lines]

    def tokens(self) -> int:
        """Return the tokens that count against a token limit."""
        if self.state == "open":
            return self.entry.asked_prompt + self.entry.asked_completion
        return self.usage.prompt + self.usage.completion

    def to_line(self) -> bytes:
        """Return the entry as a line of JSON."""
        return f"{json.dumps(asdict(self), separators=(',', ':'))}\n".encode()

    @classmethod
    def from_line(cls, text: bytes) -> OwedEntry:
        """Return the entry of a line from `to_line`."""
        fields: dict[str, Any] = json.loads(text)
        entry = fields["entry"]
        lines = tuple(LedgerLine(**{**line, "price": Price(**line["price"])}) for line in entry.pop("lines"))
        return cls(LedgerEntry(**entry, lines=lines), fields["state"], fields["closed"], Usage(**fields["usage"]))


def day_of(opened: float) -> str:
    """Return the UTC day of a time (seconds since 1970), such as 2026-11-25."""
    return datetime.fromtimestamp(opened, UTC).strftime("%Y-%m-%d")
