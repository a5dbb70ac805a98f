"""Transfer adapters to and from the Hugging Face hub, fsspec URLs and exports.

    hf:owner/name[/file.safetensors][@revision]     a repository of the hub, or one file of it
    s3://bucket/folder, file:///…, a path           a folder with an adapter's files, or one file

    export = library.json {"veneer-export": 1}, names/NAME.json, manifests/…, blobs/… as in a store, in a tar file;
    the same library gives the same bytes

Received files are checked (sha256 if there is a manifest, then `describe`) before the library stores them.
This module knows hubs and archives; the library does the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sqlalchemy import select

from veneer.errors import AdapterError, ConfigError, MissingExtraError, VeneerError
from veneer.library import index as ix
from veneer.library.database import reading
from veneer.library.describe_files import PEFT_FILES, AdapterDescription, describe_adapter
from veneer.library.library import Added, Library
from veneer.library.maintenance import check_record, parse_manifest
from veneer.library.names import parse_reference
from veneer.library.queries import record
from veneer.library.store import CHUNK, blob_path, canonical, hash_file, manifest_path, open_remote

_PLACE_MANIFEST = "veneer-manifest.json"
_MAX_JSON = 64 << 20
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)((?:/[^/@]+)*)(?:@([^@]+))?")


# -- the hub and fsspec places -----------------------------------------------------------------------------------------


def push(library: Library, reference: str, place: str, *, public: bool = False) -> str:
    """Copy a version's files to a location, created if missing; return the location.

    On the hub, a new repository is private unless `public`, and all files are one commit. Elsewhere a
    manifest of hashes is written after the files, for `pull` to check. Raises AdapterError if the location
    cannot be reached or written."""
    version, path = library.find(reference), library.resolve(reference)
    files = {path.name: path} if path.is_file() else {p.name: p for p in sorted(path.iterdir())}
    if place.startswith("hf:"):
        repo, folder, revision = _hub(place)
        with _said("hub", place):
            from huggingface_hub import CommitOperationAdd, HfApi

            api = HfApi()
            api.create_repo(repo, exist_ok=True, private=not public)
            done = api.create_commit(
                repo,
                [CommitOperationAdd(f"{folder}/{n}".lstrip("/"), str(p)) for n, p in files.items()],
                commit_message=f"{version.reference} {version.digest}".strip(),
                revision=revision,
            )
        return f"hf:{repo}@{done.oid}"
    kept = {n: {"sha256": h, "size": size} for n, (h, size) in library.files(version.entry).items()}
    with _said("place", place):
        fs, root = open_remote(place)
        fs.makedirs(root, exist_ok=True)
        for name, file in files.items():
            fs.put_file(str(file), f"{root}/{name}")
        fs.pipe_file(f"{root}/{_PLACE_MANIFEST}", canonical({"veneer-manifest": 1, "files": kept}))
    return place


def pull(
    library: Library,
    place: str,
    name: str = "",
    *,
    tags: Iterable[str] = (),
    describe: Callable[[Path], AdapterDescription] = describe_adapter,
) -> Added:
    """Add the adapter at a location, as `name` or the last part of the location.

    For the hub, the commit is recorded. Raises AdapterError if there is no adapter, or if bytes differ
    from the location's manifest."""
    with tempfile.TemporaryDirectory(prefix="veneer-pull-") as temporary:
        folder = Path(temporary)
        if place.startswith("hf:"):
            source, last = _from_hub(place, folder)
        else:
            source, last = _from_place(place, folder)
        only = [p for p in folder.iterdir() if p.name not in PEFT_FILES]
        return library.add(
            only[0] if only else folder,
            name or re.sub(r"[^a-z0-9._-]+", "-", last.lower().removesuffix(".safetensors")).strip("-._"),
            tags=tags,
            source=source,
            describe=describe,
        )


def _hub(place: str) -> tuple[str, str, str | None]:
    """Return (repository, path within it, revision)."""
    found = _HUB.fullmatch(place)
    if not found or ".." in place:
        raise ConfigError(f"{place!r} does not name a place on the hub", fix="hf:owner/name, hf:owner/name@revision")
    return found[1], found[2].strip("/"), found[3]


