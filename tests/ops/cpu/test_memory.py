"""Memory settings with other C libraries and allocators."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from veneer.ops.cpu import memory


def test_memory_settings_work_without_a_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates Windows, where ctypes cannot open the process's own symbols."""

    def refused(name: Any) -> Any:
        raise TypeError("bad argument type for built-in operation")

    monkeypatch.setattr(ctypes, "CDLL", refused)
    with memory.keep_freed_memory(), memory.return_freed_memory():
        assert torch.ones(3).sum() == 3
    memory.page_out(torch.ones(1 << 16))
    memory.trim_heap()


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"])
def test_user_allocator_settings_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    class Library:
        mallopt: Callable[..., Any] = staticmethod(lambda option, value: called.append(option))
        malloc_trim: Callable[..., Any] = staticmethod(lambda pad: None)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    with memory.keep_freed_memory():
        assert called
    called.clear()
    monkeypatch.setenv(name, "glibc.malloc.arena_max=1")
    with memory.keep_freed_memory():
        assert not called
