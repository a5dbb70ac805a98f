"""Notes on disk that outlive a SIGKILL: written at once, without waiting for the disk or for a database.

    FOLDER/SERVER.lock            held as long as the process lives; the system lets go of it at any death
    FOLDER/SERVER.0.jsonl …       one JSON object a line; a full part is followed by the next, and deleted when settled

A line is in the system's memory when `write` returns, about ten microseconds later: the process may then die in any way
and the line is read at the next start. (Only a machine that loses power within the moments until the database has the
row loses the line; the row is then settled as interrupted.) A line without its end was being written when death came.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Journal", "left_behind", "lock_file"]

_PART_BYTES = 256 * 1024
_LOCK = re.compile(r"([0-9a-f]{16})\.lock")


class Journal:
    """The journal of this process. Thread-safe."""

    def __init__(self, folder: Path, server: str, part_bytes: int = _PART_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.server, self._most = folder, server, part_bytes
        self._mutex = threading.Lock()
        self._held = _make_lock(lock_file(folder, server))
        self._part, self._oldest, self._size, self._file = -1, 0, 0, -1
        self._next()

    def write(self, line: dict[str, Any]) -> int:
        """Returns the part that the line is in."""
        data = (json.dumps(line) + "\n").encode()
        with self._mutex:
            if self._file < 0:
                raise OSError(errno.EBADF, "the journal is closed")
            if self._size >= self._most:
                self._next()
            os.write(self._file, data)
            self._size += len(data)
            return self._part

    def settled(self, part: int) -> None:
        """All lines before this part are in the database."""
        with self._mutex:
            for old in range(self._oldest, min(part, self._part)):
                _part(self.folder, self.server, old).unlink(missing_ok=True)
                self._oldest = old + 1

    def close(self, *, keep: bool = False) -> None:
        """`keep`: some lines are not in the database yet."""
        with self._mutex:
            os.close(self._file)
            self._file = -1
            if not keep:
                for part in range(self._oldest, self._part + 1):
                    _part(self.folder, self.server, part).unlink(missing_ok=True)
                lock_file(self.folder, self.server).unlink(missing_ok=True)
            os.close(self._held)

    def _next(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._part, self._size = self._part + 1, 0
        path = _part(self.folder, self.server, self._part)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def lock_file(folder: Path, server: str) -> Path:
    return folder / f"{server}.lock"


def left_behind(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(server, its lines) of each dead process; the files go when the caller has come back for the next."""
    for path in sorted(folder.glob("*.lock")):
        found = _LOCK.fullmatch(path.name)
        if not found:
            continue
        try:
            held = _lock(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # it lives, or another process has just read it
        try:
            parts = sorted(folder.glob(f"{found[1]}.*.jsonl"), key=lambda p: int(p.name.split(".")[1]))
            yield found[1], [line for part in parts for line in _lines(part)]
            for part in parts:
                part.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        finally:
            os.close(held)


def _part(folder: Path, server: str, number: int) -> Path:
    return folder / f"{server}.{number}.jsonl"


def _make_lock(path: Path) -> int:
    """A lock for this process; another may take it for a dead one's before it is held, and delete it."""
    while True:
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            return _lock(path, os.O_CREAT)
        time.sleep(0.001)


def _lock(path: Path, flags: int = 0) -> int:
    """Raises BlockingIOError where another process holds it, FileNotFoundError where it is gone."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or os.stat(path).st_ino != os.fstat(file).st_ino:  # deleted in between
            raise FileNotFoundError(path)
    except BaseException:
        os.close(file)
        raise
    return file


def _lines(part: Path) -> Iterator[dict[str, Any]]:
    for line in part.read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)