def _from_hub(place: str, into: Path) -> tuple[str, str]:
    repo, path, revision = _hub(place)
    with _said("hub", place):
        from huggingface_hub import HfApi

        api = HfApi()
        commit = api.model_info(repo, revision=revision).sha
        every = api.list_repo_files(repo, revision=commit)
        wanted = _choose(every, path, place)
        for file in wanted:
            got = api.hf_hub_download(repo, file, revision=commit)
            shutil.copyfile(got, into / file.rpartition("/")[2])
    inner = f"/{path}" if path else ""
    return f"hf:{repo}{inner}@{commit}", (path or repo).rpartition("/")[2]


def _choose(every: list[str], path: str, place: str) -> list[str]:
    """Return an adapter's files among all files of a repository.

    The named file, a PEFT folder, or the only safetensors file."""
    if path in every:
        return [path]
    inside = path + "/" if path else ""
    if f"{inside}{PEFT_FILES[0]}" in every:
        return [f"{inside}{n}" for n in PEFT_FILES if f"{inside}{n}" in every]
    found = [n for n in every if n.startswith(inside) and n.endswith(".safetensors")]
    if len(found) == 1:
        return found
    shown = ", ".join(found[:8])
    what = "several files, and none is said to be the one" if found else "no adapter there"
    raise AdapterError(what, where=place, fix=f"name one: {shown}" if found else None)


def _from_place(place: str, into: Path) -> tuple[str, str]:
    with _said("place", place):
        fs, root = open_remote(place)
        if fs.isfile(root):
            names = [root.rpartition("/")[2]]
            fs.get_file(root, str(into / names[0]))
            return place, names[0]
        inside = {entry["name"].rstrip("/").rpartition("/")[2] for entry in fs.ls(root, detail=True)}
        names = _choose(sorted(inside), "", place)
        for name in names:
            fs.get_file(f"{root}/{name}", str(into / name))
        said = fs.cat_file(f"{root}/{_PLACE_MANIFEST}") if _PLACE_MANIFEST in inside else None
    if said is not None:
        wanted = parse_manifest(said, hashlib.sha256(said).hexdigest())
        if wrong := [n for n in {*names, *wanted} if n not in names or wanted.get(n, ("",))[0] != hash_file(into / n)]:
            raise AdapterError(
                f"not what its manifest says: {', '.join(sorted(wrong))}",
                where=place,
                fix="a push there was cut off, is under way, or the files were changed: push again",
            )
    return place, root.rstrip("/").rpartition("/")[2]


@contextlib.contextmanager
def _said(what: str, place: str) -> Iterator[None]:
    """Convert client errors to veneer's: the location could not be used."""
    try:
        yield
    except VeneerError:
        raise
    except ImportError as error:
        raise MissingExtraError(str(error), where=place, fix="pip install 'veneer[s3]' for s3://") from None
    except FileNotFoundError as error:
        raise AdapterError(f"there is nothing there: {error}", where=place) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise AdapterError(f"the {what} cannot be used: {reason}", where=place) from error


# -- export and import -------------------------------------------------------------------------------------------------


@dataclass
class ExportReport:
    """The result of `export_to`."""

    path: Path
    versions: list[str]
    files: int
    bytes: int


