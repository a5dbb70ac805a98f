"""The veneer home (`$VENEER_HOME` or `~/.veneer`): downloads and generated files."""

from __future__ import annotations

import os
from pathlib import Path


def veneer_home() -> Path:
    """Return the path of the veneer home without creating the directory.

    An empty VENEER_HOME counts as unset."""
    return Path(os.environ.get("VENEER_HOME") or "~/.veneer").expanduser().absolute()


def bases_home() -> Path:
    """Return the folder of built-in bases, with one transformers directory per base."""
    return veneer_home() / "bases"
