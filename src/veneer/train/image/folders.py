"""What lies in a folder of pictures: which file is a picture, a caption, a mask or metadata, and what belongs together.

    found = list_pictures(folder, settings).found      found[i].path, .caption, .source, .mask, .repeats

A caption comes from, first that is there: a `.txt` or `.caption` file beside the picture, a row of metadata.jsonl (or
.csv, .parquet; Hugging Face's imagefolder), the words of a kohya folder `N_words` (each picture N times an epoch), the
configured prompt. What belongs to nothing is an error that names the nearest picture. Opens no picture.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from veneer.errors import DataError, nearest
from veneer.train.config.image import ImageDataSection
from veneer.train.image.picture_files import SUFFIXES
from veneer.train.text.files import read_records

__all__ = ["ListedPicture", "Listing", "list_pictures", "listed"]

MOST_SHOWN = 20
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COLUMNS = ("text", "caption", "prompt")
# pictures that no allowed decoder reads: named as broken, not passed over
UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ico", ".exr", ".cr2", ".nef", ".arw", ".dng")
_PAPERS = ("readme", "license", "licence", "notice", "attribution", "copying", "classes")
_KOHYA = re.compile(r"(\d+)_(.+)")
_MOST_REPEATS = 1000


@dataclass(frozen=True)
class ListedPicture:
    """A picture file and what belongs to it. `caption` is None when nothing says it; `source` is who said it."""

    path: Path
    name: str
    caption: str | None
    source: str
    mask: Path | None
    repeats: int


@dataclass
class Listing:
    """All of a folder. `repeats`: kohya folder -> times; `ignored`: ending -> files that are none of ours;
    `unused`: metadata columns that nothing uses; `several_lines`: caption files whose lines were joined."""

    found: list[ListedPicture] = field(default_factory=list)
    repeats: dict[str, int] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)
    several_lines: int = 0
    shared: int = 0


def listed(lines: Iterable[str]) -> str:
    """One line each, at most 20 of them."""
    lines = list(lines)
    more = f"\n  and {len(lines) - MOST_SHOWN} more" if len(lines) > MOST_SHOWN else ""
    return "\n".join(f"  - {line}" for line in lines[:MOST_SHOWN]) + more


def list_pictures(folder: str, settings: ImageDataSection, *, prompt: str | None, masks: str = "auto") -> Listing:
    """Everything in `folder` and below it, sorted by name. `masks` as the setting of that name. Raises DataError."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        _missing(root)
    pictures, captions, beside, listing = _walk(root, settings)
    if not pictures:
        held = ", ".join(f"{n} {suffix}" for suffix, n in sorted(listing.ignored.items())) or "nothing"
        raise DataError(
            "there is no picture in this folder",
            where=str(root),
            fix=f"pictures end in {', '.join(SUFFIXES)}; the folder holds {held}",
        )
    spoken = _caption_files(root, pictures, captions, listing)
    rows = _metadata(root, pictures, settings, listing)
    covers = _masks(root, pictures, beside, masks)
    for path in pictures:
        name = path.relative_to(root).as_posix()
        repeats, words = _kohya(path, root, listing)
        caption, source = next(
            (c, s)
            for c, s in (
                (spoken.get(path), "caption files"),
                (rows.get(path), "metadata"),
                (words, "folder names"),
                (prompt, "the prompt"),
                (None, "nothing"),
            )
            if c is not None or s == "nothing"
        )
        listing.found.append(ListedPicture(path, name, caption, source, covers.get(path), repeats))
    return listing


def _missing(root: Path) -> None:
    if root.is_file():
        raise DataError(
            "a folder of pictures is wanted, and this is a file", where=str(root), fix=f"give its folder, {root.parent}"
        )
    beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    near = nearest(root.name, beside, 1)
    raise DataError(
        "the folder of pictures does not exist" + ("" if root.parent.is_dir() else f" (nor does {root.parent})"),
        where=str(root),
        fix=f"did you mean {root.parent / near[0]}?" if near else "give a folder that holds pictures",
    )


