"""The library's file store: files named by sha256.

A store is a local folder or an fsspec URL.

    library.json              the library's id
    blobs/ab/ab12…            one file of an adapter, named by the sha256 of its bytes
    manifests/3f/3fa9…        an entry's manifest: {"veneer-manifest": 1, "files": {name: {"sha256", "size"}}}
    names/support.json        the index's record of a name, from which the index can be rebuilt
    folders/3fa9…/            local stores only: an entry's files with their names, as hard links to the blobs
    tmp/                      local stores only: files being written

A file appears complete or not at all, and a file named by its sha256 never changes. A process that writes a
file in tmp/ holds a lock on the file, and the operating system releases the lock when the process dies;
unlocked files in tmp/ are debris. This module handles bytes and paths; it does not use names, versions or the
index.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from veneer.errors import AdapterError, ConfigError, MissingExtraError, UnavailableError, VeneerError, install_command
from veneer.files.atomic import flush_folder, write_all
from veneer.files.locks import BINARY, POSIX, take_lock

CHUNK = 1 << 20
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "memory"}
"""fsspec protocols in which a file becomes visible only when its writer closes it."""

S3_SECONDS = 10.0
"""Seconds without a response from S3 after which an attempt fails."""


def blob_path(sha256: str) -> str:
    """Return the store's path for the file with this sha256."""
    return f"blobs/{sha256[:2]}/{sha256}"


def manifest_path(entry: str) -> str:
    """Return the store's path for an entry's manifest."""
    return f"manifests/{entry[:2]}/{entry}"


def canonical(value: Any) -> bytes:
    """Return a value as canonical JSON: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def hash_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_store(location: str) -> LocalStore | RemoteStore:
    """Return the store at a path, a file: URL or another fsspec URL.

    Raises ConfigError for an invalid URL, MissingExtraError if the protocol's package is not installed."""
    if "://" not in location:
        return LocalStore(Path(location).expanduser().absolute())
    protocol = location.partition("://")[0]
    if protocol in ("file", "local"):
        return LocalStore(Path(location.partition("://")[2]).absolute())
    if protocol not in _ATOMIC:
        raise ConfigError(
            f"a library cannot be stored on {protocol}://", where=location, fix="a folder, s3://, gs://, az://"
        )
    try:
        fs, root = open_remote(location)
    except ImportError as error:
        fix = install_command("s3") if protocol in ("s3", "s3a") else "install it with pip"
        raise MissingExtraError(str(error), where=location, fix=fix) from None
    except ValueError as error:
        raise ConfigError(f"a library cannot be stored here: {error}", where=location) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise UnavailableError(f"the store cannot be used now: {why}", where=location, fix="try again later") from error
    return RemoteStore(fs, root)


def open_remote(location: str) -> tuple[Any, str]:
    """Return the file system of an fsspec URL, and the path in it.

    If S3 stops responding, a call fails after four attempts of `S3_SECONDS` each instead of the client's
    default of 25 attempts of one minute each. Raises fsspec's errors."""
    import fsspec  # type: ignore[import-untyped]

    options: dict[str, Any] = {"use_listings_cache": False}
    s3 = location.partition("://")[0] in ("s3", "s3a")
    if s3:
        seconds = {"connect_timeout": S3_SECONDS, "read_timeout": S3_SECONDS, "retries": {"total_max_attempts": 2}}
        options["config_kwargs"] = seconds | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    fs, root = fsspec.core.url_to_fs(location, **options)
    if s3:
        fs.retries = 2
    return fs, root.rstrip("/")


