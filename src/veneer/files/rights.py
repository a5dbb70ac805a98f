"""Access rights: only the owner can read files and memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import stat
import sys
from pathlib import Path


def make_private(path: Path) -> None:
    """Remove other users' access to a file or folder.

    The group keeps its access only if it can also write, which means that the owner shares it on purpose.
    Missing paths, and paths of other users, are unchanged."""
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode & ~(stat.S_IRWXO if mode & stat.S_IWGRP else stat.S_IRWXO | stat.S_IRWXG))


def private_folder(path: Path) -> Path:
    """Create a folder if missing, make it private and return it. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    make_private(path)
    return path


def forbid_inspection() -> None:
    """Hide this process's memory, environment and descriptors from other processes.

    Applies to processes of the same user on Linux, except root's, and prevents core dumps. Child processes
    must call it again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


_PR_SET_DUMPABLE = 4
