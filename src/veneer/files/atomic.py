"""Files and folders that appear whole or not at all, whatever happens while they are written.

A file is written beside its place, flushed to the disk, and renamed there; a new folder likewise. Knows bytes and
paths; nothing of what is in them.
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

__all__ = ["Staged", "as_veneer_error", "atomic_write", "flush_folder", "new_folder", "put_folder", "stage"]


@dataclass
class Staged:
    """A file written in full beside its place, and flushed. `commit` renames it there, `discard` removes it."""

    temporary: Path
    path: Path

    def commit(self) -> None:
        try:
            _rename(self.temporary, self.path)
        except OSError as error:
            self.discard()
            raise as_veneer_error(error, self.path) from error
        flush_folder(self.path.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.temporary.unlink()


def stage(path: str | Path, chunks: Iterable[bytes | memoryview]) -> Staged:
    """Write a file's bytes beside `path` without touching it, so that several files can be staged (all the space they
    need taken) before the first one is replaced. Errors as `atomic_write`."""
    path = Path(path)
    staged = Staged(path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp"), path)
    try:
        fd = os.open(staged.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[_write(fd, view[: 1 << 26]) :]
            _fsync(fd)
        finally:
            os.close(fd)
    except BaseException as error:
        staged.discard()
        if isinstance(error, OSError):
            raise as_veneer_error(error, path) from error
        raise
    return staged


def atomic_write(path: str | Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write `path` whole or not at all: a temporary file beside it, flushed to the disk, then renamed over it.

    After any failure the old file is untouched and nothing is left behind. ResourceError when the disk is full,
    AdapterError for any other refusal."""
    stage(path, chunks).commit()


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# Separate names so that a test can make each of them fail.
_write = os.write
_fsync = os.fsync
_rename = os.replace


def as_veneer_error(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
        return ResourceError(
            f"no room to write: {error.strerror}; nothing was changed",
            where=str(path),
            fix="free some space, or write elsewhere",
        )
    return AdapterError(f"cannot write: {error.strerror or error}; nothing was changed", where=str(path))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `folder` in one rename at the end of the with-block, or leaves nothing
    behind. An empty folder may be there already. Errors as `atomic_write`."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        flush_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise as_veneer_error(error, folder) from error
        raise


def put_folder(folder: Path, contents: Mapping[str, list[bytes | memoryview]], *, last: str = "") -> None:
    """Files under their names: a new folder appears by one rename. In one that exists every file is staged first, then
    each replaces its old one, `last` (which speaks of the others) at the end. Errors as `atomic_write`."""
    if folder.exists() and not folder.is_dir():
        raise AdapterError("a file is in the way of the folder", where=str(folder))
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            for name, chunks in contents.items():
                atomic_write(temporary / name, chunks)
        return
    staged: list[Staged] = []
    try:
        for name in contents:
            staged.append(stage(folder / name, contents[name]))
        for one in sorted(staged, key=lambda s: s.path.name == last):
            one.commit()
    finally:
        for one in staged:
            one.discard()
