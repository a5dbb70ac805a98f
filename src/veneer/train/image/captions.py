"""Write captions for pictures without one, where `read_pictures` finds them.

    report = write_captions("drawings", describe, trigger="sks")

Each caption is written atomically as soon as it exists, and captioned pictures are skipped, so a stopped call
resumes. `txt` is `NAME.txt` next to `NAME.png`; `jsonl` is a row of the folder's metadata.jsonl. The caller
describes the pictures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from veneer.errors import BaseError, DataError, bullets, counted
from veneer.files.atomic import atomic_write
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import UnreadablePicture, decode_picture, read_bytes
from veneer.train.image.folder import CAPTION_SUFFIXES
from veneer.train.image.folder_captions import CAPTION_COLUMNS, FILE_COLUMNS, with_trigger
from veneer.train.image.pictures import OwnCaption, own_captions

if TYPE_CHECKING:
    from PIL.Image import Image

_CaptionForm = Literal["txt", "jsonl"]


@dataclass(frozen=True)
class WrittenCaption:
    """A written caption.

    `picture`: the picture's name in the folder. `file`: the caption's file."""

    picture: str
    file: Path
    caption: str
    cut: bool = False


@dataclass
class CaptionReport:
    """The result of a captioning call.

    `had`: number of skipped pictures, which have a caption. `failed`: `name: reason`."""

    written: list[WrittenCaption] = field(default_factory=list)
    had: int = 0
    failed: list[str] = field(default_factory=list)


def uncaptioned(folder: str, *, to: _CaptionForm = "txt", overwrite: bool = False) -> list[OwnCaption]:
    """Return the pictures of a folder to caption: uncaptioned ones, or all.

    `overwrite`: all pictures. Raises DataError for a folder that `read_pictures` would refuse, and, listing
    all pictures, if writing would have no effect or change another picture's caption."""
    found = own_captions(folder)
    if not overwrite:
        return [one for one in found if one.caption is None]
    stems = Counter(one.path.with_suffix("") for one in found)
    bad = []
    for one in found:
        files = _caption_files(one.path)
        shared = [f.name for f in files if f.with_suffix("") != one.path and stems[one.path.with_suffix("")] > 1]
        if to == "jsonl" and files:
            bad.append(f"{one.name}: {files[0].name} counts before metadata.jsonl")
        elif to == "jsonl" and one.caption is not None and one.name not in _rows(Path(folder).expanduser()):
            bad.append(f"{one.name}: its caption is in other metadata")
        elif to == "txt" and shared:
            bad.append(f"{one.name}: {shared[0]} is the caption of other pictures too")
    if bad:
        raise DataError(
            f"{counted(len(bad), 'caption')} cannot be overwritten:\n{bullets(bad)}",
            where=folder,
            fix="write the others without --overwrite, the other form (--to), or move those away",
        )
    return found


def write_captions(
    folder: str,
    describe: Callable[[Image], tuple[str, bool]],
    *,
    to: _CaptionForm = "txt",
    trigger: str | None = None,
    overwrite: bool = False,
    on_caption: Callable[[WrittenCaption], None] | None = None,
) -> CaptionReport:
    """Write a caption for each picture of `uncaptioned`, in the order of names.

    `describe`: (text, whether it is truncated) of an RGB picture. `trigger`: put in front of texts without
    it. Unreadable pictures and empty descriptions are in the report. Raises the errors of `uncaptioned`,
    ResourceError for a full disk."""
    root = Path(folder).expanduser()
    wanted = uncaptioned(folder, to=to, overwrite=overwrite)
    every = own_captions(folder)
    stems = Counter(one.path.with_suffix("") for one in every)
    settings = ImageDataSection(pictures=folder, animated="first")
    report = CaptionReport(had=len(every) - len(wanted))
    for one in wanted:
        try:
            text, cut = describe(decode_picture(read_bytes(one.path)[0], settings).colour)
        except UnreadablePicture as error:
            report.failed.append(f"{one.name}: {error}")
            continue
        except BaseError as error:  # the model does not know the picture's path
            raise BaseError(error.what, where=error.where or str(one.path), fix=error.fix) from error
        if not text:
            report.failed.append(f"{one.name}: the model says nothing of it")
            continue
        caption = text if trigger is None else with_trigger(text, trigger)[0]
        file = _write(root, one, caption, to, alone=stems[one.path.with_suffix("")] == 1)
        report.written.append(WrittenCaption(one.name, file, caption, cut))
        if on_caption is not None:
            on_caption(report.written[-1])
    return report


