"""Files of clients: uploaded training data, and result files of jobs.

    files = open_files(library)                    rows in the library's database, bytes in its store
    file = files.add("acme", "tickets.jsonl", "fine-tune", stream)
    files.get("acme", file.id), files.list("acme"), files.open(file), files.delete("acme", file.id)

Each tenant's bytes are stored separately under their sha256, so an upload reveals nothing about other
tenants' files. A file exists from the moment its row exists; the row is written after the bytes are on disk.
`sweep` removes expired files and bytes without a row. One lock serializes all writers. Under this lock,
removing bytes first checks that no row refers to them, and adding a row first checks that its bytes still
exist.

Raises Refused: not_found (404), invalid_request (400), storage_full (400).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from sqlalchemy import Connection, Engine, delete, func, insert, select

from veneer.files.atomic import replace_file
from veneer.files.rights import private_folder
from veneer.jobs.tables import JOB_SCHEMA, job_file_table
from veneer.library.database import reading, write_transaction
from veneer.library.library import Library
from veneer.library.migrate import migrate
from veneer.library.store import CHUNK, LocalStore, RemoteStore, blob_path, open_store, store_errors
from veneer.serve.quota import Quotas
from veneer.serve.request import Refused, invalid

_Purpose = Literal["fine-tune", "fine-tune-results"]

_LOCK = 0x66696C6573  # "files" in ASCII: the key of PostgreSQL's advisory lock
_GRACE = 3600.0
"""Seconds that bytes without a row are kept, because an upload can still add their row."""
_BATCH = 50
"""Files per transaction, so that no transaction holds the lock for long."""


@dataclass(frozen=True)
class UploadedFile:
    """A file of a tenant.

    sha256: hash of the file's bytes.
    created, expires: seconds since 1970; `expires` is None if the file never expires."""

    id: str
    tenant: str
    filename: str
    purpose: _Purpose
    bytes: int
    sha256: str
    created: float
    expires: float | None


def open_files(library: Library, quotas: Quotas | None = None) -> Files:
    """Open the uploaded files of a library.

    Rows are in the library's database; bytes are under `uploads` in its store. Raises the errors of opening a
    store or a database."""
    migrate(library.engine, JOB_SCHEMA, library.location)
    store = open_store(f"{library.location.rstrip('/')}/uploads")
    if isinstance(store, LocalStore):
        private_folder(store.root)
    return Files(library.engine, store, quotas or Quotas())


@dataclass
class Files:
    """The files of all tenants.

    max_bytes: maximum size of one file.
    clock: returns seconds since 1970."""

    engine: Engine
    store: LocalStore | RemoteStore
    quotas: Quotas = field(default_factory=Quotas)
    max_bytes: int = 512 << 20
    clock: Callable[[], float] = time.time

    def add(
        self,
        tenant: str,
        filename: str,
        purpose: _Purpose,
        source: IO[bytes],
        *,
        ttl: float | None = None,
        id: str | None = None,
    ) -> UploadedFile:
        """Store the content of `source`, and return the file. This call blocks.

        source: a seekable stream, which is read from its beginning and more than once.
        ttl: seconds until the file expires.
        id: given only for files that the server itself creates, which are exempt from quotas. An existing
            file with this id is not replaced."""
        sha256, size = _hash_and_size(source)
        if not size:
            raise invalid("the file is empty", "file", "send a file that has content")
        now = self.clock()
        expires = None if ttl is None else now + ttl
        file_id = id or f"file-{secrets.token_hex(12)}"
        file = UploadedFile(file_id, tenant, _base_name(filename), purpose, size, sha256, now, expires)
        if id is None:
            with reading(self.engine) as c:  # check the quota before anything is written to the store
                self._check_quota(c, tenant, size)
        self._write_missing(file, source)
        with self._transaction() as c:
            if id is None:
                self._check_quota(c, tenant, size)
            t = job_file_table.c
            if c.scalar(select(t.id).where(t.id == file_id, t.tenant == tenant)) is None:
                c.execute(insert(job_file_table), vars(file))
            self._write_missing(file, source)  # write the bytes again if a deletion removed them meanwhile
        return file

    def get(self, tenant: str, id: str) -> UploadedFile:
        with reading(self.engine) as c:
            return self._get(c, tenant, id)

    def _get(self, c: Connection, tenant: str, id: str) -> UploadedFile:
        t = job_file_table.c
        row = c.execute(select(*_COLUMNS).where(t.id == id, t.tenant == tenant)).first()
        if row is None or (row.expires is not None and row.expires <= self.clock()):
            raise _not_found(id, "id")
        return UploadedFile(**row._mapping)

    def list(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        limit: int = 10_000,
        after: str | None = None,
        newest_first: bool = True,
    ) -> tuple[list[UploadedFile], bool]:
        """Return (one page of the tenant's files, whether there are more).

        after: id of the last file of the previous page. Raises Refused if that file does not exist."""
        t = job_file_table.c
        query = select(*_COLUMNS).where(t.tenant == tenant, (t.expires.is_(None)) | (t.expires > self.clock()))
        if purpose is not None:
            query = query.where(t.purpose == purpose)
        with reading(self.engine) as c:
            if after is not None:
                number = c.scalar(select(t.number).where(t.id == after, t.tenant == tenant))
                if number is None:
                    raise _not_found(after, "after")
                query = query.where(t.number < number if newest_first else t.number > number)
            order = t.number.desc() if newest_first else t.number
            rows = c.execute(query.order_by(order).limit(limit + 1)).all()
        return [UploadedFile(**row._mapping) for row in rows[:limit]], len(rows) > limit

    def open(self, file: UploadedFile) -> IO[bytes]:
        """Open a file for reading. Later reads can raise errors of a remote store."""
        try:
            return self.store.open(upload_path(file.tenant, file.sha256))
        except FileNotFoundError:
            raise _not_found(file.id, "id") from None

    def copy_to(self, file: UploadedFile, folder: Path) -> Path:
        """Copy a file into a folder under its own name, and return the path.

        The copy is a hard link if possible, so that many jobs with the same file need no more disk space."""
        target = folder / (file.filename if not file.filename.startswith(".") else f"file{file.filename}")
        if isinstance(self.store, LocalStore):
            with suppress(OSError):
                os.link(self.store.root / upload_path(file.tenant, file.sha256), target)
                return target
        with self.open(file) as source, store_errors(str(folder)):
            replace_file(target, iter(lambda: source.read(CHUNK), b""))
        return target

    def delete(self, tenant: str, id: str) -> None:
        with self._transaction() as c:
            file = self._get(c, tenant, id)
            c.execute(delete(job_file_table).where(job_file_table.c.id == id))
        self._delete_unused([(tenant, file.sha256)])

    def sweep(self) -> None:
        """Remove expired files and leftovers of killed processes.

        Safe to run concurrently and to kill: rows and bytes are removed in batches, each in a short
        transaction."""
        now, t = self.clock(), job_file_table.c
        more = True
        while more:
            with self._transaction() as c:
                rows = c.execute(select(t.id, t.tenant, t.sha256).where(t.expires <= now).limit(_BATCH)).all()
                c.execute(delete(job_file_table).where(t.id.in_([row.id for row in rows])))
            self._delete_unused((row.tenant, row.sha256) for row in rows)
            more = len(rows) == _BATCH
        if isinstance(self.store, LocalStore):
            self.store.sweep(set())
        old = [_content(path) for path, _, changed in self.store.walk("tenants") if changed <= now - _GRACE]
        with reading(self.engine) as c:  # most bytes still have a row: rule them out without taking the lock
            used = {tuple(row) for row in c.execute(select(t.tenant, t.sha256))}
        self._delete_unused(content for content in old if content not in used)

    def _delete_unused(self, contents: Iterable[tuple[str, str]]) -> None:
        """Remove the stored bytes of each (tenant, sha256) that has no row."""
        candidates, t = sorted(set(contents)), job_file_table.c
        for at in range(0, len(candidates), _BATCH):
            batch = candidates[at : at + _BATCH]
            with self._transaction() as c:
                rows = c.execute(select(t.tenant, t.sha256).where(t.sha256.in_([sha256 for _, sha256 in batch])))
                unused = set(batch) - {(row.tenant, row.sha256) for row in rows}
                for content in unused:
                    self.store.delete(upload_path(*content))

    def _check_quota(self, c: Connection, tenant: str, size: int) -> None:
        """Raise Refused if another `size` bytes in one file would exceed the tenant's quota."""
        t = job_file_table.c
        total = select(func.count(), func.coalesce(func.sum(t.bytes), 0)).where(t.tenant == tenant)
        count, used = c.execute(total).one()
        self.quotas.check_stored(tenant, files=(count, 1), disk=(int(used), size))

    def _write_missing(self, file: UploadedFile, source: IO[bytes]) -> None:
        """Write a file's bytes to the store if they are missing there."""
        path = upload_path(file.tenant, file.sha256)
        if self.store.size(path) == file.bytes:
            return
        source.seek(0)
        self.store.fill(path, source, file.sha256)

    def _transaction(self) -> AbstractContextManager[Connection]:
        return write_transaction(self.engine, _LOCK)


_COLUMNS = [c for c in job_file_table.c if c.name != "number"]


def upload_path(tenant: str, sha256: str) -> str:
    """Return the store's path for a tenant's file with this sha256."""
    return f"tenants/{tenant or '_'}/{blob_path(sha256)}"  # "_" is not a valid tenant name


def _content(path: str) -> tuple[str, str]:
    """Return the (tenant, sha256) of a path that `upload_path` returned."""
    tenant, sha256 = path.split("/")[1], path.rpartition("/")[2]
    return "" if tenant == "_" else tenant, sha256


def _hash_and_size(source: IO[bytes]) -> tuple[str, int]:
    """Return (sha256, size in bytes) of a stream, read from its beginning."""
    source.seek(0)
    digest = hashlib.file_digest(source, "sha256")  # type: ignore[arg-type]
    source.seek(0, os.SEEK_END)
    return digest.hexdigest(), source.tell()


def _base_name(filename: str) -> str:
    """Return the last part of a file name. Raises Refused if it is invalid."""
    name = filename.replace("\\", "/").rpartition("/")[2].strip()
    if not name or name in (".", "..") or not name.isprintable() or len(name.encode("utf-8", "replace")) > 200:
        raise invalid("the file's name is empty, too long, or has characters that cannot be printed", "filename")
    return name


def _not_found(id: str, param: str) -> Refused:
    return Refused(f"No such File object: {id[:100]}", status=404, code="not_found", param=param)
