"""Keeping transformers and diffusers quiet while veneer loads or converts a base.

What matters is checked and said by the caller."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no log lines under `error` and no Python warnings within the with-block: from transformers,
    and from diffusers where it is imported already."""
    from transformers.utils import logging

    kept: list[tuple[Any, int, bool]] = []
    for each in (logging, sys.modules.get("diffusers.utils.logging")):
        if each is not None:
            kept.append((each, each.get_verbosity(), each.is_progress_bar_enabled()))
            each.set_verbosity_error()
            each.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, verbosity, bars in kept:
            each.set_verbosity(verbosity)
            if bars:
                each.enable_progress_bar()
