"""Write files and folders atomically: complete or not at all, whatever happens.

A file is written under a temporary name, flushed to disk and renamed; a new folder likewise.
`atomic_write` and `put_folder` raise veneer's errors, `replace_file` and `new_folder` the system's, for
callers with their own messages. This module knows bytes and paths; it does not know about their content.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import AdapterError, ResourceError


@dataclass
class Staged:
    """A file written under a temporary name next to its target.

    `commit` renames it to the target, `discard` removes it."""

    temporary: Path
    path: Path

    @classmethod
    def next_to(cls, path: Path, ending: str = ".tmp") -> Staged:
        """Return a staged file for `path`; nothing is written yet.

        Raises OSError if `path` is a device or a pipe: a file would replace it, which nobody intends for
        /dev/null."""
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(errno.EINVAL, "the path is a device or a pipe, not a file", str(path))
        return cls(path.with_name(f".{path.name}.{secrets.token_hex(6)}{ending}"), path)

    def commit(self) -> None:
        """Rename the file to its target. Raises OSError; the staged file is removed then."""
        try:
            os.replace(self.temporary, self.path)
        except BaseException:
            self.discard()
            raise
        flush_folder(self.path.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.temporary.unlink()


def atomic_write(path: str | Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write `path` atomically: a temporary file, flushed to disk, then renamed.

    After any failure the old file is unchanged and nothing is left behind. Raises ResourceError if the
    disk is full, AdapterError for any other error."""
    with as_veneer_errors(Path(path)):
        replace_file(path, chunks)


def replace_file(path: str | Path, chunks: Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Run `atomic_write` with the system's OSError.

    mode: permissions before the umask."""
    staged = Staged.next_to(Path(path))
    _fill(staged.temporary, chunks, mode)
    staged.commit()


def write_all(fd: int, chunks: Iterable[bytes | memoryview]) -> None:
    """Write every byte of `chunks` to an open file and flush. Raises OSError."""
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while view:
            view = view[os.write(fd, view[: 1 << 26]) :]
    os.fsync(fd)


def _fill(path: Path, chunks: Iterable[bytes | memoryview], mode: int) -> None:
    """Write a new file with these bytes, flushed; removed again after an error."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        write_all(fd, chunks)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power loss, if the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def as_veneer_errors(path: Path) -> Iterator[None]:
    """Convert OSError to ResourceError for a full disk, else to AdapterError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
            raise ResourceError(
                f"no room to write: {error.strerror}; nothing was changed",
                where=str(path),
                fix="free some space, or write elsewhere",
            ) from error
        raise AdapterError(f"cannot write: {error.strerror or error}; nothing was changed", where=str(path)) from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, renamed to `folder` at the end.

    On an error, nothing is left behind. An empty `folder` can exist already. Raises OSError."""
    temporary = Staged.next_to(folder).temporary
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        flush_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_folder(folder: Path, contents: Mapping[str, list[bytes | memoryview]], *, last: str = "") -> None:
    """Write files by name into a folder.

    A new folder appears by one rename. In an existing folder every file is staged first, so that the space
    for all of them is allocated; then each replaces its old version, `last` (the file that describes the
    others) at the end. Errors as `atomic_write`."""
    if folder.exists() and not folder.is_dir():
        raise AdapterError("a file is in the way of the folder", where=str(folder))
    if not folder.is_dir():
        with as_veneer_errors(folder), new_folder(folder) as temporary:
            for name, chunks in contents.items():
                atomic_write(temporary / name, chunks)
        return
    staged = [Staged.next_to(folder / name) for name in sorted(contents, key=lambda name: name == last)]
    try:
        for staged_file in staged:
            with as_veneer_errors(staged_file.path):
                _fill(staged_file.temporary, contents[staged_file.path.name], 0o666)
        for staged_file in staged:
            with as_veneer_errors(staged_file.path):
                staged_file.commit()
    finally:
        for staged_file in staged:
            staged_file.discard()