@dataclass
class ImportReport:
    """The result of `import_from`: new versions, known versions, and differences."""

    new: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_to(library: Library, target: str | Path, references: Iterable[str] = ()) -> ExportReport:
    """Write versions with files, tags and aliases to a tar file; the same content gives the same bytes.

    references: `support` for all its versions, `support@2`, `support@prod`; none: everything. The target
        appears complete or not at all.

    Raises AdapterError if it exists, or if the store misses a file or has a damaged one."""
    target = Path(target).expanduser()
    if target.suffix != ".tar":
        raise ConfigError(f"{target} is not the name of a tar file", fix=f"{target}.tar")
    if target.exists():
        raise AdapterError("something is there already", where=str(target), fix="name a new file")
    records = _records(library, list(references))
    manifests = {v["entry"] for r in records for v in r["versions"].values()}
    wanted: dict[str, str] = {}
    for entry in manifests:
        wanted[manifest_path(entry)] = entry
        wanted |= {blob_path(sha256): sha256 for sha256, _ in library.files(entry).values()}
    small = {"library.json": canonical({"veneer-export": 1})}
    small |= {f"names/{r['name']}.json": canonical(r) for r in records}
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    total = 0
    try:
        with temporary.open("xb") as raw:
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for path, data in sorted(small.items()):
                    _put(tar, path, io.BytesIO(data), len(data))
                for path, sha256 in sorted(wanted.items(), key=lambda item: (item[0].startswith("blobs"), item[0])):
                    total += _copy(library, path, sha256, tar)
            raw.flush()
            os.fsync(raw.fileno())
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    versions = [f"{r['name']}@{number}" for r in records for number in sorted(r["versions"], key=int)]
    return ExportReport(target, versions, len(wanted), total)


def _records(library: Library, references: list[str]) -> list[dict[str, Any]]:
    """Return the records of the chosen versions, by name."""
    chosen: dict[str, set[str] | None] = {}
    for reference in references:
        found = library.find(reference)
        if parse_reference(reference).name == reference:
            chosen[found.name] = None
        elif (some := chosen.setdefault(found.name, set())) is not None:
            some.add(str(found.version))
    with reading(library.engine) as connection:
        if not references:
            n = ix.names.c
            chosen = dict.fromkeys(connection.scalars(select(n.name).where(n.latest.is_not(None))).all())
        out = []
        for name in sorted(chosen):
            only, whole = chosen[name], record(connection, name)
            if only is not None:
                whole["versions"] = {k: v for k, v in whole["versions"].items() if k in only}
                whole["aliases"] = {k: v for k, v in whole["aliases"].items() if str(v) in only}
            out.append(whole)
    return out


def _copy(library: Library, path: str, sha256: str, tar: tarfile.TarFile) -> int:
    size = library.store.size(path)
    if size is None:
        raise AdapterError("a file is missing in the store", where=path, fix="see `veneer library verify`")
    with library.store.open(path) as file:
        checked = _Hashing(file)
        _put(tar, path, checked, size)  # type: ignore[arg-type]
    if checked.digest.hexdigest() != sha256:
        raise AdapterError("a file is damaged in the store", where=path, fix="see `veneer library verify`")
    return size


