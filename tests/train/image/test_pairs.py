"""Pictures with others before them, once they are read: how both are seen, checked and shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.train.make_pictures import put, scene, settings, wrong
from veneer.train.image.checks import check_held_out, check_pictures
from veneer.train.image.contact_sheet import contact_sheet
from veneer.train.image.pictures import read_pictures
from veneer.train.image.views import draw_row, plan_rows, prepare, view_before


def test_a_pair_of_unlike_sizes_is_named_and_one_proportion_is_enough(tmp_path: Path) -> None:
    put(tmp_path, "cat.png", image=scene(48, 32))
    put(tmp_path, "cat.before.png", None, scene(32, 32))
    message = wrong(tmp_path, before_kind="depth")
    assert "1 pair(s) are of unlike sizes" in message
    assert "cat.before.png: 32 x 32 pixels, but cat.png has 48 x 32" in message
    put(tmp_path, "cat.before.png", None, scene(96, 64))
    keys = settings(tmp_path)
    pictures, about = read_pictures(keys)
    plan = plan_rows(pictures, keys, size=32, unit=8)
    said = [(f.level, f.text) for f in check_pictures(pictures, about, plan, keys) if f.check == "pairs"]
    assert [level for level, _ in said] == ["ok", "warn"]
    assert "another size than what comes after: resized" in said[1][1]


def test_both_pictures_of_a_pair_are_cut_and_mirrored_alike(tmp_path: Path) -> None:
    """The picture before is the negative of what is after: it stays so in every view, at the same size and twice it."""
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
            view, _ = draw_row(row, keys, seed=0, epoch=epoch)
            views.add((view.left, view.flip))
            before = row.picture.before[0]
            own, other = prepare(row.picture, view, keys), prepare(before, view_before(view, before), keys)
            near = 0.02 if row.picture.name == "a.png" else 0.2  # enlarged by nearest, made smaller again
            assert torch.allclose(own.pixels, -other.pixels, atol=near)
    assert len(views) > 3


def test_pairs_that_teach_nothing_or_two_things_are_warned_of(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path, f"{name}.png", "in ink", scene(seed=ord(name)))
        put(tmp_path, f"{name}.before.png", None, scene(seed=ord("c") if name == "c" else 1))
    keys = settings(tmp_path)
    pictures, about = read_pictures(keys)
    plan = plan_rows(pictures, keys, size=32, unit=8)
    said = [f.text for f in check_pictures(pictures, about, plan, keys) if f.check == "pairs" and f.level == "warn"]
    assert any("the same file before and after: c.png" in text for text in said)
    assert any("one instruction and several results: a.png, b.png" in text for text in said)


def test_pairs_look_alike_only_where_both_halves_do(tmp_path: Path) -> None:
    white = Image.new("RGB", (48, 32), "white")  # what an edit that empties pictures makes of all of them
    for name, seed in (("a", 1), ("b", 2), ("c", 2)):
        put(tmp_path, f"{name}.png", "empty it", white)
        put(tmp_path, f"{name}.before.png", None, scene(seed=seed))
    keys = settings(tmp_path)
    pictures, about = read_pictures(keys)
    found = check_pictures(pictures, about, plan_rows(pictures, keys, size=32, unit=8), keys)
    said = next(f.text for f in found if f.check == "near-duplicates")
    assert "in 1 pair: b.png and c.png" in said
    assert "1 held-out picture, none" in check_held_out(pictures[1:], pictures[:1])[0].text
    assert check_held_out(pictures[:2], pictures[2:])[0].level == "stop"


def test_the_sheet_shows_what_is_before_left_of_what_comes_after(tmp_path: Path) -> None:
    put(tmp_path, "a.png", image=Image.new("RGB", (32, 32), "red"))
    put(tmp_path, "a.before.png", None, Image.new("RGB", (32, 32), "blue"))
    keys = settings(tmp_path)
    rows = plan_rows(read_pictures(keys)[0], keys, size=32, unit=8).rows
    assert contact_sheet(rows, keys, seed=0, path=tmp_path / "sheet.png", cell=64) == 1
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    blue, red = (np.argwhere((sheet == colour).all(-1)) for colour in ((0, 0, 255), (255, 0, 0)))
    assert len(blue) == len(red) == 64 * 64
    assert blue[:, 1].max() < red[:, 1].min()
    assert (blue[:, 0] == red[:, 0]).all()
