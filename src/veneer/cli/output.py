"""What a command prints, on its way to a terminal: the one place where strings cross.

Names, metadata and errors come out of files that anybody may have made, and a terminal obeys what it is sent: an escape
sequence can set its title, move the cursor over what was said, or fill the clipboard. `guard` puts a stream around
stdout and stderr that writes such characters out (`errors.shown`); line ends, tabs and the carriage return of a
progress line pass. What makes its own sequences and has escaped its texts, as rich does, writes to `own(stream)`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from veneer.errors import VeneerError, shown


class Guarded:
    """A text stream that writes `shown` texts to another; else that other."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream
        """Where rich, which looks for this name, writes its own sequences."""

    def write(self, text: str) -> int:
        parts = text.split("\r")
        self.rich_proxied_file.write("\r".join(shown(part, lines=True) for part in parts))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def own(stream: TextIO) -> TextIO:
    """The stream itself, for what escapes by itself."""
    return stream.rich_proxied_file if isinstance(stream, Guarded) else stream


@contextmanager
def guard() -> Iterator[None]:
    """stdout and stderr guarded; afterwards they are what they were."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, s if isinstance(s, Guarded) else Guarded(s)) for s in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def field(value: object) -> str:
    """A text out of a file as part of one line: its own line ends are written out too, so that it cannot pretend to be
    a line of ours."""
    return shown(value)


def say(line: str) -> None:
    """A line beside the result: on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The result, for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """`rows` under `head`, in columns."""
    cells = [list(head), *([field(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(table(head, rows))


MOST = 20
"""How many of a list are shown without `--all`."""
_shown: dict[str, bool] = {"everything": False}


def everything(on: bool) -> None:
    """Whether lists are shown whole from here on (`--all`)."""
    _shown["everything"] = on


def cut_list(items: Sequence[str], most: int = MOST) -> list[str]:
    """The items as fields: the first `most` and how many more there are, or all of them with `--all`."""
    few = items if _shown["everything"] or len(items) <= most + 1 else items[:most]
    out = [field(item) for item in few]
    return out if len(few) == len(items) else [*out, f"and {len(items) - len(few):,} more (--all shows them)"]


def error_text(error: VeneerError) -> str:
    """An error as it is printed: what, where and fix, a long list in it cut as every other."""
    first, *lines = error.what.splitlines() or [""]
    out = [first, *cut_list(lines, 2 * MOST)]
    out += [f"  {name}: {text}" for name, text in (("where", error.where), ("fix", error.fix)) if text]
    return "\n".join(shown(line, lines=True) for line in out)
