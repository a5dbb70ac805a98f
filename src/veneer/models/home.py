"""Where veneer keeps what it fetched or made: `$VENEER_HOME`, or `~/.veneer`."""

from __future__ import annotations

import os
from pathlib import Path


def veneer_home() -> Path:
    """The veneer home. This does not create it. An empty VENEER_HOME counts as unset."""
    return Path(os.environ.get("VENEER_HOME") or "~/.veneer").expanduser().absolute()


def bases_home() -> Path:
    """Where built-in bases live, each a plain transformers directory under its name."""
    return veneer_home() / "bases"
