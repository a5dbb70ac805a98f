"""Read folders of images as training images.

    pictures, summary = read_pictures(settings)                    training images and class images
    pictures, summary = read_pictures(settings, "validation")      the images of `settings.validation`
    pictures, held_out, summary = read_split_pictures(settings, seed)

Before the first step, each image is read and decoded once, together with its caption, mask and source images,
and all problems are reported. This module does not depend on buckets or tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from veneer.errors import DataError, bullets, counted
from veneer.models.image.base import aspect_problem
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import UnreadablePicture, decode_picture, mask_of, read_bytes
from veneer.train.image.folder import PictureFile, list_pictures, sources_per_picture, with_trigger
from veneer.train.image.near_duplicates import perceptual_hash
from veneer.train.validation_split import hold_out

_SAME_SHAPE = 0.01  # aspect ratios count as equal if their relative difference is at most this number


@dataclass(frozen=True)
class TrainingPicture:
    """A training image.

    name: path in its folder
    caption: the caption with the trigger
    size: (width, height) in pixels, upright
    digest: sha256 of the file
    mask: path of the mask file
    alpha: whether the image's own transparency is the mask
    transparent: whether the background is visible through some pixels
    repeats: how often the image occurs per epoch
    weight: weight of the image in the loss
    is_class: whether it is a class image
    sources: source images of an edit, without captions"""

    path: Path
    name: str
    caption: str
    size: tuple[int, int]
    digest: str
    perceptual_hash: bytes
    mask: Path | None = None
    mask_digest: str = ""
    alpha: bool = False
    transparent: bool = False
    repeats: int = 1
    weight: float = 1.0
    is_class: bool = False
    sources: tuple[TrainingPicture, ...] = ()

    @cached_property
    def key(self) -> str:
        """Return a sha256 digest of everything about the image that training uses, except its location."""
        parts = [self.digest, self.caption, self.mask_digest, self.alpha, self.weight, self.is_class]
        parts += [picture.digest for picture in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class PictureSummary:
    """A summary of the images that were read.

    captions: where the caption was found -> number of images
    triggers: added, replaced, already there -> number of images
    broken: `name: reason` of each dropped file
    notes: conversion during decoding -> number of images
    ignored: suffix -> number of files that are not images, captions or masks
    sources: number of source images per image
    unlike: `name: sizes` of each source image whose proportions differ from the edited image's"""

    captions: Counter[str] = field(default_factory=Counter)
    triggers: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    sources: int = 0
    unlike: list[str] = field(default_factory=list)


def same_shape(size: tuple[int, int], other_size: tuple[int, int]) -> bool:
    """Return whether two (width, height) have the same aspect ratio, within 1%."""
    return abs(size[0] * other_size[1] - size[1] * other_size[0]) <= _SAME_SHAPE * size[0] * other_size[1]


def pictures_digest(pictures: Iterable[TrainingPicture]) -> str:
    """Return the sha256 of the images' keys and repeats, in order."""
    h = hashlib.sha256()
    for picture in pictures:
        h.update(f"{picture.key}|{picture.repeats}\n".encode())
    return "sha256:" + h.hexdigest()


def read_pictures(
    settings: ImageDataSection, part: Literal["train", "validation"] = "train"
) -> tuple[list[TrainingPicture], PictureSummary]:
    """Return the images of the folders in the settings, sorted by name within each folder.

    With "train", the class images follow. Raises DataError for a folder that is missing or has no image; a
    caption, mask or metadata row without an image; images without a caption (unless there is a trigger); a
    mask whose proportions differ from the image's; images that have fewer source images than others; and
    unreadable files unless `settings.broken` is `drop`. Each error lists all problems, up to 20."""
    folders = settings.folders if part == "train" else (settings.validation,) if settings.validation else ()
    summary = PictureSummary()
    without_sources = settings.model_copy(update={"before": "off" if settings.before == "off" else "auto"})
    part_settings = settings if part == "train" else without_sources
    files_of_folder = [
        (folder, list_pictures(folder, part_settings, settings.prompt, settings.masks), False) for folder in folders
    ]
    if part == "train" and settings.class_folder is not None:
        masks = "auto" if settings.masks not in ("off", "alpha") else settings.masks
        classes = list_pictures(settings.class_folder, without_sources, settings.class_prompt, masks)
        files_of_folder.append((settings.class_folder, classes, True))
    summary.sources = sources_per_picture({folder: files for folder, (files, _), _ in files_of_folder})
    pictures: list[TrainingPicture] = []
    for folder, (files, ignored), is_class in files_of_folder:
        summary.ignored += ignored
        pictures += _read(files, folder, settings, summary, is_class)
    if folders and all(picture.is_class for picture in pictures):
        raise DataError("no picture is left to train on", where=", ".join(folders), fix=bullets(summary.broken))
    return pictures, summary


def read_split_pictures(
    settings: ImageDataSection, seed: int
) -> tuple[list[TrainingPicture], list[TrainingPicture], PictureSummary]:
    """Return the training images, the held-out images, and the summary of the training folders.

    Without `settings.validation`, `split_pictures` selects the held-out images. Raises the errors of
    `read_pictures`."""
    pictures, summary = read_pictures(settings)
    if settings.validation is None:
        return *split_pictures(pictures, settings.split, seed), summary
    return pictures, read_pictures(settings, "validation")[0], summary