def _walk(root: Path, settings: ImageDataSection) -> tuple[list[Path], list[Path], list[Path], Listing]:
    """(pictures, caption files, masks beside them, what else there is). Hidden files are never ours."""
    pictures, captions, masks = [], [], []
    listing = Listing()
    apart = [settings.class_folder, settings.validation, settings.cache, str(root / "masks")]
    apart += [] if settings.masks in ("auto", "off", "alpha") else [settings.masks]
    others = {Path(folder).expanduser().resolve() for folder in apart if folder} - {root.resolve()}
    for place, folders, files in os.walk(root):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")) and (here / f).resolve() not in others)
        listing.ignored["link to a folder"] += sum((here / f).is_symlink() for f in folders)
        for name in sorted(files):
            path = here / name
            suffix = path.suffix.lower()
            if name.startswith(".") or name in METADATA or name.lower() == "thumbs.db":
                continue
            if suffix in SUFFIXES and Path(path.stem).suffix.lower() == ".mask":
                masks.append(path)
            elif suffix in SUFFIXES or suffix in UNREAD:
                pictures.append(path)
            elif suffix in CAPTIONS and path.stem.lower() not in _PAPERS:
                captions.append(path)
            else:
                listing.ignored[suffix or name] += 1
    listing.ignored = +listing.ignored
    return pictures, captions, masks, listing


def _by_name(pictures: Iterable[Path]) -> dict[Path, list[Path]]:
    """Path without its ending, and with it -> the pictures that go by it."""
    names: dict[Path, list[Path]] = {}
    for path in pictures:
        names.setdefault(path.with_suffix(""), []).append(path)
        names.setdefault(path, []).append(path)
    return names


def _caption_files(root: Path, pictures: list[Path], captions: list[Path], listing: Listing) -> dict[Path, str]:
    """picture -> caption. All lines of a file are one caption, white space drawn together."""
    names = _by_name(pictures)
    spoken: dict[Path, tuple[str, Path]] = {}
    bad: list[str] = []
    for file in captions:
        owners = names.get(file.with_suffix(""))
        if not owners:
            bad.append(f"{file.relative_to(root)}: no picture of this name{_nearest(file, pictures, root)}")
            continue
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error.strerror)
            bad.append(f"{file.relative_to(root)}: {why}")
            continue
        listing.several_lines += sum(bool(line.strip()) for line in text.splitlines()) > 1
        listing.shared += len(owners) > 1
        for owner in owners:
            text = " ".join(text.split())
            if owner in spoken and spoken[owner][0] != text:
                other = spoken[owner][1].name
                bad.append(f"{file.relative_to(root)}: {owner.name} has another caption in {other}")
            spoken[owner] = (text, file)
    if bad:
        raise DataError(
            f"{len(bad)} caption file(s) cannot be used:\n{listed(bad)}",
            where=str(root),
            fix="name a caption as its picture (cat.txt beside cat.png), or move it elsewhere",
        )
    return {path: text for path, (text, _) in spoken.items()}


def _nearest(file: Path, pictures: Iterable[Path], root: Path) -> str:
    """The nearest picture by name, in the same folder before others."""
    beside = {p.name: p for p in pictures if p.parent == file.parent}
    stem = Path(file.stem).stem if Path(file.stem).suffix.lower() == ".mask" else file.stem
    near = nearest(stem, {Path(n).stem for n in beside}, 1)
    if near:
        name = next(n for n in sorted(beside) if Path(n).stem == near[0])
        return f"; the nearest is {name}"
    elsewhere = {p.stem: p for p in pictures}
    near = nearest(stem, elsewhere, 1)
    return f"; the nearest is {elsewhere[near[0]].relative_to(root)}" if near else ""


