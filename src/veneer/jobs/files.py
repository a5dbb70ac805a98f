"""Files of clients: uploaded training data, and result files of jobs.

    files = open_files(library)                    rows in the library's database, bytes in its store
    made = files.add("acme", "tickets.jsonl", "fine-tune", opened)
    files.get("acme", made.id), files.list("acme"), files.open(made), files.delete("acme", made.id)

    upload = files.begin("acme", "big.jsonl", "fine-tune", bytes=10**9)      a large file in parts
    part = files.add_part("acme", upload.id, opened)
    files.complete("acme", upload.id, [part.id])   checks and assembles; on error, the upload stays open

Each tenant's bytes are stored separately under their sha256, so an upload reveals nothing about other
tenants' files. A file exists once its row exists; the row is written after the bytes are on disk. `sweep`
removes bytes without a row, and expired files. Under one lock of writers, code that removes bytes checks that
no row has them, and code that adds a row checks that its bytes still exist.

Raises Refused: not_found (404), too_large (413), invalid_request (400), storage_full (400).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from sqlalchemy import Column, ColumnElement, Connection, Engine, Table, delete, func, insert, select, update

from veneer.files.atomic import replace_file
from veneer.files.rights import private_folder
from veneer.jobs.tables import JOB_SCHEMA, job_file_table, job_part_table, job_upload_table
from veneer.library.database import reading, write_transaction
from veneer.library.library import Library
from veneer.library.migrate import migrate
from veneer.library.store import CHUNK, LocalStore, RemoteStore, blob_path, open_store, store_errors
from veneer.serve.quota import Quotas
from veneer.serve.request import Refused, invalid

_Purpose = Literal["fine-tune", "fine-tune-results"]
_UploadStatus = Literal["pending", "completed", "cancelled", "expired"]

_LOCK = 0x66696C6573  # "files": key of PostgreSQL's advisory lock
_GRACE = 3600.0
"""Seconds to keep bytes without a row: the row may be about to be written."""
_BATCH = 500
"""Rows per statement and deletion: databases limit the values of a statement."""
_HOLD = 0.25
"""Maximum seconds for which one batch of removals holds the lock."""
_REMEMBERED = 30 * 86400.0
"""Seconds for which an ended upload can still be queried."""


@dataclass(frozen=True)
class FileLimits:
    """Limits of files and uploads; `QuotaLimits` has a tenant's total.

    file: bytes of a file in one request
    part, upload: bytes of an upload's part, and of a whole upload
    parts: parts per upload
    uploads: pending uploads per tenant
    upload_seconds: lifetime of a pending upload; its parts are removed afterwards"""

    file: int = 512 << 20
    part: int = 64 << 20
    upload: int = 8 << 30
    uploads: int = 1000
    parts: int = 2048
    upload_seconds: float = 3600.0


@dataclass(frozen=True)
class UploadedFile:
    """A file. `created`, `expires`: seconds since 1970; `expires`: None for never.

    `sha256`: hash of the file's bytes."""

    id: str
    tenant: str
    filename: str
    purpose: _Purpose
    bytes: int
    sha256: str
    created: float
    expires: float | None


@dataclass(frozen=True)
class Upload:
    """An upload in parts. `bytes`: announced size of the file; `file`: the result."""

    id: str
    tenant: str
    filename: str
    purpose: _Purpose
    bytes: int
    created: float
    expires: float
    status: _UploadStatus
    keep: float | None
    file: UploadedFile | None = None


@dataclass(frozen=True)
class UploadPart:
    id: str
    upload: str
    bytes: int
    sha256: str
    created: float


def open_files(library: Library, limits: FileLimits | None = None, quotas: Quotas | None = None) -> Files:
    """Open the uploaded files of a library.

    Rows are in the library's database, bytes under `uploads` in its store. Raises the errors of opening a
    store or a database."""
    migrate(library.engine, JOB_SCHEMA, library.location)
    store = open_store(f"{library.location.rstrip('/')}/uploads")
    if isinstance(store, LocalStore):
        private_folder(store.root)
    return Files(library.engine, store, limits or FileLimits(), quotas or Quotas())


