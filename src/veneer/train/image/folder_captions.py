"""Captions from files, metadata, and kohya's folder names; and the trigger.

The first source that exists is used: a `.txt` or `.caption` file next to the picture, a row of metadata.jsonl
(or .csv, .parquet; Hugging Face's imagefolder), the words of a kohya folder `N_words` (each picture N times
per epoch), the configured prompt. A file or row without a picture is an error that names the nearest picture.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from veneer.errors import DataError, bullets, counted
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import SUFFIXES
from veneer.train.image.folder import BEFORE, METADATA_FILES, PictureFile, PictureFolder
from veneer.train.image.training_picture import AboutPictures
from veneer.train.records import read_data_files

CAPTION_COLUMNS = ("text", "caption", "prompt", "instruction")
FILE_COLUMNS = ("file_name", "after")
"""Metadata columns of the file name; the first existing one is used."""
_PLACEHOLDER = "[trigger]"
_KOHYA = re.compile(r"(\d+)_(.+)")
_MOST_REPEATS = 1000


def caption_files(folder: PictureFolder, about: AboutPictures) -> dict[Path, str]:
    """Return picture -> caption.

    All lines of a file are one caption, with white space collapsed."""
    captioned: dict[Path, tuple[str, Path]] = {}
    bad: list[str] = []
    for file in folder.captions:
        owners, shown = folder.owners(file.with_suffix("")), file.relative_to(folder.root)
        if not owners:
            bad.append(folder.unowned(file))
            continue
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error.strerror)
            bad.append(f"{shown}: {why}")
            continue
        about.several_lines += sum(bool(line.strip()) for line in text.splitlines()) > 1
        about.shared += len(owners) > 1
        text = " ".join(text.split())
        for owner in owners:
            if owner in captioned and captioned[owner][0] != text:
                bad.append(f"{shown}: {owner.name} has another caption in {captioned[owner][1].name}")
            captioned[owner] = (text, file)
    if bad:
        raise DataError(
            f"{counted(len(bad), 'caption file')} cannot be used:\n{bullets(bad)}",
            where=str(folder.root),
            fix="name a caption as its picture (cat.txt beside cat.png), save it as UTF-8, or move it elsewhere",
        )
    return {path: text for path, (text, _) in captioned.items()}


def metadata_rows(
    folder: PictureFolder, settings: ImageDataSection, about: AboutPictures
) -> tuple[dict[Path, str], dict[Path, list[Path]]]:
    """Return (picture -> caption, picture -> source images) of all metadata files.

    `file_name` (or `after`) and `before` are relative to the metadata file's folder."""
    rows: dict[Path, str] = {}
    before: dict[Path, list[Path]] = {}
    bad: list[str] = []
    for place in sorted({folder.root, *(p.parent for p in folder.pictures)}):
        for file in (place / name for name in METADATA_FILES):
            if not file.is_file():
                continue
            records, _ = read_data_files([str(file)])
            columns = list(dict.fromkeys(c for record in records for c in record.values))
            column = settings.caption_column or next((c for c in CAPTION_COLUMNS if c in columns), None)
            which = next((c for c in FILE_COLUMNS if c in columns), None)
            if column not in columns or which is None:
                missing = " or ".join(FILE_COLUMNS) if which is None else column or " or ".join(CAPTION_COLUMNS)
                raise DataError(
                    f"the metadata has no column {missing}; the columns are {', '.join(columns)}",
                    where=str(file),
                    fix="name the picture's so" if which is None else "name the caption's with data.caption_column",
                )
            used = (column, which, BEFORE) if settings.before == "auto" else (column, which)
            about.unused += [c for c in columns if c not in used and c not in about.unused]
            for record in records:
                name, caption, given = (record.values.get(c) for c in (which, column, BEFORE))
                starts = given if isinstance(given, list) else [] if given is None else [given]
                problem = _row_problem(name, caption, column, which, place, folder, rows)
                problem = problem or next((p for s in starts if (p := _start_problem(s, place, folder))), "")
                if problem:
                    bad.append(f"{record.where}: {problem}")
                    continue
                rows[place / str(name)] = " ".join(str(caption).split())
                if starts:
                    before[place / str(name)] = [place / start for start in starts]
    if bad:
        raise DataError(
            f"{counted(len(bad), 'metadata row')} cannot be used:\n{bullets(bad)}",
            where=str(folder.root),
            fix="correct those rows, or take them out",
        )
    return rows, before


