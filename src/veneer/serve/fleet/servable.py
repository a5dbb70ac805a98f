"""A mix as one folder that another server loads with its full effect, under a name that only this mix can have.

    one adapter, strength 1, as every vLLM reads it     the adapter's own folder; nothing is copied
    anything else that has the form of pairs            Σ strength·ΔW, one adapter of summed rank, in a cache

A server keys its caches of prompts by the adapter's name and keeps names for ever. The names here come from the mix's
digests, so that a name left over from before, or after an unload, can never mean other weights.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.core.adapter import Adapter, scale_of
from veneer.core.mix import mix as mixed
from veneer.formats import peft
from veneer.formats.card import CARD_FILE
from veneer.formats.convert import write
from veneer.formats.placing import leaves_of
from veneer.formats.read import read
from veneer.formats.write_folded import refuse_unservable
from veneer.formats.write_names import Refusals
from veneer.serve.request import Mix, mix_digest

__all__ = ["Servable", "problems", "servable", "served_name", "serves_as_it_is"]

_PLAIN_INITS = {"gaussian", "eva", "orthogonal"}


@dataclass(frozen=True)
class Servable:
    """`rank`: what the server's --max-lora-rank must reach. `copied`: whether the folder was made for serving."""

    folder: Path
    rank: int
    copied: bool


def served_name(mix: Mix) -> str:
    """The name of a mix on another server; 128 bits, because whoever can add adapters may try to make two collide."""
    return f"veneer-{mix_digest(mix).hex()[:32]}"


def servable(parts: Sequence[tuple[Path, float]], name: str, cache: Path) -> Servable:
    """The folder for a mix of adapters, each the path of its files. `name`: the mix's `served_name`, under which
    `cache` keeps what is written.

    Raises AdapterError with every module that vLLM has no place for, and the way out."""
    own, made = parts[0][0], cache / name
    if (made / CARD_FILE).is_file():  # written last, so the folder is whole
        return Servable(made, int(json.loads((made / peft.CONFIG_FILE).read_text(encoding="utf-8"))["r"]), True)
    read_in = [(read(path).adapter, strength) for path, strength in parts]
    adapter = read_in[0][0]
    if len(parts) == 1 and parts[0][1] == 1 and serves_as_it_is(own, adapter):
        return Servable(own, max(p.rank for p in adapter.pairs.values()), False)
    if len(parts) > 1 or parts[0][1] != 1:
        adapter = mixed(read_in).adapter
    written = write(adapter, made, "vllm")
    return Servable(made, max(written.ranks), True)


def problems(adapter: Adapter) -> list[str]:
    """What vLLM has no place for in any layout, each with its modules; [] for an adapter that a fleet can serve. A
    catalog asks this before it knows the name."""
    refused: Refusals = defaultdict(list)
    refuse_unservable(adapter, leaves_of(adapter), "vLLM", refused)
    return [f"{reason}: {', '.join(sorted(modules)[:3])}" for reason, modules in refused.items()]


def serves_as_it_is(folder: Path, adapter: Adapter) -> bool:
    """Whether any vLLM gets exactly this adapter from its own folder: one scale, by the formula that it knows.

    What vLLM cannot have in any layout is an AdapterError where it is written, with the reasons."""
    if not (folder / peft.CONFIG_FILE).is_file() or not (folder / peft.TENSOR_FILE).is_file():
        return False
    config = json.loads((folder / peft.CONFIG_FILE).read_text(encoding="utf-8"))
    init = config.get("init_lora_weights", True)
    if config.get("peft_type") != "LORA" or (isinstance(init, str) and init.lower() not in _PLAIN_INITS):
        return False
    if any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "layer_replication")):
        return False
    rank = config["r"]
    scale = scale_of(config["lora_alpha"], rank, bool(config.get("use_rslora")))
    return not problems(adapter) and all(p.rank == rank and p.scale == scale for p in adapter.pairs.values())
