"""Back up and restore the library, the jobs and the tenants' database, as one archive.

    with open_library() as library, tenants_at(None) as tenants:
        write_backup(Path("monday.tar"), library, tenants)
    check_backup(Path("monday.tar"))                   raises DataError if any byte is damaged
    restore_backup(Path("monday.tar"), "library", None, "tenants.sqlite")

An archive is a tar file without compression:

    tables/TABLE/000000.jsonl            rows as JSON, from one snapshot of each database
    library/blobs/…, library/manifests/… files of adapters, named by their sha256
    uploads/tenants/…                    files of clients, named by their sha256
    inputs/…                             input files of jobs
    judged/…                             Studio's feedback on a machine without tenants
    manifest.json                        version, revisions of the tables, size and sha256 of each file
    SHA256                               sha256 of all bytes before this member

Rows are read before the files that they refer to, so servers can write during a backup. An archive does not
depend on the kind of database or store: rows from SQLite can be restored to PostgreSQL, and files from a folder
to S3.

A restore first writes the library's id to the store, and commits the library's index, which must have the same
id, last. So the library cannot be opened between the two, and the same restore can be run again. The archive
contains hashes of keys, but no keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, delete, func, insert, select

from veneer import __version__
from veneer.errors import ConfigError, DataError
from veneer.files.atomic import Staged, as_veneer_errors, replace_file
from veneer.files.rights import private_folder
from veneer.jobs.files import open_files, upload_path
from veneer.jobs.store import jobs_home
from veneer.jobs.tables import JOB_SCHEMA, job_file_table
from veneer.library import index as ix
from veneer.library.database import reading, shown_url
from veneer.library.library import Library, index_location, read_mark, write_mark
from veneer.library.migrate import Schema, revision
from veneer.library.names import check_file_name, check_name
from veneer.library.queries import record
from veneer.library.store import CHUNK, LocalStore, RemoteStore, canonical, hash_file, open_store, store_errors
from veneer.models.home import veneer_home
from veneer.serve.tenancy.store import TENANT_SCHEMA, Store, check_tenant, meta_table

_VERSION = 1
_MANIFEST, _SEAL = "manifest.json", "SHA256"
_RESTORED = "restored backup"
"""Key of the `meta` row with the sha256 of the archive that is being restored."""
_SCHEMAS = (TENANT_SCHEMA, ix.INDEX_SCHEMA, JOB_SCHEMA)
LEFT_OUT = (
    "base models, caches, checkpoints and logs of unfinished jobs (these jobs start again), Tinker states that were "
    "not saved for sampling, and data files that are not uploads"
)


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Writes members of a tar file, and computes the sha256 of each file and of the archive."""

    file: IO[bytes]
    digest: Any = field(default_factory=hashlib.sha256)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, name: str, size: int, source: IO[bytes] | bytes) -> None:
        """Add a file of exactly `size` bytes; later bytes of `source` are ignored. Raises DataError."""
        digest, written = hashlib.sha256(), 0
        self._write(_header(name, size))
        for chunk in [source] if isinstance(source, bytes) else _chunks(source, size):
            digest.update(chunk)
            self._write(chunk)
            written += len(chunk)
        if written != size:
            raise DataError("a file became shorter during the backup", where=name, fix="run the backup again")
        self._write(bytes(-size % 512))
        self.files[name] = size, digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)

    def add_rows(self, connection: Connection, schema: Schema) -> None:
        """Add all rows of a schema's tables, in files of about `CHUNK` bytes."""
        for table in schema.tables.sorted_tables:
            lines, size, number = list[bytes](), 0, 0
            rows = connection.execution_options(yield_per=1000).execute(select(table).order_by(*table.primary_key))
            for row in rows.mappings():
                lines.append(json.dumps(dict(row)).encode() + b"\n")
                size += len(lines[-1])
                if size >= CHUNK:
                    self.add(f"tables/{table.name}/{number:06}.jsonl", size, b"".join(lines))
                    lines, size, number = [], 0, number + 1
            if lines:
                self.add(f"tables/{table.name}/{number:06}.jsonl", size, b"".join(lines))


def _chunks(file: IO[bytes], left: int) -> Iterator[bytes]:
    """Yield the next `left` bytes of a file, or fewer at its end."""
    while left and (chunk := file.read(min(CHUNK, left))):
        left -= len(chunk)
        yield chunk


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.PAX_FORMAT)


def _seal(sha256: str) -> bytes:
    """Return the last bytes of an archive whose other bytes have this sha256."""
    return _header(_SEAL, 64) + sha256.encode().ljust(512, b"\0") + bytes(1024)