def _metadata(root: Path, pictures: list[Path], settings: ImageDataSection, listing: Listing) -> dict[Path, str]:
    """picture -> caption, of every metadata file in the tree; `file_name` is relative to the file's own folder."""
    known = set(pictures)
    rows: dict[Path, str] = {}
    bad: list[str] = []
    for folder in sorted({root, *(p.parent for p in pictures)}):
        for file in (folder / name for name in METADATA):
            if not file.is_file():
                continue
            records, _ = read_records([str(file)])
            columns = list(dict.fromkeys(c for record in records for c in record.values))
            column = settings.caption_column or next((c for c in COLUMNS if c in columns), None)
            if column not in columns or "file_name" not in columns:
                missing = "file_name" if "file_name" not in columns else column or " or ".join(COLUMNS)
                raise DataError(
                    f"the metadata has no column {missing}; the columns are {', '.join(columns)}",
                    where=str(file),
                    fix="name the caption's with data.caption_column",
                )
            listing.unused += [c for c in columns if c not in (column, "file_name") and c not in listing.unused]
            for record in records:
                name, caption = record.values.get("file_name"), record.values.get(column)
                problem = _row_problem(name, caption, column, folder, known, rows, root)
                if problem:
                    bad.append(f"{record.where}: {problem}")
                else:
                    rows[folder / str(name)] = " ".join(str(caption).split())
    if bad:
        raise DataError(f"{len(bad)} metadata row(s) cannot be used:\n{listed(bad)}", where=str(root))
    return rows


def _row_problem(
    name: object, caption: object, column: str, folder: Path, known: set[Path], rows: Mapping[Path, str], root: Path
) -> str:
    if not isinstance(name, str) or not name:
        return "no file_name"
    if not isinstance(caption, str):
        return f"`{column}` should be text, found {type(caption).__name__}"
    path = folder / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"file_name `{name}` leaves the folder"
    if path not in known:
        return f"there is no picture `{name}`" + _nearest(path, known, root)
    return f"`{name}` has a row already" if path in rows else ""


def _masks(root: Path, pictures: list[Path], beside: list[Path], masks: str) -> dict[Path, Path]:
    """picture -> mask file. NAME.mask.png stands beside its picture; a mask folder mirrors the pictures' paths, or
    holds their names alone."""
    if masks in ("off", "alpha"):
        return {}
    names = _by_name(pictures)
    covers: dict[Path, Path] = {}
    bad: list[str] = []
    for mask in beside:
        owners = names.get(mask.with_suffix("").with_suffix(""))
        if not owners:
            bad.append(f"{mask.relative_to(root)}: no picture of this name{_nearest(mask, pictures, root)}")
        for owner in owners or ():
            covers[owner] = mask
    folder = root / "masks" if masks == "auto" else Path(masks).expanduser()
    if masks != "auto" and not folder.is_dir():
        raise DataError("the folder of masks does not exist", where=str(folder), fix="correct data.masks")
    by_stem: dict[str, list[Path]] = {}
    for path in pictures:
        by_stem.setdefault(path.stem, []).append(path)
    for mask in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if mask.suffix.lower() not in SUFFIXES or mask.name.startswith("."):
            continue
        relative = mask.relative_to(folder)
        stem = mask.stem.removesuffix(".mask")
        owners = names.get(root / relative.with_name(stem)) or (
            by_stem.get(stem, []) if len(relative.parts) == 1 else []
        )
        if not owners:
            bad.append(f"{mask}: no picture of this name{_nearest(root / relative.with_name(stem), pictures, root)}")
        elif len({o.parent for o in owners}) > 1:
            bad.append(
                f"{mask}: pictures of this name are in {len(owners)} folders; repeat the folders among the masks"
            )
        else:
            for owner in owners:
                covers.setdefault(owner, mask)
    if bad:
        raise DataError(
            f"{len(bad)} mask(s) cannot be used:\n{listed(bad)}",
            where=str(root),
            fix="name a mask as its picture (cat.mask.png or masks/cat.png for cat.png), or set data.masks: off",
        )
    return covers


def _kohya(path: Path, root: Path, listing: Listing) -> tuple[int, str | None]:
    """(repeats, words) of the nearest folder named `N_words`, the root included."""
    for folder in path.parents:
        match = _KOHYA.fullmatch(folder.name)
        if match:
            repeats = int(match[1])
            if not 0 < repeats < _MOST_REPEATS:
                raise DataError(
                    f"a folder named N_words repeats each picture N times (as kohya's), here {repeats:,} times",
                    where=str(folder),
                    fix="rename the folder",
                )
            listing.repeats[folder.name] = repeats
            return repeats, match[2].strip()
        if folder == root:
            break
    return 1, None
