from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from PIL import Image

from tests.train.make_pictures import corners, put, scene, settings
from veneer.errors import ConfigError, DataError
from veneer.train.image.augmentation import (
    PictureRow,
    View,
    bucket_for,
    buckets,
    crop_view,
    latent_mask,
    plan_rows,
    prepare,
    sample_caption,
    sample_row,
    source_view,
)
from veneer.train.image.pictures import TrainingPicture, read_pictures

sides = st.integers(1, 3000)
resolutions = st.integers(16, 1100)
steps = st.sampled_from([1, 8, 16, 32, 64])
ratios = st.sampled_from([1.0, 1.5, 2.0, 4.0])


@effort(max_examples=200, deadline=None)
@given(resolutions, steps, ratios)
def test_buckets_are_as_large_as_their_area_allows(resolution: int, step: int, ratio: float) -> None:
    if resolution < step:
        with pytest.raises(ConfigError, match="no bucket"):
            buckets(resolution, step, ratio)
        return
    found = buckets(resolution, step, ratio)
    side = resolution // step * step
    assert (side, side) in found
    assert len(set(found)) == len(found)
    longest = max(w / h for w, h in found)
    for w, h in found:
        assert w % step == h % step == 0
        assert w * h <= resolution**2
        assert max(w, h) <= ratio * min(w, h)
        assert (h, w) in found
        if w != h and w / h != longest and h / w != longest:  # one more step on the longer side would exceed the area
            assert (max(w, h) + step) * min(w, h) > resolution**2
        elif w != h:
            assert 4 * w * h >= 3 * resolution**2 or (max(w, h) + step) * min(w, h) > resolution**2


def test_buckets_by_hand() -> None:
    assert buckets(64, 16, 2.0) == ((48, 80), (64, 64), (80, 48))  # 32 x 64 would halve the area
    assert buckets(64, 8, 2.0) == ((40, 80), (48, 80), (56, 72), (64, 64), (72, 56), (80, 40), (80, 48))
    assert buckets(64, 16, 1.0) == ((64, 64),)
    assert {(1024, 1024), (832, 1216), (896, 1152), (704, 1408)} <= set(
        buckets(1024, 64, 2.0)
    )  # sizes from the SDXL paper, appendix I


@effort(max_examples=300, deadline=None)
@given(st.tuples(sides, sides), resolutions, steps, ratios, st.sampled_from(["keep", "upscale", "drop"]), st.booleans())
def test_picture_goes_to_the_nearest_bucket(
    size: tuple[int, int], resolution: int, step: int, ratio: float, small: str, several: bool
) -> None:
    resolution = max(resolution, step)
    keys = settings(small=small, bucket_ratio=ratio, buckets=several)
    bucket, below = bucket_for(size, resolution, step, keys)
    if bucket is None:
        assert small == "drop" or min(size) < step
        assert below
        return
    w, h = bucket
    assert w % step == h % step == 0
    assert w * h <= resolution**2
    assert max(w, h) <= (ratio if several else 1) * min(w, h)
    view = crop_view(size, bucket)
    enlarged = view.resized[0] > size[0] or view.resized[1] > size[1]
    assert not enlarged or (small == "upscale" and below)
    if not below:
        aspect = Fraction(*size)
        off = max(aspect / Fraction(w, h), Fraction(w, h) / aspect)
        for a, b in buckets(resolution, step, ratio) if several else ():
            assert max(aspect / Fraction(a, b), Fraction(a, b) / aspect) * Fraction(10**12 + 1, 10**12) >= off


@effort(max_examples=300, deadline=None)
@given(
    st.tuples(sides, sides),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.booleans(),
    st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)) | st.none(),
)
def test_view_covers_its_bucket_and_matches_its_time_ids(
    size: tuple[int, int], cells: tuple[int, int], flip: bool, at: tuple[float, float] | None
) -> None:
    bucket = (8 * cells[0], 8 * cells[1])
    view = crop_view(size, bucket, flip=flip, at=at)
    (width, height), (rw, rh) = size, view.resized
    scale = max(Fraction(bucket[0], width), Fraction(bucket[1], height))
    assert rw >= bucket[0]
    assert rh >= bucket[1]
    assert abs(rw - scale * width) <= Fraction(1, 2) or rw == bucket[0]
    assert abs(rh - scale * height) <= Fraction(1, 2) or rh == bucket[1]
    assert rw == bucket[0] or rh == bucket[1]
    assert 0 <= view.top <= rh - bucket[1]
    assert 0 <= view.left <= rw - bucket[0]
    if at is None:
        assert 0 <= (rw - bucket[0]) - 2 * view.left <= 1
        assert 0 <= (rh - bucket[1]) - 2 * view.top <= 1
    original_h, original_w, top, left, target_h, target_w = view.time_ids
    assert (original_w, original_h, target_w, target_h) == (*size, *bucket)
    assert top == view.top
    # `left` is the crop's first column in the resized and possibly mirrored picture
    columns = list(range(rw))[:: -1 if flip else 1]
    seen = columns[left : left + target_w]
    stored = list(range(view.left, view.left + bucket[0]))
    assert seen == (stored[::-1] if flip else stored)


