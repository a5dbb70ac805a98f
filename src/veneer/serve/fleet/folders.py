"""Mixes as folders that other servers load with their full effect, under names that only these mixes can have.

    one adapter, strength 1, as every vLLM reads it     the adapter's own folder; nothing is copied
    anything else that has the form of pairs            Σ strength·ΔW, one adapter of summed rank: CACHE/veneer-3fa9…

A server keys its caches of prompts by the adapter's name and keeps names for ever. The names here come from the mix's
digests, so that a name left over from before, or after an unload, can never mean other weights.

Every distinct vector of strengths is a mix of its own, so a client that sends another one with each request makes a
folder, and an adapter on replicas, with each. Two bounds keep that: a tenant has at most `each` mixes at a time, and
all folders together take at most `limit_bytes`. Over the first goes what that tenant itself used longest ago, over the
second what anybody did; never what a request runs with. What goes is unloaded from the replicas before its folder is
deleted, because servers read it again when their own memory was short.

Several front doors may share the cache: a folder is moved aside before it is deleted, and whoever still asks for its
mix makes it anew. Each door counts its own tenants.

Knows adapters and folders; what is on which replica is the fleet's.
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
from veneer.formats.leaves import leaves_of
from veneer.formats.read import read
from veneer.formats.servers import refuse_unservable
from veneer.serve.request import DigestMix, Refused, mix_digest

_PLAIN_INITS = {"gaussian", "eva", "orthogonal"}


@dataclass(frozen=True)
class Servable:
    """`rank`: what the server's --max-lora-rank must reach."""

    folder: Path
    rank: int


def served_name(mix: DigestMix) -> str:
    """The name of a mix on another server; 128 bits, because whoever can add adapters may try to make two collide."""
    return f"veneer-{mix_digest(mix).hex()[:32]}"


def servable(parts: Sequence[tuple[Path, float]], name: str, cache: Path) -> Servable:
    """The folder for a mix of adapters, each the path of its files. `name`: the mix's `served_name`, under which
    `cache` keeps what is written.

    Raises AdapterError with every module that vLLM has no place for, and the way out."""
    own, made = parts[0][0], cache / name
    if (made / CARD_FILE).is_file():  # written last, so the folder is whole
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
    """What vLLM has no place for in any layout, each with its modules; [] for an adapter that a fleet can serve. A
    catalog asks this before it knows the name."""
    refused: Refusals = defaultdict(list)
    refuse_unservable(adapter, leaves_of(adapter), "vLLM", refused)
    return [f"{reason}: {', '.join(sorted(modules)[:3])}" for reason, modules in refused.items()]


def _serves_as_it_is(folder: Path, adapter: Adapter) -> bool:
    """Whether any vLLM gets exactly this adapter from its own folder: one scale, by the formula that it knows.

    What vLLM cannot have in any layout is an AdapterError where it is written, with the reasons."""
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


# -- which there are, who uses them, and which go first ----------------------------------------------------------------


def is_made(mix: DigestMix) -> bool:
    """Whether a mix is more than one adapter as it is: a client chose it, and there is no end to how many it may."""
    return len(mix) > 1 or any(strength != 1 for _, strength in mix)


def rendezvous(name: str, place: str) -> bytes:
    """A mix goes to the replicas with the highest of these (rendezvous hashing, Thaler and Ravishankar 1998): every
    front door finds the same ones, and a replica that comes or goes moves nothing but its own."""
    return hashlib.sha256(f"{place}\0{name}".encode()).digest()


class Folders:
    """`each`: mixes of one tenant; `limit_bytes`: of all folders in `cache`; `grace`: seconds for which a new folder is
    left alone, as another front door may be about to load it."""

    def __init__(self, cache: Path, *, limit_bytes: int = 16 << 30, each: int = 64, grace: float = 60.0) -> None:
        self.cache, self.limit_bytes, self.each, self.grace = cache, limit_bytes, each, grace
        self._used: dict[str, dict[str, float]] = {}
        """Name of a mix -> tenant -> when it last asked for it, in seconds since the epoch."""

    def use(self, name: str, tenant: str, busy: Callable[[str], bool]) -> list[str]:
        """Note that a tenant asks for a mix. Returns what the tenant gives up for it and nobody else uses.

        Raises Refused(429) where requests are running with as many mixes as a tenant may have."""
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
        """Name -> when anybody last asked for it. What changes as requests come is read where they come."""
        return {name: max(by.values()) for name, by in self._used.items()}

    def forget(self, names: Iterable[str]) -> None:
        """What is about to be deleted."""
        for name in names:
            self._used.pop(name, None)

    def excess(self, busy: Callable[[str], bool], last_used: Mapping[str, float]) -> list[str]:
        """The names that go for all folders to take at most the limit, the longest unused first, and none that is busy
        or was made a moment ago. Reads the disk alone: call it in a thread."""
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
        """What nobody loads any more, from the disk alone: call it in a thread."""
        for name in names:
            self._delete(self.cache / name)

    def _there(self, last_used: Mapping[str, float]) -> list[tuple[str, float, int]]:
        """(name, when it was last used, bytes) of each folder."""
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
        """Aside first, in one step: nobody can find half of it."""
        aside = folder.with_name(f".gone-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
