"""The library: stored adapters with names, versions, aliases and tags.

    library = open_library()                     <veneer home>/library, or VENEER_LIBRARY and VENEER_LIBRARY_INDEX
    library.add("runs/tickets", "support")       support@1
    library.alias("support@1", "prod")           support@prod
    library.resolve("support@prod")              a local path with its files, read-only

`add` is atomic, and safe while garbage collection runs (see `library.maintenance`). It works in this order:

    1. hash the files; the manifest of their hashes is the entry, and the manifest's sha256 is the entry's id
    2. claim (one transaction): touch a row in `objects` for each file and remember the row's generation
    3. store the files that are not in the store
    4. commit (one transaction, whose write lock blocks collection): claim all files again; store again each
       file that was collected in between (its row is gone or has another generation); write entry, version
       and tags

A process killed before step 4 leaves unreferenced files, which `gc` removes. This module uses the store and
the index; `describe_adapter` reads the adapter's files.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select, update

from veneer.errors import AdapterError, ConfigError, nearest
from veneer.library import index as ix
from veneer.library.database import reading, shown_url
from veneer.library.describe_files import AdapterDescription, content_of, describe_adapter
from veneer.library.names import Reference, check_alias, check_file_name, check_name, check_tag, parse_reference
from veneer.library.queries import (
    AdapterFamily,
    SearchPage,
    Version,
    browse,
    checks_of,
    family_of,
    find_versions,
    record,
    search,
    size_of_prefix,
)
from veneer.library.store import (
    LocalStore,
    RemoteStore,
    blob_path,
    canonical,
    hash_file,
    manifest_path,
    open_store,
    store_errors,
)
from veneer.models.home import veneer_home

MARK = "library.json"


class NotInLibrary(AdapterError):
    """The library has no version for this reference; `fix` names the nearest match."""


@dataclass
class Added:
    """The result of `add`.

    new: whether a version was created. False if the name's latest version already has this content.
    left_out: files of the folder that the library does not store."""

    version: Version
    new: bool
    left_out: list[str]


@dataclass
class Library:
    """An open library. `cache` holds local copies of a remote store's files."""

    location: str
    store: LocalStore | RemoteStore
    engine: Engine
    cache: LocalStore

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.engine.dispose()

    # -- reading -------------------------------------------------------------------------------------------------------

    def find(self, reference: str) -> Version:
        """Return the version that a reference names.

        Raises NotInLibrary, with the nearest names, if there is no such version; AdapterError if a digest
        prefix matches several adapters; ConfigError for an invalid reference."""
        with reading(self.engine) as connection:
            return self._find(connection, reference)

    def _find(self, connection: Connection, reference: str) -> Version:
        parsed = parse_reference(reference)
        versions = find_versions(connection, parsed)
        if len(versions) > 1:
            lines = "\n".join(f"  {v.digest or 'sha256:' + v.entry}  {v.reference}" for v in versions)
            raise AdapterError(f"{reference} matches several adapters:\n{lines}", where=self.location)
        if not versions:
            raise self._unknown(connection, reference, parsed.name)
        return versions[0]

    def _unknown(self, connection: Connection, reference: str, name: str) -> NotInLibrary:
        numbers = connection.scalars(select(ix.versions.c.version).where(ix.versions.c.name == name)).all()
        if numbers:
            pointers = connection.scalars(select(ix.name_aliases.c.alias).where(ix.name_aliases.c.name == name)).all()
            has = ", ".join([f"{name}@{w}" for w in [*sorted(numbers)[-5:], *sorted(pointers)]])
            return NotInLibrary(f"the library has no {reference}", where=self.location, fix=f"it has {has}")
        names = connection.scalars(select(ix.names.c.name).where(ix.names.c.latest.is_not(None))).all() if name else []
        suggestions = nearest(name, names, 3)
        fix = f"did you mean {' or '.join(suggestions)}?" if suggestions else "see `veneer library list`"
        return NotInLibrary(f"the library has no adapter {reference!r}", where=self.location, fix=fix)

    def knows_base(self, name: str) -> bool:
        """Return whether the library has an adapter for a base with this name.

        For a base that is a path, only the last part of the path must match."""
        return bool(self.search(base=name, limit=1))

    def search(self, text: str = "", **filters: Any) -> list[Version]:
        """Return the matching versions, sorted by name; see `queries.search` for filters.

        Without filters: the latest version of each name."""
        with reading(self.engine) as connection:
            return search(connection, text, **filters)

    def browse(self, text: str = "", **filters: Any) -> SearchPage:
        """Return a page of matching versions, with counts per facet.

        See `queries.browse` for filters."""
        with reading(self.engine) as connection:
            return browse(connection, text, **filters)

    def family(self, reference: str) -> AdapterFamily:
        """Return an adapter's parents, children and versions. Raises as `find` does."""
        version = self.find(reference)
        with reading(self.engine) as connection:
            return family_of(connection, version)

    def size_of_prefix(self, beginning: str) -> int:
        """Return the total bytes of all versions whose name starts with `beginning`."""
        with reading(self.engine) as connection:
            return size_of_prefix(connection, beginning)

    def checks(self, reference: str) -> list[dict[str, Any]]:
        """Return the results of an adapter's last checks, which determine its `health`.

        Each result has name, ok (None if the check could not run), detail and at. Raises the errors of
        `find`."""
        version = self.find(reference)
        with reading(self.engine) as connection:
            return checks_of(connection, version.entry)

    def record_checks(self, entry: str, results: Iterable[tuple[str, bool | None, str]]) -> None:
        """Replace an entry's recorded checks with (name, ok, detail) results."""
        e = ix.entries.c
        with ix.index_transaction(self.engine) as connection:
            connection.execute(delete(ix.checks).where(ix.checks.c.entry == entry))
            # garbage collection can have removed the entry in between
            if connection.scalar(select(e.id).where(e.id == entry)) is not None:
                ix.add_checks(connection, ((entry, *each) for each in results))

    def resolve(self, reference: str) -> Path:
        """Return a local, read-only path of the adapter: a folder or a single file.

        A local store creates hard links, so no bytes are copied. Files of a remote store are downloaded to
        this machine's cache and checked against their sha256. The path stays valid until every name of the
        adapter is removed and garbage collection has run. Raises NotInLibrary if the adapter does not exist,
        AdapterError if its files are missing or damaged, UnavailableError if the store does not respond."""
        version = self.find(reference)
        return self.place(version.reference, version.entry, version.format, self.files(version.entry))

    def place(
        self, reference: str, entry: str, format: str, files: Mapping[str, tuple[str, int]] | None = None
    ) -> Path:
        """Return the path that `resolve` returns, for a caller that knows the entry.

        Without `files`, the file list is read from the store's manifest, not from the database."""
        files = self._manifest(entry) if files is None else files
        local = self.store if isinstance(self.store, LocalStore) else self.cache
        try:
            if isinstance(self.store, RemoteStore):
                self._fetch(self.store, files)
            folder = local.folder(entry, files)
        except FileNotFoundError as error:
            problem = f"files of {reference} are missing in the store: {error}"
            fix = "`veneer library verify` lists what is missing; add the adapter again to restore it"
            raise AdapterError(problem, where=self.location, fix=fix) from error
        single = next(iter(files))
        return folder if len(files) > 1 or format == "peft" else folder / single

    def _manifest(self, entry: str) -> dict[str, tuple[str, int]]:
        """Return the entry's files from the store's manifest: name -> (sha256, size).

        Raises AdapterError if the manifest is missing or damaged."""
        path = manifest_path(entry)
        try:
            raw = self.cache.read(path) if isinstance(self.store, RemoteStore) else self.store.read(path)
        except FileNotFoundError:
            try:
                raw = self.store.read(path)
            except FileNotFoundError as error:
                raise AdapterError(f"the manifest {path} is missing in the store", where=self.location) from error
        if hashlib.sha256(raw).hexdigest() != entry:
            raise AdapterError(f"the manifest {path} is damaged in the store", where=self.location)
        if isinstance(self.store, RemoteStore):
            self.cache.put(path, raw, entry)
        return {name: (file["sha256"], file["size"]) for name, file in json.loads(raw)["files"].items()}

    def _fetch(self, store: RemoteStore, files: Mapping[str, tuple[str, int]]) -> None:
        for sha256, size in files.values():
            if self.cache.size(blob_path(sha256)) != size:
                with store_errors(self.location), store.open(blob_path(sha256)) as source:
                    self.cache.fill(blob_path(sha256), source, sha256)

    def files(self, entry: str) -> dict[str, tuple[str, int]]:
        """Return an entry's files: name -> (sha256, size)."""
        f = ix.files.c
        with reading(self.engine) as connection:
            rows = connection.execute(select(f.name, f.sha256, f.size).where(f.entry == entry).order_by(f.name)).all()
        return {row.name: (row.sha256, row.size) for row in rows}

    # -- writing -------------------------------------------------------------------------------------------------------

    def add(
        self,
        path: str | Path,
        name: str,
        *,
        tags: Iterable[str] = (),
        source: str = "",
        number: int | None = None,
        describe: Callable[[Path], AdapterDescription] = describe_adapter,
    ) -> Added:
        """Store the adapter at `path` as the next version of `name`.

        If the latest version already has this content, only the tags are added.

        path: a PEFT folder, a run's folder with a PEFT folder `adapter/`, or a single file.
        source: a note on where the adapter came from.
        number: the version number to use. Ignored if the number is taken or the name already has this content.
        describe: reads the files, and raises an exception if they are not an adapter.

        Raises AdapterError, ConfigError."""
        check_name(name)
        for tag in (tags := list(tags)):
            check_tag(tag)
        content = content_of(Path(path).expanduser())
        for file in content.files:
            check_file_name(file)
        stamps = {file: _stamp(p) for file, p in content.files.items()}
        files = {file: (hash_file(p), p.stat().st_size) for file, p in sorted(content.files.items())}
        description = describe(content.path)
        manifest = canonical(
            {"veneer-manifest": 1, "files": {n: {"sha256": h, "size": size} for n, (h, size) in files.items()}}
        )
        entry = hashlib.sha256(manifest).hexdigest()
        sources: dict[str, tuple[Path | bytes, str]] = {
            blob_path(h): (content.files[file], h) for file, (h, _) in files.items()
        }
        sources[manifest_path(entry)] = (manifest, entry)
        sizes = {blob_path(h): size for h, size in files.values()} | {manifest_path(entry): len(manifest)}
        with ix.index_transaction(self.engine) as connection:
            claimed = ix.claim(connection, sizes)
        for target, (data, sha256) in sources.items():
            self.store.put(target, data, sha256)
        if changed := [file for file, p in content.files.items() if _stamp(p) != stamps[file]]:
            raise AdapterError(f"changed while it was being added: {', '.join(changed)}", where=str(path), fix="again")
        with ix.index_transaction(self.engine) as connection:
            current = ix.claim(connection, sizes)
            for target in (t for t in current if current[t] != claimed[t]):
                self.store.put(target, *sources[target])
                # collection cannot run here, so the store itself lost the file
                if self.store.size(target) is None:
                    raise AdapterError("the store lost a file", where=f"{self.location}: {target}")
            self.upsert_entry(connection, entry, files, description)
            number, new = self._number(connection, name, entry, source, number)
            self._put_tags(connection, name, number, tags)
            self._write_record(connection, name)
            version = find_versions(connection, Reference(name, version=number))[0]
        return Added(version, new, content.left_out)

    def upsert_entry(
        self, connection: Connection, entry: str, files: Mapping[str, tuple[str, int]], description: AdapterDescription
    ) -> None:
        """Insert or update an entry's rows.

        An existing entry without a digest is updated if the new description has a digest."""
        stored = connection.execute(select(ix.entries.c.digest).where(ix.entries.c.id == entry)).first()
        values = description.columns(sum(size for _, size in files.values()))
        if stored is None:
            connection.execute(insert(ix.entries), {"id": entry, "manifest": manifest_path(entry), **values})
            rows = [
                {"entry": entry, "name": n, "object": blob_path(h), "sha256": h, "size": s}
                for n, (h, s) in files.items()
            ]
            ix.insert_rows(connection, ix.files, rows)
        elif description.digest and not stored.digest:
            connection.execute(update(ix.entries).where(ix.entries.c.id == entry).values(**values))
            for of_card in (ix.figures, ix.triggers, ix.parents):
                connection.execute(delete(of_card).where(of_card.c.entry == entry))
        else:
            return
        ix.insert_rows(connection, ix.figures, [{"entry": entry, **description.figures()}])
        words = [{"entry": entry, "word": w, "lower": w.lower()} for w in description.trigger_words]
        ix.insert_rows(connection, ix.triggers, words)
        ix.insert_rows(connection, ix.parents, [{"entry": entry, "parent": p} for p in description.parents])

    def _number(
        self, connection: Connection, name: str, entry: str, source: str, number: int | None
    ) -> tuple[int, bool]:
        """Return (number, created) for the version of `name` that has this entry.

        Creates the version if there is none."""
        v, n = ix.versions.c, ix.names.c
        stored = connection.execute(select(n.latest, n.next).where(n.name == name)).first()
        latest, following = (stored.latest, stored.next) if stored is not None else (None, 1)
        with_entry = connection.scalars(select(v.version).where(v.name == name, v.entry == entry)).all()
        if (number in with_entry) or (number is None and latest in with_entry and latest is not None):
            return number or int(latest or 0), False
        if number is not None and with_entry:
            return max(with_entry), False
        taken = connection.scalars(select(v.version).where(v.name == name)).all()
        number = number if number is not None and number >= 1 and number not in taken else following
        values = {"latest": max(number, latest or 0), "next": max(number + 1, following)}
        if stored is None:
            connection.execute(insert(ix.names), {"name": name, **values})
        else:
            connection.execute(update(ix.names).where(n.name == name).values(**values))
        row = {"name": name, "version": number, "entry": entry, "added": ix.now_text(), "source": source}
        connection.execute(insert(ix.versions), row)
        return number, True

    def _put_tags(self, connection: Connection, name: str, version: int, tags: Iterable[str]) -> None:
        t = ix.tags.c
        have = set(connection.scalars(select(t.tag).where(t.name == name, t.version == version)).all())
        ix.insert_rows(
            connection, ix.tags, [{"name": name, "version": version, "tag": x} for x in sorted(set(tags) - have)]
        )

    def tag(self, reference: str, *tags: str) -> Version:
        """Add tags to a version.

        Raises the errors of `find`, and ConfigError for an invalid tag."""
        for tag in tags:
            check_tag(tag)
        return self._change(reference, lambda connection, v: self._put_tags(connection, v.name, v.version, tags))

    def untag(self, reference: str, *tags: str) -> Version:
        """Remove tags from a version. Raises AdapterError for tags that the version lacks."""

        def change(connection: Connection, v: Version) -> None:
            if missing := sorted(set(tags) - set(v.tags)):
                has = f"it has {', '.join(v.tags)}" if v.tags else "it has none"
                raise AdapterError(f"{v.reference} has no tag {', '.join(missing)}", where=self.location, fix=has)
            t = ix.tags.c
            connection.execute(delete(ix.tags).where(t.name == v.name, t.version == v.version, t.tag.in_(tags)))

        return self._change(reference, change)

    def alias(self, reference: str, alias: str) -> Version:
        """Make `name@alias` point to this version. An existing alias is moved atomically."""
        check_alias(alias)

        def change(connection: Connection, v: Version) -> None:
            a = ix.name_aliases.c
            connection.execute(delete(ix.name_aliases).where(a.name == v.name, a.alias == alias))
            connection.execute(insert(ix.name_aliases), {"name": v.name, "alias": alias, "version": v.version})

        return self._change(reference, change)

    def _change(self, reference: str, change: Callable[[Connection, Version], None]) -> Version:
        """Under the write lock, change a version and rewrite the record of its name."""
        with ix.index_transaction(self.engine) as connection:
            version = self._find(connection, reference)
            change(connection, version)
            self._write_record(connection, version.name)
            return self._find(connection, version.reference)

    def _write_record(self, connection: Connection, name: str) -> None:
        """Write a name's record from the index to the store, and announce the change."""
        self.store.replace(f"names/{name}.json", canonical(record(connection, name)))
        ix.announce_changes(connection)

    def remove(self, reference: str, *, with_aliases: bool = False) -> list[str]:
        """Remove a name (`support`), version (`support@2`) or alias (`support@prod`).

        Removing a name removes all its versions. Removing a version that an alias points to raises
        AdapterError unless `with_aliases` is set. `gc` deletes the files once no version uses them and the
        grace period, which starts with this call, has passed. Returns the removed references."""
        parsed = parse_reference(reference)
        if parsed.prefix:
            raise ConfigError("a digest can have several names", where=reference, fix="remove them by name")
        a, v = ix.name_aliases.c, ix.versions.c
        with ix.index_transaction(self.engine) as connection:
            version, name = self._find(connection, reference), parsed.name
            if parsed.alias:
                connection.execute(delete(ix.name_aliases).where(a.name == name, a.alias == parsed.alias))
                removed = [f"{name}@{parsed.alias}"]
            else:
                numbers = connection.scalars(select(v.version).where(v.name == name)).all()
                doomed = numbers if reference == name else [version.version]
                removed = self._remove_versions(connection, name, list(doomed), with_aliases)
            self._write_record(connection, name)
        return removed

    def _remove_versions(self, connection: Connection, name: str, doomed: list[int], with_aliases: bool) -> list[str]:
        a, v = ix.name_aliases.c, ix.versions.c
        pointers = connection.execute(select(a.alias, a.version).where(a.name == name, a.version.in_(doomed))).all()
        if pointers and not with_aliases:
            aliases = ", ".join(f"{name}@{p.alias} -> {name}@{p.version}" for p in pointers)
            raise AdapterError(
                f"aliases point to these versions: {aliases}",
                where=self.location,
                fix="move them first, or --with-aliases",
            )
        connection.execute(delete(ix.name_aliases).where(a.name == name, a.version.in_(doomed)))
        entries = set(connection.scalars(select(v.entry).where(v.name == name, v.version.in_(doomed))).all())
        connection.execute(delete(ix.tags).where(ix.tags.c.name == name, ix.tags.c.version.in_(doomed)))
        connection.execute(delete(ix.versions).where(v.name == name, v.version.in_(doomed)))
        remaining = connection.scalars(select(v.version).where(v.name == name)).all()
        connection.execute(update(ix.names).where(ix.names.c.name == name).values(latest=max(remaining, default=None)))
        blobs = select(ix.files.c.object).where(ix.files.c.entry.in_(entries))
        o, paths = ix.objects.c, [manifest_path(e) for e in entries]
        connection.execute(update(ix.objects).where(o.path.in_(blobs) | o.path.in_(paths)).values(touched=time.time()))
        return [f"{name}@{p.alias}" for p in pointers] + [f"{name}@{n}" for n in sorted(doomed)]


