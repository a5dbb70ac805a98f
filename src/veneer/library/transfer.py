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


def push(library: Library, reference: str, location: str, *, public: bool = False) -> str:
    """Copy a version's files to a location, created if missing; return the location.

    On the hub, a new repository is private unless `public`, and all files are one commit. Elsewhere a
    manifest of hashes is written after the files, for `pull` to check. Raises AdapterError if the location
    cannot be reached or written."""
    version, path = library.find(reference), library.resolve(reference)
    files = {path.name: path} if path.is_file() else {p.name: p for p in sorted(path.iterdir())}
    if location.startswith("hf:"):
        repo, folder, revision = _parse_hub(location)
        with _client_errors("hub", location):
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
    files_of_version = {n: {"sha256": h, "size": size} for n, (h, size) in library.files(version.entry).items()}
    with _client_errors("place", location):
        fs, root = open_remote(location)
        fs.makedirs(root, exist_ok=True)
        for name, file in files.items():
            fs.put_file(str(file), f"{root}/{name}")
        fs.pipe_file(f"{root}/{_PLACE_MANIFEST}", canonical({"veneer-manifest": 1, "files": files_of_version}))
    return location


def pull(
    library: Library,
    location: str,
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
        if location.startswith("hf:"):
            source, last = _from_hub(location, folder)
        else:
            source, last = _from_place(location, folder)
        only = [p for p in folder.iterdir() if p.name not in PEFT_FILES]
        return library.add(
            only[0] if only else folder,
            name or re.sub(r"[^a-z0-9._-]+", "-", last.lower().removesuffix(".safetensors")).strip("-._"),
            tags=tags,
            source=source,
            describe=describe,
        )


def _parse_hub(location: str) -> tuple[str, str, str | None]:
    """Return (repository, path within it, revision)."""
    match = _HUB.fullmatch(location)
    if not match or ".." in location:
        raise ConfigError(f"{location!r} is not a location on the hub", fix="hf:owner/name, hf:owner/name@revision")
    return match[1], match[2].strip("/"), match[3]


def _from_hub(location: str, into: Path) -> tuple[str, str]:
    repo, path, revision = _parse_hub(location)
    with _client_errors("hub", location):
        from huggingface_hub import HfApi

        api = HfApi()
        commit = api.model_info(repo, revision=revision).sha
        repo_files = api.list_repo_files(repo, revision=commit)
        names = _adapter_files(repo_files, path, location)
        for file in names:
            got = api.hf_hub_download(repo, file, revision=commit)
            shutil.copyfile(got, into / file.rpartition("/")[2])
    inner = f"/{path}" if path else ""
    return f"hf:{repo}{inner}@{commit}", (path or repo).rpartition("/")[2]


def _adapter_files(names: list[str], path: str, location: str) -> list[str]:
    """Return an adapter's files among all files of a repository.

    The named file, a PEFT folder, or the only safetensors file."""
    if path in names:
        return [path]
    inside = path + "/" if path else ""
    if f"{inside}{PEFT_FILES[0]}" in names:
        return [f"{inside}{n}" for n in PEFT_FILES if f"{inside}{n}" in names]
    candidates = [n for n in names if n.startswith(inside) and n.endswith(".safetensors")]
    if len(candidates) == 1:
        return candidates
    first_names = ", ".join(candidates[:8])
    message = "several files; it is unclear which is the adapter" if candidates else "there is no adapter"
    raise AdapterError(message, where=location, fix=f"name one: {first_names}" if candidates else None)


def _from_place(location: str, into: Path) -> tuple[str, str]:
    with _client_errors("place", location):
        fs, root = open_remote(location)
        if fs.isfile(root):
            names = [root.rpartition("/")[2]]
            fs.get_file(root, str(into / names[0]))
            return location, names[0]
        inside = {entry["name"].rstrip("/").rpartition("/")[2] for entry in fs.ls(root, detail=True)}
        names = _adapter_files(sorted(inside), "", location)
        for name in names:
            fs.get_file(f"{root}/{name}", str(into / name))
        manifest = fs.cat_file(f"{root}/{_PLACE_MANIFEST}") if _PLACE_MANIFEST in inside else None
    if manifest is not None:
        expected = parse_manifest(manifest, hashlib.sha256(manifest).hexdigest())
        if different := [
            n for n in {*names, *expected} if n not in names or expected.get(n, ("",))[0] != hash_file(into / n)
        ]:
            raise AdapterError(
                f"files differ from the manifest: {', '.join(sorted(different))}",
                where=location,
                fix="push again: a push was interrupted or is running, or the files were changed",
            )
    return location, root.rstrip("/").rpartition("/")[2]


@contextlib.contextmanager
def _client_errors(client: str, location: str) -> Iterator[None]:
    """Convert client errors to veneer's: the location could not be used."""
    try:
        yield
    except VeneerError:
        raise
    except ImportError as error:
        raise MissingExtraError(str(error), where=location, fix="pip install 'veneer[s3]' for s3://") from None
    except FileNotFoundError as error:
        raise AdapterError(f"there is no file or folder: {error}", where=location) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise AdapterError(f"the {client} cannot be used: {reason}", where=location) from error


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
    """The result of `import_from`: new versions, existing versions, and differences."""

    new: list[str] = field(default_factory=list)
    existing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_to(library: Library, target: str | Path, references: Iterable[str] = ()) -> ExportReport:
    """Write versions with files, tags and aliases to a tar file; the same content gives the same bytes.

    references: `support` for all its versions, `support@2`, `support@prod`; empty: all adapters. The
        target appears complete or not at all.

    Raises AdapterError if the target exists, or a stored file is missing or damaged."""
    target = Path(target).expanduser()
    if target.suffix != ".tar":
        raise ConfigError(f"{target} is not the name of a tar file", fix=f"{target}.tar")
    if target.exists():
        raise AdapterError("the target already exists", where=str(target), fix="name a new file")
    records = _records(library, list(references))
    manifests = {v["entry"] for r in records for v in r["versions"].values()}
    objects: dict[str, str] = {}
    for entry in manifests:
        objects[manifest_path(entry)] = entry
        objects |= {blob_path(sha256): sha256 for sha256, _ in library.files(entry).values()}
    small = {"library.json": canonical({"veneer-export": 1})}
    small |= {f"names/{r['name']}.json": canonical(r) for r in records}
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    total = 0
    try:
        with temporary.open("xb") as raw:
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for path, data in sorted(small.items()):
                    _add_member(tar, path, io.BytesIO(data), len(data))
                for path, sha256 in sorted(objects.items(), key=lambda item: (item[0].startswith("blobs"), item[0])):
                    total += _copy(library, path, sha256, tar)
            raw.flush()
            os.fsync(raw.fileno())
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    versions = [f"{r['name']}@{number}" for r in records for number in sorted(r["versions"], key=int)]
    return ExportReport(target, versions, len(objects), total)


def _records(library: Library, references: list[str]) -> list[dict[str, Any]]:
    """Return the records of the chosen versions, by name."""
    selected: dict[str, set[str] | None] = {}
    for reference in references:
        version = library.find(reference)
        if parse_reference(reference).name == reference:
            selected[version.name] = None
        elif (numbers := selected.setdefault(version.name, set())) is not None:
            numbers.add(str(version.version))
    with reading(library.engine) as connection:
        if not references:
            n = ix.names.c
            selected = dict.fromkeys(connection.scalars(select(n.name).where(n.latest.is_not(None))).all())
        out = []
        for name in sorted(selected):
            only, content = selected[name], record(connection, name)
            if only is not None:
                content["versions"] = {k: v for k, v in content["versions"].items() if k in only}
                content["aliases"] = {k: v for k, v in content["aliases"].items() if str(v) in only}
            out.append(content)
    return out


def _copy(library: Library, path: str, sha256: str, tar: tarfile.TarFile) -> int:
    size = library.store.size(path)
    if size is None:
        raise AdapterError("a file is missing in the store", where=path, fix="see `veneer library verify`")
    with library.store.open(path) as file:
        checked = _Hashing(file)
        _add_member(tar, path, checked, size)  # type: ignore[arg-type]
    if checked.digest.hexdigest() != sha256:
        raise AdapterError("a file is damaged in the store", where=path, fix="see `veneer library verify`")
    return size


def _add_member(tar: tarfile.TarFile, path: str, file: IO[bytes], size: int) -> None:
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
        if missing := sorted({h for m in manifests.values() for h, _ in m.values() if blob_path(h) not in archive}):
            raise AdapterError(f"{len(missing)} files are missing in the export: {missing[0]} …", where=str(source))
        for fields in records:
            _import_name(library, archive, fields, manifests, describe, out)
    return out


def _import_name(
    library: Library,
    archive: Mapping[str, Callable[[], IO[bytes]]],
    fields: dict[str, Any],
    manifests: Mapping[str, Mapping[str, tuple[str, int]]],
    describe: Callable[[Path], AdapterDescription],
    out: ImportReport,
) -> None:
    name, numbers = fields["name"], {}
    for number, v in sorted(fields["versions"].items(), key=lambda item: int(item[0])):

        def checked(path: Path, digest: str = v["digest"], version: str = f"{name}@{number}") -> AdapterDescription:
            description = describe(path)
            if digest and description.digest and description.digest != digest:
                raise AdapterError(
                    f"{version} is {description.digest}, and the export says {digest}", fix="do not trust it"
                )
            return description

        with tempfile.TemporaryDirectory(prefix="veneer-import-") as temporary:
            files = _unpack(archive, manifests[v["entry"]], Path(temporary))
            added = library.add(files, name, tags=v["tags"], source=v["source"], number=int(number), describe=checked)
        numbers[int(number)] = added.version.version
        (out.new if added.new else out.existing).append(added.version.reference)
        if added.version.version != int(number):
            out.notes.append(f"{name}@{number} of the export is {added.version.reference} here")
    with reading(library.engine) as connection:
        aliases_here = record(connection, name)["aliases"]
    for alias, number in sorted(fields["aliases"].items()):
        if alias not in aliases_here and number in numbers:
            library.alias(f"{name}@{numbers[number]}", alias)
        elif alias in aliases_here and aliases_here[alias] != numbers.get(number):
            out.notes.append(f"{name}@{alias} stays at {name}@{aliases_here[alias]}")


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
