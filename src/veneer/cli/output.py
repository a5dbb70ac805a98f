"""Terminal output of commands: escaping, JSON, tables, long lists and errors.

Names, metadata and errors can come from untrusted files. An escape sequence in such a text could set the
terminal's title, overwrite earlier lines or fill the clipboard. `guard` therefore wraps stdout and stderr in
a stream that escapes control characters with `errors.shown`, except line ends, tabs and the carriage return
of a progress line. Libraries that escape text themselves and write their own escape sequences, such as rich,
use `unwrapped(stream)`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from veneer.errors import VeneerError, shown


class Guarded:
    """A text stream that escapes text with `shown` and writes to another stream.

    All other attributes are those of the other stream."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream
        """The wrapped stream. rich looks for this name and writes escape sequences there."""

    def write(self, text: str) -> int:
        parts = text.split("\r")
        self.rich_proxied_file.write("\r".join(shown(part, lines=True) for part in parts))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def unwrapped(stream: TextIO) -> TextIO:
    """Return the stream inside a `Guarded`, for code that escapes text itself."""
    return stream.rich_proxied_file if isinstance(stream, Guarded) else stream


@contextmanager
def guard() -> Iterator[None]:
    """Wrap stdout and stderr in `Guarded`, and restore both on exit."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, s if isinstance(s, Guarded) else Guarded(s)) for s in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def field(value: object) -> str:
    """Return a text from a file, escaped for use within a line of output.

    Line ends are escaped too, so that the text cannot imitate a line of veneer's own output."""
    return shown(value)


def say(line: str) -> None:
    """Print a line to stderr immediately."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return `rows` as text, in aligned columns with the headings `head`."""
    cells = [list(head), *([field(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(table(head, rows))


MOST = 20
"""Number of list items to show without `--all`."""
_list_settings: dict[str, bool] = {"everything": False}


def set_show_all(on: bool) -> None:
    """Set whether `cut_list` returns all items, as with `--all`."""
    _list_settings["everything"] = on


def cut_list(items: Sequence[str], most: int = MOST) -> list[str]:
    """Return the first `most` items, escaped, and a note that counts the rest.

    With `--all`, returns all items."""
    few = items if _list_settings["everything"] or len(items) <= most + 1 else items[:most]
    out = [field(item) for item in few]
    return out if len(few) == len(items) else [*out, f"and {len(items) - len(few):,} more (--all shows them)"]


def error_text(error: VeneerError) -> str:
    """Return an error's `what`, `where` and `fix` as text; long lists are shortened."""
    first, *lines = error.what.splitlines() or [""]
    out = [first, *cut_list(lines, 2 * MOST)]
    out += [f"  {name}: {text}" for name, text in (("where", error.where), ("fix", error.fix)) if text]
    return "\n".join(shown(line, lines=True) for line in out)
