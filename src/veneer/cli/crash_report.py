"""Reports of internal errors: errors that are not a VeneerError.

A user's mistake raises a VeneerError; any other error is a bug in veneer. The report lists what to send: the
version, the command with its option names (values are omitted: a value can be a key or an address) and the
last frames. The full traceback goes to a file, because it can contain private text."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Container, Sequence
from pathlib import Path

from veneer import __version__
from veneer.errors import shown

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""
_VARIABLE = "VENEER_TRACEBACK"
_FRAMES = 4


def report(error: Exception, argv: Sequence[str], commands: Container[str]) -> str:
    """Return the text to print for an error. With VENEER_TRACEBACK set, the text has the traceback."""
    trace = "".join(traceback.format_exception(error))
    versions = [f"veneer {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{platform.system()} {platform.machine()}"]
    versions += [
        f"{n} {sys.modules[n].__version__}" for n in ("torch", "transformers", "diffusers") if n in sys.modules
    ]
    frames = [_frame_text(frame) for frame in traceback.extract_tb(error.__traceback__)[-_FRAMES:][::-1]]
    lines = [
        f"error: {type(error).__name__}: {shown(str(error)[:300])}",
        "  This is a bug in veneer, not a mistake of yours. Please report it with the lines below.",
        f"  version:  {', '.join(versions)}",
        f"  command:  {command_line(argv, commands)}",
        f"  raised:   {type(error).__module__}.{type(error).__name__}",
        *(f"  {'at:' if not i else '':<9} {frame}" for i, frame in enumerate(frames)),
    ]
    if os.environ.get(_VARIABLE, "") not in ("", "0"):
        return "\n".join([trace.rstrip(), "", *lines])
    path = _save(trace)
    where = f"the whole traceback is in {path}" if path else "the traceback could not be saved"
    return "\n".join([*lines, f"  {where}; {_VARIABLE}=1 prints it"])


def command_line(argv: Sequence[str], commands: Container[str]) -> str:
    """Return the command and option names; every other word becomes `…`."""
    words = ["veneer"]
    for i, word in enumerate(argv):
        option = word.partition("=")[0]
        is_name = word in commands if i == 0 else option.startswith("-") and len(option) < 32
        words.append(shown(option) if is_name else "…")
    return " ".join(words)


def _frame_text(frame: traceback.FrameSummary) -> str:
    """Return a frame with its path relative to the package."""
    parts = Path(frame.filename).parts
    for root in ("veneer", "site-packages"):
        if root in parts:
            at = len(parts) - 1 - parts[::-1].index(root)
            parts = parts[at + (root == "site-packages") :]
            break
    else:
        parts = parts[-1:]
    return f"{'/'.join(parts)}:{frame.lineno} in {frame.name}"


def _save(text: str) -> str | None:
    """Write the traceback to a new private file. Returns the path, or None on failure."""
    try:
        handle, path = tempfile.mkstemp(prefix="veneer-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return path
