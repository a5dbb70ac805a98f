"""Locks of open files and folders, released when the process ends."""

from __future__ import annotations


def take_lock(fd: int) -> None:
    """Lock the file or folder of `fd` for this process.

    Raises BlockingIOError if another process holds the lock, another OSError if the file system has no
    locks. Does nothing on Windows, where an open file cannot be removed."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