@dataclass
class Files:
    """Uploaded files and uploads of all tenants. `clock`: seconds since 1970."""

    engine: Engine
    store: LocalStore | RemoteStore
    limits: FileLimits = field(default_factory=FileLimits)
    quotas: Quotas = field(default_factory=Quotas)
    clock: Callable[[], float] = time.time

    # -- files ---------------------------------------------------------------------------------------------------------

    def add(
        self,
        tenant: str,
        filename: str,
        purpose: _Purpose,
        source: IO[bytes],
        *,
        keep: float | None = None,
        id: str | None = None,
    ) -> UploadedFile:
        """Store the content of `source`, and return the file.

        Reads `source` from its beginning, more than once. `keep`: seconds until the file expires. `id`: id of
        a file that the server makes, which is exempt from quotas; an existing file with this id stays.
        Blocks."""
        made = self._file(tenant, filename, purpose, source, keep, id)
        with self._adding(tenant, made, source) as c:
            if id is None:
                self._check_room(c, tenant, made.bytes)
            if not self._known(c, tenant, made.id):
                c.execute(insert(job_file_table), vars(made))
        return made

    def _file(
        self,
        tenant: str,
        filename: str,
        purpose: _Purpose,
        source: IO[bytes],
        keep: float | None,
        id: str | None = None,
    ) -> UploadedFile:
        sha256, size = _measured(source)
        if not size:
            raise invalid("the file is empty", "file", "send a file with something in it")
        id, name, now = id or f"file-{secrets.token_hex(12)}", _plain(filename), self.clock()
        return UploadedFile(id, tenant, name, purpose, size, sha256, now, None if keep is None else now + keep)

    def known(self, tenant: str, id: str) -> bool:
        """Return whether a file with this id exists."""
        with reading(self.engine) as c:
            return self._known(c, tenant, id)

    def _known(self, c: Connection, tenant: str, id: str) -> bool:
        t = job_file_table.c
        return c.scalar(select(t.id).where(t.id == id, t.tenant == tenant)) is not None

    def get(self, tenant: str, id: str) -> UploadedFile:
        with reading(self.engine) as c:
            return self._get(c, tenant, id)

    def _get(self, c: Connection, tenant: str, id: str) -> UploadedFile:
        t = job_file_table.c
        row = c.execute(select(*_columns()).where(t.id == id, t.tenant == tenant)).first()
        if row is None or (row.expires is not None and row.expires <= self.clock()):
            raise _missing("File", id, "id")
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
        """Return (a page of a tenant's files, whether more exist).

        `after`: id of the last file of the previous page. Raises Refused for an unknown `after`."""
        t = job_file_table.c
        query = select(*_columns()).where(t.tenant == tenant, (t.expires.is_(None)) | (t.expires > self.clock()))
        if purpose is not None:
            query = query.where(t.purpose == purpose)
        with reading(self.engine) as c:
            if after is not None:
                at = c.scalar(select(t.number).where(t.id == after, t.tenant == tenant))
                if at is None:
                    raise _missing("File", after, "after")
                query = query.where(t.number < at if newest_first else t.number > at)
            order = t.number.desc() if newest_first else t.number
            rows = c.execute(query.order_by(order).limit(limit + 1)).all()
        return [UploadedFile(**row._mapping) for row in rows[:limit]], len(rows) > limit

    def open(self, file: UploadedFile) -> IO[bytes]:
        """Open a file's bytes. Reads from a remote store raise the store's errors."""
        try:
            return self.store.open(_path(file.tenant, file.sha256))
        except FileNotFoundError:
            raise _missing("File", file.id, "id") from None

    def put_in(self, file: UploadedFile, folder: Path) -> Path:
        """Place a file in a folder under its own name, and return the path.

        Uses a hard link if possible, so that many jobs on one file need no more disk space."""
        target = folder / (file.filename if not file.filename.startswith(".") else f"file{file.filename}")
        if isinstance(self.store, LocalStore):
            with suppress(OSError):
                os.link(self.store.root / _path(file.tenant, file.sha256), target)
                return target
        with self.open(file) as source, store_errors(str(folder)):
            replace_file(target, iter(lambda: source.read(CHUNK), b""))
        return target

    def delete(self, tenant: str, id: str) -> None:
        with self._change() as c:
            gone = self._get(c, tenant, id)
            c.execute(delete(job_file_table).where(job_file_table.c.id == id))
        self._release([(tenant, gone.sha256)])

    # -- uploads -------------------------------------------------------------------------------------------------------

    def begin(self, tenant: str, filename: str, purpose: _Purpose, bytes: int, *, keep: float | None = None) -> Upload:
        """Begin an upload of `bytes` bytes in parts."""
        if bytes > self.limits.upload:
            raise Refused(f"the upload has more than {self.limits.upload:,} bytes", status=413, code="too_large")
        now = self.clock()
        made = Upload(
            f"upload_{secrets.token_hex(12)}",
            tenant,
            _plain(filename),
            purpose,
            bytes,
            now,
            now + self.limits.upload_seconds,
            "pending",
            keep,
        )
        u = job_upload_table.c
        begun = select(func.count()).where(u.tenant == tenant, u.status == "pending", u.expires > now)
        with self._change() as c:
            if (c.scalar(begun) or 0) >= self.limits.uploads:
                what = f"{self.limits.uploads:,} uploads are begun here"
                raise Refused(what, status=400, code="storage_full", fix="complete or cancel some of them")
            self._check_room(c, tenant, bytes)
            c.execute(insert(job_upload_table), vars(made))
        return made

    def get_upload(self, tenant: str, id: str) -> Upload:
        with reading(self.engine) as c:
            return _upload(c, tenant, id, self.clock())

    def add_part(self, tenant: str, upload: str, source: IO[bytes]) -> UploadPart:
        """Store one part. Blocks."""
        sha256, size = _measured(source)
        if not size:
            raise invalid("the part is empty", "data")
        now = self.clock()
        made = UploadPart(f"part_{secrets.token_hex(12)}", upload, size, sha256, now)
        with reading(self.engine) as c:  # before any byte is stored
            _pending(c, tenant, upload, now)
        with self._adding(tenant, made, source) as c:
            whole = _pending(c, tenant, upload, now).bytes
            p = job_part_table.c
            count, sent = c.execute(
                select(func.count(), func.coalesce(func.sum(p.bytes), 0)).where(p.upload == upload)
            ).one()
            if count >= self.limits.parts:
                raise invalid(f"an upload has at most {self.limits.parts:,} parts", "data", "send larger parts")
            if sent + size > 2 * whole + self.limits.part:  # a part can be sent again, or stay unused
                raise invalid(f"the parts have more than the {whole:,} bytes of the upload", "data")
            self._check_room(c, tenant, size)
            c.execute(insert(job_part_table), vars(made) | {"tenant": tenant})
        return made

    def complete(self, tenant: str, id: str, parts: Sequence[str], md5: str | None = None) -> Upload:
        """Assemble the file from these parts, in this order.

        Raises Refused if the parts do not match the announced size or md5; the upload then stays pending.
        Blocks."""
        with reading(self.engine) as c:
            upload = _pending(c, tenant, id, self.clock())
            rows = c.execute(select(job_part_table).where(job_part_table.c.upload == id)).all()
        known = {row.id: row for row in rows}
        if wrong := [part for part in parts if part not in known]:
            raise invalid(f"the upload has no part {wrong[0][:100]!r}", "part_ids")
        if len(set(parts)) < len(parts):
            raise invalid("a part is named twice", "part_ids")
        chosen = [known[part] for part in parts]
        if (size := sum(row.bytes for row in chosen)) != upload.bytes:
            what = f"the parts have {size:,} bytes, and the upload was announced with {upload.bytes:,}"
            raise invalid(what, "part_ids", "name every part, in order")
        with tempfile.TemporaryFile() as whole:
            checked = hashlib.md5(usedforsecurity=False)
            try:
                for row in chosen:
                    with store_errors("the store"), self.store.open(_path(tenant, row.sha256)) as piece:
                        while chunk := piece.read(CHUNK):
                            whole.write(chunk)
                            checked.update(chunk)
            except FileNotFoundError:
                raise invalid(f"the upload {id} was given up meanwhile", "upload_id", "begin another") from None
            if md5 is not None and checked.hexdigest() != md5.lower():
                raise invalid(f"the parts have the md5 {checked.hexdigest()}, not {md5[:64]}", "md5", "send them again")
            made = self._file(tenant, upload.filename, upload.purpose, whole, upload.keep)
            with self._adding(tenant, made, whole) as c:
                _pending(c, tenant, id, self.clock())
                c.execute(
                    update(job_upload_table).where(job_upload_table.c.id == id).values(status="completed", file=made.id)
                )
                c.execute(insert(job_file_table), vars(made))
        self._drop_parts(id)
        return self.get_upload(tenant, id)

    def cancel(self, tenant: str, id: str) -> Upload:
        """Cancel an upload and remove its parts."""
        with self._change() as c:
            _pending(c, tenant, id, self.clock())
            c.execute(update(job_upload_table).where(job_upload_table.c.id == id).values(status="cancelled"))
        self._drop_parts(id)
        return self.get_upload(tenant, id)

    # -- upkeep --------------------------------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Remove expired files and uploads, and leftovers of killed processes.

        Also removes uploads that ended long ago. Returns how many were removed. Safe to run concurrently and
        to kill: rows and bytes are removed in batches, each in a short transaction."""
        now, u = self.clock(), job_upload_table.c
        count = self._drop(job_file_table, job_file_table.c.expires <= now)
        with self._change() as c:
            count += c.execute(
                update(job_upload_table).where(u.status == "pending", u.expires <= now).values(status="expired")
            ).rowcount
            c.execute(delete(job_upload_table).where(u.status != "pending", u.expires <= now - _REMEMBERED))
        self._drop(job_part_table, job_part_table.c.upload.not_in(select(u.id).where(u.status == "pending")))
        if isinstance(self.store, LocalStore):
            self.store.sweep(set())
        old = (_content(path) for path, _, changed in self.store.walk("tenants") if changed <= now - _GRACE)
        while some := [*islice(old, _BATCH)]:
            count += self._release(some)
        return count

    def _drop_parts(self, upload: str) -> None:
        """Remove the parts of an upload that has ended."""
        self._drop(job_part_table, job_part_table.c.upload == upload)

    def _drop(self, table: Table, which: ColumnElement[bool]) -> int:
        """Delete selected rows of files or parts, and bytes without a row.

        Returns the number of rows."""
        count, t = 0, table.c
        while True:
            with self._change() as c:
                rows = c.execute(select(t.id, t.tenant, t.sha256).where(which).limit(_BATCH)).all()
                c.execute(delete(table).where(t.id.in_([row.id for row in rows])))
            self._release([(row.tenant, row.sha256) for row in rows])
            count += len(rows)
            if len(rows) < _BATCH:
                return count

    def _release(self, contents: Iterable[tuple[str, str]]) -> int:
        """Remove contents (tenant, sha256) without a row; return how many."""
        count, wanted = 0, sorted(set(contents))
        with reading(self.engine) as c:  # most contents still have a row and need no lock
            kept = _with_rows(c, wanted)
        left = [content for content in wanted if content not in kept]
        while left:
            with self._change() as c:
                end = time.monotonic() + _HOLD
                kept = _with_rows(c, left)
                while left and time.monotonic() < end:
                    if (content := left.pop()) not in kept:
                        self.store.delete(_path(*content))
                        count += 1
        return count

    def _check_room(self, c: Connection, tenant: str, more: int) -> None:
        """Check the tenant's quota for one more file of `more` bytes."""
        count = c.scalar(select(func.count()).where(job_file_table.c.tenant == tenant)) or 0
        have = sum(
            int(c.scalar(select(func.coalesce(func.sum(t.c.bytes), 0)).where(t.c.tenant == tenant)) or 0)
            for t in (job_file_table, job_part_table)
        )
        self.quotas.check_stored(tenant, files=(count, 1), disk=(have, more))

    @contextmanager
    def _adding(self, tenant: str, made: UploadedFile | UploadPart, source: IO[bytes]) -> Iterator[Connection]:
        """Open a transaction that adds a row, with its bytes on disk before and after."""
        path = _path(tenant, made.sha256)
        if self.store.size(path) != made.bytes:
            self._write(path, source, made.sha256)
        with self._change() as c:
            yield c
            if self.store.size(path) != made.bytes:  # the last other row with these bytes was deleted meanwhile
                self._write(path, source, made.sha256)

    def _write(self, path: str, source: IO[bytes], sha256: str) -> None:
        source.seek(0)
        if isinstance(self.store, LocalStore):
            self.store.fill(path, source, sha256)
            return
        with tempfile.NamedTemporaryFile() as whole:
            for chunk in iter(lambda: source.read(CHUNK), b""):
                whole.write(chunk)
            whole.flush()
            self.store.put(path, Path(whole.name), sha256)

    def _change(self) -> AbstractContextManager[Connection]:
        return write_transaction(self.engine, _LOCK)


