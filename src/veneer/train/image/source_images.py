"""Find and check the source images of editing pairs.

A picture's source images are `NAME.before.png` next to it, a file of the same name in the folder `before` or
in each of the configured folders, or the `before` of its metadata row; the metadata columns can then be
before, instruction and after. All pictures have the same number of source images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from veneer.errors import DataError, bullets, counted
from veneer.models.image.base import too_long
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import SUFFIXES, UnreadablePicture, decode_picture, read_bytes
from veneer.train.image.folder import BEFORE, PictureFile, PictureFolder
from veneer.train.image.near_duplicates import perceptual_hash
from veneer.train.image.training_picture import AboutPictures, TrainingPicture


def before_files(
    folder: PictureFolder, named: Mapping[Path, Sequence[Path]], settings: ImageDataSection
) -> dict[Path, list[Path]]:
    """Return picture -> its source images, one from each source.

    The sources are its metadata row (`named`), NAME.before.png next to it, and a file of the same path in
    each folder. Raises DataError for files that belong to no picture."""
    if settings.before == "off":
        return {}
    auto, root = settings.before == "auto", folder.root
    found = {path: list(paths) for path, paths in named.items() if auto}
    bad: list[str] = []
    for file in folder.befores if auto else ():
        owners = folder.owners(file.with_suffix("").with_suffix(""))
        if not owners:
            bad.append(folder.unowned(file))
        for owner in owners:
            found.setdefault(owner, []).append(file)
    used = {path for paths in named.values() for path in paths}
    for place in [root / BEFORE] if auto else [Path(given).expanduser() for given in settings.before_folders]:
        files = [f for f in sorted(place.rglob("*")) if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
        if not auto and not files:
            what = "holds no picture" if place.is_dir() else "is a file" if place.exists() else "does not exist"
            raise DataError(f"the folder of before pictures {what}", where=str(place), fix="correct data.before")
        for file in files:
            if file in used:
                continue
            mirrored = root / file.relative_to(place)
            owners = folder.owners(mirrored.with_suffix(""))
            if not owners:
                bad.append(folder.unowned(file, mirrored))
            for owner in owners:
                found.setdefault(owner, []).append(file)
    if bad:
        raise DataError(
            f"{counted(len(bad), 'before picture')} with no picture after:\n{bullets(bad)}",
            where=str(root),
            fix="name both alike (before/cat.png or cat.before.png for cat.png), or set data.before: off",
        )
    return found


def each_before(folders: Mapping[str, Sequence[PictureFile]]) -> int:
    """Return the number of source images per picture.

    Raises DataError if some have fewer than others."""
    files = [file for own in folders.values() for file in own]
    most = max((len(file.before) for file in files), default=0)
    fewer = [f"{f.name}: {len(f.before) or 'nothing'}" if most > 1 else f.name for f in files if len(f.before) < most]
    if fewer:
        short = [folder for folder, own in folders.items() if any(len(file.before) < most for file in own)]
        example = next(file.name for file in files if len(file.before) == most)
        rest = "those that have none" if most == 1 else "what is too many"
        what = "no picture before them" if most == 1 else f"fewer than the {most} pictures that are before {example}"
        raise DataError(
            f"{len(fewer)} of {len(files)} pictures have {what}:\n{bullets(fewer)}",
            where=", ".join(short),
            fix="give each its own (NAME.before.png beside it, or its name in the before folder), remove "
            f"{rest}, or set data.before: off to learn from captions alone",
        )
    return most


def open_before(path: Path, after: TrainingPicture, settings: ImageDataSection) -> TrainingPicture:
    """Return a source image. Raises UnreadablePicture."""
    name = os.path.relpath(path, after.path.parents[len(Path(after.name).parts) - 1])
    try:
        data, digest = read_bytes(path)
        opened = decode_picture(data, settings)
    except UnreadablePicture as error:
        raise UnreadablePicture(f"what is before it, {name}, {error}") from None
    transparent = opened.alpha is not None
    return TrainingPicture(
        path, name, "", opened.size, digest, perceptual_hash(opened.colour), transparent=transparent, notes=opened.notes
    )


def check_befores(pictures: Iterable[TrainingPicture], folder: str, about: AboutPictures) -> None:
    """Report source images whose size or proportions differ, in `about`.

    Raises DataError for source images that are too long."""
    pairs = [(before, after) for after in pictures for before in after.before]
    unlike = [f"{before.name}: {why}" for before, after in pairs if (why := after.unlike(before.size))]
    about.own_shape += unlike
    about.resized_before += sum(before.size != after.size for before, after in pairs)
    if long := [f"{b.name}: {why}" for b, after in pairs if after.unlike(b.size) and (why := too_long(*b.size))]:
        raise DataError(
            f"{counted(len(long), 'before picture')} too long to be shown whole:\n{bullets(long)}",
            where=folder,
            fix="crop them",
        )
