"""Keeping transformers and diffusers quiet while veneer loads or converts a base.

What matters is checked and said by the caller."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["quiet"]


_lock = threading.Lock()
_inside = 0
_before = ExitStack()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no log lines under `error` and no Python warnings within the with-block: from transformers,
    and from diffusers where it is imported already.

    All of that is the process's, so that of blocks in several threads the first to begin makes it quiet, and the last
    to end puts it back."""
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _hush(_before)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _before.close()


def _hush(before: ExitStack) -> None:
    from transformers.utils import logging

    for each in (logging, sys.modules.get("diffusers.utils.logging")):
        if each is not None:
            if each.is_progress_bar_enabled():
                before.callback(each.enable_progress_bar)
            before.callback(each.set_verbosity, each.get_verbosity())
            each.set_verbosity_error()
            each.disable_progress_bar()
    before.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
