"""A picture as it is learned, and what was read of all of them.

A picture's `key` is a hash of its bytes, its mask's bytes and its caption, and of those before it: where the file
stands does not matter.
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

_SAME_SHAPE = 0.01  # how far another aspect ratio may be from its own


@dataclass(frozen=True)
class TrainingPicture:
    """A picture as it is learned.

    `name`: its path in its folder. `caption`: with the trigger. `size`: (width, height) in pixels, upright.
    `digest`: sha256 of the file. `mask`: a mask file; `alpha`: its own transparency is the mask. `transparent`: some of
    it shows the background. `repeats`: times an epoch. `weight`: of its loss. `is_class`: one of the class pictures.
    `notes`: what decoding converted. `before`: the pictures that an edit starts from, without captions."""

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
        """sha256 of all content that is learned from."""
        parts = [self.digest, self.caption, self.mask_digest, self.alpha, self.weight, self.is_class]
        parts += [picture.digest for picture in self.before]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def unlike(self, size: tuple[int, int]) -> str:
        """What is said of a file of `size` that has another proportion; else nothing."""
        (width, height), (w, h) = self.size, size
        return "" if same_shape(size, self.size) else f"{w} x {h} pixels, but {self.name} has {width} x {height}"


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (width, height) have one proportion, within a hundredth."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= _SAME_SHAPE * size[0] * other[1]


@dataclass
class AboutPictures:
    """What was read. `captions`: source -> pictures. `trigger`: added, replaced, already there -> pictures.
    `broken`: `name: reason` of files left out. `notes`: what decoding converted -> pictures. `repeats`: kohya folder ->
    times. `ignored`: ending -> files of no kind that is read. `unused`: metadata columns that nothing uses.
    `several_lines`: caption files whose lines were joined. `shared`: caption files that belong to several pictures.
    `class_triggers`: class pictures whose caption holds the trigger. `before`: pictures before each; `resized_before`:
    those of another size than theirs; `own_shape`: those of another proportion, `name: sizes`."""

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
    """sha256 over the pictures' keys and repeats, in order; the same wherever the folder is."""
    h = hashlib.sha256()
    for picture in pictures:
        h.update(f"{picture.key}|{picture.repeats}\n".encode())
    return "sha256:" + h.hexdigest()
