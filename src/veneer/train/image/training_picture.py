"""A training picture, and a summary of all of them.

A picture's `key` is a hash of its bytes, its mask's bytes, its caption, and those of its source images,
independent of its location.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from veneer.train.image.near_duplicates import PerceptualHash

_SAME_SHAPE = 0.01  # maximum relative difference of aspect ratios


@dataclass(frozen=True)
class TrainingPicture:
    """A training picture.

    `name`: its path in its folder. `caption`: with the trigger. `size`: (width, height) in pixels, upright.
    `digest`: sha256 of the file. `mask`: a mask file; `alpha`: its own transparency is the mask.
    `transparent`: some of it shows the background. `repeats`: times per epoch. `weight`: weight of its loss.
    `is_class`: whether it is a class picture. `notes`: conversions by decoding. `before`: source images of an
    edit, without captions."""

    path: Path
    name: str
    caption: str
    size: tuple[int, int]
    digest: str
    perceptual_hash: PerceptualHash
    mask: Path | None = None
    mask_digest: str = ""
    alpha: bool = False
    transparent: bool = False
    repeats: int = 1
    weight: float = 1.0
    is_class: bool = False
    notes: tuple[str, ...] = ()
    before: tuple[TrainingPicture, ...] = ()

    @cached_property
    def key(self) -> str:
        """Return the sha256 of all trained content."""
        parts = [self.digest, self.caption, self.mask_digest, self.alpha, self.weight, self.is_class]
        parts += [picture.digest for picture in self.before]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def unlike(self, size: tuple[int, int]) -> str:
        """Return the problem of a file of `size` with other proportions; else ""."""
        (width, height), (w, h) = self.size, size
        return "" if same_shape(size, self.size) else f"{w} x {h} pixels, but {self.name} has {width} x {height}"


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two (width, height) have equal proportions, within 1%."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= _SAME_SHAPE * size[0] * other[1]


@dataclass
class AboutPictures:
    """A summary of the read pictures.

    `captions`: source -> pictures. `trigger`: added, replaced, already there -> pictures. `broken`: `name:
    reason` of dropped files. `notes`: conversion by decoding -> pictures. `repeats`: kohya folder -> times.
    `ignored`: suffix -> files of other kinds. `unused`: unused metadata columns. `several_lines`: caption
    files whose lines were joined. `shared`: caption files of several pictures. `class_triggers`: class
    pictures whose caption has the trigger. `before`: source images per picture; `resized_before`: those of
    another size than their picture; `own_shape`: those of other proportions, `name: sizes`."""

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
    before: int = 0
    resized_before: int = 0
    own_shape: list[str] = field(default_factory=list)


def pictures_digest(pictures: Iterable[TrainingPicture]) -> str:
    """Return the sha256 over the pictures' keys and repeats, in order.

    It is independent of the folder's location."""
    h = hashlib.sha256()
    for picture in pictures:
        h.update(f"{picture.key}|{picture.repeats}\n".encode())
    return "sha256:" + h.hexdigest()
