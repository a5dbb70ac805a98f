"""The image example runs from its configuration file, on a tiny base and a few drawings."""

from __future__ import annotations

from pathlib import Path

import veneer
from tests.tiny_image_base import tiny_image_base
from tests.train.tiny_pictures import drawings
from veneer.formats.read import read
from veneer.train.events import Event, Resolved

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "images" / "config.yaml"


def test_the_example_trains_and_saves(tmp_path: Path) -> None:
    seen: list[Event] = []
    result = veneer.train_image(
        EXAMPLE,
        f"base={tiny_image_base(tmp_path, 'flux1')}",
        f"data.pictures={drawings(tmp_path / 'drawings', 12)}",
        f"output={tmp_path / 'out'}",
        "schedule.steps=2",
        "samples.every=2",
        "samples.steps=1",
        on_event=seen.append,
    )
    assert read(Path(result.adapter)).adapter.digest() == result.digest
    sources = next(e.sources for e in seen if isinstance(e, Resolved))
    assert sources["batching.rows"].startswith("from preset style")
    assert sources["adapter.rank"].startswith(str(EXAMPLE))
    assert result.validation is not None
    assert len(result.samples) == 2
