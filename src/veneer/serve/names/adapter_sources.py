"""The adapters that a server can read: the library, and files in allowed folders.

    sources = AdapterSources(base, library=open_library())
    location = sources.locate("support@2")         a library reference, or a path in an allowed folder
    sources.keep(digest, location)
    adapter = sources.read(digest, problems)       from disk, fully checked

Adapters that cannot be served raise Refused (adapter_unusable) with a message that starts with a reason:

    | reason                       | status | |
    | not_found                    | 404    | no such reference, and no such file in an allowed folder |
    | wrong_base                   | 400    | the adapter belongs to another base |
    | shape_mismatch               | 400    | names or shapes that this base does not have |
    | unsafe_file                  | 400    | a pickle, an inconsistent header, a link out of its folder |
    | corrupt                      | 400    | a truncated file, not an adapter, contradictory settings |
    | not_finite                   | 400    | NaN or infinity |
    | unstated_scale               | 400    | a file with PEFT's tensor names but no configuration |
    | too_large                    | 400    | more bytes than the limit |
    | dora_unsupported             | 400    | reported by the runner; the message has the details |
    | modules_to_save_unsupported  | 400    | reported by the runner: full copies of modules, token rows |
    | form_unsupported             | 400    | anything else that the runner cannot serve with full effect |
    | changed                      | 409    | the file has changed since it was loaded; load it again |
    | damaged                      | 503    | the library's copy is missing or differs from what was added |

A store, database or disk that does not answer is not the adapter's fault: the error is 503 `unavailable`, and
the client can try again. This module uses the library, files and one base, and is independent of the names
and requests of a server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from veneer.adapters.use import AnyBase, load_adapter
from veneer.core.adapter import Adapter
from veneer.errors import AdapterError, ConfigError, MismatchError, UnsafeFileError, VeneerError, quoted
from veneer.formats import read as reader
from veneer.library.library import Library
from veneer.library.name_index import NamedVersion, NameIndex
from veneer.library.names import parse_reference
from veneer.models.sources import short_name
from veneer.serve.request import Refused, not_ready
from veneer.serve.transient import internal_error, is_transient, transient_error

_MOST_LOCATIONS = 1 << 16

Problems = Callable[[Adapter], list[str]]
"""A function that returns why an adapter cannot be served with full effect, one line per reason.

