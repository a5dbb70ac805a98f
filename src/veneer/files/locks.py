"""Locks on open files and folders, released when the process ends."""

from __future__ import annotations


def take_lock(fd: int) -> None:
    """Lock the file or folder of `fd` for this process.

    Raises BlockingIOError if another process holds the lock, another OSError if the file system does not
    support locks. Does nothing on Windows, because an open file cannot be removed there."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
