"""Mixes as folders that other servers load with full effect, under names unique to the mix.

    one plain adapter, strength 1, for any vLLM  the adapter's own folder; nothing is copied
    any other mix of low-rank pairs              Σ strength·ΔW, one adapter of summed rank: CACHE/veneer-3fa9…

A server keys its prompt caches by adapter name and remembers names forever. Names here derive from the mix's
digests, so a stale name can never mean other weights.

Every distinct vector of strengths is a separate mix, so a client that sends a new one with each request
creates a folder and a loaded adapter each time. Two limits bound this: a tenant has at most `each` mixes at a
time, and all folders together take at most `limit_bytes`. Over the first limit, the tenant's least recently
used mix is removed, over the second, anybody's; never a mix with running requests. A removed mix is unloaded
from the replicas before its folder is deleted, because servers reread the folder after they evict the
adapter.

Several front doors can share the cache: a folder is renamed before it is deleted, and a front door that still
needs the mix writes it again. Each front door counts its own tenants.

Handles adapters and folders; the fleet knows which replica has which.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from veneer.serve.request import DigestMix, Refused, mix_digest

_PLAIN_INITS = {"gaussian", "eva", "orthogonal"}


@dataclass(frozen=True)
class Servable:
    """A folder to serve. `rank`: the minimum for the server's --max-lora-rank."""

    folder: Path
    rank: int


def served_name(mix: DigestMix) -> str:
    """The name of a mix on another server.

    128 bits, because uploaders could try to force collisions.
    """
    return f"veneer-{mix_digest(mix).hex()[:32]}"


def servable(parts: Sequence[tuple[Path, float]], name: str, cache: Path) -> Servable:
    """Write the folder for a mix of adapters, given as (path of its files, strength).

    `name`: the mix's `served_name`, its folder in `cache`. Raises AdapterError with every module that vLLM
    does not support, and a fix.
    """
    own, made = parts[0][0], cache / name
    if (made / CARD_FILE).is_file():  # written last, so the folder is complete
        return Servable(made, int(json.loads((made / CONFIG_FILE).read_text(encoding="utf-8"))["r"]))
    read_in = [(read(path).adapter, strength) for path, strength in parts]
    adapter = read_in[0][0]
    if len(parts) == 1 and parts[0][1] == 1 and _serves_as_it_is(own, adapter):
        return Servable(own, max(p.rank for p in adapter.pairs.values()))
    if len(parts) > 1 or parts[0][1] != 1:
        adapter = mixed(read_in).adapter
    written = write(adapter, made, "vllm")
    return Servable(made, max(written.ranks))


def vllm_problems(adapter: Adapter) -> list[str]:
    """The parts of an adapter that vLLM does not support in any layout, with modules.

    [] if a fleet can serve the adapter.

    A catalog checks this before it registers a name.
    """
    refused: Refusals = defaultdict(list)
    refuse_unservable(adapter, changes_by_module(adapter), "vLLM", refused)
    return [f"{reason}: {', '.join(sorted(modules)[:3])}" for reason, modules in refused.items()]


def _serves_as_it_is(folder: Path, adapter: Adapter) -> bool:
    """Whether any vLLM reads exactly this adapter from its own folder.

    True for a single scale, by vLLM's formula. Adapters that vLLM supports in no layout raise AdapterError
    later, when written.
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


# -- which exist, who uses them, which are removed first ---------------------------------------------------------------


def is_made(mix: DigestMix) -> bool:
    """Whether a mix is client-chosen: anything but one adapter at strength 1."""
    return len(mix) > 1 or any(strength != 1 for _, strength in mix)


def rendezvous(name: str, place: str) -> bytes:
    """The hash that ranks replicas for a mix.

    Rendezvous hashing (Thaler and Ravishankar 1998). A mix goes to the replicas with the highest values. All
    front doors agree, and adding or removing a replica moves only its own mixes.
    """
    return hashlib.sha256(f"{place}\0{name}".encode()).digest()


class Folders:
    """The folders of mixes, with limits.

    `each`: mixes per tenant. `limit_bytes`: size of all folders in `cache`. `grace`: seconds for which a new
    folder is kept, because another front door may be about to load it.
    """

    def __init__(self, cache: Path, *, limit_bytes: int = 16 << 30, each: int = 64, grace: float = 60.0) -> None:
        self.cache, self.limit_bytes, self.each, self.grace = cache, limit_bytes, each, grace
        self._used: dict[str, dict[str, float]] = {}
        """Name of a mix -> tenant -> time of its last request, in seconds since the epoch."""

    def use(self, name: str, tenant: str, busy: Callable[[str], bool]) -> list[str]:
        """Record a tenant's use of a mix.

        Returns mixes dropped for it that nobody else uses. Raises Refused (429) if the tenant's maximum of
        mixes all have running requests.
        """
        own = {n: by[tenant] for n, by in self._used.items() if tenant in by and n != name}
        over = max(0, len(own) + 1 - self.each)
        idle = sorted((n for n in own if not busy(n)), key=lambda n: own[n])
        if over > len(idle):
            raise Refused(
                f"requests are running with {self.each} different mixes, as many as a tenant may have",
                status=429,
                code="overloaded",
                fix="wait for one of them, or ask for a mix that is there",
            )
        given_up = []
        for old in idle[:over]:
            del self._used[old][tenant]
            if not self._used[old]:
                del self._used[old]
                given_up.append(old)
        self._used.setdefault(name, {})[tenant] = time.time()
        return given_up

    def used(self, name: str) -> bool:
        return name in self._used

    def last_used(self) -> dict[str, float]:
        """Name -> time of the last use by anybody.

        Call on the event loop, where requests change it.
        """
        return {name: max(by.values()) for name, by in self._used.items()}

    def forget(self, names: Iterable[str]) -> None:
        """Forget mixes that are about to be deleted."""
        for name in names:
            self._used.pop(name, None)

    def excess(self, busy: Callable[[str], bool], last_used: Mapping[str, float]) -> list[str]:
        """The names to remove to stay within the size limit, least recently used first.

        Excludes busy and newly written mixes. Reads the disk: call in a thread.
        """
        there = self._there(last_used)
        size, now, names = sum(of for _, _, of in there), time.time(), []
        for name, used, of in sorted(there, key=lambda found: found[1]):
            if size <= self.limit_bytes:
                break
            if not busy(name) and used < now - self.grace:
                size -= of
                names.append(name)
        return names

    def delete(self, names: Iterable[str]) -> None:
        """Delete folders that no replica has loaded. Writes the disk: call in a thread."""
        for name in names:
            self._delete(self.cache / name)

    def _there(self, last_used: Mapping[str, float]) -> list[tuple[str, float, int]]:
        """(name, time of last use, bytes) of each folder."""
        found = []
        for folder in self.cache.glob("veneer-*"):
            try:
                size = sum(f.stat().st_size for f in folder.iterdir())
                made = folder.stat().st_mtime
            except OSError:  # deleted by another front door meanwhile
                continue
            found.append((folder.name, max(made, last_used.get(folder.name, made)), size))
        return found

    def _delete(self, folder: Path) -> None:
        """Rename first, atomically, so that nobody finds a partial folder."""
        aside = folder.with_name(f".gone-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
