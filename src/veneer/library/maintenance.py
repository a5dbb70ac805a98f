"""Maintain a library: collect unreferenced files, verify, rebuild the index.

Collection is safe while any number of adds (see `library.library`) and other collections run:

    1. delete the rows of entries that have no version and were not touched within the grace period
    2. in the same transaction, condemn objects that no entry refers to and that were not touched within the
       grace period: set their generation to CONDEMNED
    3. in batches, one transaction each: delete the file, then the row, of each object that is still condemned

A claim between 2 and 3 saves an object, because the claim gives a condemned object a new generation. An add
that claimed an object before 2 sees a changed generation when it commits, and stores the file again under the
write lock. So correctness does not depend on the grace period, on clocks or on the duration of an upload; the
grace period only saves work and keeps removed content for a while. If the process is killed during 3,
condemned rows without files can remain; a process that claims such a row checks whether the file exists, and
an add that had found the file in the store sees a changed generation when it commits. One case is not
covered: PostgreSQL considers a process dead and ends its transaction, although the process is alive and keeps
deleting its batch. `verify_library` then lists the files as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, select, update

from veneer.errors import AdapterError, ConfigError
from veneer.library import index as ix
from veneer.library.database import reading
from veneer.library.describe_files import AdapterDescription
from veneer.library.library import Library, open_library
from veneer.library.names import check_alias, check_file_name, check_name, check_tag
from veneer.library.queries import record
from veneer.library.store import CHUNK, LocalStore, RemoteStore, blob_path, canonical, manifest_path

_GRACE = 3600.0
"""Seconds to keep content after its only remaining name is removed, or after an unfinished add began."""

FILES_CHECK = "files"
"""Name of the check that an entry's files are complete and have their sha256."""

_BATCH = 100
_OBJECT = re.compile(r"(blobs|manifests)/([0-9a-f]{2})/\2[0-9a-f]{62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class GcReport:
    """Counts of what `gc` removed, or would remove.

    debris: leftover temporary files, and folders of removed entries."""

    entries: int = 0
    files: int = 0
    bytes: int = 0
    debris: int = 0


@dataclass
class VerifyReport:
    """The result of `verify_library`.

    orphans: files that no entry refers to. They are not errors, and `gc` removes them later."""

    files: int = 0
    bytes: int = 0
    missing: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.corrupt or self.records)


@dataclass
class RebuildReport:
    """The result of `rebuild`.

    lost: what could not be restored, with reasons."""

    names: int = 0
    versions: int = 0
    lost: list[str] = field(default_factory=list)


def gc(library: Library, *, grace: float = _GRACE, dry_run: bool = False, strays: bool = True) -> GcReport:
    """Remove entries without a name, unreferenced files, and debris.

    Content touched in the last `grace` seconds is kept. With `dry_run`, nothing is removed, only counted.
    Without `strays`, do not search the store for files that are missing from the index.
    Safe to run during any other operation and after a kill."""
    out, cutoff = GcReport(), time.time() - grace
    e, o = ix.entries.c, ix.objects.c
    nameless = ~exists().where(ix.versions.c.entry == e.id)
    quiet = exists().where(o.path == e.manifest, o.touched < cutoff)
    with ix.index_transaction(library.engine) as connection:
        out.entries = connection.execute(delete(ix.entries).where(nameless, quiet)).rowcount
        if dry_run:
            sizes = list(connection.scalars(select(o.size).where(_unused(), o.touched < cutoff)))
            out.files, out.bytes = len(sizes), sum(sizes)
            connection.rollback()
            return out
        connection.execute(update(ix.objects).where(_unused(), o.touched < cutoff).values(generation=ix.CONDEMNED))
    if strays:
        _condemn_strays(library, cutoff)
    while _delete_condemned(library, out):
        pass
    with reading(library.engine) as connection:
        entries = set(connection.scalars(select(e.id)).all())
        blobs = set(connection.scalars(select(ix.files.c.object)).all())
    if isinstance(library.store, LocalStore):
        out.debris += library.store.sweep(entries)
    else:
        out.debris += library.cache.sweep(entries)
        for path, _, _ in list(library.cache.walk("blobs")):
            if path not in blobs:
                library.cache.delete(path)
    return out


