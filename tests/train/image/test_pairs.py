"""Pictures with others before them: how a folder gives them, what is read of them, and what bad pairs are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.train.make_pictures import put, scene, settings
from veneer.errors import DataError
from veneer.train.image.before_kinds import unlike_kind
from veneer.train.image.checks import check_held_out, check_pictures
from veneer.train.image.contact_sheet import contact_sheet
from veneer.train.image.pictures import count_pictures, read_pictures
from veneer.train.image.views import draw_row, plan_rows, prepare, view_before


def pairs_of(folder: Path, **keys: Any) -> dict[str, list[str]]:
    pictures, about = read_pictures(settings(folder, **keys))
    assert count_pictures(settings(folder, **keys)) == (len(pictures), about.before)
    return {p.name: [b.name for b in p.before] for p in pictures}


def wrong(folder: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_pictures(settings(folder, **keys))
    return str(caught.value)


def test_four_ways_to_say_what_is_before(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "beside", f"{name}.png", "make it red")
        put(tmp_path / "beside", f"{name}.before.jpg", None)
        put(tmp_path / "folder", f"{name}.png", "make it red")
        put(tmp_path / "folder/before", f"{name}.webp", None)
        put(tmp_path / "named", f"{name}.png", "make it red")
        put(tmp_path / "starts", f"{name}.png", None)
        put(tmp_path / "more", f"{name}.png", None)
        put(tmp_path / "rows/after", f"{name}.png", None)
        put(tmp_path / "rows/before", f"{name}-1.png", None)
    lines = [
        {"before": f"before/{n}-1.png", "instruction": "make it red", "after": f"after/{n}.png"} for n in ("cat", "dog")
    ]
    (tmp_path / "rows/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert pairs_of(tmp_path / "beside") == {f"{n}.png": [f"{n}.before.jpg"] for n in ("cat", "dog")}
    assert pairs_of(tmp_path / "folder") == {f"{n}.png": [f"before/{n}.webp"] for n in ("cat", "dog")}
    one = pairs_of(tmp_path / "named", before=str(tmp_path / "starts"))
    assert one == {f"{n}.png": [f"../starts/{n}.png"] for n in ("cat", "dog")}
    two = pairs_of(tmp_path / "named", before=(str(tmp_path / "starts"), str(tmp_path / "more")))
    assert two["cat.png"] == ["../starts/cat.png", "../more/cat.png"]
    assert pairs_of(tmp_path / "rows") == {f"after/{n}.png": [f"before/{n}-1.png"] for n in ("cat", "dog")}
    assert {p.caption for p in read_pictures(settings(tmp_path / "rows"))[0]} == {"make it red"}


def test_a_picture_may_be_before_one_and_after_another(tmp_path: Path) -> None:
    for name in ("day", "night", "ink"):
        put(tmp_path, f"{name}.png", None)
    lines = [
        {"file_name": "night.png", "before": "day.png", "text": "at night"},
        {"file_name": "day.png", "before": "night.png", "text": "by day"},
        {"file_name": "ink.png", "before": ["day.png"], "text": "in ink"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert pairs_of(tmp_path) == {"day.png": ["night.png"], "ink.png": ["day.png"], "night.png": ["day.png"]}
    put(tmp_path, "sketch.png", None)  # shown, and not learned: it has no row of its own
    lines.append({"file_name": "ink.png", "before": "sketch.png", "text": "in ink"})
    del lines[2]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert pairs_of(tmp_path)["ink.png"] == ["sketch.png"]
    assert "sketch.png" not in pairs_of(tmp_path)


def test_off_learns_from_captions_alone_and_counts_what_it_leaves(tmp_path: Path) -> None:
    put(tmp_path, "cat.png")
    put(tmp_path, "cat.before.png", None)
    pictures, about = read_pictures(settings(tmp_path, before="off"))
    assert [p.before for p in pictures] == [()]
    assert about.ignored["before pictures"] == 1
    with_pair = read_pictures(settings(tmp_path))[0][0]
    assert with_pair.key != pictures[0].key  # another thing is learned, and its own cache entry


def test_a_pair_without_its_partner_is_named(tmp_path: Path) -> None:
    put(tmp_path, "cat.png")
    put(tmp_path, "dog.png")
    put(tmp_path, "cat.before.png", None)
    message = wrong(tmp_path)
    assert "1 of 2 pictures have no picture before them:\n" in message
    assert "dog.png" in message
    assert "data.before: off" in message
    put(tmp_path, "dog.before.png", None)
    put(tmp_path, "dot.before.png", None)
    put(tmp_path / "before", "bird.png", None)
    message = wrong(tmp_path)
    assert "2 before picture(s) have no picture after them" in message
    assert "dot.before.png: no picture of this name; the nearest is dog.png" in message
    assert "before/bird.png: no picture of this name" in message
    folder = tmp_path / "other"
    put(folder, "cat.png", None)
    (folder / "metadata.jsonl").write_text(json.dumps({"after": "cat.png", "before": "cats/1.png", "text": "x"}))
    assert "`before`: there is no picture `cats/1.png`" in wrong(folder)
    (folder / "metadata.jsonl").write_text(json.dumps({"after": "cat.png", "before": "../cat.png", "text": "x"}))
    assert "leaves the folder" in wrong(folder)
    assert "the folder of before pictures does not exist" in wrong(
        tmp_path / "before", before=str(tmp_path / "nowhere")
    )


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


# -- control pictures --------------------------------------------------------------------------------------------------


def edges() -> Image.Image:
    cv2 = pytest.importorskip("cv2")
    return Image.fromarray(cv2.Canny(np.asarray(scene(96, 96, seed=2)), 30, 60)).convert("RGB")


def depth() -> Image.Image:
    return scene(96, 96, seed=4).convert("L").convert("RGB")


def pose() -> Image.Image:
    image = Image.new("RGB", (96, 96))
    pen = ImageDraw.Draw(image)
    for i, colour in enumerate(("#ff0000", "#ffaa00", "#00ff55", "#0055ff")):
        pen.line((48, 20 + 10 * i, 20 + 15 * i, 85), fill=colour, width=4)
    return image


MADE = {"canny": edges, "depth": depth, "pose": pose, "photo": lambda: scene(96, 96, seed=5)}


@pytest.mark.parametrize("kind", ["canny", "depth", "pose"])
def test_a_control_picture_is_of_its_own_kind_alone(kind: str) -> None:
    verdicts = {name: unlike_kind(make(), kind) for name, make in MADE.items()}
    assert [name for name, why in verdicts.items() if not why] == [kind]
    assert not any(unlike_kind(make(), "picture") for make in MADE.values())
    assert "black all over" in unlike_kind(Image.new("RGB", (8, 8)), kind)


def test_class_pictures_that_lack_one_before_are_said_to_be_there(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "own", f"{name}.png", "make it red")
        put(tmp_path / "own", f"{name}.before.png", None)
        put(tmp_path / "class", f"{name}.png", "a photo")
    message = wrong(tmp_path / "own", class_folder=str(tmp_path / "class"))
    assert "2 of 4 pictures have no picture before them" in message
    assert f"where: {tmp_path / 'class'}\n" in message


def test_what_a_resized_jpeg_of_edges_is(tmp_path: Path) -> None:
    large = edges().resize((192, 192), Image.Resampling.NEAREST)
    large.resize((120, 120), Image.Resampling.LANCZOS).save(tmp_path / "edges.jpg", quality=80)
    assert unlike_kind(Image.open(tmp_path / "edges.jpg"), "canny") == ""
    inverted = Image.fromarray(255 - np.asarray(edges()))
    assert "invert it" in unlike_kind(inverted, "canny")


def test_a_photo_where_edges_are_declared_is_named_with_the_way_out(tmp_path: Path) -> None:
    for name, before in (("cat", edges()), ("dog", scene(96, 96, seed=7))):
        put(tmp_path, f"{name}.png", image=scene(96, 96, seed=ord(name[0])))
        put(tmp_path, f"{name}.before.png", None, before)
    message = wrong(tmp_path, before_kind="canny")
    assert "1 picture(s) are not what data.before_kind: canny says" in message
    assert "dog.before.png: it has colours" in message
    assert "data.before_kind: picture, which takes any" in message
    assert len(read_pictures(settings(tmp_path))[0]) == 2