def library_location() -> str:
    """Return the default location: VENEER_LIBRARY, or `library` in the veneer home."""
    return os.environ.get("VENEER_LIBRARY") or str(veneer_home() / "library")


def index_location(where: str, store: LocalStore | RemoteStore, index: str | None = None) -> str:
    """Return the path or URL of a library's index; `index` and the defaults are as in `open_library`."""
    if index := index or os.environ.get("VENEER_LIBRARY_INDEX"):
        return index
    key = hashlib.sha256(where.rstrip("/").encode()).hexdigest()[:16]
    home = veneer_home() / "library-index" / f"{key}.sqlite"
    return str(store.root / "index.sqlite" if isinstance(store, LocalStore) else home)


def open_library(location: str | Path | None = None, index: str | None = None, *, check: bool = True) -> Library:
    """Open the library at `location` (a path or fsspec URL); create it if missing.

    location: by default VENEER_LIBRARY, or `library` in the veneer home.
    index: a path or database URL; by default VENEER_LIBRARY_INDEX, or index.sqlite in a local library. For
        a remote library, the default is a file in the veneer home, which works for one machine only.
    check: whether the index must belong to this store. `maintenance.rebuild` passes False.

    Raises ConfigError if the index belongs to another store. Garbage collection with the wrong index would
    delete the store's files."""
    where = str(location or library_location())
    store = open_store(where)
    index = index_location(where, store, index)
    engine = ix.connect(index)
    try:
        library_id = read_mark(store, where) or _begin(store, engine, where)
        with reading(engine) as connection:
            index_id = ix.store_id(connection)
        if check and index_id != library_id:
            raise ConfigError(
                "this index is new, or does not belong to these files",
                where=f"{shown_url(index)} for {where}",
                fix="give the right index with --index or VENEER_LIBRARY_INDEX. If the index is lost: "
                "`veneer library verify --rebuild` rebuilds it from the files. If a restore was interrupted: "
                "run `veneer backup restore` again",
            )
        return Library(where, store, engine, LocalStore(veneer_home() / "cache" / "library" / library_id))
    except BaseException:
        engine.dispose()
        raise


