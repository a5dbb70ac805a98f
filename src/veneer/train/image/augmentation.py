"""Views of images: buckets, crops, flips, sampled captions, and tensors.

    plan = plan_rows(pictures, settings, size=base.size, unit=base.unit)  image x resolution x repeat
    view, caption = sample_row(plan.rows[i], settings, seed=0, epoch=3)   the same in a resumed run
    tensors = prepare(row.picture, view, settings)                        pixels, mask, SDXL's time ids

A bucket is a (width, height) in multiples of the step, with width * height <= resolution² and a longer side
of at most `bucket_ratio` times the shorter side. An image is assigned to the bucket with the nearest aspect
ratio, resized to cover the bucket, and cropped. An image that would have to be enlarged gets a bucket of its
own size. This module does not depend on models.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from veneer.errors import ConfigError, DataError
from veneer.models.image.base import size_in_units
from veneer.train.config.image import ImageDataSection
from veneer.train.image.decode import UnreadablePicture, decode_picture, mask_of, read_bytes
from veneer.train.image.pictures import TrainingPicture, same_shape

_Bucket = tuple[int, int]
_CROPS = 4
"""Number of random crops per image. Each crop is cached."""


@dataclass(frozen=True)
class PictureRow:
    """An image in one bucket.

    repeat: number of this copy, if the image is repeated. Each copy has its own random numbers."""

    picture: TrainingPicture
    bucket: _Bucket
    repeat: int = 0


@dataclass
class PicturePlan:
    """The rows of an epoch.

    rows: in the order of the images
    small: images smaller than their bucket, which remain at their own size, are enlarged, or are dropped
    dropped: images that are dropped at every resolution
    step: the sides of buckets are multiples of `step`"""

    rows: list[PictureRow] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    step: int = 1

    @property
    def sizes(self) -> dict[_Bucket, int]:
        """Return bucket -> number of rows, most used first."""
        counts = Counter(row.bucket for row in self.rows)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class View:
    """A crop of a resized image.

    The crop has the pixels [top, top + height) x [left, left + width), mirrored if `flip`.

    original, resized: (width, height) of the image before and after resizing."""

    width: int
    height: int
    original: tuple[int, int]
    resized: tuple[int, int]
    top: int = 0
    left: int = 0
    flip: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Return SDXL's micro-conditioning (arXiv 2307.01952, 2.2).

        The values are the original height and width, the crop's top and left in the resized image, and the
        target height and width. For a mirrored crop, left is measured in the mirrored image:
        `resized width - left - width`."""
        crop_left = self.resized[0] - self.left - self.width if self.flip else self.left
        return (self.original[1], self.original[0], self.top, crop_left, self.height, self.width)

    @property
    def cut(self) -> float:
        """Return the share of the image outside the crop."""
        return 1 - self.width * self.height / (self.resized[0] * self.resized[1])


@dataclass(frozen=True)
class ViewTensors:
    """The tensors of a view.

    pixels: (3, h, w) float32 in -1..1; mask: (1, h, w) float32 in 0..1 or None; sizes: (6,) float32 time ids.
    """

    pixels: Tensor
    mask: Tensor | None
    sizes: Tensor


@lru_cache(maxsize=64)
def buckets(resolution: int, step: int, ratio: float) -> tuple[_Bucket, ...]:
    """Return all maximal (width, height) buckets.

    Sides are multiples of `step`, width * height <= resolution², and the longer side is at most `ratio` times
    the shorter side. The square is always included. A bucket is maximal if its longer side cannot grow by
    another step. The only exception is the longest bucket, which can be shortened to meet `ratio` if at least
    three quarters of the area remain. Raises ConfigError if there is no bucket."""
    area = resolution * resolution
    side = resolution // step * step
    shapes: set[_Bucket] = {(side, side)} if side else set()
    last = (side, side)
    for short in range(side, 0, -step):
        fits, allowed = area // short // step * step, int(ratio * short) // step * step
        if fits <= allowed:
            last = (short, fits)
            shapes |= {last, last[::-1]}
            continue
        # Add the shortened bucket only if it is longer in proportion than the last bucket.
        if allowed * last[0] > short * last[1] and 4 * short * allowed >= 3 * area:
            shapes |= {(short, allowed), (allowed, short)}
        break
    if not shapes:
        message = f"a resolution of {resolution} pixels has no bucket in steps of {step}"
        raise ConfigError(message, where="data.resolution", fix=f"give at least {step}")
    return tuple(sorted(shapes))


