"""Settings changed while loading are restored when the last thread has finished."""

from __future__ import annotations

import gc
import threading
import warnings
from logging import getLogger

import pytest
from transformers.utils import logging

from veneer.models.loading import errors_only, uncollected


def test_garbage_collection_pauses_only_while_loading() -> None:
    enabled = gc.isenabled()
    try:
        gc.enable()
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled()
        gc.disable()
        with uncollected():
            pass
        assert not gc.isenabled(), "the caller had paused collection"
    finally:
        (gc.enable if enabled else gc.disable)()


def test_settings_are_restored_after_the_last_context_exits() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)
    began, end = threading.Event(), threading.Event()

    def other() -> None:
        with errors_only():
            began.set()
            end.wait(10)

    thread = threading.Thread(target=other)
    with errors_only():
        thread.start()
        assert began.wait(10)
    warnings.warn_explicit("still off", UserWarning, "x.py", 1, module="transformers.utils")
    end.set()
    thread.join()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)) == before
    with pytest.warns(UserWarning, match="shown"):
        warnings.warn("shown", UserWarning, stacklevel=1)
    with errors_only(), errors_only():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before[0]


def test_only_warnings_of_the_libraries_are_hidden() -> None:
    """Other warnings inside the block are shown, and other changed settings persist."""
    mine = ("ignore", None, ResourceWarning, None, 0)
    before = list(warnings.filters)
    try:
        with errors_only():
            with pytest.warns(UserWarning, match="mine"):
                warnings.warn("mine", UserWarning, stacklevel=1)
            warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="transformers.modeling_utils")
            warnings.warn_explicit("theirs", FutureWarning, "x.py", 1, module="torch")
            warnings.filters.append(mine)  # type: ignore[attr-defined]
        assert mine in warnings.filters
        assert len(warnings.filters) == len(before) + 1
        with pytest.warns(UserWarning, match="theirs"):
            warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="transformers.modeling_utils")
    finally:
        warnings.filters.remove(mine)  # type: ignore[attr-defined]


def test_bitsandbytes_warning_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes 0.49 logs this line on import on processors with AVX512-BF16."""
    theirs = getLogger("bitsandbytes.backends.cpu.ops")
    theirs.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure …", "no hub")
    theirs.warning("another thing")
    assert [record.message for record in caplog.records] == ["another thing"]