def split_pictures(
    pictures: Sequence[TrainingPicture], split: int | float | None, seed: int
) -> tuple[list[TrainingPicture], list[TrainingPicture]]:
    """Return (training, held-out) images, selected by `hold_out`.

    If `split` is None, a tenth of the images is held out, at most 50, and none if there are fewer than 20
    images. Class images are never held out."""
    candidates = [p for p in pictures if not p.is_class]
    default = min(50, len(candidates) // 10) if len(candidates) >= 20 else 0

    def order(text: bytes) -> bytes:
        return hashlib.blake2b(text, digest_size=8).digest()

    keys = (p.key for p in candidates)
    selected = hold_out(keys, len(candidates), split, seed=seed, default=default, noun="pictures", order=order)
    held_out = [candidates[i] for i in selected]
    held_ids = {id(p) for p in held_out}
    return [p for p in pictures if id(p) not in held_ids], held_out


def count_pictures(settings: ImageDataSection) -> tuple[int, int]:
    """Return (number of images in the folders of the settings, number of source images per image).

    Images are not opened. Raises the same DataErrors as `read_pictures` for problems with a folder's
    contents."""
    files = {f: list_pictures(f, settings, settings.prompt, settings.masks)[0] for f in settings.folders}
    return sum(map(len, files.values())), sources_per_picture(files)


def _read(
    files: Sequence[PictureFile], folder: str, settings: ImageDataSection, summary: PictureSummary, is_class: bool
) -> list[TrainingPicture]:
    trigger = None if is_class else settings.trigger
    if trigger is None and (missing := [file.name for file in files if file.caption is None]):
        key = "class_prompt" if is_class else "prompt"
        message = f"{len(missing)} of {len(files)} pictures have no caption:\n{bullets(missing)}"
        fix = f"write NAME.txt for each, or a metadata.jsonl, or set data.{key} for all that have none; "
        fix += f"a vision-language model writes them: veneer data caption {shlex.quote(folder)} --model MODEL"
        raise DataError(message, where=folder, fix=fix)
    if trigger is None and (unset := [file.name for file in files if "[trigger]" in (file.caption or "")]):
        message = f"{len(unset)} of {counted(len(files), 'caption')} cannot be used, because they contain [trigger] "
        message += f"and data.trigger is not set:\n{bullets(unset)}"
        raise DataError(message, where=folder, fix="set data.trigger, or correct the captions")
    pictures, broken = [], []
    for file in files:
        caption, change = with_trigger(file.caption or "", trigger)
        try:
            pictures.append(_open(file, caption, settings, summary, is_class))
        except UnreadablePicture as error:
            broken.append(f"{file.name}: {error}")
            continue
        summary.captions[file.caption_source] += 1
        summary.triggers.update([change] if change else [])
    if broken and settings.broken == "refuse":
        message = f"{len(broken)} of {counted(len(files), 'picture')} cannot be used:\n{bullets(broken)}"
        fix = "repair or remove them, or leave them out with data.broken=drop"
        raise DataError(message, where=folder, fix=fix)
    summary.broken += broken
    return pictures


def _open(
    file: PictureFile, caption: str, settings: ImageDataSection, summary: PictureSummary, is_class: bool
) -> TrainingPicture:
    """Decode an image, its mask and its source images.

    Raises UnreadablePicture for unreadable files, for a mask whose proportions differ from the image's, and
    for a source image with an extreme aspect ratio."""
    data, digest = read_bytes(file.path)
    decoded = decode_picture(data, settings)
    width, height = decoded.size
    mask_digest = ""
    if file.mask is not None:
        try:
            data, mask_digest = read_bytes(file.mask)
            size = mask_of(data, settings).size
        except UnreadablePicture as error:
            raise UnreadablePicture(f"its mask {file.mask}: {error}") from None
        if not same_shape(size, decoded.size):
            sizes = f"{size[0]} x {size[1]} pixels, but the picture has {width} x {height}"
            raise UnreadablePicture(f"its mask {file.mask} has {sizes}")
    sources = []
    for path in file.sources:
        name = os.path.relpath(path, file.path.parents[len(Path(file.name).parts) - 1])
        try:
            data, source_digest = read_bytes(path)
            source = decode_picture(data, settings)
        except UnreadablePicture as error:
            raise UnreadablePicture(f"its source image {name}: {error}") from None
        if not same_shape(source.size, decoded.size):
            if why := aspect_problem(*source.size):
                raise UnreadablePicture(f"its source image {name} has {why}")
            sizes = f"{source.size[0]} x {source.size[1]} pixels, but {file.name} has {width} x {height}"
            summary.unlike.append(f"{name}: {sizes}")
        source_hash, transparent = perceptual_hash(source.colour), source.alpha is not None
        picture = TrainingPicture(path, name, "", source.size, source_digest, source_hash, transparent=transparent)
        sources.append(picture)
    summary.notes.update(decoded.notes)
    return TrainingPicture(
        file.path,
        file.name,
        caption,
        decoded.size,
        digest,
        perceptual_hash(decoded.colour),
        file.mask,
        mask_digest,
        alpha=settings.masks == "alpha" and decoded.alpha is not None,
        transparent=decoded.alpha is not None,
        repeats=file.repeats,
        weight=settings.class_weight if is_class else 1.0,
        is_class=is_class,
        sources=tuple(sources),
    )