# -- rows --------------------------------------------------------------------------------------------------------------


def _path(tenant: str, sha256: str) -> str:
    return f"tenants/{tenant or '_'}/{blob_path(sha256)}"  # `_` is no valid tenant name


def _content(path: str) -> tuple[str, str]:
    """Return the (tenant, sha256) of a `_path`."""
    tenant, sha256 = path.split("/")[1], path.rpartition("/")[2]
    return "" if tenant == "_" else tenant, sha256


def _columns() -> list[Column[Any]]:
    return [c for c in job_file_table.c if c.name != "number"]


def _with_rows(c: Connection, contents: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the contents (tenant, sha256) that a file or part still uses."""
    found: set[tuple[str, str]] = set()
    for tenant in {tenant for tenant, _ in contents}:
        hashes = [sha256 for owner, sha256 in contents if owner == tenant]
        for at in range(0, len(hashes), _BATCH):
            for t in (job_file_table.c, job_part_table.c):
                query = select(t.sha256).where(t.tenant == tenant, t.sha256.in_(hashes[at : at + _BATCH]))
                found |= {(tenant, sha256) for sha256 in c.scalars(query)}
    return found


def _upload(c: Connection, tenant: str, id: str, now: float) -> Upload:
    u = job_upload_table.c
    row = c.execute(select(job_upload_table).where(u.id == id, u.tenant == tenant)).first()
    if row is None:
        raise _missing("Upload", id, "upload_id")
    values = dict(row._mapping)
    if row.status == "pending" and row.expires <= now:
        values["status"] = "expired"
    if row.file is not None:
        kept = c.execute(select(*_columns()).where(job_file_table.c.id == row.file)).first()
        values["file"] = None if kept is None else UploadedFile(**kept._mapping)
    return Upload(**values)


def _pending(c: Connection, tenant: str, id: str, now: float) -> Upload:
    found = _upload(c, tenant, id, now)
    if found.status != "pending":
        raise invalid(f"the upload {id} is {found.status}", "upload_id", "begin another")
    return found


def _measured(source: IO[bytes]) -> tuple[str, int]:
    """Return (sha256, bytes) of a stream, read from its beginning."""
    digest, size = hashlib.sha256(), 0
    source.seek(0)
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _plain(filename: str) -> str:
    """Return a file's base name. Raises Refused for an invalid name."""
    name = filename.replace("\\", "/").rpartition("/")[2].strip()
    if not name or name in (".", "..") or not name.isprintable() or len(name.encode("utf-8", "replace")) > 200:
        raise invalid("the file's name is empty, too long, or has signs that cannot be printed", "filename")
    return name


def _missing(kind: str, id: str, param: str) -> Refused:
    return Refused(f"No such {kind} object: {id[:100]}", status=404, code="not_found", param=param)