The engine provides the function.
"""


def unusable(reason: str, message: str, *, status: int = 400, fix: str | None = None) -> Refused:
    return Refused(f"{reason}: {message}", status=status, code="adapter_unusable", fix=fix)


@dataclass(frozen=True)
class AdapterLocation:
    """The location of an adapter's files.

    `root`: the operator's name for the adapter; never a path. `path`: the files, if they are in an allowed
    folder. Otherwise, the adapter is in the library: `reference` is its digest, and `entry` and `format`
    locate its files there.
    """

    root: str
    reference: str = ""
    path: Path | None = None
    entry: str = ""
    format: str = ""


def location_of(version: NamedVersion) -> AdapterLocation:
    reference = version.digest or f"sha256:{version.entry}"
    return AdapterLocation(version.reference, reference, entry=version.entry, format=version.format)


@dataclass(frozen=True)
class UnloadedBase:
    """A base that is not loaded yet; its fingerprint matches no adapter."""

    name: str
    fingerprint: str = "not loaded"

    @property
    def short_name(self) -> str:
        return short_name(self.name)


class AdapterSources:
    """The adapters that a server can read. Thread-safe.

    `base`: an `UnloadedBase` is replaced once by the loaded base. `folders`: allowed folders; files anywhere
    inside them can be loaded.
    """

    def __init__(
        self, base: AnyBase | UnloadedBase, *, library: Library | None = None, folders: Sequence[str | Path] = ()
    ) -> None:
        self.base, self.library = base, library
        self._folders = [_folder(folder) for folder in folders]
        self.names = None if library is None else NameIndex(library)
        self._loaded: dict[str, AdapterLocation] = {}
        self._lock = threading.Lock()

    # -- looking up references -----------------------------------------------------------------------------------------

    def find_version(self, reference: str, *, sure: bool = False) -> NamedVersion | None:
        """Look up a reference in the in-memory index, and return its version.

        Returns None if the reference is unknown or malformed. Reads no adapter and queries no database.
        `sure`: first wait for an index refresh that starts now; only for callers that can block.
        """
        if self.names is None or len(reference) > 200:
            return None
        try:
            parsed = parse_reference(reference)
        except ConfigError:
            return None
        return (self.names.refreshed() if sure else self.names.now).find(parsed)

    async def fresh(self) -> None:
        """Wait until all changes committed before this call are visible, or until the index's timeout."""
        if self.names is not None:
            await self.names.fresh()

    def latest_versions(self, fingerprint: str) -> list[NamedVersion]:
        """Return the latest readable version of each name for the base with this fingerprint."""
        return [] if self.names is None else [v for v in self.names.now.latest(fingerprint) if v.digest]

    def close(self) -> None:
        if self.names is not None:
            self.names.close()

    # -- locating files ------------------------------------------------------------------------------------------------

    def locate(self, source: str) -> AdapterLocation:
        """Return the location of a library reference, or of a path in an allowed folder. Raises Refused."""
        version = self.find_version(source, sure=True)
        if version is not None:
            return location_of(version)
        path = self._path(source)
        if path is None:
            hint = "a library reference" + (", or a path in an allowed folder" if self._folders else "")
            raise unusable("not_found", f"there is no adapter {quoted(source)}", status=404, fix=f"give {hint}")
        return AdapterLocation(path.name, path=path)

    def _path(self, source: str) -> Path | None:
        """Return the resolved path inside an allowed folder, or None.

        A path outside the allowed folders is treated like a path that does not exist.
        """
        path = Path(source)
        if not source.isprintable() or len(source) > 4096 or ".." in path.parts:
            return None
        for folder in self._folders:
            try:
                real = (folder / path).resolve(strict=True)
                if real.is_relative_to(folder) and (real.is_file() or real.is_dir()):
                    self._check_inside(real, folder)
                    return real
            except (OSError, RuntimeError):
                continue
        return None

    def _check_inside(self, real: Path, folder: Path) -> None:
        """Raise Refused for a link that leads out of the allowed folder."""
        inner = real / "adapter"
        parts = (
            [real] if real.is_file() else [p for d in (real, inner) if d.is_dir() for p in islice(d.iterdir(), 5000)]
        )
        if any(not p.resolve().is_relative_to(folder) for p in parts):
            raise unusable("unsafe_file", f"a link in {real.name} leads out of the allowed folder")

    # -- reading -----------------------------------------------------------------------------------------------------

    def keep(self, digest: str, location: AdapterLocation) -> None:
        """Remember `location` as the source of the adapter with this digest.

        The location is kept even after the adapter's name is unloaded or removed. Only the newest
        `_MOST_LOCATIONS` locations are kept.
        """
        with self._lock:
            self._loaded.pop(digest, None)
            self._loaded[digest] = location
            if len(self._loaded) > _MOST_LOCATIONS:
                del self._loaded[next(iter(self._loaded))]

    def read(self, digest: str, problems: Problems = lambda adapter: []) -> Adapter:
        """Return the adapter with this digest, read from its known location. Raises Refused."""
        return self.read_from(self._location(digest), problems, digest)

    def files(self, digest: str) -> Path:
        """Return the path of an adapter's files, for servers that read them. Raises Refused."""
        return self._files(self._location(digest))

    def _location(self, digest: str) -> AdapterLocation:
        location = self._loaded.get(digest)
        if location is None and (version := self.find_version(digest)) is not None:
            location = location_of(version)
        if location is None:
            raise unusable("not_found", f"no adapter has the digest {digest}", status=404)
        return location

    def read_from(self, location: AdapterLocation, problems: Problems, digest: str = "") -> Adapter:
        """Read an adapter, and check that this base serves it with full effect.

        `digest`: the digest that the adapter must have. Tensors from an allowed folder are copied; otherwise,
        a change to a memory-mapped file would affect running requests. Raises Refused.
        """
        if location.path is not None and not location.path.exists():
            raise unusable("not_found", f"{location.root} no longer exists", status=404)
        try:
            if isinstance(self.base, UnloadedBase):
                raise not_ready("loading")
            path = self._files(location)
            adapter = load_adapter(self.base, str(path))
            if location.path is not None:
                adapter = adapter.mapped(lambda t: t.clone())
            # The library computes digests from the files, without a base.
            if digest and adapter.digest() != digest and reader.read(path).adapter.digest() != digest:
                raise unusable("changed", f"{location.root} has changed since it was loaded", status=409)
        except Refused:
            raise
        except Exception as error:  # readers can raise any exception for a hostile file
            raise self._refusal(location, error) from error
        if faults := problems(adapter):
            raise _unservable(location, faults)
        return adapter

    def _files(self, location: AdapterLocation) -> Path:
        """Return the path of an adapter's files, fetched first if they are in a remote library.

        Errors say that the copy is missing, damaged or unavailable, never that the adapter is invalid.
        """
        if location.path is not None:
            return location.path
        assert self.library is not None
        try:
            return self.library.place(location.root, location.entry, location.format)
        except AdapterError as error:
            if self.find_version(location.reference) is None:
                raise unusable("not_found", f"the library no longer has {location.root}", status=404) from error
            refused = transient_error(f"the library's copy of {location.root}", error)
            raise unusable("damaged", refused.what, status=503, fix=refused.fix) from error
        except Exception as error:
            raise internal_error(f"the library's copy of {location.root}", error) from error

    def _refusal(self, location: AdapterLocation, error: Exception) -> Refused:
        if is_transient(error):
            return transient_error(location.root, error)
        message = error.what if isinstance(error, VeneerError) else f"{type(error).__name__}: {error}"
        for hidden, public in self._paths(location).items():
            message = message.replace(hidden, public)
        if isinstance(error, UnsafeFileError):
            reason = "unsafe_file"
        elif isinstance(error, MismatchError):
            reason = "wrong_base"
        elif "NaN" in message or "not finite" in message:
            reason = "not_finite"
        elif isinstance(error, AdapterError) and "does not state the scale" in message:
            return unusable("unstated_scale", f"{location.root}: {message}", fix=error.fix)
        else:
            reason = "shape_mismatch" if self._is_readable(location) else "corrupt"
        return unusable(reason, f"{location.root}: {message}")

    def _paths(self, location: AdapterLocation) -> dict[str, str]:
        """Return a mapping from local paths to the texts that replace them in messages to clients."""
        paths = {} if location.path is None else {str(location.path): location.root}
        if self.library is not None:
            paths[self.library.location] = "the library"
        if Path(self.base.name).is_absolute():
            paths[self.base.name] = self.base.short_name
        return paths

    def _is_readable(self, location: AdapterLocation) -> bool:
        """Return whether the files are a readable adapter, of any base."""
        try:
            reader.read(self._files(location))
        except Exception:  # the files exist, so an error means that they are bad
            return False
        return True


def _folder(folder: str | Path) -> Path:
    """Return the resolved folder. Raises ConfigError if it does not exist."""
    try:
        resolved = Path(folder).expanduser().resolve(strict=True)
    except (OSError, RuntimeError):
        resolved = None
    if resolved is None or not resolved.is_dir():
        fix = "create the folder, or leave the option out"
        raise ConfigError(f"there is no folder {folder}", where="--allow-folder", fix=fix)
    return resolved


def _unservable(location: AdapterLocation, problems: list[str]) -> Refused:
    text = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    low = text.lower()
    reason = "form_unsupported"
    if "dora" in low:
        reason = "dora_unsupported"
    elif any(words in low for words in ("full cop", "modules_to_save", "token rows")):
        reason = "modules_to_save_unsupported"
    return unusable(reason, f"{location.root} cannot be served with its full effect: {text}")
