"""Adapters that clients send: on the disk as they come, under an id for an hour, each tenant's its own.

    staging = Staging(most=2 << 30)
    incoming = staging.begin("acme", "style.safetensors")
    incoming.write(chunk), …                     raises Refused (413) beyond `most`
    staged = staging.keep(incoming)              .path: the file; or the folder that an archive's files were put in
    staging.get("acme", staged.id)               Refused (404) once it is gone, and for everybody else
    staging.drop(staged), staging.close()

Of an archive the files of a PEFT folder are taken and nothing else, whatever their paths say: each is written under the
one name it may have, so that none leads anywhere. Nothing is loaded here. Knows files; no adapters.
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

from veneer.files.rights import private_folder
from veneer.library.describe import PEFT_FILES
from veneer.library.store import CHUNK
from veneer.models.home import veneer_home
from veneer.serve.request import Refused, invalid

_SINGLES = (".safetensors", ".gguf")
_ARCHIVE = ".zip"
_KEPT = 3600.0
_TENANTS_ROOM = 2
"""How many of the largest files a tenant may have here at a time: its oldest go."""
_MOST_INDEX = 1 << 20
"""Bytes of an archive's index, which are read at once."""
_INDEX_END = 22 + (1 << 16)
"""Bytes in which the end of a zip's index is, its longest comment with it."""
_STRAY = 86400.0
"""Seconds after which the folder of a process that was killed goes."""


@dataclass(frozen=True)
class StagedAdapter:
    """`name`: the file's, as the client called it, made plain. `until`: seconds since 1970."""

    id: str
    tenant: str
    name: str
    path: Path
    size: int
    until: float


@dataclass
class IncomingAdapter:
    """A file that is being sent."""

    id: str
    tenant: str
    name: str
    path: Path
    most: int
    size: int = 0
    _file: IO[bytes] | None = None

    def write(self, chunk: bytes | bytearray) -> None:
        """Blocks. Raises Refused (413) beyond `most`."""
        self.size += len(chunk)
        if self.size > self.most:
            raise _large(self.most)
        if self._file is None:
            self._file = self.path.open("wb")
        self._file.write(chunk)

    def end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass
class Staging:
    """Staged adapters. Thread-safe. `most`: bytes of one adapter, unpacked. `clock`: seconds since 1970."""

    most: int
    clock: Callable[[], float] = time.time
    _held: dict[str, StagedAdapter] = field(default_factory=dict)
    _folder: Path | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def begin(self, tenant: str, filename: str) -> IncomingAdapter:
        """A file that is about to come. Raises Refused (400) for a name that no adapter's file has. Blocks."""
        name = _plain(filename)
        if not name.lower().endswith((*_SINGLES, _ARCHIVE)):
            said = "pickles run whatever code is in them; " if re.search(r"\.(pt|pth|bin|ckpt|pkl)$", name) else ""
            raise invalid(
                f"{said}{name} is not called as an adapter's file is", "filename", ", ".join((*_SINGLES, _ARCHIVE))
            )
        self._sweep()
        id = secrets.token_hex(16)
        folder = self._home() / id
        folder.mkdir()
        return IncomingAdapter(id, tenant, name, folder / name, self.most)

    def keep(self, incoming: IncomingAdapter) -> StagedAdapter:
        """What has come, in the place of its tenant's oldest where there is no room. Raises Refused (400) for an
        archive that holds no adapter. Blocks."""
        incoming.end()
        if not incoming.size:
            raise invalid("the body is empty", None, "send the file as the body")
        path, size = incoming.path, incoming.size
        if incoming.name.lower().endswith(_ARCHIVE):
            path = incoming.path.parent / "adapter"
            path.mkdir()
            size = _unpack(incoming.path, path, self.most)
            incoming.path.unlink()
        until = self.clock() + _KEPT
        staged = StagedAdapter(incoming.id, incoming.tenant, incoming.name, path, size, until)
        with self._lock:
            own = [each for each in self._held.values() if each.tenant == staged.tenant]
            self._held[staged.id] = staged
        while own and sum(each.size for each in own) + size > _TENANTS_ROOM * self.most:
            self.drop(own.pop(0))
        return staged

    def get(self, tenant: str, id: str) -> StagedAdapter:
        """Raises Refused (404)."""
        with self._lock:
            found = self._held.get(id)
        if found is None or found.tenant != tenant or found.until < self.clock():
            raise Refused(
                "there is no such file here", status=404, code="not_found", fix="send it again; it is kept for an hour"
            )
        return found

    def drop(self, staged: StagedAdapter | IncomingAdapter) -> None:
        """Its bytes go. Blocks."""
        with self._lock:
            self._held.pop(staged.id, None)
            folder = self._folder
        if isinstance(staged, IncomingAdapter):
            staged.end()
        if folder is not None:
            shutil.rmtree(folder / staged.id, ignore_errors=True)

    def close(self) -> None:
        """Everything goes."""
        with self._lock:
            self._held.clear()
            folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _home(self) -> Path:
        """This process's folder, made when it is first needed; those of processes that were killed go then."""
        with self._lock:
            if self._folder is None:
                place = private_folder(veneer_home() / "cache" / "staged")
                for old in place.iterdir():
                    with contextlib.suppress(OSError):
                        if old.stat().st_mtime < time.time() - _STRAY:
                            shutil.rmtree(old, ignore_errors=True)
                self._folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=place))
            return self._folder

    def _sweep(self) -> None:
        with self._lock:
            expired = [each for each in self._held.values() if each.until < self.clock()]
        for each in expired:
            self.drop(each)


