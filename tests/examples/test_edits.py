"""The editing example runs from its configuration file, on a tiny Kontext base and a few image pairs.

Its adapter then edits a picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import veneer
from tests.cli.run import run
from tests.tiny_image_base import tiny_image_base
from tests.train.tiny_pictures import drawings
from veneer.errors import MismatchError
from veneer.formats.read import read
from veneer.imaging.adapters import ImagePipeline
from veneer.imaging.reproduce import read_recipe, reproduce
from veneer.models.image.base import load_image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "edits" / "config.yaml"


def test_the_edits_example_trains_edits_and_reproduces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, place = drawings(tmp_path / "pairs", 12), tiny_image_base(tmp_path, "kontext")
    for path in list(pairs.glob("*.png")):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path.with_suffix(".before.png"))
    start = tmp_path / "start.png"
    Image.open(pairs / "1.png").resize((48, 32)).save(start)
    result = veneer.train_image(
        EXAMPLE,
        f"base={place}",
        f"data.pictures={pairs}",
        f"output={tmp_path / 'out'}",
        "schedule.steps=2",
        "samples.every=2",
        "samples.steps=1",
        f"samples.before=[{start}]",
        on_event=lambda event: None,
    )
    assert read(Path(result.adapter)).adapter.digest() == result.digest
    assert (result.validation is not None, len(result.samples)) == (True, 2)
    out = tmp_path / "edited.png"
    run(
        capsys,
        "image",
        "--base",
        str(place),
        "-a",
        result.adapter,
        "--reference",
        str(start),
        "--steps",
        "2",
        "-o",
        str(out),
        "invert it",
    )
    with Image.open(out) as made:
        made.load()
        assert made.width > made.height  # has the proportions of the picture that is edited
        base = load_image(str(place))
        by_python = veneer.image(base, "invert it", adapters=[result.adapter], references=[start], steps=2)[0]
        assert np.array_equal(np.asarray(made), np.asarray(by_python.image))
        with ImagePipeline(base) as mixer:
            again = reproduce(mixer, read_recipe(out))
            assert np.array_equal(np.asarray(made), np.asarray(again.image))
            Image.open(start).rotate(180).save(start)
            with pytest.raises(MismatchError, match="not the picture that was used originally"):
                reproduce(mixer, read_recipe(out))