def write_caption(picture: Path, text: str, folder: str | None = None) -> WrittenCaption:
    """Replace the caption of one picture where it is read.

    The caption is in the picture's own file, in its row of metadata.jsonl, or in a new NAME.txt next to it.
    `folder`: the training folder, by default the picture's own. Raises DataError if writing would have no
    effect or change another picture's caption, and for an empty text."""
    caption, root = " ".join(text.split()), Path(folder or picture.parent).expanduser()
    if not caption:
        raise DataError("a caption has at least one word", where=str(picture), fix="say what is to be seen")
    every = own_captions(str(root))
    whole = picture.expanduser().resolve()
    one = next((one for one in every if one.path.resolve() == whole), None)
    if one is None:
        fix = f"it has {counted(len(every), 'picture')}, as {every[0].name}"
        raise DataError("there is no such picture in the folder", where=str(picture), fix=fix)
    files, row = _caption_files(one.path), one.name in _rows(root)
    siblings = [other.name for other in every if other.path.with_suffix("") == one.path.with_suffix("")]
    shared = [file for file in files if file.with_suffix("") != one.path and len(siblings) > 1]
    if shared:
        what = f"{shared[0].name} is the caption of {', '.join(siblings)}"
        raise DataError(what, where=str(picture), fix="give one of them another name")
    if not files and one.caption is not None and not row:
        raise DataError(
            "its caption is in metadata that is not written here", where=str(picture), fix="change it in that file"
        )
    file = _write(root, one, caption, "jsonl" if row and not files else "txt", alone=len(siblings) == 1)
    return WrittenCaption(one.name, file, caption)


def _write(root: Path, one: OwnCaption, caption: str, to: _CaptionForm, *, alone: bool) -> Path:
    """Write a caption and return its file.

    `alone`: no other picture has this name with another suffix."""
    if to == "jsonl":
        file = root / "metadata.jsonl"
        atomic_write(file, [_with_row(root, one.name, caption)])
        return file
    new = one.path.with_suffix(".txt") if alone else one.path.with_name(f"{one.path.name}.txt")
    files = _caption_files(one.path) or [new]
    for file in files:
        atomic_write(file, [f"{caption}\n".encode()])
    return files[0]


def _caption_files(picture: Path) -> list[Path]:
    """Return the caption files next to a picture."""
    places = (picture.with_suffix(""), picture)
    names = [place.with_name(place.name + suffix) for place in places for suffix in CAPTION_SUFFIXES]
    return [name for name in names if name.is_file()]


def _lines(root: Path) -> list[str]:
    file = root / "metadata.jsonl"
    return [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()] if file.exists() else []


def _rows(root: Path) -> dict[str, int]:
    """Return picture -> its line in the folder's metadata.jsonl.

    `own_captions` has read the file."""
    rows = map(json.loads, _lines(root))
    return {str(next((row[c] for c in FILE_COLUMNS if c in row), "")): i for i, row in enumerate(rows)}


def _with_row(root: Path, name: str, caption: str) -> bytes:
    """Return metadata.jsonl with this picture's caption in the caption column.

    Other lines are unchanged."""
    lines, at = _lines(root), _rows(root).get(name)
    rows = [json.loads(line) for line in lines]
    column = next((c for c in CAPTION_COLUMNS if any(c in row for row in rows)), "text")
    row = json.dumps((rows[at] if at is not None else {"file_name": name}) | {column: caption}, ensure_ascii=False)
    lines = [*lines, row] if at is None else [*lines[:at], row, *lines[at + 1 :]]
    return "".join(f"{line}\n" for line in lines).encode()
