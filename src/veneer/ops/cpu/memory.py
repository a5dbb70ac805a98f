"""Process memory: allocator settings, file-backed pages and peak usage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # from glibc's malloc.h
_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
_RETURNED = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 1 << 17, _M_TRIM_THRESHOLD: 1 << 17}
_AFTER = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 1 << 25, _M_TRIM_THRESHOLD: 1 << 26}
"""Settings applied when the last with-block of `_allocator` ends. They are constants, because mallopt cannot
read the previous settings. By default, glibc raises its thresholds up to these values when larger blocks are
freed, and never lowers the thresholds; the first mallopt call ends this adaptation. In a process that has
loaded or trained a model, the thresholds would have reached these values anyway."""
_settings: list[dict[int, int]] = []
_settings_lock = threading.Lock()


_SET_BY_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def _c_function(name: str) -> Any:
    """Return a C library function, or None if it is unavailable (Windows)."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None


def trim_heap() -> None:
    """Return freed memory to the operating system, if the C library supports this."""
    if (trim := _c_function("malloc_trim")) is not None:
        trim(0)


@contextmanager
def _allocator(setting: dict[int, int]) -> Iterator[None]:
    """Configure glibc's malloc inside a with-block.

    With-blocks can overlap; the settings of the block that was entered last apply to the whole process.

    Does nothing if the environment configures malloc (MALLOC_…, GLIBC_TUNABLES), or if the C library has no
    mallopt."""
    mallopt, trim = _c_function("mallopt"), _c_function("malloc_trim")
    set_by_user = any(name in os.environ for name in _SET_BY_USERS) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is None or trim is None or set_by_user:
        yield
        return

    def apply_settings() -> None:
        for option, value in (_settings[-1] if _settings else _AFTER).items():
            mallopt(option, value)

    with _settings_lock:
        _settings.append(setting)
        apply_settings()
    try:
        yield
    finally:
        with _settings_lock:
            del _settings[len(_settings) - 1 - _settings[::-1].index(setting)]
            apply_settings()
            last = not _settings
        if last:
            gc.collect()
            trim(0)


def keep_freed_memory() -> AbstractContextManager[None]:
    """Keep freed memory in the process inside a with-block, then return it to the system.

    By default glibc maps every block above 32 MB (and many above 128 kB) from the system and unmaps it when
    freed; the kernel zeroes the pages each time. A training step allocates and frees the same activations
    repeatedly. Keeping the pages mapped saved 8% of a step."""
    return _allocator(_KEPT)


def return_freed_memory() -> AbstractContextManager[None]:
    """Return freed memory to the system at once inside a with-block.

    The opposite of `keep_freed_memory`. By default, once a large block has been freed, glibc allocates later
    blocks of that size from its heap, and small allocations between these blocks prevent the heap from
    shrinking. When weights were quantized one after another, this fragmentation wasted a tenth of the model's
    size."""
    return _allocator(_RETURNED)


def peak_resident() -> int:
    """Return the peak resident memory of this process, in bytes.

    On Linux, this is VmHWM, because ru_maxrss starts at the parent process's value."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # the resource module does not exist on Windows
        import psutil

        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def reset_peak_resident() -> None:
    """Reset the value of `peak_resident` to the current resident memory.

    Does nothing outside Linux, or without permission."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def unread_bytes(tensor: Tensor) -> int:
    """Return the number of bytes of a tensor that are not in memory yet.

    Pages of a memory-mapped file are loaded on first access. Returns 0 if the number is unknown: outside
    Linux, or for a device tensor."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return 0
    size = tensor.numel() * tensor.element_size()
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = tensor.data_ptr() // page, -(-(tensor.data_ptr() + size) // page)
    try:
        with open("/proc/self/pagemap", "rb") as pages:
            pages.seek(8 * first)
            present = pages.read(8 * (last - first))[7::8]  # 64 bits per page; the highest bit means present
    except OSError:
        return 0
    return min(size, page * sum(byte < 128 for byte in present))


_MADV_PAGEOUT = 21  # Linux 5.4


def page_out(tensor: Tensor) -> None:
    """Tell the kernel that a tensor's file-backed pages can be dropped from memory.

    Weights in a memory map stay resident while any tensor of the file is alive. Dropping pages changes no
    data: a dropped page is read again on access. Does nothing outside Linux, or for a device tensor."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    madvise = _c_function("madvise")
    if madvise is None:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if last > first:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(_MADV_PAGEOUT))
