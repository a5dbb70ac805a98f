from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.train.make_pictures import corners, put, scene, settings
from veneer.train.image.augmentation import PicturePlan, ViewTensors, plan_rows
from veneer.train.image.contact_sheet import contact_sheet, shaded
from veneer.train.image.pictures import TrainingPicture, read_pictures


def plan(folder: Path, **keys: Any) -> tuple[list[TrainingPicture], PicturePlan]:
    own = settings(folder, **keys)
    pictures, _ = read_pictures(own)
    return pictures, plan_rows(pictures, own, size=64, unit=16)


def test_the_sheet_shows_the_crops(tmp_path: Path) -> None:
    put(tmp_path / "p", "a.png", "four corners, " + "many words " * 40, corners(128, 128))
    put(tmp_path / "p", "b.png", "", scene(64, 64))
    rows = plan(tmp_path / "p")[1].rows
    path = tmp_path / "sheet.png"
    assert contact_sheet(rows, settings(), seed=0, path=path, cell=192) == 2
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert sheet.shape[1] == 2 * (192 + 8) + 8
    for (y, x), colour in {(20, 20): (255, 0, 0), (20, 180): (0, 255, 0), (180, 20): (0, 0, 255)}.items():
        assert np.abs(sheet[y + 8, x + 8] - colour).max() < 8
    assert (sheet[208:, :208] < 100).any()  # there is text below the first picture
    assert contact_sheet(rows * 20, settings(), seed=0, path=path) == 24


def test_masked_areas_are_hatched_red() -> None:
    mask = torch.ones(1, 32, 32)
    mask[:, :, 16:] = 0
    pixels = np.asarray(shaded(ViewTensors(torch.zeros(3, 32, 32), mask, torch.zeros(6)))).astype(int)
    assert np.abs(pixels[:, :16] - 127.5).max() <= 1
    red, green = pixels[:, 16:, 0], pixels[:, 16:, 1]
    assert (red - green).min() > 30
    assert len(np.unique(green)) > 1  # in stripes


def test_sheet_shows_the_source_left_of_the_result(tmp_path: Path) -> None:
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
