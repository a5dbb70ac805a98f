"""Keeping transformers and diffusers quiet while veneer uses them; what matters is checked and said by the caller."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no log lines under `error` and no Python warnings from them within the with-block."""
    from transformers.utils import logging

    diffusers = sys.modules.get("diffusers")  # where it is not loaded, it has nothing to say
    level = diffusers.logging.get_verbosity() if diffusers else 0
    if diffusers:
        diffusers.logging.set_verbosity_error()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if diffusers:
            diffusers.logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
