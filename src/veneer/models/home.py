"""The veneer home, for downloads and generated files: `$VENEER_HOME` or `~/.veneer`."""

from __future__ import annotations

import os
from pathlib import Path


def veneer_home() -> Path:
    """Return the path of the veneer home, without creating it.

    An empty VENEER_HOME counts as unset."""
    return Path(os.environ.get("VENEER_HOME") or "~/.veneer").expanduser().absolute()


def bases_home() -> Path:
    """Return the folder of built-in bases, each a transformers directory under its name."""
    return veneer_home() / "bases"
