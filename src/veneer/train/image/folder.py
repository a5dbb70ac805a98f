"""List a folder of images, and match captions, masks and source images to them by name.

    files, ignored = list_pictures("drawings", settings, settings.prompt, settings.masks)

| an image's    | are searched for in                                                                       |
| caption       | NAME.txt or NAME.caption, metadata.jsonl (.csv, .parquet), the name of a kohya folder     |
|               | `N_words`, the configured prompt; the first one found is used                             |
| mask          | NAME.mask.png, or the same path in the folder `masks` or in the configured folder         |
| source images | NAME.before.png, or the same path in the folder `before` or in the configured folders     |

A kohya folder repeats each image N times per epoch. A caption, mask, source image or metadata row without an
image is an error. Only captions and metadata are opened, not images.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from veneer.errors import DataError, bullets, counted, first_few
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import SUFFIXES
from veneer.train.records import read_data_files

CAPTION_SUFFIXES = (".txt", ".caption")
_CAPTION_COLUMNS = ("text", "caption", "prompt", "instruction")
_FILE_COLUMN = "file_name"
_METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# image formats that no allowed decoder reads; such files are reported as broken instead of skipped
_UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ico", ".exr", ".cr2", ".nef", ".arw", ".dng")
_NOT_CAPTIONS = ("readme", "license", "licence", "notice", "attribution", "copying", "classes")
_KOHYA = re.compile(r"(\d+)_(.+)")
_MOST_REPEATS = 1000


@dataclass(frozen=True)
class PictureFile:
    """An image file and its related files.

    caption: None if the image has no caption. caption_source: where the caption was found. sources: source
    images, if the image is an edit."""

    path: Path
    name: str
    caption: str | None
    caption_source: str
    mask: Path | None
    repeats: int
    sources: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Folder:
    """The files of a folder and its subfolders, by kind, sorted by name.

    masks, source_files: files named NAME.mask and NAME.before. ignored: suffix -> number of other files."""

    root: Path
    pictures: list[Path]
    captions: list[Path]
    masks: list[Path]
    source_files: list[Path]
    ignored: Counter[str]

    @cached_property
    def _names(self) -> dict[Path, list[Path]]:
        names: dict[Path, list[Path]] = {}
        for path in self.pictures:
            names.setdefault(path.with_suffix(""), []).append(path)
            names.setdefault(path, []).append(path)
        return names

    def owners(self, name: Path) -> list[Path]:
        """Return the images with this path. `name` can omit the suffix of the image."""
        return self._names.get(name, [])

    def unowned(self, file: Path) -> str:
        """Return the error message about a file that belongs to no image."""
        return f"{file.relative_to(self.root) if file.is_relative_to(self.root) else file}: no picture of this name"


def list_pictures(
    folder: str, settings: ImageDataSection, prompt: str | None, masks: str
) -> tuple[list[PictureFile], Counter[str]]:
    """Return the images in a folder and its subfolders, sorted by name, and the ignored files by suffix.

    prompt, masks: the values of these settings, which differ for class images.

    Raises DataError."""
    files = _scan(folder, settings)
    if not files.pictures:
        ignored_types = first_few([f"{n} {suffix}" for suffix, n in files.ignored.most_common()], 12) or "nothing"
        fix = f"pictures end in {', '.join(SUFFIXES)}; the folder holds {ignored_types}"
        raise DataError("there is no picture in this folder", where=str(files.root), fix=fix)
    captions, rows, masks_of = _captions(files), _metadata(files, settings), _masks(files, masks)
    source_images = _source_images(files, settings)
    out = []
    for path in files.pictures:
        repeats, words = _kohya_folder(path, files.root)
        sources = {
            "caption files": captions.get(path),
            "metadata": rows.get(path),
            "folder names": words,
            "the prompt": prompt,
        }
        source = next((source for source, caption in sources.items() if caption is not None), "nothing")
        name = path.relative_to(files.root).as_posix()
        source_files = tuple(source_images.get(path, ()))
        out.append(PictureFile(path, name, sources.get(source), source, masks_of.get(path), repeats, source_files))
    return out, files.ignored


def sources_per_picture(folders: Mapping[str, Sequence[PictureFile]]) -> int:
    """Return the number of source images per image. Raise DataError if the numbers differ."""
    files = [file for files_of_folder in folders.values() for file in files_of_folder]
    most = max((len(file.sources) for file in files), default=0)
    fewer = [f"{f.name}: {len(f.sources) or 'none'}" if most > 1 else f.name for f in files if len(f.sources) < most]
    if fewer:
        example = next(file.name for file in files if len(file.sources) == most)
        missing = "no source image" if most == 1 else f"fewer than the {most} source images of {example}"
        uneven = [name for name, group in folders.items() if any(len(f.sources) < most for f in group)]
        message = f"{len(fewer)} of {len(files)} pictures have {missing}:\n{bullets(fewer)}"
        fix = "give all pictures the same number (NAME.before.png, or the same name in the before folder), or set "
        fix += "data.before: off to train on captions only"
        raise DataError(message, where=", ".join(uneven), fix=fix)
    return most


def with_trigger(caption: str, trigger: str | None) -> tuple[str, str]:
    """Return (caption with the trigger, what was done).

    The second value is "replaced", "already there", "added", or "" if `trigger` is None. Every `[trigger]` in
    the caption is replaced with the trigger. If the caption does not contain the trigger, it is prepended as
    a separate tag."""
    if trigger is None:
        return caption, ""
    if "[trigger]" in caption:
        return caption.replace("[trigger]", trigger), "replaced"
    if has_word(caption, trigger):
        return caption, "already there"
    return f"{trigger}, {caption}" if caption else trigger, "added"


def has_word(caption: str, word: str) -> bool:
    """Return whether a caption contains a whole word or phrase, ignoring case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


