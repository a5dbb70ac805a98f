"""Quiet blocks that overlap in two threads leave nothing behind."""

from __future__ import annotations

import threading
import warnings

import pytest
from transformers.utils import logging

from veneer.models.quiet import quiet


def test_the_last_to_end_puts_back_what_was() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)
    began, end = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            began.set()
            end.wait(10)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        assert began.wait(10)
    warnings.warn("still quiet", UserWarning, stacklevel=1)
    end.set()
    thread.join()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)) == before
    with pytest.warns(UserWarning, match="loud"):
        warnings.warn("loud", UserWarning, stacklevel=1)
    with quiet(), quiet():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before[0]
