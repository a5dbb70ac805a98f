"""What the `pictures` section of a configuration holds: its keys, their defaults and meanings, and why so.

Does not know files, decoders, models or torch.
"""

from __future__ import annotations

import re
from typing import Literal

import pydantic

from veneer.train.config.text import Section, setting

__all__ = ["PictureSettings"]

_NAMED = {"white": "#ffffff", "black": "#000000", "grey": "#808080"}


class PictureSettings(Section):
    """Which pictures are learned, what is said of each, and how they are cut."""

    pictures: str | tuple[str, ...] = setting(
        ..., "folders of pictures, with captions beside them, a metadata.jsonl, or kohya's `N_words` folders"
    )
    validation: str | None = setting(None, "a folder of pictures never trained on, read the same way")
    prompt: str | None = setting(None, "the caption of every picture that has none of its own")
    caption_column: str | None = setting(
        None, "metadata's column of captions", "the first of text, caption and prompt that is there"
    )
    trigger: str | None = setting(
        None, "a word for what is learned: replaces `[trigger]` in captions, and is put before those that lack it"
    )
    class_folder: str | None = setting(None, "class (regularisation) pictures, learned beside the others; no trigger")
    class_prompt: str | None = setting(None, "the caption of every class picture that has none of its own")
    class_weight: float = setting(1.0, "the class pictures' loss is multiplied by this", "DreamBooth's value", ge=0)
    caption_dropout: float = setting(
        0.0, "share of the rows whose caption is empty, drawn anew each epoch", "0.1 trains guidance too", ge=0, le=1
    )
    shuffle_tags: bool = setting(False, "shuffle the caption's comma-separated tags, anew each epoch")
    keep_tags: int | None = setting(
        None, "so many first tags stay where they are when shuffling", "1 with a trigger, else 0", ge=0
    )
    resolution: int | tuple[int, ...] | None = setting(
        None, "side in pixels of a square of the same area; several: each picture is learned at each", "the base's size"
    )
    buckets: bool = setting(
        True, "keep each picture's aspect ratio as nearly as the step allows; false: squares", "cuts away least"
    )
    bucket_step: int | None = setting(
        None, "bucket sides are multiples of this many pixels", "64 from 512 pixels on, the base's unit below"
    )
    bucket_ratio: float = setting(
        2.0, "longest side over shortest, at most", "bases have seen little beyond", ge=1, le=8
    )
    small: Literal["keep", "upscale", "drop"] = setting(
        "keep",
        "pictures smaller than their bucket: a bucket of their own size, enlarged, or left out",
        "enlarging teaches blur",
    )
    crop: Literal["center", "random"] = setting("center", "which part is kept of what lies outside the bucket")
    crops: int = setting(
        4, "different random crops of a picture; each epoch uses one of them", "bounds the cache", gt=0
    )
    flip: bool = setting(
        False, "mirror a picture in half of the epochs", "faces, writing and products are not symmetric"
    )
    masks: str = setting(
        "auto",
        "where loss masks are: auto (NAME.mask.png beside, and a `masks` folder), off, alpha, or a folder",
        "used where they are, and said",
    )
    mask_floor: float = setting(0.0, "weight of what a mask leaves out; white is always 1", "nothing of it", ge=0, le=1)
    background: str = setting(
        "#ffffff", "colour behind transparent pixels: #rrggbb, white, black or grey", "as on paper"
    )
    animated: Literal["refuse", "first"] = setting("refuse", "animated files: stop, or use their first frame")
    broken: Literal["refuse", "drop"] = setting(
        "refuse", "files that cannot be read: stop, or leave them out, counted", "nothing is lost without being asked"
    )
    most_megapixels: float = setting(
        120.0, "larger pictures are refused unread", "a small file can unpack to more than the memory", gt=0
    )
    cache: str | None = setting(
        None, "folder for latents and text embeddings; nothing: `cache` in the output folder", "made once, used by all"
    )

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.pictures,) if isinstance(self.pictures, str) else self.pictures

    @property
    def colour(self) -> tuple[int, int, int]:
        """The background as (red, green, blue), 0 to 255."""
        text = _NAMED.get(self.background, self.background)
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)

    def resolutions(self, size: int) -> tuple[int, ...]:
        """Sides from small to large; `size` is the base's, used when none is set."""
        sides = (size,) if self.resolution is None else self.resolution
        return tuple(sorted({sides} if isinstance(sides, int) else set(sides)))

    def step(self, unit: int, size: int) -> int:
        """Bucket step for a base whose sides are multiples of `unit` and whose default side is `size`."""
        if self.bucket_step is not None:
            return self.bucket_step
        return max(unit, 64 // unit * unit) if min(self.resolutions(size)) >= 512 else unit

    @pydantic.field_validator("background")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        if value not in _NAMED and not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
            raise ValueError("a colour is #rrggbb, white, black or grey")
        return value

    @pydantic.field_validator("resolution")
    @classmethod
    def _is_positive(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        sides = () if value is None else (value,) if isinstance(value, int) else value
        if any(side < 8 for side in sides) or value == ():
            raise ValueError("a resolution is at least 8 pixels")
        return value

    @pydantic.field_validator("trigger")
    @classmethod
    def _is_a_word(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or value != value.strip() or "," in value):
            raise ValueError("a trigger is one or more words without commas")
        return value

    @pydantic.model_validator(mode="after")
    def _goes_together(self) -> PictureSettings:
        if self.class_prompt is not None and self.trigger and self.trigger.lower() in self.class_prompt.lower():
            raise ValueError("class_prompt holds the trigger: class pictures keep the class as it was without it")
        if self.masks not in ("auto", "off", "alpha") and len(self.folders) > 1:
            raise ValueError("a folder of masks goes with one folder of pictures; masks: auto looks in each")
        if self.bucket_step is not None and self.bucket_step < 1:
            raise ValueError("bucket_step is at least 1")
        return self
