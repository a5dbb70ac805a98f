"""Find adapters by name, load them and attach them to a base.

`formats` and `models` do not import each other, so the code that needs both is here. This module finds an
adapter, reads it, checks that it belongs to the base and attaches it with its strength.

    support:0.8            an adapter at strength 0.8; without `:number` the strength is 1
    runs/first             a folder with adapter_config.json, or a run's folder with a PEFT folder `adapter/`
    style.safetensors      a file in any format that `formats` reads
    support, support@2,    if no such path exists, an adapter in the library: latest version, version 2, or
    acme/support@prod        the version that an alias points to, with or without a namespace
    sha256:3fa9c1          the adapter whose digest starts with these digits
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Unpack

from veneer.core.adapter import check_strength
from veneer.errors import AdapterError, ConfigError, MismatchError, UnsafeFileError, nearest, quoted
from veneer.formats import peft
from veneer.formats import read as reader
from veneer.formats.card import CARD_FILE, read_card
from veneer.formats.folder import CONFIG_FILE
from veneer.formats.reading import Reading
from veneer.formats.strengths import split_factors, split_strength
from veneer.models.image.families import family_label, is_image_family, same_family

if TYPE_CHECKING:
    from torch import nn

    from veneer.core.adapter import Adapter
    from veneer.core.attach import Attachment

AdapterSpec = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
"""An adapter by folder, file or name: "runs/a", "runs/a:0.5", Path("runs/a") or ("runs/a", 0.5)."""


class AnyBase(Protocol):
    """The attributes of a TextBase or an ImageBase that this module needs.

    Adapters attach to `model`."""

    name: str
    fingerprint: str

    @property
    def short_name(self) -> str: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def family(self) -> str: ...


def parse_spec(spec: AdapterSpec) -> tuple[str, float]:
    """Split "NAME_OR_PATH[:strength]" into the name or path and the strength.

    The default strength is 1. If the whole text is an existing path, no strength is split off. Raises
    ConfigError for an empty name or an invalid strength."""
    strength: float | None
    if isinstance(spec, tuple):
        name, strength = os.fspath(spec[0]), check_strength(quoted(os.fspath(spec[0])), spec[1])
    else:
        spec = os.fspath(spec)
        name, strength = (spec, None) if Path(spec).expanduser().exists() else split_strength(spec)
    if not name:
        raise ConfigError(
            f"{spec!r} does not name an adapter", fix="NAME_OR_PATH or NAME_OR_PATH:strength, as in runs/a:0.8"
        )
    return name, 1.0 if strength is None else strength


def adapter_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of an adapter's files: a PEFT folder, or one file.

    An existing path has precedence over a name in the library. If neither exists, raises AdapterError with
    the places searched."""
    name = os.fspath(name)
    here = Path(name).expanduser()
    for folder in (here, here / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if here.exists():
        return here  # reading this path raises a more specific error
    if here.is_symlink():
        problem = f"{name!r} is a broken or circular symlink"
        advice = "fix the link, or give the path of the folder or file"
        raise AdapterError(problem, where=f"{here.absolute()} -> {os.readlink(here)}", fix=advice)
    head, factors = split_factors(name)
    if factors and "/" not in factors:
        problem = f"there is no adapter {name!r}; the part after the @, {factors!r}, is for image bases only"
        advice = f"for a text base, give one strength: {split_strength(head)[0]}:0.8"
        raise AdapterError(problem, where=str(here.absolute()), fix=advice)
    if behind := _invalid_strength(name):
        problem = f"there is no adapter {name!r}, and {behind[1]!r} is not a strength"
        advice = f"{behind[0]}:0.8; for factors per block, add an @: {behind[0]}:0.8@text=0.5"
        raise AdapterError(problem, where=str(here.absolute()), fix=advice)
    hints = nearest(here.name, [f.name for f in here.parent.iterdir()], 1) if here.parent.is_dir() else []
    fix = f"did you mean {hints[0]}?" if hints else "give a folder, a file, or a name that `veneer library list` shows"
    if not _is_reference(name):
        raise AdapterError(f"there is no adapter {name!r}", where=str(here.absolute()), fix=fix)
    from veneer.library.library import NotInLibrary, library_location, open_library

    library_path = library_location()
    if "://" not in library_path and not Path(library_path).is_dir():  # opening would create a library
        raise AdapterError(
            f"there is no adapter {name!r}", where=f"{here.absolute()}; no library at {library_path}", fix=fix
        )
    with open_library() as library:
        try:
            return library.resolve(name)
        except AdapterError as error:
            if isinstance(error, NotInLibrary) and "/" in name:  # the name is more likely a path
                where = f"{here.absolute()}, {error.where}"
                raise AdapterError(f"there is no adapter {name!r}", where=where, fix=error.fix) from error
            if hints:
                raise AdapterError(error.what, where=f"{here.absolute()}, {error.where}", fix=fix) from error
            raise


def _invalid_strength(name: str) -> tuple[str, str] | None:
    """Return (existing path, suffix) if `name` is a path with an invalid strength.

    Otherwise returns None. The version or alias in a library reference is not an invalid strength."""
    if _is_reference(name):
        return None
    for separator in (":", "@"):
        head, separator_found, behind = name.partition(separator)
        if separator_found and head and Path(head).expanduser().exists():
            return head, behind
    return None


def _is_reference(name: str) -> bool:
    """Return whether `name` can be a library reference; otherwise it must be a path."""
    from veneer.library.names import parse_reference

    try:
        parse_reference(name)
    except ConfigError:
        return False
    return True


def read_adapter(name: str | os.PathLike[str]) -> Reading:
    """Read the adapter `name` in any format, without a base.

    Raises the errors of `adapter_path` and `formats.read.read`."""
    return reader.read(adapter_path(name))


def stated_base(name: str) -> str:
    """Return the base that an adapter's card or PEFT configuration names, or ""."""
    folder = adapter_path(name)
    if (folder / CARD_FILE).is_file():
        card = read_card(folder).card
        if card.base:
            return card.base
    try:
        stated = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return stated if isinstance(stated, str) else ""


def load_adapter(
    base: AnyBase, name: str | os.PathLike[str], *, allow_other_base: bool = False, **how: Unpack[reader.ReadOptions]
) -> Adapter:
    """Read an adapter and check that it belongs to `base`.

    Attach the result with `attach(base.model).add(…)`.

    name: a folder, a file or a name in the library.
    how: options of `formats.read.read`.
    allow_other_base: accept an adapter of another base if every name and shape fits.

    Raises MismatchError if the adapter is for another family, or if its card names another base. The error
    then lists both fingerprints and the first names and shapes that do not fit. Raises AdapterError for any
    other problem."""
    name = os.fspath(name)
    path = adapter_path(name)
    try:
        reading = _read_for(base, path, how)
    except UnsafeFileError:
        raise
    except AdapterError as error:
        with contextlib.suppress(AdapterError):  # read without the base, to find the family
            _refuse_other_family(base, name, path, reader.read(path, assume_scale=True), _first_lines(error.what, 3))
        card = read_card(path).card if (path / CARD_FILE).is_file() else None
        if card is None or card.base_fingerprint in ("", base.fingerprint):
            raise
        raise _mismatch(name, card.base, card.base_fingerprint, base, _first_lines(error.what)) from error
    adapter = reading.adapter
    if not allow_other_base:
        _refuse_other_family(base, name, path, reading)
    theirs = adapter.card.base_fingerprint
    if theirs and theirs != base.fingerprint and not allow_other_base:
        raise _mismatch(name, adapter.card.base, theirs, base, "every name and shape fits")
    return adapter


def _read_for(base: AnyBase, path: Path, how: reader.ReadOptions) -> Reading:
    if path.is_dir() and not is_image_family(base.family) and not (path / CONFIG_FILE).is_file():
        peft.load_folder(path)  # raises a clearer error for an incomplete text adapter
    return reader.read(path, base=base.model, family=base.family, **how)


def _refuse_other_family(
    base: AnyBase, name: str, path: Path, reading: Reading, why: str = "but its module names and shapes match the base"
) -> None:
    """Raise MismatchError if the adapter and the base belong to different families."""
    its = reading.family
    if its is None and (not is_image_family(base.family) or reading.adapter.card.kind == "image"):
        return  # language models share module names, so the caller's error is more useful
    if its is not None and same_family(its, base.family):
        return
    label = family_label(its) if its else "text"
    base_label = family_label(base.family) if is_image_family(base.family) else f"a language model ({base.family})"
    problem = (
        f"this is {'an' if label == 'SDXL' else 'a'} {label} adapter, the base is {base_label}\n"
        f"  adapter: {name}\n"
        f"  base:    {base.name}\n"
        f"  {why}"
    )
    raise MismatchError(problem, where=str(path), fix="use the adapter with a base of its own family")


def attach_adapters(
    base: AnyBase, specs: Sequence[AdapterSpec], *, attachment: Attachment | None = None, allow_other_base: bool = False
) -> Attachment:
    """Attach adapters to a base and select them as one mix.

    All adapters are read and checked before any of them is attached. If `specs` is empty, the base without
    adapters is selected.

    attachment: the base's attachment, if it already has one.

    Raises the errors of `load_adapter`, and ConfigError if an adapter is named twice."""
    mix = [parse_spec(spec) for spec in specs]
    names = [name for name, _ in mix]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"adapter {twice[0]!r} is named twice", fix="name it once, with the sum of the strengths")
    have = attachment.adapters if attachment else {}
    adapters = {n: load_adapter(base, n, allow_other_base=allow_other_base) for n in names if n not in have}
    from veneer.core.attach import attach

    attached = attachment or attach(base.model)
    try:
        for name, adapter in adapters.items():
            attached.add(name, adapter)
        attached.use(*mix)
    except BaseException:
        if attachment is None:
            attached.detach()
        raise
    return attached


def _mismatch(name: str, their_base: str, theirs: str, base: AnyBase, detail: str) -> MismatchError:
    named = f" ({their_base})" if their_base else ""
    fits = detail.startswith("every")
    return MismatchError(
        f"adapter {name!r} belongs to another base\n"
        f"  its base:  {theirs}{named}\n"
        f"  this base: {base.fingerprint} ({base.name})\n"
        f"  {detail}",
        where=str(adapter_path(name)),
        fix="use its own base" + (", or --allow-other-base if you know that this base is compatible" if fits else ""),
    )


def _first_lines(text: str, n: int = 6) -> str:
    lines = text.splitlines()
    return "\n  ".join(lines[:n] + ([f"… and {len(lines) - n} more"] if len(lines) > n else []))
