"""Access rights: keep files and this process's memory private."""

from __future__ import annotations

import contextlib
import ctypes
import stat
import sys
from pathlib import Path


def make_private(path: Path) -> None:
    """Remove other users' access to a file or folder.

    A group with write access keeps its access, because such access means that the owner shares
    the path on purpose. Missing paths and paths that belong to other users are left unchanged."""
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode & ~(stat.S_IRWXO if mode & stat.S_IWGRP else stat.S_IRWXO | stat.S_IRWXG))


def private_folder(path: Path) -> Path:
    """Create a folder if it is missing, make it private, and return its path.

    Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    make_private(path)
    return path


def forbid_inspection() -> None:
    """Hide this process's memory, environment and descriptors from the user's other processes.

    Works only on Linux; root keeps access. Also disables core dumps. Each child process must call this
    function itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


_PR_SET_DUMPABLE = 4
