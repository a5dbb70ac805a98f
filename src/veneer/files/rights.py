"""Who else on this machine may read what is kept here, in files and in memory: what people wrote is its owner's."""

from __future__ import annotations

import contextlib
import ctypes
import stat
import sys
from pathlib import Path


def make_private(path: Path) -> None:
    """Nobody else can read the file, or get into the folder; a group only where it may write too, which is how one that
    shares it on purpose has it. What is not there, or is another's, stays as it is."""
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode & ~(stat.S_IRWXO if mode & stat.S_IWGRP else stat.S_IRWXO | stat.S_IRWXG))


def private_folder(path: Path) -> Path:
    """The folder, made if it is not there, as `make_private` has it. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    make_private(path)
    return path


def forbid_inspection() -> None:
    """Makes this process's memory, environment and descriptors unreadable to other processes of its user (on Linux, and
    not to root's), and leaves no core dump of them. A process that this one starts has to do it again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


_PR_SET_DUMPABLE = 4
