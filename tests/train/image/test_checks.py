from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.train.make_pictures import put, scene, settings
from veneer.train.image.augmentation import plan_rows
from veneer.train.image.checks import check_held_out, check_pictures
from veneer.train.image.pictures import read_pictures
from veneer.train.preflight import Finding


def findings(folder: Path, size: int = 32, **keys: Any) -> dict[str, list[Finding]]:
    own = settings(folder, **keys)
    pictures, summary = read_pictures(own)
    found: dict[str, list[Finding]] = {}
    for finding in check_pictures(pictures, summary, plan_rows(pictures, own, size=size, unit=8), own):
        found.setdefault(finding.check, []).append(finding)
    return found


def texts(found: list[Finding]) -> str:
    return "\n".join(f"{f.level} {f.text} {f.fix}" for f in found)


def test_plain_folder_has_only_ok_findings(tmp_path: Path) -> None:
    for n in range(3):
        put(tmp_path, f"{n}.png", f"number {n}", scene(40 + 8 * n, 40, seed=n))
    found = findings(tmp_path)
    assert {f.level for group in found.values() for f in group} == {"ok"}
    assert "3 pictures: 3 rows an epoch" in texts(found["pictures"])
    assert "3 from caption files" in texts(found["captions"])
    assert "32 x 32: 1" in texts(found["buckets"]) or "32 x 32: 2" in texts(found["buckets"])


def test_findings_count_and_name_pictures(tmp_path: Path) -> None:
    for n in range(4):
        put(tmp_path, f"{n}.png", f"number {n}", scene(64, 64, seed=n))
    put(tmp_path, "again.jpg", "number 0", scene(64, 64, seed=0))
    put(tmp_path, "tiny.png", "tiny", scene(20, 20, seed=7))
    put(tmp_path, "wide.png", "wide", scene(300, 40, seed=8))
    put(tmp_path, "empty.png", "", scene(64, 64, seed=9))
    put(tmp_path, "bad.png").write_bytes(b"no")
    (tmp_path / "clip.mp4").write_bytes(b"")
    found = findings(tmp_path, broken="drop")
    assert "warn 1 of 9 (11%) files cannot be read and are left out: bad.png: not a picture" in texts(found["broken"])
    assert "1 .mp4" in texts(found["ignored"])
    same = "warn 2 of 8 (25%) pictures look like another picture, in 1 pair: 0.png and again.jpg"
    assert same in texts(found["near-duplicates"])
    small = "1 of 8 (12%) pictures are smaller than a bucket and used at their own size: tiny.png"
    assert small in texts(found["small"])
    assert "wide.png (" in texts(found["crops"])
    assert "1 empty caption: empty.png" in texts(found["captions"])
    with_trigger = findings(tmp_path, broken="drop", trigger="sks")
    assert "`sks`: added in 8" in texts(with_trigger["trigger"]), "bad.png is not learned"


def test_conversions_are_counted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    for n in range(2):
        put(tmp_path, f"{n}.jpg", "x", scene(seed=n)).unlink()
        scene(seed=n).save(tmp_path / f"{n}.jpg", exif=exif)
    scene(seed=3).save(put(tmp_path, "3.png", "x"), icc_profile=b"junk")
    found = findings(tmp_path)["decoding"]
    assert "warn 1 a color profile that cannot be used; sRGB is assumed" in texts(found)
    assert "ok 2 turned upright (EXIF)" in texts(found)


def test_triggers_and_class_pictures(tmp_path: Path) -> None:
    put(tmp_path / "own", "a.png", "a dog", scene(seed=1))
    put(tmp_path / "own", "b.png", "a sks dog", scene(seed=2))
    put(tmp_path / "class", "c.png", "sks", scene(seed=3))
    put(tmp_path / "class", "d.png", "a dog", scene(seed=2))
    found = findings(tmp_path / "own", trigger="sks", class_folder=str(tmp_path / "class"), class_weight=0.5)
    assert "2 pictures and 2 class pictures (weight 0.5)" in texts(found["pictures"])
    assert "`sks`: added in 1, already there in 1" in texts(found["trigger"])
    assert "1 class caption with the trigger: c.png" in texts(found["trigger"])
    assert "warn 1 of 2 (50%) pictures look like a class picture" in texts(found["class pictures"])


