"""Transfer adapters to and from the Hugging Face hub and fsspec URLs.

    hf:owner/name[/file.safetensors][@revision]     a repository on the hub, or one file in a repository
    s3://bucket/folder, file:///…, a path           a folder with an adapter's files, or one file

Received files are checked (sha256 if there is a manifest, then `describe`) before the library stores them.
This module only transfers files; the library does the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from veneer.errors import AdapterError, ConfigError, MissingExtraError, VeneerError, install_command
from veneer.library.describe_files import PEFT_FILES, AdapterDescription, describe_adapter
from veneer.library.library import Added, Library
from veneer.library.maintenance import parse_manifest
from veneer.library.store import canonical, hash_file, open_remote

_PLACE_MANIFEST = "veneer-manifest.json"
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)((?:/[^/@]+)*)(?:@([^@]+))?")


def push(library: Library, reference: str, location: str, *, public: bool = False) -> str:
    """Copy a version's files to a location and return the location.

    The location is created if missing. On the hub, a new repository is private unless `public` is set, and
    all files are pushed in one commit. Elsewhere, a manifest of hashes is written last, and `pull` checks the
    files against the manifest. Raises AdapterError if the location cannot be reached or written."""
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
    """Add the adapter at a location to the library.

    name: the adapter's name; default: the last part of the location.

    For the hub, the recorded source includes the commit. Raises AdapterError if the location has no adapter,
    or if the adapter's files differ from the location's manifest."""
    with tempfile.TemporaryDirectory(prefix="veneer-pull-") as temporary:
        folder = Path(temporary)
        if location.startswith("hf:"):
            source, last = _from_hub(location, folder)
        else:
            source, last = _from_location(location, folder)
        only = [p for p in folder.iterdir() if p.name not in PEFT_FILES]
        return library.add(
            only[0] if only else folder,
            name or re.sub(r"[^a-z0-9._-]+", "-", last.lower().removesuffix(".safetensors")).strip("-._"),
            tags=tags,
            source=source,
            describe=describe,
        )


def _parse_hub(location: str) -> tuple[str, str, str | None]:
    """Return (repository, path in the repository, revision) of an `hf:` location."""
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
    """Return the names of an adapter's files, chosen from all files of a repository.

    The adapter is the file at `path`, a PEFT folder, or the only safetensors file."""
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


def _from_location(location: str, into: Path) -> tuple[str, str]:
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
            problem = f"files differ from the manifest: {', '.join(sorted(different))}"
            fix = "push again: a push was interrupted or is running, or the files were changed"
            raise AdapterError(problem, where=location, fix=fix)
    return location, root.rstrip("/").rpartition("/")[2]


@contextlib.contextmanager
def _client_errors(client: str, location: str) -> Iterator[None]:
    """Convert errors of the hub's or file system's client to veneer's errors."""
    try:
        yield
    except VeneerError:
        raise
    except ImportError as error:
        raise MissingExtraError(str(error), where=location, fix=f"for s3://: {install_command('s3')}") from None
    except FileNotFoundError as error:
        raise AdapterError(f"there is no such file or folder: {error}", where=location) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise AdapterError(f"the {client} cannot be used: {reason}", where=location) from error