def _put(tar: tarfile.TarFile, path: str, file: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(path)
    member.size, member.mode = size, 0o644
    tar.addfile(member, file)


class _Hashing:
    """An open file that hashes what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, n: int = -1) -> bytes:
        data = self.file.read(n)
        self.digest.update(data)
        return data


def import_from(
    library: Library, source: str | Path, *, describe: Callable[[Path], AdapterDescription] = describe_adapter
) -> ImportReport:
    """Add the content of an export.

    Every manifest and file is checked against its sha256; every adapter is read by `describe` and its
    digest compared with the export's. Nothing in the export is trusted.

    Versions keep their numbers if those are free, or have the same content already; otherwise they get the
    next number, with a note. Existing aliases keep their target, with a note. A second import changes
    nothing. Raises AdapterError before the first add if the export is damaged or incomplete."""
    source, out = Path(source).expanduser(), ImportReport()
    with _opened(source) as archive:
        if _json(archive, "library.json") != {"veneer-export": 1}:
            raise AdapterError("this is not an export of a library", where=str(source))
        records = [check_record(_json(archive, p)) for p in sorted(archive) if p.startswith("names/")]
        manifests = {v["entry"]: _manifest(archive, v["entry"]) for r in records for v in r["versions"].values()}
        if gone := sorted({h for m in manifests.values() for h, _ in m.values() if blob_path(h) not in archive}):
            raise AdapterError(f"{len(gone)} files are not in the export: {gone[0]} …", where=str(source))
        for found in records:
            _import_name(library, archive, found, manifests, describe, out)
    return out


def _import_name(
    library: Library,
    archive: Mapping[str, Callable[[], IO[bytes]]],
    found: dict[str, Any],
    manifests: Mapping[str, Mapping[str, tuple[str, int]]],
    describe: Callable[[Path], AdapterDescription],
    out: ImportReport,
) -> None:
    name, here = found["name"], {}
    for number, v in sorted(found["versions"].items(), key=lambda item: int(item[0])):

        def checked(path: Path, said: str = v["digest"], who: str = f"{name}@{number}") -> AdapterDescription:
            about = describe(path)
            if said and about.digest and about.digest != said:
                raise AdapterError(f"{who} is {about.digest}, and the export says {said}", fix="do not trust it")
            return about

        with tempfile.TemporaryDirectory(prefix="veneer-import-") as temporary:
            place = _unpack(archive, manifests[v["entry"]], Path(temporary))
            added = library.add(place, name, tags=v["tags"], source=v["source"], number=int(number), describe=checked)
        here[int(number)] = added.version.version
        (out.new if added.new else out.known).append(added.version.reference)
        if added.version.version != int(number):
            out.notes.append(f"{name}@{number} of the export is {added.version.reference} here")
    with reading(library.engine) as connection:
        own = record(connection, name)["aliases"]
    for alias, number in sorted(found["aliases"].items()):
        if alias not in own and number in here:
            library.alias(f"{name}@{here[number]}", alias)
        elif alias in own and own[alias] != here.get(number):
            out.notes.append(f"{name}@{alias} stays at {name}@{own[alias]}")


def _unpack(archive: Mapping[str, Callable[[], IO[bytes]]], files: Mapping[str, tuple[str, int]], into: Path) -> Path:
    """Write an entry's files under their names, each checked.

    Returns the folder, or the only file."""
    for name, (sha256, _) in files.items():
        with archive[blob_path(sha256)]() as source, (into / name).open("xb") as target:
            shutil.copyfileobj(source, target, CHUNK)
        if (got := hash_file(into / name)) != sha256:
            raise AdapterError(f"{name} has sha256 {got}, not {sha256}", where=blob_path(sha256), fix="export again")
    if PEFT_FILES[0] in files and set(files) <= set(PEFT_FILES):
        return into
    if len(files) != 1:
        raise AdapterError(f"these files are not an adapter: {', '.join(sorted(files))}", fix="export again")
    return into / next(iter(files))


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[dict[str, Callable[[], IO[bytes]]]]:
    """Yield path -> function that opens it, for every file of an export.

    Nothing is extracted by its name."""
    try:
        tar = tarfile.open(source, "r:")  # noqa: SIM115 (closed below)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AdapterError(f"this tar file cannot be read: {error}", where=str(source)) from None
    with tar:
        try:
            members = {m.name: m for m in tar.getmembers() if m.isfile()}
            yield {n: lambda m=m: _member(tar, m) for n, m in members.items()}  # type: ignore[misc]
        except (tarfile.TarError, EOFError) as error:
            raise AdapterError(f"the tar file is damaged: {error}", where=str(source)) from None


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    opened = tar.extractfile(member)
    assert opened is not None  # members are files
    return opened


def _json(archive: Mapping[str, Callable[[], IO[bytes]]], path: str) -> Any:
    try:
        return json.loads(_small(archive, path))
    except ValueError as error:
        raise AdapterError(
            f"{path} is not JSON: {error}", fix="this is not an export of a library, or a damaged one"
        ) from None


def _small(archive: Mapping[str, Callable[[], IO[bytes]]], path: str) -> bytes:
    if path not in archive:
        raise AdapterError(f"the export has no {path}", fix="it is incomplete, or it is not an export of a library")
    with archive[path]() as file:
        data = file.read(_MAX_JSON + 1)
    if len(data) > _MAX_JSON:
        raise AdapterError(f"{path} is too large", fix="this is not an export of a library")
    return data


def _manifest(archive: Mapping[str, Callable[[], IO[bytes]]], entry: str) -> dict[str, tuple[str, int]]:
    return parse_manifest(_small(archive, manifest_path(entry)), entry)