def picture(folder: Path, image: Image.Image, name: str = "a.png", **keys: Any) -> TrainingPicture:
    put(folder, name, "a thing", image)
    return next(p for p in read_pictures(settings(folder, **keys))[0] if p.name == name)


def test_pixels_without_resizing_equal_the_files(tmp_path: Path) -> None:
    image = scene(48, 32)
    one = picture(tmp_path, image)
    view = View(24, 16, (48, 32), (48, 32), top=5, left=7)
    seen = prepare(one, view, settings())
    want = np.asarray(image).astype(np.float64)[5:21, 7:31] / 255 * 2 - 1
    assert seen.pixels.shape == (3, 16, 24)
    assert seen.pixels.dtype == torch.float32
    assert np.abs(seen.pixels.permute(1, 2, 0).numpy() - want).max() < 1e-6
    assert seen.sizes.tolist() == [32, 48, 5, 7, 16, 24]
    assert seen.mask is None
    mirrored = prepare(one, View(24, 16, (48, 32), (48, 32), top=5, left=7, flip=True), settings())
    assert torch.equal(mirrored.pixels, seen.pixels.flip(-1))
    assert mirrored.sizes.tolist() == [32, 48, 5, 48 - 7 - 24, 16, 24]


def test_an_upright_picture_has_upright_time_ids(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # stored 40 wide and 24 high, shown 24 wide and 40 high
    path = tmp_path / "a.png"
    corners(40, 24).save(path, exif=exif)
    (one,) = read_pictures(settings(tmp_path, prompt="x"))[0]
    assert one.size == (24, 40)
    seen = prepare(one, crop_view(one.size, (24, 40)), settings())
    assert seen.sizes.tolist() == [40, 24, 0, 0, 40, 24]
    assert seen.pixels[:, 0, 0].tolist() == [-1, -1, 1]  # blue: the bottom left corner as stored


def test_masks_follow_crop_flip_and_floor(tmp_path: Path) -> None:
    image = corners(32, 32)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16, 8:16] = 255
    mask[20:, :] = 128
    put(tmp_path, "a.mask.png", None, Image.fromarray(mask))
    one = picture(tmp_path, image)
    view = View(16, 24, (32, 32), (32, 32), top=4, left=6, flip=True)
    seen = prepare(one, view, settings())
    want = mask[4:28, 6:22][:, ::-1] / 255
    assert seen.mask.shape == (1, 24, 16)
    assert np.abs(seen.mask[0].numpy() - want).max() < 1e-6
    floored = prepare(one, view, settings(mask_floor=0.25)).mask
    assert np.abs(floored[0].numpy() - (0.25 + 0.75 * want)).max() < 1e-6
    cells = latent_mask(seen.mask, 6, 4)[0].numpy()
    assert np.abs(cells - want.reshape(6, 4, 4, 4).mean((1, 3))).max() < 1e-6


def test_alpha_is_the_mask_if_configured(tmp_path: Path) -> None:
    image = scene(32, 32)
    alpha = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    image.putalpha(Image.fromarray(alpha))
    one = picture(tmp_path, image, masks="alpha")
    seen = prepare(one, crop_view(one.size, (32, 32)), settings(masks="alpha"))
    assert np.abs(seen.mask[0].numpy() - alpha / 255).max() < 1e-6
    assert prepare(picture(tmp_path, image), crop_view(one.size, (32, 32)), settings()).mask is None


def test_a_picture_that_changed_during_the_run_is_refused(tmp_path: Path) -> None:
    one = picture(tmp_path, scene())
    put(tmp_path, "a.png", "x", scene(seed=9))
    with pytest.raises(DataError, match="changed during the run"):
        prepare(one, crop_view(one.size, (16, 16)), settings())
    one.path.unlink()
    with pytest.raises(DataError, match="no longer be used: cannot be read"):
        prepare(one, crop_view(one.size, (16, 16)), settings())


def test_rows_are_resolutions_times_repeats(tmp_path: Path) -> None:
    put(tmp_path, "3_dog/a.png", None, scene(128, 64))
    put(tmp_path, "1_dog/b.png", None, scene(40, 40))
    put(tmp_path, "1_dog/c.png", None, scene(40, 5))
    keys = settings(tmp_path, resolution=(64, 32))
    pictures, _ = read_pictures(keys)
    plan = plan_rows(pictures, keys, size=1024, unit=8)
    rows = [(r.picture.name[-5:], r.bucket, r.repeat) for r in plan.rows]
    assert rows == [
        ("b.png", (32, 32), 0),
        ("b.png", (40, 40), 0),  # 64 x 64 would enlarge the picture, so the bucket is smaller
        *(("a.png", bucket, n) for bucket, n in itertools.product([(40, 24), (80, 40)], range(3))),
    ]
    assert plan.small == ["1_dog/b.png", "1_dog/c.png"]
    assert plan.dropped == ["1_dog/c.png"]
    assert sum(plan.sizes.values()) == 8