def test_class_pictures_are_not_the_pictures_themselves(tmp_path: Path) -> None:
    for n in range(4):
        put(tmp_path / "dogs" / "own", f"{n}.png", f"number {n}", scene(seed=n))
    put(tmp_path / "dogs", "other.png", "a dog", scene(seed=9))
    put(tmp_path / "few", "0.png", "number 0", scene(seed=0))
    put(tmp_path / "others", "other.png", "a dog", scene(seed=9))
    for folder, level in (("dogs/own", ["stop"]), ("dogs", ["stop"]), ("few", ["warn"]), ("others", [])):
        found = findings(tmp_path / "dogs" / "own", class_folder=str(tmp_path / folder))
        assert [f.level for f in found.get("class pictures", [])] == level, folder


def test_masks_are_counted_and_empty_ones_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a", scene(64, 32, seed=1))
    mask = np.zeros((32, 64), np.uint8)
    mask[:, :8] = 255  # outside the center square, which is all that the crop keeps
    put(tmp_path, "a.mask.png", None, Image.fromarray(mask))
    put(tmp_path, "b.png", "b", scene(32, 32, seed=2))
    found = findings(tmp_path, buckets=False)
    assert "1 of 2 (50%) pictures have a loss mask" in texts(found["masks"])
    assert "masks are black in the entire crop, so nothing is trained there: a.png" in texts(found["masks"])
    opaque = findings(tmp_path, masks="alpha")["masks"]
    assert "stop data.masks is `alpha`, but no picture has transparency" in texts(opaque)


def test_held_out_duplicates_of_training_pictures_are_found(tmp_path: Path) -> None:
    for n in range(6):
        put(tmp_path, f"{n}.png", "x", scene(seed=n))
    pictures = {p.name: p for p in read_pictures(settings(tmp_path))[0]}
    put(tmp_path, "again.jpg", "x", scene(96, 64, seed=0))
    again = next(p for p in read_pictures(settings(tmp_path))[0] if p.name == "again.jpg")
    train = [pictures[f"{n}.png"] for n in range(3)]
    held = [pictures[f"{n}.png"] for n in range(3, 6)]
    assert texts(check_held_out(train, held)).startswith("ok 3 held-out")
    found = check_held_out(train, [*held, again])
    assert texts(found).startswith("warn 1 of 4 (25%) held-out pictures are, or look like")
    assert "again.jpg is 0.png" in found[0].text
    assert check_held_out(train, [again])[0].level == "stop"


def test_a_pair_of_equal_files_gives_a_warning(tmp_path: Path) -> None:
    for name in ("a", "c"):
        put(tmp_path, f"{name}.png", "in ink", scene(seed=ord(name)))
        put(tmp_path, f"{name}.before.png", None, scene(seed=ord("c")))
    assert "1 of 2 (50%) pictures are the same file as one of their source images: c.png" in texts(
        findings(tmp_path)["pairs"]
    )


def test_pairs_look_alike_only_if_both_halves_do(tmp_path: Path) -> None:
    white = Image.new("RGB", (48, 32), "white")  # the result of an edit that blanks every picture
    for name, seed in (("a", 1), ("b", 2), ("c", 2)):
        put(tmp_path, f"{name}.png", "empty it", white)
        put(tmp_path, f"{name}.before.png", None, scene(seed=seed))
    assert "in 1 pair: b.png and c.png" in texts(findings(tmp_path)["near-duplicates"])
    pictures, _ = read_pictures(settings(tmp_path))
    assert "1 held-out picture, none" in check_held_out(pictures[1:], pictures[:1])[0].text
    assert check_held_out(pictures[:2], pictures[2:])[0].level == "stop"