def _scan(folder: str, settings: ImageDataSection) -> _Folder:
    """Return the files of `folder` and its subfolders.

    Hidden files and the other folders in the settings are skipped. Raises DataError if the folder does not
    exist, or if a subfolder cannot be read."""
    root = Path(folder).expanduser()
    if not os.path.isdir(root):  # unlike Path.is_dir, does not raise for a name that is too long
        message = "this is a file, not a folder of pictures" if os.path.isfile(root) else "the folder does not exist"
        raise DataError(message, where=str(root), fix="give a folder with pictures")
    pictures, captions, masks, source_files, ignored = [], [], [], [], Counter[str]()
    other_folders = [settings.class_folder, settings.validation, settings.cache, str(root / "masks")]
    other_folders += [] if settings.masks in ("auto", "off", "alpha") else [settings.masks]
    other_folders += settings.source_folders or [str(root / "before")]
    excluded = {Path(name).expanduser().resolve() for name in other_folders if name} - {root.resolve()}
    for directory, folders, names in os.walk(root, onerror=_raise_unreadable):
        current = Path(directory)
        visible = sorted(name for name in folders if not name.startswith((".", "__")))
        folders[:] = [name for name in visible if (current / name).resolve() not in excluded]
        ignored["link to a folder"] += sum((current / f).is_symlink() for f in folders)
        for name in sorted(names):
            path = current / name
            suffix, marker = path.suffix.lower(), Path(path.stem).suffix.lower()
            if name.startswith(".") or name in _METADATA_FILES or name.lower() == "thumbs.db":
                continue
            if path.exists() and not path.is_file():  # reading a pipe or a device can block forever
                ignored["pipe or device"] += 1
            elif suffix in SUFFIXES and marker == ".mask":
                masks.append(path)
            elif suffix in SUFFIXES and marker == ".before":
                source_files.append(path)
                ignored["source images"] += settings.before != "auto"
            elif suffix in SUFFIXES or suffix in _UNREAD:
                pictures.append(path)
            elif suffix in CAPTION_SUFFIXES and path.stem.lower() not in _NOT_CAPTIONS:
                captions.append(path)
            else:
                ignored[suffix or name] += 1
    return _Folder(root, pictures, captions, masks, source_files, +ignored)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise DataError(f"this folder cannot be read: {error.strerror}", where=error.filename) from error


