"""Folders of mixes that vLLM serves without loss, under names that identify the mix.

| mix | name | folder |
| --- | ---- | ------ |
| one adapter at strength 1 | `veneer-` and its digest | the adapter's own in the library, or a converted copy |
| any other | `veneer-mix-` and the mix's digest | one adapter of summed rank, Σ strength·ΔW |

vLLM keys its prefix caches by adapter name, and remembers each name until vLLM ends. Each name here always
means the same weights, so a deleted folder can be written again under its old name.

Every distinct vector of strengths is a separate mix. `Mixes` therefore limits the mixes per tenant and the
total size of the folders. Over a limit, it deletes the least recently used folder, but never a folder with
running requests or one used in the last `grace` seconds. Several veneer servers can share the parent folder:
modification times record the last use by any of them. Each server counts only its own tenants' mixes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
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
from veneer.models.home import veneer_home
from veneer.serve.request import DigestMix, Refused, mix_digest

_PLAIN_INITS = {"gaussian", "eva", "orthogonal"}


def is_weighted(mix: DigestMix) -> bool:
    """Return whether a mix is neither the base nor one adapter at strength 1."""
    return len(mix) > 1 or any(strength != 1 for _, strength in mix)


def served_name(mix: DigestMix) -> str:
    """Return the name of a mix in vLLM."""
    if is_weighted(mix):
        return f"veneer-mix-{mix_digest(mix).hex()[:32]}"
    return f"veneer-{mix[0][0].removeprefix('sha256:')}"


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


class Mixes:
    """The folders of weighted mixes, with limits on their number and size.

    `files`: adapter digest -> path of its files. `each`: maximum mixes per tenant. `limit_bytes`: maximum
    size of all folders. `grace`: seconds for which a folder is kept after its last use, because vLLM could
    still be loading it.
    """

    def __init__(
        self,
        files: Callable[[str], Path],
        folder: Path,
        *,
        each: int = 64,
        limit_bytes: int = 16 << 30,
        grace: float = 60.0,
    ) -> None:
        self.files, self.folder = files, folder
        self.each, self.limit_bytes, self.grace = each, limit_bytes, grace
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
        if not (self.folder / name / CARD_FILE).is_file():
            with self._writing:
                servable([(self.files(digest), strength) for digest, strength in mix], name, self.folder)
                self._collect()
        with contextlib.suppress(FileNotFoundError):  # another veneer server has deleted it; the request is retried
            os.utime(self.folder / name)

    def _collect(self) -> None:
        """Delete dropped folders, and the least recently used folders over the size limit."""
        folders = []
        for path in self.folder.glob("veneer-mix-*"):
            with contextlib.suppress(OSError):  # another veneer server has deleted it
                folders.append((path.stat().st_mtime, sum(f.stat().st_size for f in path.iterdir()), path))
        total = sum(size for _, size, _ in folders)
        for used, size, path in sorted(folders):
            over = path.name in self._dropped or total > self.limit_bytes
            if not over or self._running[path.name] or used > time.time() - self.grace:
                continue
            total -= size
            self._dropped.discard(path.name)
            renamed = path.with_name(f".gone-{secrets.token_hex(8)}")
            with contextlib.suppress(OSError):
                os.rename(path, renamed)  # rename first, so that no process finds a partially deleted folder
                shutil.rmtree(renamed, ignore_errors=True)