def bucket_for(
    size: tuple[int, int], resolution: int, step: int, settings: ImageDataSection
) -> tuple[_Bucket | None, bool]:
    """Return (bucket for an image of `size`, whether the image is smaller than its bucket).

    The bucket is the one with the nearest aspect ratio on a log scale; of equally near buckets, the largest.
    Instead of a bucket, None means that the image is dropped."""
    width, height = size
    ratio = settings.bucket_ratio if settings.buckets else 1.0
    choices = buckets(resolution, step, ratio)
    aspect = math.log(width / height)
    best = min(choices, key=lambda b: (abs(math.log(b[0] / b[1]) - aspect), -b[0] * b[1], b))
    if best[0] <= width and best[1] <= height:
        return best, False
    if settings.small == "upscale":
        return best, True
    if settings.small == "drop":
        return None, True
    short = min(width, height, resolution) // step * step
    if not short:
        return None, True
    most = min(int(ratio * short), resolution * resolution // short)
    long = min(max(width, height), most) // step * step
    return ((long, short) if width >= height else (short, long)), True


def plan_rows(pictures: Sequence[TrainingPicture], settings: ImageDataSection, *, size: int, unit: int) -> PicturePlan:
    """Return the rows of an epoch: each image at each resolution, with repeats.

    An image that gets the same bucket at several resolutions occurs only once.

    size: the base's default side in pixels. unit: image sides must be multiples of `unit` pixels.

    Raises ConfigError if `bucket_step` is not a multiple of `unit`, and DataError if no row is left."""
    step = settings.step(unit, size)
    if step % unit:
        message = f"data.bucket_step is {step}, but this base's image sides are multiples of {unit}"
        raise ConfigError(message, where="data.bucket_step", fix=f"set a multiple of {unit}")
    plan = PicturePlan(step=step)
    for picture in pictures:
        used: set[_Bucket] = set()
        small = False
        for resolution in settings.resolutions(size):
            bucket, below = bucket_for(picture.size, resolution, step, settings)
            small = small or below
            if bucket is not None and bucket not in used:
                used.add(bucket)
                plan.rows += [PictureRow(picture, bucket, n) for n in range(picture.repeats)]
        if small:
            plan.small.append(picture.name)
        if not used:
            plan.dropped.append(picture.name)
    if not plan.rows:
        keep = "set data.small to keep or upscale"
        if settings.small == "keep":
            keep = "set data.small to upscale" + (f", or data.bucket_step to {unit}" if step > unit else "")
        message = f"every picture is smaller than its bucket (in steps of {step} pixels) and is left out"
        raise DataError(message, where=", ".join(settings.folders), fix=f"lower data.resolution, or {keep}")
    return plan


def sample_row(row: PictureRow, settings: ImageDataSection, *, seed: int, epoch: int) -> tuple[View, str]:
    """Return the view and the caption of a row in an epoch.

    The result is a pure function of the arguments. A random crop is one of four per image and bucket, so that
    latents can be cached."""
    at = None
    if settings.crop == "random":  # the same four positions in every epoch and for every repeat
        crop = int(_row_uniform(seed, epoch, row, "crop") * _CROPS) + 1
        down, across = (_uniform(seed, row.picture.key, row.bucket, crop, axis) for axis in ("down", "right"))
        at = down, across
    flip = settings.flip and _row_uniform(seed, epoch, row, "flip") < 0.5
    view = crop_view(row.picture.size, row.bucket, flip=flip, at=at)
    return view, sample_caption(row, settings, seed=seed, epoch=epoch)


def crop_view(
    size: tuple[int, int], bucket: _Bucket, *, flip: bool = False, at: tuple[float, float] | None = None
) -> View:
    """Return the view of an image of `size` in `bucket`.

    The image is resized by max(bucket / size), so that it covers the bucket, and cropped.

    at: crop position, as (vertical, horizontal) shares of the excess in [0, 1); None for the center."""
    width, height = size
    w, h = bucket
    if w * height >= h * width:  # scale to the bucket's width; the height is then at least h
        resized = (w, max(h, _rounded(height * w, width)))
    else:
        resized = (max(w, _rounded(width * h, height)), h)
    over = (resized[1] - h, resized[0] - w)
    top, left = (over[0] // 2, over[1] // 2) if at is None else (int(at[0] * (over[0] + 1)), int(at[1] * (over[1] + 1)))
    return View(w, h, size, resized, top, left, flip)


def source_view(
    view: View, source: TrainingPicture, unit: int = 1, size: Callable[[int, int], tuple[int, int]] | None = None
) -> View:
    """Return the view of a source image that corresponds to a target image's `view`.

    A source image with the target's proportions, in any size, gets the same crop and flip. A source image
    with other proportions is shown whole, with about the same number of pixels and sides that are multiples
    of `unit`.

    size: maps (width, height) to the size for the base."""
    same_aspect = same_shape(source.size, view.original)
    target = (view.width, view.height)
    if not same_aspect:
        target = size_in_units(unit, math.isqrt(view.width * view.height), source.size[0] / source.size[1])
    width, height = target if size is None else size(*target)
    if not same_aspect:
        return View(width, height, source.size, (width, height), flip=view.flip)
    if (width, height) == target:
        return replace(view, original=source.size)
    across, down = width / view.width, height / view.height
    resized = max(width, round(view.resized[0] * across)), max(height, round(view.resized[1] * down))
    top, left = min(round(view.top * down), resized[1] - height), min(round(view.left * across), resized[0] - width)
    return View(width, height, source.size, resized, top, left, view.flip)


def shapes_of(picture: TrainingPicture, view: View) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of the view, then one (height, width) for each source image.

    A source image with the proportions of `picture` has (0, 0), any other source image has its own size. Rows
    with equal results can form one batch."""
    odd = ((0, 0) if same_shape(b.size, view.original) else b.size for b in picture.sources)
    return ((view.height, view.width), *odd)


def sample_caption(row: PictureRow, settings: ImageDataSection, *, seed: int, epoch: int) -> str:
    """Return the caption of a row in an epoch.

    The caption is empty with probability `caption_dropout`. Otherwise, `shuffle_tags` shuffles its tags."""
    if _row_uniform(seed, epoch, row, "dropout") < settings.caption_dropout:
        return ""
    if not settings.shuffle_tags:
        return row.picture.caption
    tags = [tag for tag in (t.strip() for t in row.picture.caption.split(",")) if tag]
    keep = settings.keep_tags
    if keep is None:
        keep = int(settings.trigger is not None and not row.picture.is_class)
    order = sorted(range(keep, len(tags)), key=lambda i: _row_uniform(seed, epoch, row, f"tag {i}"))
    return ", ".join(tags[:keep] + [tags[i] for i in order])


def prepare(picture: TrainingPicture, view: View, settings: ImageDataSection) -> ViewTensors:
    """Return the tensors of a view.

    Raises DataError if the file is missing or has changed since it was read."""
    opened = decode_picture(_read_unchanged(picture.path, picture.digest), settings)
    mask = opened.alpha if picture.alpha else None
    if picture.mask is not None:
        mask = mask_of(_read_unchanged(picture.mask, picture.mask_digest), settings)
    colour = np.array(crop_resized(opened.colour, view), dtype=np.float32)
    pixels = torch.from_numpy(colour).permute(2, 0, 1) / 127.5 - 1
    weights = None
    if mask is not None:
        grey = np.array(crop_resized(mask, view, Image.Resampling.BOX), dtype=np.float32)
        values = torch.from_numpy(grey)[None] / 255
        weights = settings.mask_floor + (1 - settings.mask_floor) * values
    return ViewTensors(pixels.contiguous(), weights, torch.tensor(view.time_ids, dtype=torch.float32))


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Return a mask (…, h, w) on the grid of the latents: the mean over each cell."""
    return torch.nn.functional.adaptive_avg_pool2d(mask, (height, width))


def crop_original(picture: TrainingPicture, view: View, settings: ImageDataSection) -> Image.Image:
    """Return the part of an image that a view shows, at the image's own resolution.

    Raises the DataErrors of `prepare`."""
    image = decode_picture(_read_unchanged(picture.path, picture.digest), settings).colour
    across, down = image.width / view.resized[0], image.height / view.resized[1]
    left, right = (round(x * across) for x in (view.left, view.left + view.width))
    top, bottom = (round(y * down) for y in (view.top, view.top + view.height))
    image = image.crop((left, top, right, bottom))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image


def crop_resized(image: Image.Image, view: View, filter: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Return the part of an image that a view shows, at the size of the view."""
    if image.size != view.resized:
        image = image.resize(view.resized, filter)
    image = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image


def _read_unchanged(path: Path, digest: str) -> bytes:
    try:
        data, now = read_bytes(path)
    except UnreadablePicture as error:
        raise DataError(f"a picture of this run can no longer be used: {error}", where=str(path)) from None
    if now != digest:
        fix = "start the run again; it will recompute the latents of this picture"
        raise DataError("the picture changed during the run", where=str(path), fix=fix)
    return data


def _row_uniform(seed: int, epoch: int, row: PictureRow, purpose: str) -> float:
    return _uniform(seed, epoch, row.picture.key, row.bucket, row.repeat, purpose)


def _uniform(*parts: object) -> float:
    """Return a number in [0, 1) from a hash of the arguments.

    With a random generator instead, each row would depend on the rows before it."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _rounded(numerator: int, denominator: int) -> int:
    """Return numerator / denominator, exactly rounded to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)