def _captions(folder: _Folder) -> dict[Path, str]:
    """Return image -> caption. All lines of a file form one caption, with white space collapsed."""
    captions: dict[Path, str] = {}
    bad: list[str] = []
    for file in folder.captions:
        name, owners = file.relative_to(folder.root), folder.owners(file.with_suffix(""))
        if not owners:
            bad.append(folder.unowned(file))
            continue
        try:
            text = " ".join(file.read_bytes().decode("utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            bad.append(f"{name}: {'not UTF-8 text' if isinstance(error, UnicodeDecodeError) else error.strerror}")
            continue
        twice = [owner.name for owner in owners if captions.get(owner, text) != text]
        bad += [f"{name}: {owner} has more than one caption file, with different texts" for owner in twice]
        captions |= dict.fromkeys(owners, text)
    fix = "give a caption the name of its picture (cat.txt for cat.png), and save it as UTF-8"
    _raise_if_bad(folder, bad, "caption file", fix)
    return captions


def _masks(folder: _Folder, masks: str) -> dict[Path, Path]:
    """Return image -> mask file. Raise DataError for a mask without an image.

    masks: the value of the setting data.masks."""
    if masks in ("off", "alpha"):
        return {}
    mask_folder = folder.root / "masks" if masks == "auto" else Path(masks).expanduser()
    if masks != "auto" and not mask_folder.is_dir():
        raise DataError("the folder of masks does not exist", where=str(mask_folder), fix="correct data.masks")
    matches, bad = _match_files(folder, folder.masks, [(mask_folder, _pictures_in(mask_folder))])
    fix = "give a mask the name of its picture (cat.mask.png or masks/cat.png), or set data.masks: off"
    _raise_if_bad(folder, bad, "mask", fix)
    return {picture: files[0] for picture, files in matches.items()}


def _source_images(folder: _Folder, settings: ImageDataSection) -> dict[Path, list[Path]]:
    """Return image -> its source images, in the order of the source folders.

    Raises DataError for source images that belong to no image."""
    if settings.before == "off":
        return {}
    auto = settings.before == "auto"
    roots = [folder.root / "before"] if auto else [Path(name).expanduser() for name in settings.source_folders]
    files_of_root = [(root, _pictures_in(root)) for root in roots]
    if empty := [root for root, files in files_of_root if not files and not auto]:
        raise DataError("this folder of source images has no pictures", where=str(empty[0]), fix="correct data.before")
    matches, bad = _match_files(folder, folder.source_files if auto else [], files_of_root)
    fix = "name source images after the picture (cat.before.png or before/cat.png for cat.png), or set data.before: off"
    _raise_if_bad(folder, bad, "source image", fix)
    return matches


def _pictures_in(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]


def _match_files(
    folder: _Folder, suffixed: Iterable[Path], mirrored: Iterable[tuple[Path, list[Path]]]
) -> tuple[dict[Path, list[Path]], list[str]]:
    """Return image -> the files that match its name, and messages about files without an image.

    suffixed: files named NAME.mask.png or NAME.before.png. mirrored: (folder, files in it whose relative
    paths match the images' paths)."""
    matches: dict[Path, list[Path]] = {}
    bad: list[str] = []
    pairs = [(file, file.with_suffix("").with_suffix("")) for file in suffixed]
    for root, files in mirrored:
        pairs += [(file, folder.root / file.relative_to(root).with_suffix("")) for file in files]
    for file, name in pairs:
        owners = folder.owners(name)
        for owner in owners:
            matches.setdefault(owner, []).append(file)
        if not owners:
            bad.append(folder.unowned(file))
    return matches, bad


def _metadata(folder: _Folder, settings: ImageDataSection) -> dict[Path, str]:
    """Return image -> caption, from all metadata files.

    Paths in a metadata file are relative to the folder that contains the file."""
    rows: dict[Path, str] = {}
    bad: list[str] = []
    for directory in sorted({folder.root, *(p.parent for p in folder.pictures)}):
        for file in (directory / name for name in _METADATA_FILES):
            if not file.is_file():
                continue
            records = read_data_files([str(file)])
            columns = list(dict.fromkeys(c for record in records for c in record.values))
            text_column = settings.caption_column or next((c for c in _CAPTION_COLUMNS if c in columns), None)
            if _FILE_COLUMN not in columns or text_column not in columns:
                missing, fix = _FILE_COLUMN, "give the column of picture paths this name"
                if _FILE_COLUMN in columns:
                    missing, fix = text_column or " or ".join(_CAPTION_COLUMNS), "set data.caption_column"
                message = f"the metadata has no column {missing}; the columns are {', '.join(columns)}"
                raise DataError(message, where=str(file), fix=fix)
            for record in records:
                name, caption = record.values.get(_FILE_COLUMN), record.values.get(text_column)
                problem = _path_problem(name, directory, folder)
                if not problem and not isinstance(caption, str):
                    problem = f"`{text_column}` should be text, found {type(caption).__name__}"
                if not problem and directory / str(name) in rows:
                    problem = f"`{name}` already has a row"
                if problem:
                    bad.append(f"{record.where}: {problem}")
                    continue
                rows[directory / str(name)] = " ".join(str(caption).split())
    _raise_if_bad(folder, bad, "metadata row", "correct or remove these rows")
    return rows


def _path_problem(name: object, directory: Path, folder: _Folder) -> str:
    """Return what is wrong with an image path in a metadata row, or ""."""
    if not isinstance(name, str) or not name:
        return f"`{_FILE_COLUMN}` should be a picture's path, found {name!r}"
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"`{_FILE_COLUMN}`: `{name}` is outside the folder"
    path = directory / name
    return "" if path in folder.owners(path) else f"`{_FILE_COLUMN}`: there is no picture `{name}`"


def _kohya_folder(path: Path, root: Path) -> tuple[int, str | None]:
    """Return (repeats, words) of the nearest parent folder named `N_words`, up to the root."""
    for folder in path.parents:
        if match := _KOHYA.fullmatch(folder.name):
            repeats = int(match[1])
            if not 0 < repeats < _MOST_REPEATS:
                message = "a folder named N_words (as in kohya's scripts) repeats each picture N times, but N is "
                raise DataError(f"{message}{repeats:,}", where=str(folder), fix="rename the folder")
            return repeats, match[2].strip()
        if folder == root:
            break
    return 1, None


def _raise_if_bad(folder: _Folder, bad: Sequence[str], kind: str, fix: str) -> None:
    if bad:
        message = f"{counted(len(bad), kind)} cannot be used:\n{bullets(bad)}"
        raise DataError(message, where=str(folder.root), fix=fix)
