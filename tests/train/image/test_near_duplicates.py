from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageEnhance

from tests.train.make_pictures import scene
from veneer.train.image.near_duplicates import near_duplicates, perceptual_hash


def recoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_re_encoded_resized_and_brightened_pictures_look_the_same() -> None:
    images = [scene(240, 160, seed) for seed in range(12)]
    looks = [perceptual_hash(image) for image in images]
    assert near_duplicates(looks) == []
    for change in (
        lambda i: recoded(i, 40),
        lambda i: i.resize((90, 60), Image.Resampling.LANCZOS),
        lambda i: ImageEnhance.Brightness(i).enhance(1.03),
        lambda i: i.crop((2, 2, 238, 158)),
    ):
        assert near_duplicates([perceptual_hash(change(i)) for i in images], looks) == [(n, n) for n in range(12)]


def test_same_shapes_in_different_colors_are_not_duplicates() -> None:
    def disc(colour: tuple[int, int, int]) -> Image.Image:
        y, x = np.mgrid[:64, :64]
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[(x - 32) ** 2 + (y - 32) ** 2 < 600] = colour
        return Image.fromarray(pixels)

    red, orange, blue = (perceptual_hash(disc(c)) for c in ((220, 30, 30), (240, 150, 30), (30, 60, 220)))
    assert near_duplicates([red, orange, blue]) == []
    assert near_duplicates([red, perceptual_hash(recoded(disc((220, 30, 30)), 80))]) == [(0, 1)]


def test_all_duplicate_pairs_are_found() -> None:
    looks = [perceptual_hash(scene(seed=n % 5)) for n in range(9)]
    want = [(n, n + 5) for n in range(4)]
    assert near_duplicates(looks) == want
    assert near_duplicates(looks[:1] * 1100) == [(i, j) for i in range(1100) for j in range(i + 1, 1100)]
    assert near_duplicates([]) == near_duplicates(looks, []) == []
