"""What the files of `veneer tenant` share: the database that the command was given, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.output import field

if TYPE_CHECKING:
    from veneer.serve.tenancy.store import Store

__all__ = ["AsJson", "day", "opened", "print_json", "set_place", "table", "who"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_place: dict[str, str | None] = {"at": None}


def set_place(at: str | None) -> None:
    """The database of the commands to come."""
    _place["at"] = at


@contextmanager
def opened() -> Iterator[Store]:
    from veneer.serve.tenancy.keys import default_database
    from veneer.serve.tenancy.store import Store

    store = Store(_place["at"] or default_database())
    try:
        yield store
    finally:
        store.close()


def who() -> str:
    import getpass

    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container without a name for its user
        import os

        return f"cli:{os.getuid()}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """`rows` under `head` in columns, or what to say where there are none."""
    if not rows:
        print(empty)
        return
    cells = [list(head), *([field(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def day(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