def _plain(filename: str) -> str:
    """A client's name for a file, as a plain one: its last part, of letters, digits and `._-` alone."""
    last = re.split(r"[/\\]", filename)[-1]
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", last).strip("._-")
    return stem[-100:].lstrip("._-") or "adapter"


def _large(most: int) -> Refused:
    return Refused(f"the adapter has more than {most:,} bytes", status=413, code="too_large")


# -- archives ----------------------------------------------------------------------------------------------------------


def _unpack(archive: Path, folder: Path, most: int) -> int:
    """Puts a PEFT folder's files out of an archive into `folder`; their bytes. Raises Refused."""
    size = 0
    try:
        for name, source in _members(archive):
            target = folder / name
            if target.exists():
                raise invalid(f"the archive has several files called {name}", None, "send the adapter of one folder")
            with source, target.open("wb") as out:
                while chunk := source.read(CHUNK):
                    size += len(chunk)
                    if size > most:
                        raise _large(most)
                    out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise invalid(f"the archive cannot be read: {error}") from None
    if not (folder / PEFT_FILES[0]).is_file():
        raise invalid(f"the archive has no {PEFT_FILES[0]}", None, "an archive of the folder that training wrote")
    return size


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, bytes) of the files of an archive that an adapter has, in the archive's order. Of ways to pack those that
    need little memory to unpack."""
    with archive.open("rb") as file:
        file.seek(max(0, archive.stat().st_size - _INDEX_END))
        end = file.read()
    whole = end[-22:-18] == b"PK\x05\x06" and end[-2:] == b"\0\0"  # where zipfile looks first
    at = len(end) - 22 if whole else end.rfind(b"PK\x05\x06")
    size, long = int.from_bytes(end[at + 12 : at + 16], "little"), end[max(0, at - 20) :].startswith(b"PK\x06\x07")
    if at < 0 or size > _MOST_INDEX or long:
        raise invalid("this is no zip archive of a few files", None, "a zip of the adapter's folder")
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            name = info.filename.rpartition("/")[2]
            if name in PEFT_FILES and not info.is_dir():
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise invalid("the archive is packed in a way that is not read here", None, "store or deflate")
                yield name, opened.open(info)
