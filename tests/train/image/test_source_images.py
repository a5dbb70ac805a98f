"""Pictures with others before them: how a folder gives them, and what pairs without a partner are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.train.make_pictures import put, scene, settings, wrong
from veneer.train.image.pictures import count_pictures, read_pictures


def pairs_of(folder: Path, **keys: Any) -> dict[str, list[str]]:
    pictures, about = read_pictures(settings(folder, **keys))
    assert count_pictures(settings(folder, **keys)) == (len(pictures), about.before)
    return {p.name: [b.name for b in p.before] for p in pictures}


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
    for said in ("1 of 2 pictures have no picture before them:\n", "dog.png", "data.before: off"):
        assert said in message
    put(tmp_path, "dog.before.png", None)
    put(tmp_path, "dot.before.png", None)
    put(tmp_path / "before", "bird.png", None)
    message = wrong(tmp_path)
    assert "2 before pictures with no picture after" in message
    assert "dot.before.png: no picture of this name; the nearest is dog.png" in message
    assert "before/bird.png: no picture of this name" in message
    folder = tmp_path / "other"
    put(folder, "cat.png", None)
    (folder / "metadata.jsonl").write_text(json.dumps({"after": "cat.png", "before": "cats/1.png", "text": "x"}))
    assert "`before`: there is no picture `cats/1.png`" in wrong(folder)
    (folder / "metadata.jsonl").write_text(json.dumps({"after": "cat.png", "before": "../cat.png", "text": "x"}))
    assert "leaves the folder" in wrong(folder)
    (folder / "metadata.jsonl").write_text(json.dumps({"after": "cat.png", "before": "", "text": "x"}))
    assert "should be a picture's path, found nothing" in wrong(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, why in ((tmp_path / "no", "does not exist"), (tmp_path / "cat.png", "is a file"), (empty, "no picture")):
        assert why in wrong(tmp_path / "before", before=str(place))


def test_one_that_has_more_before_it_than_others_is_named(tmp_path: Path) -> None:
    for name in ("cat", "dog", "fox"):
        put(tmp_path, f"{name}.png")
        put(tmp_path, f"{name}.before.png", None)
    put(tmp_path, "dog.before.jpg", None)
    message = wrong(tmp_path)
    assert "2 of 3 pictures have fewer than the 2 pictures that are before dog.png" in message
    assert "remove what is too many" in message


def test_a_line_is_not_shown_whole(tmp_path: Path) -> None:
    put(tmp_path, "cat.png")
    put(tmp_path, "cat.before.png", None, scene(90, 2))
    message = wrong(tmp_path)
    assert "cat.before.png: 90×2 pixels, and one side is at most 8 times the other" in message


def test_class_pictures_that_lack_one_before_are_said_to_be_there(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "own", f"{name}.png", "make it red")
        put(tmp_path / "own", f"{name}.before.png", None)
        put(tmp_path / "class", f"{name}.png", "a photo")
    message = wrong(tmp_path / "own", class_folder=str(tmp_path / "class"))
    assert "2 of 4 pictures have no picture before them" in message
    assert f"where: {tmp_path / 'class'}\n" in message
