"""Locks on open files and folders, released when the process ends."""

from __future__ import annotations

import os

POSIX = os.name == "posix"
"""False on Windows, which opens no folders, renames and deletes no open files, and has no modes of files."""
BINARY = getattr(os, "O_BINARY", 0)
"""A flag for `os.open`: without it, Windows changes line ends in the bytes that are read and written."""


def take_lock(fd: int) -> None:
    """Lock the file or folder of `fd` for this process.

    Raises BlockingIOError if another process holds the lock, another OSError if the file system does not
    support locks. Does nothing on Windows, because an open file cannot be removed there."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
