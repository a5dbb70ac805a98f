"""Folders of mixes that vLLM serves without loss, under names that identify the mix.

| mix | name | folder |
| --- | ---- | ------ |
| one adapter at strength 1 | `veneer-` and its digest | the adapter's own in the library, or a converted copy |
| any other | `veneer-mix-` and the mix's digest | one adapter of summed rank, Σ strength·ΔW |

vLLM keys its prefix caches by adapter name, and remembers each name until vLLM ends. Each name here always
means the same weights, so a deleted folder can be written again under its old name.

If the library is on S3, each mix is also stored there, in `mixes/` beside the adapters, and the plug-in in
vLLM copies the mix into its own folder. With a library in a folder, vLLM reads the shared folder.

Every distinct vector of strengths is a separate mix. `Mixes` therefore limits the mixes per tenant, and the
age and total size of the folders. When it writes a new mix, it deletes mixes over a limit, least recently used
first, but never a mix with running requests or one used in the last `grace` seconds. Several veneer servers
can share the folder and the library: modification times record the last use by any of them. Each server
counts only its own tenants' mixes. A copy in vLLM's folder is deleted when the first vLLM of the machine
starts, because a running vLLM can read the copy at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from veneer.core.adapter import Adapter, scale_of
from veneer.core.mix import mix as mixed
from veneer.formats.card import CARD_FILE
from veneer.formats.comparison import Refusals
from veneer.formats.convert import write
from veneer.formats.folder import CONFIG_FILE, TENSOR_FILE
from veneer.formats.module_tensors import changes_by_module
from veneer.formats.read import read
from veneer.formats.server_export import refuse_unservable
from veneer.library.library import library_location, open_library
from veneer.library.store import RemoteStore, hash_file
from veneer.models.home import veneer_home
from veneer.serve.request import DigestMix, Refused, is_weighted, served_name

_STORED = "mixes"
"""Folder of the mixes in a remote library's store."""
REFRESH = 300.0
"""Seconds after which another use of a mix is recorded in a remote store."""
_PLAIN_INITS = {"gaussian", "eva", "orthogonal"}


def mix_folder() -> Path:
    """Return the folder of mixes and converted adapters, which veneer and vLLM share."""
    return Path(os.environ.get("VENEER_VLLM_CACHE") or veneer_home() / "cache" / "served")


def servable(parts: Sequence[tuple[Path, float]], name: str, cache: Path) -> Path:
    """Return a mix's folder for vLLM; write the folder if necessary.

    `parts`: (path of an adapter's files, strength). `name`: the mix's `served_name`, and its folder's name in
    `cache`. Raises AdapterError with every module that vLLM does not support, and a fix.
    """
    first_path, written = parts[0][0], cache / name
    if (written / CARD_FILE).is_file():  # written last, so the folder is complete if this file exists
        return written
    adapters = [(read(path).adapter, strength) for path, strength in parts]
    adapter = adapters[0][0]
    weighted = len(parts) > 1 or parts[0][1] != 1
    if not weighted and _serves_as_it_is(first_path, adapter):
        return first_path
    write(mixed(adapters).adapter if weighted else adapter, written, "vllm")
    return written


def vllm_problems(adapter: Adapter) -> list[str]:
    """Return the parts of an adapter that vLLM cannot serve in any layout, with the names of their modules.

    A catalog calls this function before it registers a name.
    """
    refused: Refusals = defaultdict(list)
    refuse_unservable(adapter, changes_by_module(adapter), "vLLM", refused)
    return [f"{reason}: {', '.join(sorted(modules)[:3])}" for reason, modules in refused.items()]


def _serves_as_it_is(folder: Path, adapter: Adapter) -> bool:
    """Return whether every vLLM version loads exactly this adapter from the adapter's own folder.

    This requires that all modules have the same rank and scale, and that vLLM's formula gives this scale. If
    vLLM cannot serve the adapter in any layout, returns False; writing the folder then raises AdapterError.
    """
    if not (folder / CONFIG_FILE).is_file() or not (folder / TENSOR_FILE).is_file():
        return False
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    init = config.get("init_lora_weights", True)
    if config.get("peft_type") != "LORA" or (isinstance(init, str) and init.lower() not in _PLAIN_INITS):
        return False
    if any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "layer_replication")):
        return False
    rank = config["r"]
    scale = scale_of(config["lora_alpha"], rank, bool(config.get("use_rslora")))
    return not vllm_problems(adapter) and all(p.rank == rank and p.scale == scale for p in adapter.pairs.values())


def fetch_mix(name: str) -> bool:
    """Copy a mix from the library's remote store into this machine's folder, for vLLM.

    Returns whether the store has the mix. Raises UnavailableError.
    """
    folder = mix_folder()
    with open_library() as library, tempfile.TemporaryDirectory(dir=_created(folder), prefix=".new-") as new:
        files = [path for path, _, _ in library.store.walk(f"{_STORED}/{name}/")]
        if not any(path.endswith(f"/{CARD_FILE}") for path in files):
            return False
        for path in files:
            (Path(new) / Path(path).name).write_bytes(library.store.read(path))
        os.chmod(new, 0o755)
        with contextlib.suppress(OSError):  # another process has copied the mix
            os.rename(new, folder / name)
            Path(new).mkdir()  # for TemporaryDirectory to remove
    return True


def drop_copies() -> None:
    """Delete copied mixes, unless a vLLM that can read them is running on this machine.

    Keeps a shared lock on the folder until the process ends."""
    import fcntl

    if "://" not in library_location():  # this folder holds the original mixes
        return
    lock = os.open(_created(mix_folder()), os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for copy in mix_folder().glob("veneer-mix-*"):
            shutil.rmtree(copy, ignore_errors=True)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_SH)


