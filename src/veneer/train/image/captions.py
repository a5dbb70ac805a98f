"""Write captions for images that have none, as NAME.txt next to NAME.png.

    report = write_captions("drawings", describe, trigger="sks")

Each caption is written atomically as soon as it exists, and images with a caption are skipped, so an
interrupted call can be repeated. The caller provides the function `describe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import BaseError, DataError, counted
from veneer.files.atomic import atomic_write
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import UnreadablePicture, decode_picture, read_bytes
from veneer.train.image.folder import CAPTION_SUFFIXES, PictureFile, list_pictures, with_trigger

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class WrittenCaption:
    """A written caption.

    picture: name of the image in the folder. file: path of the caption file."""

    picture: str
    file: Path
    caption: str
    cut: bool = False


@dataclass
class CaptionReport:
    """The result of a captioning call.

    had: number of images that were skipped because they already had a caption. failed: `name: reason` for
    each image that could not be captioned."""

    written: list[WrittenCaption] = field(default_factory=list)
    had: int = 0
    failed: list[str] = field(default_factory=list)


def write_captions(
    folder: str,
    describe: Callable[[Image], tuple[str, bool]],
    *,
    trigger: str | None = None,
    overwrite: bool = False,
    on_caption: Callable[[WrittenCaption], None] | None = None,
) -> CaptionReport:
    """Write captions for the images that have none, or for all images if `overwrite` is true.

    Images are processed in order of their names.

    describe: returns (text, truncated) for an RGB image. trigger: prepended to each text that does not
    contain it.

    The report lists unreadable images and empty descriptions. Raises DataError for a folder that
    `read_pictures` refuses, and if overwriting would change another image's caption; ResourceError if the
    disk is full."""
    settings = ImageDataSection(pictures=folder)
    files = _list(folder)
    todo = [file for file in files if overwrite or file.caption_source not in ("caption files", "metadata")]
    report = CaptionReport(had=len(files) - len(todo))
    targets = {file.path: _caption_files(file, files) for file in todo}
    for file in todo:
        try:
            text, cut = describe(decode_picture(read_bytes(file.path)[0], settings).colour)
        except UnreadablePicture as error:
            report.failed.append(f"{file.name}: {error}")
            continue
        except BaseError as error:  # the model does not know the path of the image, so add it
            raise BaseError(error.what, where=error.where or str(file.path), fix=error.fix) from error
        if not text:
            report.failed.append(f"{file.name}: the model's description is empty")
            continue
        caption = text if trigger is None else with_trigger(text, trigger)[0]
        report.written.append(_write(file, targets[file.path], caption, cut))
        if on_caption is not None:
            on_caption(report.written[-1])
    return report


def write_caption(picture: Path, text: str, folder: str | None = None) -> WrittenCaption:
    """Write the caption of one image to its caption file, which takes precedence over metadata.

    folder: the training folder; the default is the image's folder.

    Raises DataError for an unknown image, for an empty text, and if writing would change another image's
    caption."""
    caption = " ".join(text.split())
    if not caption:
        raise DataError("a caption has at least one word", where=str(picture), fix="describe the picture")
    files = _list(folder or str(picture.parent))
    path = picture.expanduser().resolve()
    file = next((file for file in files if file.path.resolve() == path), None)
    if file is None:
        fix = f"the folder has {counted(len(files), 'picture')}, such as {files[0].name}"
        raise DataError("there is no such picture in the folder", where=str(picture), fix=fix)
    return _write(file, _caption_files(file, files), caption)


def _list(folder: str) -> list[PictureFile]:
    return list_pictures(folder, ImageDataSection(pictures=folder, masks="off"), None, "off")[0]


def _caption_files(file: PictureFile, files: Sequence[PictureFile]) -> list[Path]:
    """Return the paths of an image's caption files. If it has none, return the path of the file to create."""
    stem = file.path.with_suffix("")
    siblings = [sibling.name for sibling in files if sibling.path.with_suffix("") == stem]
    paths = [place.with_name(place.name + suffix) for place in (stem, file.path) for suffix in CAPTION_SUFFIXES]
    existing = [path for path in paths if path.is_file()]
    if shared := [path.name for path in existing if path.with_suffix("") == stem and len(siblings) > 1]:
        message = f"{shared[0]} is the caption of {', '.join(siblings)}"
        raise DataError(message, where=str(file.path), fix="rename one of them")
    stem_or_name = stem if len(siblings) == 1 else file.path
    return existing or [stem_or_name.with_name(f"{stem_or_name.name}.txt")]


def _write(file: PictureFile, targets: Sequence[Path], caption: str, cut: bool = False) -> WrittenCaption:
    for target in targets:
        atomic_write(target, [f"{caption}\n".encode()])
    return WrittenCaption(file.name, targets[0], caption, cut)
