"""Write files and folders atomically: completely or not at all.

A file is written under a temporary name, flushed to disk and renamed. A new folder is created in the same
way. `atomic_write` and `put_folder` raise veneer's errors; `replace_file` and `new_folder` raise the system's
errors, for callers with their own messages. This module works on bytes and paths, whatever their content.
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
from veneer.files.locks import BINARY


@dataclass
class Staged:
    """A file written under a temporary name next to its target.

    `commit` renames the file to the target; `discard` removes the file."""

    temporary: Path
    path: Path

    @classmethod
    def next_to(cls, path: Path, ending: str = ".tmp") -> Staged:
        """Return a staged file for `path`, without creating the file.

        Raises OSError if `path` is a device or a pipe, which the rename would replace (for example
        /dev/null)."""
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(errno.EINVAL, "the path is a device or a pipe, not a file", str(path))
        return cls(path.with_name(f".{path.name}.{secrets.token_hex(6)}{ending}"), path)

    def commit(self) -> None:
        """Rename the file to its target.

        Raises OSError; the staged file is then removed."""
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
    """Write `path` atomically, through a temporary file.

    The temporary file is flushed to disk and then renamed to `path`. After a failure, the old file is
    unchanged and the temporary file is removed. Raises ResourceError if the disk is full, AdapterError for
    any other error."""
    with as_veneer_errors(Path(path)):
        replace_file(path, chunks)


def replace_file(path: str | Path, chunks: Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Write `path` as `atomic_write` does, but raise the system's OSError.

    mode: permissions, before the umask is applied."""
    staged = Staged.next_to(Path(path))
    _fill(staged.temporary, chunks, mode)
    staged.commit()


def write_all(fd: int, chunks: Iterable[bytes | memoryview]) -> None:
    """Write every byte of `chunks` to an open file and flush to disk. Raises OSError."""
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while view:
            view = view[os.write(fd, view[: 1 << 26]) :]
    os.fsync(fd)


def _fill(path: Path, chunks: Iterable[bytes | memoryview], mode: int) -> None:
    """Write a new file and flush to disk; on an error, remove the file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, mode)
    try:
        write_all(fd, chunks)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)


def flush_folder(folder: Path) -> None:
    """Flush a folder, so that renames survive a power loss, if the file system supports this."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def as_veneer_errors(path: Path) -> Iterator[None]:
    """Convert OSError to ResourceError if the disk is full, otherwise to AdapterError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
            problem = f"no room to write: {error.strerror}; nothing was changed"
            raise ResourceError(problem, where=str(path), fix="free some space, or write elsewhere") from error
        raise AdapterError(f"cannot write: {error.strerror or error}; nothing was changed", where=str(path)) from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which is renamed to `folder` at the end.

    `folder` must not exist, or must be empty. On an error, the temporary folder is removed. Raises
    OSError."""
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
    """Write files into a folder.

    contents: file name -> chunks of the file.
    last: name of the file that describes the others; this file is replaced last.

    A new folder is created with one rename. In an existing folder, all files are first written under
    temporary names, which allocates the space for all of them; each file then replaces its old version.
    Raises the errors of `atomic_write`."""
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
