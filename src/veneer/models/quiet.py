"""Keeping transformers and diffusers quiet while veneer loads or converts a base.

What matters is checked and said by the caller."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

__all__ = ["quiet"]


_lock = threading.Lock()
_inside = 0
_before = ExitStack()


_LIBRARIES = r"(transformers|diffusers|accelerate|huggingface_hub|torch|bitsandbytes|gguf)(\.|$)"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines under `error` within the with-block from transformers, and from diffusers where
    it is imported already; and no Python warnings about those libraries' own lines. Anybody else's are shown.

    The first two are the process's, so that of blocks in several threads the first to begin makes it quiet, and the
    last to end puts it back. For loading and converting, not for what goes on while others work."""
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


def _is_news(record: logging.LogRecord) -> bool:
    """bitsandbytes, which PEFT brings along wherever diffusers is imported, looks for faster kernels on a hub when it
    is imported, and warns where there are none; veneer never multiplies by them."""
    return "gemm_4bit_forward" not in str(record.msg)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)


def _hush(before: ExitStack) -> None:
    from transformers.utils import logging as theirs

    for each in (theirs, sys.modules.get("diffusers.utils.logging")):
        if each is not None:
            if each.is_progress_bar_enabled():
                before.callback(each.enable_progress_bar)
            before.callback(each.set_verbosity, each.get_verbosity())
            each.set_verbosity_error()
            each.disable_progress_bar()
    # not catch_warnings, which at its end would put away what others have changed meanwhile
    had = list(warnings.filters)
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    before.callback(_unfilter, next((f for f in warnings.filters if f not in had), None))


def _unfilter(added: Any) -> None:
    if added in warnings.filters:
        warnings.filters.remove(added)  # type: ignore[attr-defined]
