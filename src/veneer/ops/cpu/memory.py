"""Memory of the process: allocator policy, file-backed pages and peak usage."""

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

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
_RETURNED = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 1 << 17, _M_TRIM_THRESHOLD: 1 << 17}
_AFTER = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 1 << 25, _M_TRIM_THRESHOLD: 1 << 26}
"""Settings to restore. mallopt has no getter, and after its first call glibc no longer adapts its
thresholds. By default glibc raises them with every larger freed block, up to these values, and never
lowers them: a process that has trained or loaded a model would be at these values anyway."""
_settings: list[dict[int, int]] = []
_settings_lock = threading.Lock()


_SET_BY_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def _c_function(name: str) -> Any:
    """Return a function of the process's C library; None if there is none (Windows)."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None


def give_back() -> None:
    """Return freed memory to the system, if the C library supports it."""
    if (trim := _c_function("malloc_trim")) is not None:
        trim(0)


@contextmanager
def _allocator(setting: dict[int, int]) -> Iterator[None]:
    """Configure glibc's malloc during a with-block.

    Blocks can overlap; the latest open block's settings apply.

    malloc belongs to the whole process, so settings from the environment (MALLOC_…, GLIBC_TUNABLES) win. Does nothing
    if the C library has no mallopt."""
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


def kept_memory() -> AbstractContextManager[None]:
    """Keep freed memory in the process during a with-block, then return it.

    By default glibc maps every block above 32 MB (and many above 128 kB) anew and unmaps it when freed;
    the kernel zeroes the pages each time. A training step allocates and frees the same activations
    repeatedly: keeping them saves a measured 8% of a step."""
    return _allocator(_KEPT)


def returned_memory() -> AbstractContextManager[None]:
    """Return freed memory to the system at once, during a with-block.

    The opposite of `kept_memory`. Once a large block was freed, glibc takes blocks of this size from its
    heap, and allocations between them keep the heap from shrinking: quantizing weight after weight left a
    tenth of the model in holes."""
    return _allocator(_RETURNED)


def peak_resident() -> int:
    """Return the peak resident memory of this process, in bytes.

    On Linux this is not ru_maxrss, which starts at the parent's value."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows has no resource module
        import psutil

        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def forget_peak_resident() -> None:
    """Reset the peak to the currently resident memory.

    Does nothing outside Linux, or without permission."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def unread_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor that are not in memory yet.

    Pages of a memory map are read at first use. 0 if unknown: not on Linux, or on a device."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return 0
    size = tensor.numel() * tensor.element_size()
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = tensor.data_ptr() // page, -(-(tensor.data_ptr() + size) // page)
    try:
        with open("/proc/self/pagemap", "rb") as pages:
            pages.seek(8 * first)
            present = pages.read(8 * (last - first))[7::8]  # each page has 64 bits; the highest means present
    except OSError:
        return 0
    return min(size, page * sum(byte < 128 for byte in present))


_MADV_PAGEOUT = 21  # Linux 5.4


def page_out(tensor: Tensor) -> None:
    """Hint that this memory will not be read soon, to drop file-backed pages.

    Weights read through a memory map stay resident while any of the file's tensors lives. The hint changes
    no content: a touched page is read again. Does nothing outside Linux, or on a device."""
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