def _created(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Mixes:
    """The folders of weighted mixes, with limits on their number, size and age.

    `files`: adapter digest -> path of its files. `each`: maximum mixes per tenant. `limit_bytes`: maximum
    size of all folders. `days`: how long a mix is kept after its last use. `grace`: seconds for which a mix is
    kept over the other limits, because vLLM could still be loading it. `store`: the library's store, if it is
    not a folder.
    """

    def __init__(
        self,
        files: Callable[[str], Path],
        folder: Path,
        *,
        each: int = 64,
        limit_bytes: int = 16 << 30,
        days: float = 7.0,
        grace: float = 60.0,
        store: RemoteStore | None = None,
    ) -> None:
        self.files, self.folder = files, folder
        self.each, self.limit_bytes, self.days, self.grace, self.store = each, limit_bytes, days, grace, store
        self.stored: dict[str, float] = {}
        """Name -> when this server last stored the mix in `store`, or its last use."""
        self._tenants: dict[str, dict[str, None]] = defaultdict(dict)
        """Tenant -> names of its mixes, least recently used first."""
        self._running: Counter[str] = Counter()
        self._dropped: set[str] = set()
        self._writing = threading.Lock()

    @contextlib.contextmanager
    def using(self, mix: DigestMix, tenant: str) -> Iterator[None]:
        """Count a running request of a tenant inside the block. Call on the event loop.

        If the tenant has too many mixes, drops the least recently used one. Raises Refused (429) if all of
        the tenant's mixes have running requests.
        """
        if not is_weighted(mix):
            yield
            return
        name, tenant_mixes = served_name(mix), self._tenants[tenant]
        tenant_mixes.pop(name, None)
        if len(tenant_mixes) >= self.each:
            idle = next((n for n in tenant_mixes if not self._running[n]), None)
            if idle is None:
                raise Refused(
                    f"requests are running with {self.each} different mixes, the most that a tenant can have",
                    status=429,
                    code="overloaded",
                    fix="wait for a request to finish, or use one of these mixes",
                )
            del tenant_mixes[idle]
            if not any(idle in names for names in self._tenants.values()):
                self._dropped.add(idle)
        tenant_mixes[name] = None
        self._dropped.discard(name)
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1
            self._running += Counter()  # removes zeros

    def write(self, mix: DigestMix) -> None:
        """Write a mix's folder unless it exists, then delete folders that exceed the limits. Blocking.

        Raises AdapterError if vLLM does not support an adapter.
        """
        name = served_name(mix)
        new = not (self.folder / name / CARD_FILE).is_file()
        if new:
            with self._writing:
                servable([(self.files(digest), strength) for digest, strength in mix], name, self.folder)
        with contextlib.suppress(FileNotFoundError):  # another veneer server has deleted it; the request is retried
            os.utime(self.folder / name)
            if self.store is not None and self.stored.get(name, 0.0) < time.time() - REFRESH:
                self._store(self.store, name)
        if new:
            with self._writing:
                self._collect()

    def _store(self, store: RemoteStore, name: str) -> None:
        """Store a mix's files, the card last. For a stored mix, write only the card again, which records the use."""
        files = sorted((self.folder / name).iterdir(), key=lambda file: file.name == CARD_FILE)
        for file in files[:-1]:
            store.put(f"{_STORED}/{name}/{file.name}", file, hash_file(file))
        store.replace(f"{_STORED}/{name}/{CARD_FILE}", files[-1].read_bytes())
        self.stored[name] = time.time()

    def _collect(self) -> None:
        """Delete dropped and old mixes, and the least recently used mixes over the size limit."""
        dropped, self._dropped = self._dropped, set()
        kept: set[str] = set()
        if self.store is not None:
            found: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
            for path, size, changed in self.store.walk(f"{_STORED}/"):
                found[path.split("/")[1]].append((changed, size, path))
            stored = [(max(f)[0], sum(size for _, size, _ in f), name) for name, f in found.items()]
            for name in self._excess(stored, dropped, self.grace + 2 * REFRESH, kept):
                for _, _, path in sorted(found[name], key=lambda file: not file[2].endswith(CARD_FILE)):
                    self.store.delete(path)
        folders = []
        for folder in self.folder.glob("veneer-mix-*"):
            with contextlib.suppress(OSError):  # another veneer server has deleted it
                folders.append((folder.stat().st_mtime, sum(f.stat().st_size for f in folder.iterdir()), folder.name))
        for name in self._excess(folders, dropped, self.grace, kept):
            renamed = self.folder / f".gone-{secrets.token_hex(8)}"
            with contextlib.suppress(OSError):
                os.rename(self.folder / name, renamed)  # first, so that no process finds a partially deleted folder
                shutil.rmtree(renamed, ignore_errors=True)
        self._dropped |= kept

    def _excess(
        self, mixes: list[tuple[float, int, str]], dropped: set[str], grace: float, kept: set[str]
    ) -> Iterator[str]:
        """Yield the names to delete. `mixes`: (last use, bytes, name). Adds dropped mixes that stay to `kept`."""
        total, now = sum(size for _, size, _ in mixes), time.time()
        for used, size, name in sorted(mixes):
            over = name in dropped or total > self.limit_bytes or used < now - 86_400 * self.days
            if over and not self._running[name] and used <= now - grace:
                total -= size
                yield name
            elif name in dropped:
                kept.add(name)