def write_backup(path: Path, library: Library, tenants: Store | None) -> dict[str, Any]:
    """Write an archive atomically, readable only by this user; return its manifest.

    tenants: the tenants' database, or None if there is none.

    Servers and workers can run meanwhile. Raises ConfigError if `path` exists, DataError if a file of the
    library is missing, and the errors of `atomic_write`."""
    if path.exists():
        raise ConfigError("a file or folder with this name already exists", where=str(path), fix="use a new name")
    uploads = open_files(library).store
    with as_veneer_errors(path):
        staged = Staged.next_to(path)
        opened = os.open(staged.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(opened, "wb") as file:
                manifest = _write(_Writer(file), library, uploads, tenants)
                file.flush()
                os.fsync(file.fileno())
            staged.commit()
        finally:
            staged.discard()
    return manifest


def _write(out: _Writer, library: Library, uploads: LocalStore | RemoteStore, tenants: Store | None) -> dict[str, Any]:
    manifest: dict[str, Any] = {"veneer-backup": _VERSION, "veneer": __version__, "inputs": str(jobs_home() / "inputs")}
    manifest |= {"created": ix.now_text(), "revisions": {}, "rows": {}}
    if tenants is not None:
        with tenants.reading() as c:
            _write_rows(c, out, manifest, TENANT_SCHEMA)
    o, f, e, u = ix.objects.c, ix.files.c, ix.entries.c, job_file_table.c
    with reading(library.engine) as c:
        _write_rows(c, out, manifest, ix.INDEX_SCHEMA)
        _write_rows(c, out, manifest, JOB_SCHEMA)
        manifest["library"] = ix.store_id(c)
        used = select(f.object).union(select(e.manifest))
        objects = c.execute(select(o.path, o.size).where(o.path.in_(used)).order_by(o.path)).all()
        contents = c.execute(select(u.tenant, u.sha256, u.bytes).distinct().order_by(u.tenant, u.sha256)).all()
    for path, size in objects:
        try:
            with store_errors(library.location), library.store.open(path) as source:
                out.add(f"library/{path}", size, source)
        except FileNotFoundError:
            fix = "if an adapter was removed just now, run the backup again; otherwise: veneer library verify"
            raise DataError("a file of the library is missing", where=path, fix=fix) from None
    for tenant, sha256, size in contents:
        path = upload_path(tenant, sha256)
        # a client can delete a file at any time; the restore then leaves out the file's row
        with contextlib.suppress(FileNotFoundError), store_errors(library.location), uploads.open(path) as source:
            out.add(f"uploads/{path}", size, source)
    for prefix, folder in (("inputs", jobs_home() / "inputs"), ("judged", veneer_home() / "judged")):
        for file in sorted(folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # the input files of ended jobs are removed
                if file.is_file() and not file.is_symlink():
                    with file.open("rb") as source:
                        name = f"{prefix}/{file.relative_to(folder).as_posix()}"
                        out.add(name, os.fstat(source.fileno()).st_size, source)
    data = canonical(manifest | {"files": out.files})
    out.add(_MANIFEST, len(data), data)
    out.file.write(_seal(out.digest.hexdigest()))
    return manifest | {"files": out.files}


def _write_rows(c: Connection, out: _Writer, manifest: dict[str, Any], schema: Schema) -> None:
    out.add_rows(c, schema)
    manifest["revisions"][schema.table] = revision(c, schema)
    for table in schema.tables.sorted_tables:
        manifest["rows"][table.name] = c.scalar(select(func.count()).select_from(table))


# -- checking ----------------------------------------------------------------------------------------------------------


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"this backup is incomplete or damaged: {why}", where=str(path), fix="use another backup")


def check_backup(path: Path) -> dict[str, Any]:
    """Check every byte of an archive, and return its manifest. Raises DataError."""
    with path.open("rb") as file:
        return _check(path, file)[0]


def _check(path: Path, file: IO[bytes]) -> tuple[dict[str, Any], dict[str, tarfile.TarInfo], str]:
    """Check an open archive; return (manifest, members by name, the archive's sha256)."""
    digest = hashlib.sha256()
    for chunk in _chunks(file, max(0, os.fstat(file.fileno()).st_size - len(_seal("0" * 64)))):
        digest.update(chunk)
    sha256 = digest.hexdigest()
    if file.read() != _seal(sha256):
        raise _damaged(path, "its SHA-256 does not match")
    members: dict[str, tarfile.TarInfo] = {}
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                parts = info.name.split("/")
                if info.type != tarfile.REGTYPE or info.issparse() or info.name in members:
                    raise _damaged(path, f"{info.name!r} is not a plain file, or occurs twice")
                if {"", ".", ".."} & set(parts) or "\\" in info.name or "\0" in info.name:
                    raise _damaged(path, f"the path {info.name!r} leaves the archive's folders")
                members[info.name] = info
        del members[_SEAL]
        about = members.pop(_MANIFEST)
        file.seek(about.offset_data)
        manifest = json.loads(file.read(about.size))
        if manifest["veneer-backup"] != _VERSION:
            problem = f"this backup has version {manifest['veneer-backup']}; this veneer reads only version {_VERSION}"
            raise DataError(problem, where=str(path), fix=f"restore it with veneer {manifest['veneer']}")
        files, revisions = manifest["files"], manifest["revisions"]
        if files.keys() != members.keys() or not all(isinstance(n, str) for n in revisions.values()):
            raise _damaged(path, "its files differ from its manifest")
        if not (isinstance(manifest["library"], str) and manifest["library"].isalnum()):
            raise _damaged(path, "the library's id is invalid")
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__} {error}") from None
    for name, info in members.items():
        file.seek(info.offset_data)
        digest = hashlib.sha256()
        for chunk in _chunks(file, info.size):
            digest.update(chunk)
        if files[name] != [info.size, digest.hexdigest()]:
            raise _damaged(path, f"the content of {name!r} differs from its manifest")
    return manifest, members, sha256