def test_bucket_steps_fit_the_base(tmp_path: Path) -> None:
    one = picture(tmp_path, scene(64, 64))
    assert plan_rows([one], settings(), size=64, unit=16).step == 16
    assert plan_rows([one], settings(), size=1024, unit=16).step == 64
    with pytest.raises(ConfigError, match="multiples of 16"):
        plan_rows([one], settings(bucket_step=24), size=64, unit=16)
    for several in (True, False):
        with pytest.raises(ConfigError, match="16 pixels has no bucket in steps of 32"):
            plan_rows([one], settings(resolution=16, buckets=several), size=64, unit=32)
    with pytest.raises(DataError, match="smaller than its bucket"):
        plan_rows([one], settings(small="drop"), size=128, unit=16)


def rows(folder: Path, caption: str = "sks, red, big, old, round, soft", n: int = 40, **keys: Any) -> list[PictureRow]:
    put(folder, "a.png", caption, scene(64, 48))
    (one,) = read_pictures(settings(folder, **keys))[0]
    return [PictureRow(one, (32, 32), i) for i in range(n)]


def test_views_depend_on_seed_epoch_and_row_only(tmp_path: Path) -> None:
    keys = settings(tmp_path, trigger="sks", shuffle_tags=True, caption_dropout=0.3, flip=True, crop="random")
    all_rows = rows(tmp_path)
    first = [sample_row(row, keys, seed=1, epoch=2) for row in all_rows]
    assert first[::-1] == [sample_row(row, keys, seed=1, epoch=2) for row in all_rows[::-1]]
    assert first != [sample_row(row, keys, seed=1, epoch=3) for row in all_rows]
    assert first != [sample_row(row, keys, seed=2, epoch=2) for row in all_rows]
    views = {view for e in range(50) for view, _ in (sample_row(r, keys, seed=1, epoch=e) for r in all_rows[:8])}
    assert len({(v.top, v.left) for v in views}) == 4  # the same four crops in every epoch, so that they can be cached
    assert len({v.flip for v in views}) == 2


@effort(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4))
def test_shuffled_tags_keep_the_first_ones(seed: int, keep: int) -> None:
    one = object.__new__(TrainingPicture)
    tags = ["sks", "red", "big", "old", "round"]
    one.__dict__.update(caption=", ".join(tags), key="k", is_class=False)
    keys = settings(shuffle_tags=True, keep_tags=keep)
    drawn = sample_caption(PictureRow(one, (8, 8)), keys, seed=seed, epoch=0).split(", ")
    assert sorted(drawn) == sorted(tags)
    assert drawn[:keep] == tags[:keep]


def test_the_trigger_stays_in_front_by_default(tmp_path: Path) -> None:
    all_rows = rows(tmp_path)
    keys = settings(tmp_path, trigger="sks", shuffle_tags=True)
    drawn = [sample_caption(r, keys, seed=0, epoch=0) for r in all_rows]
    assert all(c.startswith("sks, ") for c in drawn)
    assert len(set(drawn)) > 20
    free = settings(tmp_path, shuffle_tags=True)
    assert not all(sample_caption(r, free, seed=0, epoch=0).startswith("sks, ") for r in all_rows)


def test_augmentations_have_the_stated_probabilities(tmp_path: Path) -> None:
    all_rows = rows(tmp_path, n=2000)
    keys = settings(tmp_path, caption_dropout=0.1, flip=True, crop="random")
    drawn = [sample_row(r, keys, seed=0, epoch=0) for r in all_rows]
    assert abs(sum(c == "" for _, c in drawn) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert abs(sum(v.flip for v, _ in drawn) - 1000) < 5 * (2000 * 0.25) ** 0.5
    plain = settings(tmp_path)
    assert {sample_row(r, plain, seed=0, epoch=0) for r in all_rows} == {
        (crop_view((64, 48), (32, 32)), all_rows[0].picture.caption)
    }


def test_source_and_result_have_equal_crops(tmp_path: Path) -> None:
    """The source picture is the negative of the result, and every view must preserve this relation.

    Covers a source of equal size and one of half the size.
    """
    after = scene(60, 40, seed=3)
    negative = Image.fromarray(255 - np.asarray(after))
    put(tmp_path, "a.png", image=after)
    put(tmp_path, "a.before.png", None, negative)
    put(tmp_path, "b.png", image=after.resize((120, 80), Image.Resampling.NEAREST))
    put(tmp_path, "b.before.png", None, negative)
    keys = settings(tmp_path, crop="random", flip=True, buckets=False)
    rows = plan_rows(read_pictures(keys)[0], keys, size=32, unit=8).rows
    views = set()
    for row in rows:
        for epoch in range(6):
            view, _ = sample_row(row, keys, seed=0, epoch=epoch)
            views.add((view.left, view.flip))
            before = row.picture.sources[0]
            own, other = prepare(row.picture, view, keys), prepare(before, source_view(view, before), keys)
            near = 0.02 if row.picture.name == "a.png" else 0.2  # b.png was enlarged and is reduced again
            assert torch.allclose(own.pixels, -other.pixels, atol=near)
    assert len(views) > 3
