"""Folders to pictures: every file decoded once, its caption with the trigger, its mask, its weight, what is wrong.

    pictures, about = read_pictures(settings)                    training pictures and class pictures
    pictures, about = read_pictures(settings, "validation")      those of `settings.validation`

A picture's `key` is a hash of its bytes, its mask's bytes and its caption: where the file stands does not matter.
Reads everything once, so that what cannot be used is known before step one. Knows neither buckets nor tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Literal

from veneer.errors import DataError
from veneer.train.config.image import ImageDataSection
from veneer.train.image.folders import ListedPicture, Listing, list_pictures, listed
from veneer.train.image.looks import Look, look_of
from veneer.train.image.picture_files import UnreadablePicture, decode_picture, mask_of, read_bytes

__all__ = ["AboutPictures", "TrainingPicture", "pictures_digest", "read_pictures", "with_trigger"]

PLACEHOLDER = "[trigger]"
_SAME_SHAPE = 0.01  # how far a mask's aspect ratio may be from its picture's


@dataclass(frozen=True)
class TrainingPicture:
    """A picture as it is learned.

    `name`: its path in its folder. `caption`: with the trigger. `size`: (width, height) in pixels, upright.
    `digest`: sha256 of the file. `mask`: a mask file; `alpha`: its own transparency is the mask. `transparent`: some of
    it shows the background. `repeats`: times an epoch. `weight`: of its loss. `is_class`: one of the class pictures.
    `notes`: what decoding converted."""

    path: Path
    name: str
    caption: str
    size: tuple[int, int]
    digest: str
    look: Look
    mask: Path | None = None
    mask_digest: str = ""
    alpha: bool = False
    transparent: bool = False
    repeats: int = 1
    weight: float = 1.0
    is_class: bool = False
    notes: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """sha256 of everything the picture teaches."""
        parts = [self.digest, self.caption, self.mask_digest, self.alpha, self.weight, self.is_class]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class AboutPictures:
    """What was read. `captions`: who said them -> pictures. `trigger`: added, replaced, already there -> pictures.
    `broken`: `name: reason` of files left out. `notes`: what decoding converted -> pictures. `repeats`: kohya folder ->
    times. `ignored`: ending -> files that are none of ours. `unused`: metadata columns that nothing uses.
    `several_lines`: caption files whose lines were joined. `shared`: caption files that speak for several pictures.
    `class_triggers`: class pictures whose caption holds the trigger."""

    pictures: int = 0
    class_pictures: int = 0
    captions: Counter[str] = field(default_factory=Counter)
    trigger: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    broken: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    masks: int = 0
    resized_masks: int = 0
    alpha_masks: int = 0
    repeats: dict[str, int] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)
    several_lines: int = 0
    shared: int = 0
    class_triggers: list[str] = field(default_factory=list)


def read_pictures(
    settings: ImageDataSection,
    which: Literal["train", "validation"] = "train",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[TrainingPicture], AboutPictures]:
    """The pictures of the settings' folders, sorted by name within each; with "train" the class pictures follow.

    `progress` is called with (files read, files in all): a photograph of 12 megapixels takes about a fifth of a second.

    Raises DataError for a folder that is missing or holds no picture; a caption, mask or metadata row without a
    picture; pictures without a caption (when there is no trigger to stand alone); a mask of another shape; and files
    that cannot be read unless `settings.broken` is `drop`. Each lists all it found, up to 20."""
    folders = settings.folders if which == "train" else (settings.validation,) if settings.validation else ()
    about = AboutPictures()
    pictures: list[TrainingPicture] = []
    listings = [(f, list_pictures(f, settings, prompt=settings.prompt, masks=settings.masks), False) for f in folders]
    if which == "train" and settings.class_folder is not None:
        masks = "auto" if settings.masks not in ("off", "alpha") else settings.masks
        listing = list_pictures(settings.class_folder, settings, prompt=settings.class_prompt, masks=masks)
        listings.append((settings.class_folder, listing, True))
    total, done = sum(len(listing.found) for _, listing, _ in listings), count(1)

    def tick() -> None:
        n = next(done)
        if progress is not None:
            progress(n, total)

    for folder, listing, is_class in listings:
        read = _read(listing, folder, settings, about, tick, is_class=is_class)
        pictures += read
        about.class_pictures += len(read) if is_class else 0
        about.pictures += 0 if is_class else len(read)
    if folders and not about.pictures:
        raise DataError("no picture is left to train on", where=", ".join(folders), fix=listed(about.broken))
    return pictures, about


def pictures_digest(pictures: Iterable[TrainingPicture]) -> str:
    """sha256 over what the pictures teach, in order; the same in whatever folder they stand."""
    h = hashlib.sha256()
    for picture in pictures:
        h.update(f"{picture.key}|{picture.repeats}\n".encode())
    return "sha256:" + h.hexdigest()


def with_trigger(caption: str, trigger: str | None) -> tuple[str, str]:
    """(caption with the trigger, what was done: "replaced", "already there", "added" or "" without a trigger).

    `[trigger]` is replaced wherever it stands; a caption that lacks the word gets it in front, as a tag of its own.
    ValueError for a placeholder with nothing to put there."""
    if trigger is None:
        if PLACEHOLDER in caption:
            raise ValueError(f"holds {PLACEHOLDER}, and data.trigger is not set")
        return caption, ""
    if PLACEHOLDER in caption:
        return caption.replace(PLACEHOLDER, trigger), "replaced"
    if _has_word(caption, trigger):
        return caption, "already there"
    return f"{trigger}, {caption}" if caption else trigger, "added"


def _has_word(caption: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


def _read(
    listing: Listing,
    folder: str,
    settings: ImageDataSection,
    about: AboutPictures,
    tick: Callable[[], None],
    *,
    is_class: bool,
) -> list[TrainingPicture]:
    about.repeats |= listing.repeats
    about.ignored += listing.ignored
    about.unused += [c for c in listing.unused if c not in about.unused]
    about.several_lines += listing.several_lines
    about.shared += listing.shared
    trigger = None if is_class else settings.trigger
    captions = _captions(listing.found, folder, trigger, is_class=is_class)
    if is_class and settings.trigger:
        about.class_triggers += [
            f.name for f, (c, _) in zip(listing.found, captions, strict=True) if _has_word(c, settings.trigger)
        ]
    pictures, broken, wrong_masks = [], [], []
    for found, (caption, did) in zip(listing.found, captions, strict=True):
        tick()
        try:
            picture = _open(found, caption, settings, is_class=is_class)
        except UnreadablePicture as error:
            broken.append(f"{found.name}: {error}")
            continue
        try:
            about.resized_masks += picture.mask is not None and _mask_differs(picture, settings)
        except UnreadablePicture as error:
            wrong_masks.append(f"{picture.mask}: {error}")
        about.notes.update(picture.notes)
        about.captions[found.source] += 1
        about.trigger.update([did] if did else [])
        about.masks += picture.mask is not None
        about.alpha_masks += picture.alpha
        about.empty += not caption
        pictures.append(picture)
    if wrong_masks:
        raise DataError(
            f"{len(wrong_masks)} mask(s) cannot be used:\n{listed(wrong_masks)}",
            where=folder,
            fix="draw them at their picture's size, white where it is learned, or set data.masks: off",
        )
    if broken and settings.broken == "refuse":
        raise DataError(
            f"{len(broken)} of {len(listing.found)} pictures cannot be used:\n{listed(broken)}",
            where=folder,
            fix="repair or remove them, or leave them out with data.broken=drop",
        )
    about.broken += broken
    return pictures


def _captions(
    found: Sequence[ListedPicture], folder: str, trigger: str | None, *, is_class: bool
) -> list[tuple[str, str]]:
    """Every picture's caption with the trigger, and what was done for that; DataError for those that have none, or a
    placeholder for nothing."""
    captions, bad = [], []
    missing = [f.name for f in found if f.caption is None] if trigger is None else []
    for f in found:
        try:
            captions.append(with_trigger(f.caption or "", trigger))
        except ValueError as error:
            bad.append(f"{f.name}: {error}" if not is_class else f"{f.name}: holds {PLACEHOLDER}: the class has none")
    if missing:
        key = "class_prompt" if is_class else "prompt"
        raise DataError(
            f"{len(missing)} of {len(found)} pictures have no caption:\n{listed(missing)}",
            where=folder,
            fix=f"write NAME.txt beside each, or a metadata.jsonl, or set data.{key} for all that have none",
        )
    if bad:
        raise DataError(f"{len(bad)} caption(s) cannot be used:\n{listed(bad)}", where=folder, fix="correct them")
    return captions


def _open(found: ListedPicture, caption: str, settings: ImageDataSection, *, is_class: bool) -> TrainingPicture:
    data, digest = read_bytes(found.path)
    opened = decode_picture(data, settings)
    mask, mask_digest = found.mask, ""
    if mask is not None:
        try:
            mask_digest = read_bytes(mask)[1]
        except UnreadablePicture:
            mask_digest = "unreadable"  # told by _mask_differs, with the mask's own name
    return TrainingPicture(
        found.path,
        found.name,
        caption,
        opened.size,
        digest,
        look_of(opened.colour),
        mask,
        mask_digest,
        alpha=settings.masks == "alpha" and opened.alpha is not None,
        transparent=opened.alpha is not None,
        repeats=found.repeats,
        weight=settings.class_weight if is_class else 1.0,
        is_class=is_class,
        notes=opened.notes,
    )


def _mask_differs(picture: TrainingPicture, settings: ImageDataSection) -> bool:
    """Whether the mask has another size than its picture; UnreadablePicture when it has another shape."""
    assert picture.mask is not None
    size = mask_of(read_bytes(picture.mask)[0], settings).size
    (width, height), (w, h) = picture.size, size
    if abs(w * height - h * width) > _SAME_SHAPE * w * height:
        raise UnreadablePicture(f"{w} x {h} pixels, but {picture.name} has {width} x {height}")
    return size != picture.size