@dataclass
class LocalStore:
    """A store in a local folder."""

    root: Path

    def size(self, path: str) -> int | None:
        """Return a file's size; None if the file does not exist."""
        try:
            return (self.root / path).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def open(self, path: str) -> IO[bytes]:
        return (self.root / path).open("rb")

    def put(self, path: str, source: Path | bytes, sha256: str) -> None:
        """Store bytes under their sha256, unless they are already stored.

        Raises AdapterError, with nothing changed, if the source's sha256 differs from `sha256`."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if self.size(path) == size:
            return
        with contextlib.ExitStack() as stack:
            chunks = iter([source]) if isinstance(source, bytes) else _chunks(stack.enter_context(source.open("rb")))
            self._write(path, chunks, sha256, mode=0o444)

    def fill(self, path: str, source: IO[bytes], sha256: str) -> None:
        """Store the bytes of an open file under their sha256. Raises the errors of `put`."""
        self._write(path, _chunks(source), sha256, mode=0o444)

    def replace(self, path: str, data: bytes) -> None:
        """Atomically write a file whose content can change, such as a record."""
        self._write(path, iter([data]), None, mode=0o644)

    def _write(self, path: str, chunks: Iterator[bytes], sha256: str | None, mode: int) -> None:
        target = self.root / path
        with self.temporary() as (temporary, fd):
            digest = hashlib.sha256()
            try:
                write_all(fd, _hashed(chunks, digest))
                if POSIX:
                    os.fchmod(fd, mode)
            finally:
                if not POSIX:
                    os.close(fd)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise _wrong_bytes(path, digest.hexdigest(), sha256)
            new = _make_parents(target)
            os.replace(temporary, target)
            for folder in {target.parent, *new}:
                flush_folder(folder)

    @contextlib.contextmanager
    def temporary(self, folder: bool = False) -> Iterator[tuple[Path, int]]:
        """Yield the path and descriptor of a new, locked file or folder in tmp/.

        The file or folder is removed at the end, unless the caller moved it. On Windows, the caller closes a
        file before it moves it, and a folder has no descriptor."""
        parent = self.root / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = parent / secrets.token_hex(12)
            if folder:
                path.mkdir()
            if folder and not POSIX:
                fd = -1
                break
            flags = os.O_RDONLY if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY
            try:
                fd = os.open(path, flags, 0o600)
            except FileNotFoundError:  # a sweep removed the folder between the two calls
                continue
            if _lock(fd) and path.exists():
                break
            os.close(fd)  # a sweep removed the file as debris: try again
        try:
            yield path, fd
        finally:
            if POSIX:
                os.close(fd)
            _discard(path)

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def walk(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Yield (path, size, modification time) of every file below `prefix`."""
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                entries = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):
                    stat = entries.stat()
                    yield entries.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime

    def folder(self, entry: str, files: Mapping[str, tuple[str, int]]) -> Path:
        """Return a folder with hard links to an entry's files.

        files: name -> (sha256, size).

        If the file system has no hard links, the files are copies. Raises FileNotFoundError if a blob is
        missing."""
        target = self.root / "folders" / entry
        if _has_files(target, files):
            return target
        with self.temporary(folder=True) as (temporary, _):
            for name, (sha256, _size) in files.items():
                blob = self.root / blob_path(sha256)
                try:
                    os.link(blob, temporary / name)
                except FileNotFoundError:
                    raise
                except OSError:
                    shutil.copyfile(blob, temporary / name)
                    os.chmod(temporary / name, 0o444 if POSIX else 0o666)
            if not _has_files(temporary, files):
                raise FileNotFoundError(f"blobs of entry {entry} have sizes that differ from its manifest")
            target.parent.mkdir(parents=True, exist_ok=True)
            while not _has_files(target, files):
                try:
                    os.rename(temporary, target)
                except OSError:  # another process created the folder, or a user removed files from it
                    if target.exists() and not _has_files(target, files):
                        self.drop_folder(entry)
        return target

    def drop_folder(self, entry: str) -> None:
        """Remove an entry's folder.

        The folder is moved away first, so that readers never see a partial folder."""
        folder = self.root / "folders" / entry
        aside = self.root / "tmp" / secrets.token_hex(12)
        aside.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, aside)
            _discard(aside)

    def sweep(self, entries: set[str]) -> int:
        """Remove leftover files in tmp/, and folders of entries that are not in `entries`.

        Returns the number of removed files and folders. tmp/ is left alone on Windows, which has no such locks."""
        count = 0
        for path in _entries(self.root / "tmp") if POSIX else []:
            try:
                fd = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, PermissionError):
                continue
            try:
                if _lock(fd):
                    _discard(path)
                    count += 1
            finally:
                os.close(fd)
        for path in _entries(self.root / "folders"):
            if path.name not in entries:
                self.drop_folder(path.name)
                count += 1
        return count