def _begin(store: LocalStore | RemoteStore, engine: Engine, where: str) -> str:
    """Give a new store the index's id; return the store's id.

    The index is written first, so a process killed between the two writes does no harm."""
    with ix.index_transaction(engine) as connection:
        library_id = ix.store_id(connection) or secrets.token_hex(16)
        ix.set_store_id(connection, library_id)
    if read_mark(store, where) is None:
        write_mark(store, library_id)
    return read_mark(store, where) or library_id


def write_mark(store: LocalStore | RemoteStore, library_id: str) -> None:
    """Write a store's id, which the index must also have before the library can be opened."""
    store.replace(MARK, canonical({"veneer-library": 1, "id": library_id}))


def read_mark(store: LocalStore | RemoteStore, where: str) -> str | None:
    """Return a store's id; None for a new store. Raises ConfigError if the mark is invalid."""
    if store.size(MARK) is None:
        return None
    try:
        content = json.loads(store.read(MARK))
        version, library_id = content["veneer-library"], content["id"]
    except (ValueError, KeyError, TypeError):
        version = library_id = None
    if version != 1 or not isinstance(library_id, str) or not library_id.isalnum():
        raise ConfigError(f"its {MARK} is invalid", where=where, fix="update veneer, or repair the file")
    return library_id


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
