"""vLLM plugin: `vllm serve` resolves adapter names in the veneer library.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 64
    POST /v1/chat/completions {"model": "support@prod", …}

vLLM imports this module through the entry point `vllm.general_plugins` in each of its processes and calls
`register`. The plugin then looks up unknown names in the library (VENEER_LIBRARY, VENEER_LIBRARY_INDEX). If
the adapter belongs to the base and vLLM serves it without loss, the name resolves to the adapter's folder.
Otherwise it resolves to None: vLLM returns a 404, and the log has the reason. The plugin also resolves the
names that a veneer server uses (`mixes`).

vLLM remembers what a name means until the name is unloaded, and keys its prefix cache by adapter name. So a
name whose version can change (`support`, `support@prod`) resolves to a name that includes the version,
`support@prod=support@3`: after the name is unloaded and its alias moved, no cached prompt of the old version
can match.

Runs in vLLM's environment, which must also have SQLAlchemy. Implements vLLM's resolver interface; `mixes`
provides the folders.
"""

from __future__ import annotations

import asyncio
import logging
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import AdapterError, ConfigError, VeneerError

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.library.queries import Version

log = logging.getLogger("vllm.veneer")  # vLLM shows only logs below its own logger

_Found = tuple[str, Path]
"""The adapter's name in vLLM, and its folder."""


def register() -> None:
    """Register the resolver. vLLM calls this function in every process, possibly more than once."""
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # type: ignore[import-not-found]

    from veneer.serve.fleet.mixes import drop_copies

    drop_copies()

    class VeneerResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            resolved = await asyncio.to_thread(_resolve_or_warn, base_model_name, lora_name)
            # vLLM replaces this number with its own
            return None if resolved is None else LoRARequest(resolved[0], 1, str(resolved[1]))

    if "veneer" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver("veneer", VeneerResolver())


def _resolve_or_warn(base: str, name: str) -> _Found | None:
    try:
        return resolve_name(base, name)
    except (VeneerError, OSError) as error:
        log.warning("veneer does not serve %r: %s", name[:200], error)
        return None


def resolve_name(base: str, name: str) -> _Found:
    """Return the adapter that `name` means in the library, for vLLM's `base` (a folder or a hub id).

    Raises ConfigError for text that is not a reference (such as a path), and AdapterError for an adapter that
    is not in the library, belongs to another base, or would lose part of its effect in vLLM.
    """
    from veneer.formats.card import CARD_FILE
    from veneer.formats.read import read
    from veneer.library.library import library_location, open_library
    from veneer.library.names import parse_reference
    from veneer.serve.fleet.mixes import fetch_mix, mix_folder, servable
    from veneer.serve.request import make_mix, served_digest, served_name

    if re.fullmatch("veneer-mix-[0-9a-f]{32}", name):  # a veneer server has written the mix's folder
        folder = mix_folder() / name
        if not (folder / CARD_FILE).is_file() and not ("://" in library_location() and fetch_mix(name)):
            fix = "set VENEER_VLLM_CACHE to the veneer server's folder, or keep the library on S3"
            raise AdapterError(f"there is no folder {folder}", fix=fix)
        _check_modules(base, name, read(folder).adapter)
        return name, folder
    exact = served_digest(name)
    reference = exact or name
    parse_reference(reference)
    location = library_location()
    if "://" not in location and not Path(location).is_dir():  # opening the library would create it
        raise ConfigError(f"there is no library at {location}", fix="set VENEER_LIBRARY")
    with open_library() as library:
        version = library.find(reference)
        path = library.resolve(version.reference)
    adapter = read(path).adapter
    _check_base(base, version, adapter)
    mix = make_mix([(version.digest or f"sha256:{version.entry}", 1.0)])
    folder = servable([(path, 1.0)], served_name(mix), mix_folder())
    log.info("veneer: %s is %s, from %s", name, version.reference, folder)
    return name if exact or name == version.reference else f"{name}={version.reference}", folder


def _check_base(base: str, version: Version, adapter: Adapter) -> None:
    """Raise AdapterError if the adapter's modules or recorded fingerprint belong to another base."""
    if version.kind == "image":
        raise AdapterError(f"{version.reference} is an adapter of an image model, but vLLM serves language models")
    _check_modules(base, version.reference, adapter)
    files = _base_files(base)
    if files and version.fingerprint and version.fingerprint != (base_fingerprint := _fingerprint(files)):
        raise AdapterError(
            f"{version.reference} belongs to another base\n"
            f"  its base:  {version.fingerprint} ({version.base})\n"
            f"  this base: {base_fingerprint} ({base})",
            fix="serve the adapter's own base",
        )


def _check_modules(base: str, name: str, adapter: Adapter) -> None:
    """Raise AdapterError if a module's name or shape differs from the base's.

    Skips the check if the base's files are not on this machine or have an unknown layout.
    """
    files = _base_files(base)
    if files is None:
        log.warning("veneer: the files of %s are not on this machine, so adapters are not checked against it", base)
        return
    shapes = _shapes(files)
    problems = []
    for module, pair in adapter.pairs.items():
        shape = shapes.get(_tail(f"{module}.weight"))
        if module == "lm_head" and shape is None:  # tied
            shape = shapes.get("embed_tokens.weight")
        pair_shape = (
            (pair.A.shape[1], pair.B.shape[0]) if pair.kind == "embedding" else (pair.B.shape[0], pair.A.shape[1])
        )
        if shape is None and pair.kind in ("linear", "embedding"):
            problems.append(f"{module}: the base has no such module")
        elif shape is not None and pair.kind in ("linear", "embedding") and shape not in (pair_shape, pair_shape[::-1]):
            problems.append(f"{module}: {pair_shape[0]}×{pair_shape[1]}, but the base's is {shape[0]}×{shape[1]}")
    if problems:
        lines = "\n".join(f"  - {line}" for line in problems[:6])
        raise AdapterError(f"{name} does not fit {base} in {len(problems)} modules:\n{lines}")


@cache
def _base_files(base: str) -> Path | None:
    """Return the folder of vLLM's base, or None if not on this machine. Never contacts the hub."""
    folder = Path(base).expanduser()
    if (folder / "config.json").is_file():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(base, "config.json")
    except ValueError:  # not a hub id
        return None
    return Path(file).parent if isinstance(file, str) else None


@cache
def _shapes(files: Path) -> dict[str, tuple[int, ...]]:
    from veneer.files.weights import tensor_table

    return {_tail(tensor.name): tensor.shape for tensor in tensor_table(files)}


def _tail(name: str) -> str:
    """Return a parameter's name without the prefix before the decoder.

    The prefix differs between files and transformers."""
    at = name.find("layers.")
    return name[at:] if at >= 0 else name.removeprefix("model.")


@cache
def _fingerprint(files: Path) -> str:
    from veneer.models.fingerprint import fingerprint
    from veneer.models.text.base import read_base_config

    return fingerprint(files, read_base_config(files))