@dataclass
class RemoteStore:
    """A store at an fsspec URL."""

    fs: Any
    root: str

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def size(self, path: str) -> int | None:
        try:
            with store_errors(self.root):
                return int(self.fs.info(self._at(path))["size"])
        except FileNotFoundError:
            return None

    def read(self, path: str) -> bytes:
        with store_errors(self.root):
            return bytes(self.fs.cat_file(self._at(path)))

    def open(self, path: str) -> IO[bytes]:
        """Open a file for reading.

        Reads can also fail, so the caller must read the file inside `store_errors`."""
        with store_errors(self.root):
            opened: IO[bytes] = self.fs.open(self._at(path), "rb", cache_type="readahead", block_size=8 << 20)
        return opened

    def put(self, path: str, source: Path | bytes, sha256: str) -> None:
        """Store bytes like `LocalStore.put`.

        Garbage collection can delete the file right after this call; the add detects this when it commits."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if self.size(path) == size:
            return
        if (actual := hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else hash_file(source)) != sha256:
            raise _wrong_bytes(path, actual, sha256)
        self._send(path, source)
        if (stored_size := self.size(path)) not in (size, None):
            raise AdapterError(
                f"{size:,} bytes were sent, but {stored_size} are stored", where=self._at(path), fix="try again"
            )

    def fill(self, path: str, source: IO[bytes], sha256: str) -> None:
        """Store the bytes of an open file like `LocalStore.fill`, through a temporary file."""
        with tempfile.NamedTemporaryFile() as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            self.put(path, Path(copy.name), sha256)

    def replace(self, path: str, data: bytes) -> None:
        self._send(path, data)

    def _send(self, path: str, source: Path | bytes) -> None:
        try:
            with store_errors(self.root):
                if isinstance(source, bytes):
                    self.fs.pipe_file(self._at(path), source)
                else:
                    self.fs.put_file(str(source), self._at(path))
        except FileNotFoundError as error:
            if isinstance(source, Path) and not source.exists():
                raise
            raise ConfigError("the bucket does not exist", where=self.root, fix="create the bucket") from error

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), store_errors(self.root):
            self.fs.rm_file(self._at(path))

    def walk(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        try:
            with store_errors(self.root):
                entries = self.fs.find(self._at(prefix), detail=True)
        except FileNotFoundError:
            return
        for path, metadata in entries.items():
            changed = metadata.get("LastModified") or metadata.get("mtime") or metadata.get("created") or 0.0
            when = changed.timestamp() if hasattr(changed, "timestamp") else float(changed)
            yield path[len(self.root) + 1 :], int(metadata["size"]), when


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Convert errors of a remote store's client to UnavailableError.

    FileNotFoundError, veneer's own errors and the error for a full local disk are raised unchanged."""
    try:
        yield
    except (FileNotFoundError, VeneerError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the local disk is full
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UnavailableError(f"the store cannot be used now: {reason}", where=where, fix="try again later") from error


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _hashed(chunks: Iterator[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _wrong_bytes(path: str, actual: str, expected: str) -> AdapterError:
    problem = f"the bytes have sha256 {actual}, not {expected}"
    return AdapterError(problem, where=path, fix="try again: the file changed, or the transfer damaged it")


def _make_parents(target: Path) -> set[Path]:
    """Create the parent folders of `target`; return folders that have new entries."""
    if target.parent.is_dir():
        return set()
    target.parent.mkdir(parents=True, exist_ok=True)
    return {target.parent.parent, target.parent.parent.parent}


def _lock(fd: int) -> bool:
    """Lock an open file or folder; return False if another process holds the lock."""
    try:
        take_lock(fd)
    except OSError:
        return False
    return True


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _has_files(folder: Path, files: Mapping[str, tuple[str, int]]) -> bool:
    """Return whether a folder has exactly these files, with the right sizes."""
    try:
        return {e.name: e.stat().st_size for e in os.scandir(folder)} == {n: size for n, (_, size) in files.items()}
    except FileNotFoundError:
        return False