def _row_problem(
    name: object, caption: object, column: str, which: str, place: Path, folder: PictureFolder, rows: Collection[Path]
) -> str:
    """Return what is wrong with a metadata row in `place`, given earlier `rows`."""
    if not isinstance(name, str) or not name:
        return f"no {which}"
    if not isinstance(caption, str):
        return f"`{column}` should be text, found {type(caption).__name__}"
    path = place / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"{which} `{name}` leaves the folder"
    if path not in folder.owners(path):
        return f"there is no picture `{name}`" + folder.nearest(path)
    return f"`{name}` has a row already" if path in rows else ""


def _start_problem(name: object, place: Path, folder: PictureFolder) -> str:
    """Return what is wrong with a row's `before`."""
    if not isinstance(name, str) or not name:
        found = type(name).__name__ if name != "" else "nothing"
        return f"`{BEFORE}` should be a picture's path, found {found}"
    path = place / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"`{BEFORE}`: `{name}` leaves the folder"
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        beside = [p for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES] if path.parent.is_dir() else []
        return f"`{BEFORE}`: there is no picture `{name}`" + folder.nearest(path, beside)
    return ""


def kohya_folder(path: Path, root: Path, about: AboutPictures) -> tuple[int, str | None]:
    """Return (repeats, words) of the nearest folder named `N_words`.

    Includes the root."""
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
            about.repeats[folder.name] = repeats
            return repeats, match[2].strip()
        if folder == root:
            break
    return 1, None


def triggered(
    found: Sequence[PictureFile], folder: str, trigger: str | None, *, is_class: bool
) -> list[tuple[str, str]]:
    """Return every picture's caption with the trigger, and how it was added.

    Raises DataError for pictures without a caption, and for a placeholder without a trigger."""
    captions, bad = [], []
    missing = [f.name for f in found if f.caption is None] if trigger is None else []
    for f in found:
        try:
            captions.append(with_trigger(f.caption or "", trigger))
        except ValueError as error:
            bad.append(f"{f.name}: {error}" if not is_class else f"{f.name}: holds {_PLACEHOLDER}: the class has none")
    if missing:
        key = "class_prompt" if is_class else "prompt"
        raise DataError(
            f"{len(missing)} of {len(found)} pictures have no caption:\n{bullets(missing)}",
            where=folder,
            fix=f"write NAME.txt beside each, or a metadata.jsonl, or set data.{key} for all that have none; "
            f"a vision-language model writes them: veneer data caption {shlex.quote(folder)} --model MODEL",
        )
    if bad:
        raise DataError(
            f"{counted(len(bad), 'caption')} cannot be used:\n{bullets(bad)}", where=folder, fix="correct them"
        )
    return captions


def with_trigger(caption: str, trigger: str | None) -> tuple[str, str]:
    """Return (caption with the trigger, what was done).

    The second value is "replaced", "already there", "added", or "" without a trigger. `[trigger]` is replaced
    everywhere; a caption without the word gets it in front, as a separate tag. Raises ValueError for a
    placeholder without a trigger."""
    if trigger is None:
        if _PLACEHOLDER in caption:
            raise ValueError(f"holds {_PLACEHOLDER}, and data.trigger is not set")
        return caption, ""
    if _PLACEHOLDER in caption:
        return caption.replace(_PLACEHOLDER, trigger), "replaced"
    if has_word(caption, trigger):
        return caption, "already there"
    return f"{trigger}, {caption}" if caption else trigger, "added"


def has_word(caption: str, word: str) -> bool:
    """Return whether a caption contains a word or phrase, ignoring case.

    Only whole words match."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None
