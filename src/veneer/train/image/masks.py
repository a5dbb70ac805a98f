"""Find loss masks of pictures, and check their sizes.

Masks are NAME.mask.png next to NAME.png, or files in the folder `masks` or the configured folder, which
mirrors the pictures' paths or has their names only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from veneer.errors import DataError, bullets, counted
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import SUFFIXES, UnreadablePicture, mask_of, read_bytes
from veneer.train.image.folder import PictureFolder
from veneer.train.image.training_picture import TrainingPicture


def mask_files(folder: PictureFolder, masks: str) -> dict[Path, Path]:
    """Return picture -> mask file.

    `masks`: the setting. Raises DataError for a mask without a picture."""
    if masks in ("off", "alpha"):
        return {}
    covers: dict[Path, Path] = {}
    bad: list[str] = []
    for mask in folder.masks:
        owners = folder.owners(mask.with_suffix("").with_suffix(""))
        if not owners:
            bad.append(folder.unowned(mask))
        for owner in owners:
            covers[owner] = mask
    place = folder.root / "masks" if masks == "auto" else Path(masks).expanduser()
    if masks != "auto" and not place.is_dir():
        raise DataError("the folder of masks does not exist", where=str(place), fix="correct data.masks")
    by_stem: dict[str, list[Path]] = {}
    for path in folder.pictures:
        by_stem.setdefault(path.stem, []).append(path)
    for mask in sorted(place.rglob("*")) if place.is_dir() else ():
        if mask.suffix.lower() not in SUFFIXES or mask.name.startswith("."):
            continue
        relative = mask.relative_to(place)
        stem = mask.stem.removesuffix(".mask")
        mirrored = folder.root / relative.with_name(stem)
        owners = folder.owners(mirrored) or (by_stem.get(stem, []) if len(relative.parts) == 1 else [])
        if not owners:
            bad.append(folder.unowned(mask, mirrored))
        elif len({o.parent for o in owners}) > 1:
            bad.append(
                f"{mask}: pictures of this name are in {len(owners)} folders; repeat the folders among the masks"
            )
        else:
            for owner in owners:
                covers.setdefault(owner, mask)
    if bad:
        raise DataError(
            f"{counted(len(bad), 'mask')} cannot be used:\n{bullets(bad)}",
            where=str(folder.root),
            fix="name a mask as its picture (cat.mask.png or masks/cat.png for cat.png), or set data.masks: off",
        )
    return covers


def check_masks(pictures: Iterable[TrainingPicture], folder: str, settings: ImageDataSection) -> int:
    """Return the number of masks whose size differs from their picture's.

    Raises DataError for masks that cannot be read or have other proportions."""
    resized, wrong = 0, []
    for picture in pictures:
        if picture.mask is None:
            continue
        try:
            size = mask_of(read_bytes(picture.mask)[0], settings).size
        except UnreadablePicture as error:
            wrong.append(f"{picture.mask}: {error}")
            continue
        resized += size != picture.size
        if why := picture.unlike(size):
            wrong.append(f"{picture.mask}: {why}")
    if wrong:
        raise DataError(
            f"{counted(len(wrong), 'mask')} cannot be used:\n{bullets(wrong)}",
            where=folder,
            fix="draw them at their picture's size, white where it is learned, or set data.masks: off",
        )
    return resized