# -- restoring ---------------------------------------------------------------------------------------------------------


def restore_backup(
    path: Path, location: str, index: str | None, tenants: str, *, replace: bool = False
) -> dict[str, Any]:
    """Restore an archive to an empty machine, and return its manifest.

    location, index: see `open_library`.
    tenants: the SQLite file or URL of the tenants' database; unused if the archive has no tenants.
    replace: first rename what is there to NAME.before-restore-TIME; only for folders and SQLite files.

    Servers and workers must be stopped. Checks the whole archive before anything is written. Raises DataError
    for a damaged archive or one with other revisions of the tables, ConfigError if a target is not empty."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        manifest, members, sha256 = _check(path, file)
        tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        archive = _Archive(path, tar, manifest, members)
        for schema in _SCHEMAS:
            archived, here = manifest["revisions"].get(schema.table, ""), schema.revisions[-1]
            if archived not in ("", here):
                fix = f"restore it with veneer {manifest['veneer']}; a later veneer then migrates the databases"
                problem = f"{schema.what} has revision {archived} in this backup, but {here} in this veneer"
                raise DataError(problem, where=str(path), fix=fix if archived < here else "update veneer")
        store, judged = open_store(location), veneer_home() / "judged"
        index = index_location(location, store, index)
        has_tenants = TENANT_SCHEMA.table in manifest["revisions"]
        if replace:
            folder = str(store.root) if isinstance(store, LocalStore) else location
            _set_aside([folder, index, str(judged), *([tenants] if has_tenants else [])])
        if read_mark(store, location) not in (None, manifest["library"]):
            raise _in_use("the library", location)
        for name in archive.below("judged"):
            if (target := judged / name).exists() and hash_file(target) != manifest["files"][f"judged/{name}"][1]:
                raise _in_use("Studio's feedback", str(target))
        library = stack.enter_context(Library(location, store, ix.connect(index), LocalStore(judged)))
        files = open_files(library)
        with reading(library.engine) as c:
            if ix.store_id(c) is not None or _has_rows(c, ix.INDEX_SCHEMA) or _has_rows(c, JOB_SCHEMA):
                raise _in_use("the library's index", shown_url(index))
        tenant_store = stack.enter_context(contextlib.closing(Store(tenants))) if has_tenants else None
        tenants_done = tenant_store is not None and _is_restored(tenant_store, sha256)
        write_mark(store, manifest["library"])
        for prefix, target_store in (("library", store), ("uploads", files.store)):
            for name in archive.below(prefix):
                with archive.open(f"{prefix}/{name}") as source:
                    target_store.fill(name, source, manifest["files"][f"{prefix}/{name}"][1])
        for prefix, folder_path in (("inputs", private_folder(jobs_home()) / "inputs"), ("judged", judged)):
            for name in archive.below(prefix):
                (folder_path / name).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(f"{prefix}/{name}") as source:
                    replace_file(
                        folder_path / name, _chunks(source, archive.members[f"{prefix}/{name}"].size), mode=0o600
                    )
        if tenant_store is not None and not tenants_done:
            with tenant_store.change() as c:
                archive.restore_rows(c, TENANT_SCHEMA)
                c.execute(insert(meta_table), {"key": _RESTORED, "value": sha256})
        with ix.index_transaction(library.engine) as c:  # last, because a library without its index cannot be opened
            archive.restore_rows(c, ix.INDEX_SCHEMA)
            archive.restore_rows(c, JOB_SCHEMA)
            for name in c.scalars(select(ix.names.c.name)).all():
                store.replace(f"names/{name}.json", canonical(record(c, name)))
        if tenant_store is not None:
            with tenant_store.change() as c:
                c.execute(delete(meta_table).where(meta_table.c.key == _RESTORED))
    return manifest


@dataclass
class _Archive:
    """An open archive that `_check` has accepted."""

    path: Path
    tar: tarfile.TarFile
    manifest: dict[str, Any]
    members: dict[str, tarfile.TarInfo]

    def below(self, prefix: str) -> list[str]:
        """Return the paths below a folder of the archive, relative to the folder."""
        return [name[len(prefix) + 1 :] for name in self.members if name.startswith(f"{prefix}/")]

    def open(self, name: str) -> IO[bytes]:
        source = self.tar.extractfile(self.members[name])
        assert source is not None  # it is a plain file
        return source

    def restore_rows(self, c: Connection, schema: Schema) -> None:
        """Insert the rows of a schema's tables, which must be empty."""
        for table in schema.tables.sorted_tables:
            if table is meta_table:  # a new database has a row here
                c.execute(delete(table))
            for name in self.below(f"tables/{table.name}"):
                rows = [json.loads(line) for line in self.open(f"tables/{table.name}/{name}")]
                if any(row.keys() != set(table.c.keys()) for row in rows):
                    raise _damaged(self.path, f"{table.name} has other columns than revision {schema.revisions[-1]}")
                rows = [row for row in rows if self._is_wanted(table.name, row)]
                ix.insert_rows(c, table, rows)
            if (counter := table.autoincrement_column) is not None and c.dialect.name == "postgresql":
                highest = select(func.max(counter)).scalar_subquery()
                c.execute(select(func.setval(func.pg_get_serial_sequence(table.name, counter.name), highest)))

    def _is_wanted(self, table: str, row: dict[str, Any]) -> bool:
        """Check names that become paths, and adapt paths; return False if the row's file is not in the archive."""
        if table == "library_names":
            check_name(row["name"])
        elif table == "library_files":
            check_file_name(row["name"])
        elif table == "tenants":
            check_tenant(row["name"])
        elif table == "jobs":
            old, new = (json.dumps(f"{home}/")[1:-1] for home in (self.manifest["inputs"], jobs_home() / "inputs"))
            row["config"] = row["config"].replace(old, new)
        elif table == meta_table.name:
            return bool(row["key"] != _RESTORED)
        elif table == "library_objects":
            return f"library/{row['path']}" in self.members
        elif table == "job_files":
            return f"uploads/{upload_path(row['tenant'], row['sha256'])}" in self.members
        return True


