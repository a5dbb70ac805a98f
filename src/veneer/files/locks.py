"""Locks of open files and folders, which end with the process that has them."""

from __future__ import annotations


def take_lock(fd: int) -> None:
    """Lock what `fd` is open on, for this process alone. Raises BlockingIOError where another has it, another OSError
    on a file system that has no locks. On Windows, where a file that is open cannot be removed, it does nothing."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
