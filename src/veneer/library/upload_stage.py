"""Uploaded adapters: stored on disk under an id for an hour, visible to their tenant only.

    staging = UploadStage(most=2 << 30)
    incoming = staging.begin("acme", "style.safetensors")
    incoming.write(chunk), …                     raises UploadTooLarge beyond `most`
    staged = staging.keep(incoming)              .path: the file, or the folder unpacked from an archive
    staging.get("acme", staged.id)               None once expired, and for other tenants
    staging.drop(staged), staging.close()

Only the files of a PEFT folder are unpacked from an archive, each under a fixed name that ignores its path in
the archive, so that no file can escape the folder. Nothing is loaded. This module handles files, not
adapters.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from veneer.errors import ConfigError
from veneer.files.rights import private_folder
from veneer.library.describe_files import PEFT_FILES
from veneer.library.store import CHUNK
from veneer.models.home import veneer_home

_ENDINGS = (".safetensors", ".gguf", ".zip")
_LIFETIME = 3600.0
_TENANTS_ROOM = 2
"""Maximum storage of a tenant, as a multiple of `most`; beyond it, the oldest uploads are dropped."""
_MOST_INDEX = 1 << 20
"""Maximum bytes of an archive's index, because the index is read into memory at once."""
_INDEX_END = 22 + (1 << 16)
"""Length in bytes of a zip file's end record with the longest possible comment."""
_STRAY = 86400.0
"""Seconds after which the folder of a killed process is deleted."""


class UploadTooLarge(ConfigError):
    """An uploaded adapter has more bytes than the limit."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the adapter has more than {most:,} bytes")


@dataclass
class StagedAdapter:
    """An uploaded file. `name`: the client's file name, sanitized. `until`: seconds since 1970."""

    id: str
    tenant: str
    name: str
    path: Path
    file: IO[bytes]
    most: int
    size: int = 0
    until: float = 0.0

    def write(self, chunk: bytes) -> None:
        """Append a chunk. Blocking. Raises UploadTooLarge beyond `most`."""
        self.size += len(chunk)
        if self.size > self.most:
            raise UploadTooLarge(self.most)
        self.file.write(chunk)


@dataclass
class UploadStage:
    """The staged adapters of all tenants. Thread-safe.

    most: maximum bytes of one unpacked adapter
    clock: returns the time in seconds since 1970"""

    most: int
    clock: Callable[[], float] = time.time
    _staged: dict[str, StagedAdapter] = field(default_factory=dict)
    _folder: Path | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def begin(self, tenant: str, filename: str) -> StagedAdapter:
        """Start an upload. Blocking. Raises ConfigError for a file name that no adapter has."""
        last = re.split(r"[/\\]", filename)[-1]
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", last).strip("._-")
        name = stem[-100:].lstrip("._-") or "adapter"
        if not name.lower().endswith(_ENDINGS):
            pickle = re.search(r"\.(pt|pth|bin|ckpt|pkl)$", name)
            warning = "pickles run whatever code is in them; " if pickle else ""
            raise ConfigError(f"{warning}{name} is not the name of an adapter's file", fix=", ".join(_ENDINGS))
        with self._lock:
            expired = [each for each in self._staged.values() if each.until < self.clock()]
        for each in expired:
            self.drop(each)
        id = secrets.token_hex(16)
        path = self._home() / id / name
        path.parent.mkdir()
        return StagedAdapter(id, tenant, name, path, path.open("wb"), self.most)

    def keep(self, staged: StagedAdapter) -> StagedAdapter:
        """Finish an upload, dropping the tenant's oldest files if needed. Blocking.

        Raises ConfigError for an archive without an adapter, UploadTooLarge.
        """
        staged.file.close()
        if not staged.size:
            raise ConfigError("the body is empty", fix="send the file as the body")
        if staged.name.lower().endswith(".zip"):
            archive, staged.path = staged.path, staged.path.parent / "adapter"
            staged.path.mkdir()
            staged.size = _unpack(archive, staged.path, self.most)
            archive.unlink()
        staged.until = self.clock() + _LIFETIME
        with self._lock:
            same_tenant = [each for each in self._staged.values() if each.tenant == staged.tenant]
            self._staged[staged.id] = staged
        while same_tenant and sum(each.size for each in same_tenant) + staged.size > _TENANTS_ROOM * self.most:
            self.drop(same_tenant.pop(0))
        return staged

    def get(self, tenant: str, id: str) -> StagedAdapter | None:
        """Return a tenant's staged file, or None if it does not exist or has expired."""
        with self._lock:
            staged = self._staged.get(id)
        valid = staged is not None and staged.tenant == tenant and staged.until >= self.clock()
        return staged if valid else None

    def drop(self, upload: StagedAdapter) -> None:
        """Delete an upload. Blocking."""
        with self._lock:
            self._staged.pop(upload.id, None)
            folder = self._folder
        upload.file.close()
        if folder is not None:
            shutil.rmtree(folder / upload.id, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        with self._lock:
            self._staged.clear()
            folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _home(self) -> Path:
        """Return this process's folder.

        The first call creates the folder and deletes the folders of killed processes."""
        with self._lock:
            if self._folder is None:
                parent = private_folder(veneer_home() / "cache" / "staged")
                for old in parent.iterdir():
                    with contextlib.suppress(OSError):
                        if old.stat().st_mtime < time.time() - _STRAY:
                            shutil.rmtree(old, ignore_errors=True)
                self._folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
            return self._folder


# -- archives ----------------------------------------------------------------------------------------------------------


def _unpack(archive: Path, folder: Path, most: int) -> int:
    """Unpack a PEFT folder's files from an archive into `folder`; return their bytes. Raises ConfigError."""
    size = 0
    try:
        for name, source in _members(archive):
            target = folder / name
            if target.exists():
                raise ConfigError(f"the archive has several files called {name}", fix="send the adapter of one folder")
            with source, target.open("wb") as out:
                while chunk := source.read(CHUNK):
                    size += len(chunk)
                    if size > most:
                        raise UploadTooLarge(most)
                    out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ConfigError(f"the archive cannot be read: {error}") from None
    if not (folder / PEFT_FILES[0]).is_file():
        raise ConfigError(f"the archive has no {PEFT_FILES[0]}", fix="an archive of the folder that training wrote")
    return size


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, stream) of the adapter files in an archive, in order.

    Accepts only compression methods that need little memory to unpack.
    """
    with archive.open("rb") as file:
        file.seek(max(0, archive.stat().st_size - _INDEX_END))
        end = file.read()
    ends_with_index = end[-22:-18] == b"PK\x05\x06" and end[-2:] == b"\0\0"  # zipfile tries this position first
    at = len(end) - 22 if ends_with_index else end.rfind(b"PK\x05\x06")
    size, long = int.from_bytes(end[at + 12 : at + 16], "little"), end[max(0, at - 20) :].startswith(b"PK\x06\x07")
    if at < 0 or size > _MOST_INDEX or long:
        raise ConfigError("this is not a zip archive, or it has too many files", fix="a zip of the adapter's folder")
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            name = info.filename.rpartition("/")[2]
            if name in PEFT_FILES and not info.is_dir():
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ConfigError("the archive's compression is not supported", fix="store or deflate")
                yield name, opened.open(info)
