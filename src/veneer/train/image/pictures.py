"""Read folders of pictures as training pictures.

    pictures, about = read_pictures(settings)                    training pictures and class pictures
    pictures, about = read_pictures(settings, "validation")      those of `settings.validation`

Every file is decoded once, before step one, with its caption and trigger, mask, source images and weight; all
problems are reported. `folder` lists files, `folder_captions`, `masks` and `befores` match them to pictures.
Independent of buckets and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from veneer.errors import DataError, bullets, counted, first_few
from veneer.train.config.image import ImageDataSection, SliderSection
from veneer.train.image.decode import SUFFIXES, UnreadablePicture, decode_picture, read_bytes
from veneer.train.image.folder import PictureFile, picture_folder
from veneer.train.image.folder_captions import caption_files, has_word, kohya_folder, metadata_rows, triggered
from veneer.train.image.masks import check_masks, mask_files
from veneer.train.image.near_duplicates import perceptual_hash
from veneer.train.image.source_images import before_files, check_befores, each_before, open_before
from veneer.train.image.training_picture import AboutPictures, TrainingPicture

_OWN = ("caption files", "metadata")


def read_pictures(
    settings: ImageDataSection, which: Literal["train", "validation"] = "train"
) -> tuple[list[TrainingPicture], AboutPictures]:
    """Return the pictures of the settings' folders, sorted by name in each.

    With "train" the class pictures follow. Raises DataError for a folder that is missing or has no picture; a
    caption, mask or metadata row without a picture; pictures without a caption (if there is no trigger to use
    instead); a mask of other proportions; incomplete pairs; and unreadable files unless `settings.broken` is
    `drop`. Each error lists all problems, up to 20."""
    folders = settings.folders if which == "train" else (settings.validation,) if settings.validation else ()
    about = AboutPictures()
    pictures: list[TrainingPicture] = []
    elsewhere = settings.model_copy(update={"before": "off" if settings.before == "off" else "auto"})
    own = settings if which == "train" else elsewhere
    found = [(f, _list_folder(f, own, about, settings.prompt, settings.masks), False) for f in folders]
    if which == "train" and settings.class_folder is not None:
        masks = "auto" if settings.masks not in ("off", "alpha") else settings.masks
        classes = _list_folder(settings.class_folder, elsewhere, about, settings.class_prompt, masks)
        found.append((settings.class_folder, classes, True))
    about.before = each_before({folder: files for folder, files, _ in found})
    for folder, files, is_class in found:
        read = _read(files, folder, settings, about, is_class=is_class)
        pictures += read
        about.class_pictures += len(read) if is_class else 0
        about.pictures += 0 if is_class else len(read)
    if folders and not about.pictures:
        raise DataError("no picture is left to train on", where=", ".join(folders), fix=bullets(about.broken))
    return pictures, about


def count_pictures(settings: ImageDataSection) -> tuple[int, int]:
    """Return (pictures in the settings' folders, source images per picture).

    Uses names only. Raises DataError for a folder's content as `read_pictures` does."""
    about = AboutPictures()
    files = {f: _list_folder(f, settings, about, settings.prompt, settings.masks) for f in settings.folders}
    return sum(map(len, files.values())), each_before(files)


@dataclass(frozen=True)
class OwnCaption:
    """A picture of a folder, its name there, and its own caption or None."""

    path: Path
    name: str
    caption: str | None


def own_captions(folder: str) -> list[OwnCaption]:
    """Return the pictures of a folder by name, with captions of files and metadata.

    Raises DataError for a folder that `read_pictures` would refuse before opening a picture."""
    found = _list_folder(folder, ImageDataSection(pictures=folder, masks="off"), AboutPictures(), None, "off")
    return [OwnCaption(f.path, f.name, f.caption if f.source in _OWN else None) for f in found]


def _read(
    files: Sequence[PictureFile], folder: str, settings: ImageDataSection, about: AboutPictures, *, is_class: bool
) -> list[TrainingPicture]:
    trigger = None if is_class else settings.trigger
    captions = triggered(files, folder, trigger, is_class=is_class)
    if is_class and settings.trigger:
        about.class_triggers += [
            f.name for f, (c, _) in zip(files, captions, strict=True) if has_word(c, settings.trigger)
        ]
    pictures, broken = [], []
    for found, (caption, did) in zip(files, captions, strict=True):
        try:
            picture = _open(found, caption, settings, is_class=is_class)
            before = tuple(open_before(path, picture, settings) for path in found.before)
        except UnreadablePicture as error:
            broken.append(f"{found.name}: {error}")
            continue
        about.notes.update(picture.notes)
        about.captions[found.source] += 1
        about.trigger.update([did] if did else [])
        about.masks += picture.mask is not None
        about.alpha_masks += picture.alpha
        about.empty += not caption
        pictures.append(replace(picture, before=before))
    about.resized_masks += check_masks(pictures, folder, settings)
    check_befores(pictures, folder, about)
    if broken and settings.broken == "refuse":
        raise DataError(
            f"{len(broken)} of {len(files)} pictures cannot be used:\n{bullets(broken)}",
            where=folder,
            fix="repair or remove them, or leave them out with data.broken=drop",
        )
    about.broken += broken
    return pictures


def _open(found: PictureFile, caption: str, settings: ImageDataSection, *, is_class: bool) -> TrainingPicture:
    data, digest = read_bytes(found.path)
    opened = decode_picture(data, settings)
    mask, mask_digest = found.mask, ""
    if mask is not None:
        try:
            mask_digest = read_bytes(mask)[1]
        except UnreadablePicture:
            mask_digest = "unreadable"  # check_masks reports it with the mask's name
    return TrainingPicture(
        found.path,
        found.name,
        caption,
        opened.size,
        digest,
        perceptual_hash(opened.colour),
        mask,
        mask_digest,
        alpha=settings.masks == "alpha" and opened.alpha is not None,
        transparent=opened.alpha is not None,
        repeats=found.repeats,
        weight=settings.class_weight if is_class else 1.0,
        is_class=is_class,
        notes=opened.notes,
    )


def _list_folder(
    place: str, settings: ImageDataSection, about: AboutPictures, prompt: str | None, masks: str
) -> list[PictureFile]:
    """Return the pictures in `place` and its subfolders, sorted by name.

    Counts other files in `about`. `prompt`, `masks`: the settings. Raises DataError."""
    folder = picture_folder(place, settings)
    about.ignored += folder.ignored
    rows, named = metadata_rows(folder, settings, about)
    shown = {path for paths in named.values() for path in paths}
    folder = replace(folder, pictures=[p for p in folder.pictures if p not in shown or p in rows])
    if not folder.pictures:
        others = first_few([f"{n} {suffix}" for suffix, n in folder.ignored.most_common()], 12) or "nothing"
        raise DataError(
            "there is no picture in this folder",
            where=str(folder.root),
            fix=f"pictures end in {', '.join(SUFFIXES)}; the folder holds {others}",
        )
    captioned = caption_files(folder, about)
    covers = mask_files(folder, masks)
    before = before_files(folder, named, settings)
    out = []
    for path in folder.pictures:
        repeats, words = kohya_folder(path, folder.root, about)
        sources = {
            "caption files": captioned.get(path),
            "metadata": rows.get(path),
            "folder names": words,
            "the prompt": prompt,
        }
        source = next((source for source, caption in sources.items() if caption is not None), "nothing")
        name, own = path.relative_to(folder.root).as_posix(), tuple(before.get(path, ()))
        out.append(PictureFile(path, name, sources.get(source), source, covers.get(path), repeats, own))
    return out


def planned_slider(slider: SliderSection) -> tuple[int, int, float, str]:
    """Return the numbers for a slider's plan.

    They are (scenes, training rows per scene, extra base forward passes per row, description)."""
    text = f"a slider: {counted(slider.scenes, 'scene')} that the base draws first, learned at both signs, "
    return slider.scenes, 2, 1.5, text + "three forwards of the base for both"