def _in_use(what: str, where: str) -> ConfigError:
    fix = "restore to an empty place, or use --replace to set existing folders and SQLite files aside"
    return ConfigError(f"{what} is not empty", where=where, fix=fix)


def _has_rows(c: Connection, schema: Schema) -> bool:
    tables = [table for table in schema.tables.sorted_tables if not table.name.endswith("_meta")]
    return any(c.execute(select(table).limit(1)).first() is not None for table in tables)


def _is_restored(store: Store, sha256: str) -> bool:
    """Return whether an interrupted restore of the same archive wrote the tenants' rows.

    Raises ConfigError if the rows are others."""
    with store.reading() as c:
        restored = c.scalar(select(meta_table.c.value).where(meta_table.c.key == _RESTORED))
        if restored != sha256 and _has_rows(c, TENANT_SCHEMA):
            raise _in_use("the tenants' database", shown_url(store.where))
    return restored == sha256


def _set_aside(places: list[str]) -> None:
    """Rename files and folders that exist, so that the places are empty. Raises ConfigError for other URLs."""
    ending = f".before-restore-{time.strftime('%Y%m%d-%H%M%S')}"
    for place in places:
        place = place.removeprefix("sqlite:///")
        if "://" in place:
            fix = "create an empty database or bucket, and restore without --replace"
            raise ConfigError("only folders and SQLite files can be set aside", where=shown_url(place), fix=fix)
    for place in places:
        path = Path(place.removeprefix("sqlite:///")).expanduser()
        for suffix in ("", "-wal", "-shm"):
            if (old := path.with_name(path.name + suffix)).exists():
                old.rename(path.with_name(f"{path.name}{ending}{suffix}"))