def _unused() -> ColumnElement[bool]:
    o = ix.objects.c
    return ~exists().where(ix.files.c.object == o.path) & ~exists().where(ix.entries.c.manifest == o.path)


def _delete_condemned(library: Library, out: GcReport) -> bool:
    """Delete one batch of condemned objects; return False if there were none.

    Files and their rows are deleted in one transaction, so that no claim can come between the two."""
    o = ix.objects.c
    with ix.index_transaction(library.engine) as connection:
        rows = connection.execute(
            select(o.path, o.size).where(o.generation == ix.CONDEMNED, _unused()).limit(_BATCH)
        ).all()
        for row in rows:
            library.store.delete(row.path)
            out.files += 1
            out.bytes += row.size
        connection.execute(delete(ix.objects).where(o.path.in_([row.path for row in rows])))
    return bool(rows)


def _condemn_strays(library: Library, cutoff: float) -> None:
    """Condemn stored files that have no row in the index.

    This happens if collection removes the claim of an add that is still uploading, and the add's process is
    killed after the upload."""
    o = ix.objects.c
    stored = [f for f in _stored(library) if f[2] < cutoff]
    with ix.index_transaction(library.engine) as connection:
        recorded_paths = set(connection.scalars(select(o.path)).all())
        rows = [{"path": p, "size": size, "touched": at, "generation": ix.CONDEMNED} for p, size, at in stored]
        ix.insert_rows(connection, ix.objects, [row for row in rows if row["path"] not in recorded_paths])


def _stored(library: Library) -> Iterator[tuple[str, int, float]]:
    for prefix in ("blobs", "manifests"):
        yield from (f for f in library.store.walk(prefix) if _OBJECT.fullmatch(f[0]))


# -- checking ----------------------------------------------------------------------------------------------------------


def verify_library(library: Library, *, repair: bool = False, log: Callable[[str], None] | None = None) -> VerifyReport:
    """Compare files with their sha256, and the store's name records with the index.

    The results are recorded as the adapters' checks.

    repair: remove corrupt files, so that adding the adapter again restores them, and rewrite wrong
        records."""
    out = VerifyReport()
    referenced = _referenced(library)
    stored = {path: size for path, size, _ in _stored(library)}
    out.orphans = sorted(set(stored) - set(referenced))
    absent, corrupt = [], []
    for at, (path, size) in enumerate(sorted(referenced.items())):
        if stored.get(path) is None and library.store.size(path) is None:
            absent.append(path)
            continue
        if _hash(library.store, path) != path.rpartition("/")[2]:
            corrupt.append(path)
        out.files += 1
        out.bytes += size
        if log is not None and (at + 1) % 1000 == 0:
            log(f"{at + 1:,} of {len(referenced):,} files")
    if absent or corrupt:  # a file that garbage collection removed in the meantime is not an error
        referenced = _referenced(library)
    out.missing = [_with_versions(library, path) for path in absent if path in referenced]
    corrupt_now = [path for path in corrupt if path in referenced]
    out.corrupt = [_with_versions(library, path) for path in corrupt_now]
    _record_file_checks(library, {path for path in absent if path in referenced}, set(corrupt_now))
    if isinstance(library.store, RemoteStore):
        for path, _, _ in list(library.cache.walk("blobs")):
            if _hash(library.cache, path) != path.rpartition("/")[2]:
                library.cache.delete(path)
                out.repaired.append(f"removed from this machine's cache: {path}")
    if repair:
        _remove_corrupt(library, corrupt_now, out)
    _check_records(library, repair, out)
    return out


def _record_file_checks(library: Library, missing: set[str], corrupt: set[str]) -> None:
    """Replace the recorded file check of every entry."""
    e, f = ix.entries.c, ix.files.c
    with ix.index_transaction(library.engine) as connection:
        problems: dict[str, list[str]] = {entry: [] for entry in connection.scalars(select(e.id))}
        objects = select(f.entry, f.object).union_all(select(e.id, e.manifest))
        for entry, path in connection.execute(objects) if missing | corrupt else ():
            if path in missing | corrupt:
                problems[entry].append(f"{path} is {'missing' if path in missing else 'corrupt'}")
        connection.execute(delete(ix.checks).where(ix.checks.c.name == FILES_CHECK))
        sound = "every file has its sha256"
        ix.add_checks(connection, ((n, FILES_CHECK, not w, "\n".join(sorted(w)) or sound) for n, w in problems.items()))


