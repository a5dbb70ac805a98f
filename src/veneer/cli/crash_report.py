"""Reports of internal errors: errors that are not a VeneerError.

A user's mistake raises a VeneerError; any other error is a bug in veneer. The report lists what to send: the
version, the command with its option names (values are omitted: a value can be a key or an address) and the
last frames. The full traceback goes to a file, because it can contain private text.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer import __version__
from veneer.errors import shown

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""
SHOWS = "VENEER_TRACEBACK"
FRAMES = 4


def report(error: Exception, argv: Sequence[str], commands: Mapping[str, str]) -> str:
    """Return the text to print for `error`.

    `commands`: command -> module. With VENEER_TRACEBACK in the environment, the text has the traceback."""
    whole = "".join(traceback.format_exception(error))
    about = f"veneer {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    loaded = [f"{n} {sys.modules[n].__version__}" for n in ("torch", "transformers", "diffusers") if n in sys.modules]
    lines = [
        f"error: {type(error).__name__}: {shown(str(error)[:300])}",
        "  This is a fault in veneer, not in what you did: every mistake of a user's has words of its own. Nothing was",
        "  checked beyond this point. Please report it with the lines below.",
        f"  version:  {', '.join([about, *loaded])}",
        f"  command:  {command_line(argv, commands)}",
        f"  raised:   {type(error).__module__}.{type(error).__name__}",
    ]
    lines += [f"  {'at:' if not i else '':<9} {frame}" for i, frame in enumerate(_frames(error))]
    if os.environ.get(SHOWS, "") not in ("", "0"):
        return "\n".join([whole.rstrip(), "", *lines])
    kept = _kept(whole)
    where = f"the whole traceback is in {kept}" if kept else "the traceback could not be kept"
    return "\n".join([*lines, f"  {where}; {SHOWS}=1 prints it"])


def command_line(argv: Sequence[str], commands: Mapping[str, str]) -> str:
    """Return the command, subcommands and option names; every value becomes `…`."""
    out, known = ["veneer"], set(commands)
    for i, word in enumerate(argv):
        option = word.partition("=")[0]
        if word in known and i < 3 and "…" not in out:
            out.append(word)
            known = _subcommands(getattr(sys.modules.get(commands.get(word, "")), "app", None)) if i == 0 else known
        else:
            out.append(option if option.startswith("-") and len(option) < 32 else "…")
    return " ".join(shown(word) for word in out)


def _subcommands(app: Any) -> set[str]:
    """Return the command names of a Typer and of its groups."""
    found = {c.name or getattr(c.callback, "__name__", "") for c in getattr(app, "registered_commands", [])}
    for group in getattr(app, "registered_groups", []):
        found |= {group.name or "", *_subcommands(group.typer_instance)}
    return {name.replace("_", "-") for name in found}


def _frames(error: Exception) -> list[str]:
    """Return the last frames, innermost first, with paths relative to the package."""
    found = traceback.extract_tb(error.__traceback__)[-FRAMES:][::-1]
    return [f"{_within(frame.filename)}:{frame.lineno} in {frame.name}" for frame in found]


def _within(file: str) -> str:
    parts = Path(file).parts
    for root in ("veneer", "site-packages"):
        if root in parts:
            at = len(parts) - 1 - parts[::-1].index(root)
            return "/".join(parts[at + (root == "site-packages") :])
    return parts[-1] if parts else file


def _kept(text: str) -> str | None:
    """Write the traceback to a new private file. Returns the path, or None on failure."""
    try:
        handle, path = tempfile.mkstemp(prefix="veneer-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return path
