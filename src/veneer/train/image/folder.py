"""List the files in a folder of pictures by kind, and match files to pictures.

    folder = picture_folder("drawings", settings)
    folder.owners(Path("drawings/cat"))          the pictures of this name

Uses names only and opens no file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from veneer.errors import DataError, nearest
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import SUFFIXES

BEFORE = "before"
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# pictures that no allowed decoder reads: reported as broken, not skipped
_UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ico", ".exr", ".cr2", ".nef", ".arw", ".dng")
_NOT_CAPTIONS = ("readme", "license", "licence", "notice", "attribution", "copying", "classes")


@dataclass(frozen=True)
class PictureFile:
    """A picture file and its related files.

    `source`: where its caption is from; `caption`: None without one. `before`: source images of an edit."""

    path: Path
    name: str
    caption: str | None
    source: str
    mask: Path | None
    repeats: int
    before: tuple[Path, ...] = ()


@dataclass(frozen=True)
class PictureFolder:
    """A folder and its subfolders.

    `masks`, `befores`: files named NAME.mask and NAME.before. `ignored`: suffix -> number of files of other
    kinds."""

    root: Path
    pictures: list[Path]
    captions: list[Path]
    masks: list[Path]
    befores: list[Path]
    ignored: Counter[str]

    @cached_property
    def _names(self) -> dict[Path, list[Path]]:
        names: dict[Path, list[Path]] = {}
        for path in self.pictures:
            names.setdefault(path.with_suffix(""), []).append(path)
            names.setdefault(path, []).append(path)
        return names

    def owners(self, name: Path) -> list[Path]:
        """Return the pictures of this path, without its suffix or with it."""
        return self._names.get(name, [])

    def unowned(self, file: Path, name: Path | None = None) -> str:
        """Return the message about a file that belongs to no picture.

        `name`: the path of its picture, if it is in another folder."""
        shown = file.relative_to(self.root) if file.is_relative_to(self.root) else file
        return f"{shown}: no picture of this name{self.nearest(name or file)}"

    def nearest(self, file: Path, pictures: Iterable[Path] | None = None) -> str:
        """Return the nearest picture by name, as the end of a sentence.

        Prefers pictures in the same folder."""
        pictures = self.pictures if pictures is None else pictures
        beside = {p.name: p for p in pictures if p.parent == file.parent}
        stem = Path(file.stem).stem if Path(file.stem).suffix.lower() in (".mask", f".{BEFORE}") else file.stem
        near = nearest(stem, {Path(n).stem for n in beside}, 1)
        if near:
            name = next(n for n in sorted(beside) if Path(n).stem == near[0])
            return f"; the nearest is {name}"
        elsewhere = {p.stem: p for p in pictures}
        near = nearest(stem, elsewhere, 1)
        return f"; the nearest is {elsewhere[near[0]].relative_to(self.root)}" if near else ""


def picture_folder(folder: str, settings: ImageDataSection) -> PictureFolder:
    """Return the content of `folder` and its subfolders, in the order of names.

    Skips hidden files and the settings' other folders. Raises DataError if the folder does not exist, or if a
    subfolder cannot be read."""
    root = Path(folder).expanduser()
    if not os.path.isdir(root):  # no error for a name that is too long
        raise _no_folder(root)
    pictures, captions, masks, befores, ignored = [], [], [], [], Counter[str]()
    apart = [settings.class_folder, settings.validation, settings.cache, str(root / "masks")]
    apart += [] if settings.masks in ("auto", "off", "alpha") else [settings.masks]
    apart += settings.before_folders or [str(root / BEFORE)]
    others = {Path(folder).expanduser().resolve() for folder in apart if folder} - {root.resolve()}
    for place, folders, files in os.walk(root, onerror=_unread):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")) and (here / f).resolve() not in others)
        ignored["link to a folder"] += sum((here / f).is_symlink() for f in folders)
        for name in sorted(files):
            path = here / name
            suffix = path.suffix.lower()
            if name.startswith(".") or name in METADATA_FILES or name.lower() == "thumbs.db":
                continue
            if path.exists() and not path.is_file():  # reading a pipe or a device can block forever
                ignored["pipe or device"] += 1
            elif suffix in SUFFIXES and Path(path.stem).suffix.lower() == ".mask":
                masks.append(path)
            elif suffix in SUFFIXES and Path(path.stem).suffix.lower() == f".{BEFORE}":
                befores.append(path)
                ignored["before pictures"] += settings.before != "auto"
            elif suffix in SUFFIXES or suffix in _UNREAD:
                pictures.append(path)
            elif suffix in CAPTION_SUFFIXES and path.stem.lower() not in _NOT_CAPTIONS:
                captions.append(path)
            else:
                ignored[suffix or name] += 1
    return PictureFolder(root, pictures, captions, masks, befores, +ignored)


def _unread(error: OSError) -> NoReturn:
    raise DataError(f"this folder cannot be read: {error.strerror}", where=error.filename) from error


def _no_folder(root: Path) -> DataError:
    if os.path.isfile(root):
        return DataError(
            "this is a file, and a folder of pictures is needed", where=str(root), fix=f"give its folder, {root.parent}"
        )
    beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if os.path.isdir(root.parent) else []
    near = nearest(root.name, beside, 1)
    return DataError(
        "the folder of pictures does not exist" + ("" if os.path.isdir(root.parent) else f" (nor does {root.parent})"),
        where=str(root),
        fix=f"did you mean {root.parent / near[0]}?" if near else "give a folder that holds pictures",
    )