def _referenced(library: Library) -> dict[str, int]:
    """Return path -> size of every file that an entry refers to."""
    o = ix.objects.c
    with reading(library.engine) as connection:
        return {row.path: row.size for row in connection.execute(select(o.path, o.size).where(~_unused()))}


def _hash(store: LocalStore | RemoteStore, path: str) -> str:
    digest = hashlib.sha256()
    with contextlib.suppress(FileNotFoundError), store.open(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _with_versions(library: Library, path: str) -> str:
    """Return a path followed by the versions that use the file."""
    v, f, e = ix.versions.c, ix.files.c, ix.entries.c
    users = select(f.entry).where(f.object == path).union(select(e.id).where(e.manifest == path))
    with reading(library.engine) as connection:
        rows = connection.execute(
            select(v.name, v.version).where(v.entry.in_(users)).order_by(v.name, v.version).limit(4)
        ).all()
    versions = ", ".join(f"{row.name}@{row.version}" for row in rows[:3]) + (", …" if len(rows) > 3 else "")
    return f"{path} ({versions or 'no version'})"


def _remove_corrupt(library: Library, bad: list[str], out: VerifyReport) -> None:
    f = ix.files.c
    for path in bad:
        with ix.index_transaction(library.engine) as connection:
            if _hash(library.store, path) == path.rpartition("/")[2]:
                continue  # restored meanwhile
            library.store.delete(path)
            connection.execute(update(ix.objects).where(ix.objects.c.path == path).values(generation=ix.CONDEMNED))
            entries = connection.scalars(select(f.entry).where(f.object == path)).all()
        if isinstance(library.store, LocalStore):
            for entry in entries:
                library.store.drop_folder(entry)
        out.repaired.append(f"removed {path}: add the adapter again to restore it")


def _check_records(library: Library, repair: bool, out: VerifyReport) -> None:
    n = ix.names.c
    with reading(library.engine) as connection:
        names = list(connection.scalars(select(n.name).order_by(n.name)).all())
    for name in names:
        path = f"names/{name}.json"

        def correction(c: Connection, name: str = name, path: str = path) -> bytes | None:
            """Return the correct record, or None if the stored record is correct."""
            correct = canonical(record(c, name))
            return None if _read(library, path) == correct else correct

        with reading(library.engine) as connection:
            if correction(connection) is None:
                continue
        with ix.index_transaction(library.engine) as connection:  # the lock keeps other processes from writing
            correct = correction(connection)
            if correct is not None and repair:
                library.store.replace(path, correct)
        if correct is not None:
            (out.repaired if repair else out.records).append(path)


def _read(library: Library, path: str) -> bytes | None:
    try:
        return library.store.read(path)
    except FileNotFoundError:
        return None


# -- rebuilding the index ----------------------------------------------------------------------------------------------


def rebuild(location: str | Path | None = None, index: str | None = None) -> RebuildReport:
    """Rebuild the index from the store's records and manifests.

    Replaces the content of the index in one transaction. A version with a missing manifest or file is left
    out and listed in the result.

    Every record is written just before the index transaction that it describes is committed. If a process is
    killed between the two, the record is one change ahead of the lost index, never behind."""
    out = RebuildReport()
    with open_library(location, index, check=False) as library:
        library_id = json.loads(library.store.read("library.json"))["id"]
        with ix.index_transaction(library.engine) as connection:
            ix.clear(connection)
            ix.set_store_id(connection, library_id)
            for path, _, _ in sorted(library.store.walk("names")):
                try:
                    fields = check_record(json.loads(library.store.read(path)))
                except (ValueError, AdapterError, ConfigError) as error:
                    out.lost.append(f"{path}: {error}")
                    continue
                _restore(library, connection, fields, out)
            ix.announce_changes(connection)
    return out


def _restore(library: Library, connection: Connection, fields: dict[str, Any], out: RebuildReport) -> None:
    name, numbers = fields["name"], []
    connection.execute(ix.names.insert(), {"name": name, "latest": None, "next": fields["next"]})
    for number, v in sorted(fields["versions"].items(), key=lambda item: int(item[0])):
        try:
            raw = library.store.read(manifest_path(v["entry"]))
            files = parse_manifest(raw, v["entry"])
        except FileNotFoundError:
            out.lost.append(f"{name}@{number}: its manifest is missing")
            continue
        except (AdapterError, ConfigError) as error:
            out.lost.append(f"{name}@{number}: {error}")
            continue
        if missing := [n for n, (sha256, size) in files.items() if library.store.size(blob_path(sha256)) != size]:
            out.lost.append(f"{name}@{number}: missing files or wrong sizes: {', '.join(missing)}")
            continue
        sizes = {blob_path(sha256): size for sha256, size in files.values()} | {manifest_path(v["entry"]): len(raw)}
        ix.claim(connection, sizes)
        library.upsert_entry(connection, v["entry"], files, AdapterDescription(v["digest"], v["format"], v["card"]))
        row = {"name": name, "version": int(number), "entry": v["entry"], "added": v["added"], "source": v["source"]}
        connection.execute(ix.versions.insert(), row)
        ix.insert_rows(connection, ix.tags, [{"name": name, "version": int(number), "tag": t} for t in v["tags"]])
        numbers.append(int(number))
    out.names += 1
    out.versions += len(numbers)
    following = max([fields["next"], *(k + 1 for k in numbers)])
    connection.execute(
        update(ix.names).where(ix.names.c.name == name).values(latest=max(numbers, default=None), next=following)
    )
    for alias, number in sorted(fields["aliases"].items()):
        if number in numbers:
            connection.execute(ix.name_aliases.insert(), {"name": name, "alias": alias, "version": number})
        else:
            out.lost.append(f"{name}@{alias}: version {number} is missing")


def check_record(fields: Any) -> dict[str, Any]:
    """Validate and return a name's record that was read from a file.

    Raises AdapterError or ConfigError if the record is invalid."""
    try:
        if fields["veneer-name"] != 1:
            raise AdapterError(f"the record has version {fields['veneer-name']!r}; this veneer supports only version 1")
        check_name(fields["name"])
        for alias, number in fields["aliases"].items():
            check_alias(alias)
            _ok(type(number) is int)
        for number, v in fields["versions"].items():
            _ok(number.isdigit() and int(number) >= 1 and _SHA256.fullmatch(v["entry"]) is not None)
            _ok(all(isinstance(v[k], str) for k in ("added", "source", "digest", "format")))
            _ok(isinstance(v["card"], dict) and len(set(v["tags"])) == len(v["tags"]))
            for tag in v["tags"]:
                check_tag(tag)
        _ok(type(fields["next"]) is int and fields["next"] >= 1)
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"the record of a name is damaged: {type(error).__name__} {error}") from None
    valid: dict[str, Any] = fields
    return valid


def parse_manifest(raw: bytes, entry: str) -> dict[str, tuple[str, int]]:
    """Return the files of a manifest: name -> (sha256, size).

    Raises AdapterError if the sha256 of `raw` is not `entry`, or if `raw` is not a manifest."""
    if (sha256 := hashlib.sha256(raw).hexdigest()) != entry:
        raise AdapterError(f"the manifest has sha256 {sha256}, not {entry}")
    try:
        content = json.loads(raw)
        _ok(content["veneer-manifest"] == 1 and len(content["files"]) > 0)
        for name, file in content["files"].items():
            check_file_name(name)
            _ok(_SHA256.fullmatch(file["sha256"]) is not None and type(file["size"]) is int and file["size"] >= 0)
        return {name: (file["sha256"], file["size"]) for name, file in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"the manifest is damaged: {type(error).__name__} {error}") from None


def _ok(holds: bool) -> None:
    if not holds:
        raise TypeError("a value has the wrong type")
