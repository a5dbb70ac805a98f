"""`make image-quickstart`, on a tiny base and two steps: drawings, training, sheet and table."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.scripts import script_module
from tests.tiny_image_base import tiny_image_base

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return script_module(ROOT / "examples" / "image_quickstart.py")


def test_the_table_has_fifty_drawings_to_train_on_and_more_than_a_hundred_that_are_not_among_them(
    quickstart: ModuleType,
) -> None:
    names = quickstart.table_of_names()
    used = {use: {name for _, name in rows} for use, rows in names.items()}
    assert len(used["train"]) == 50
    assert len(used["held out"]) >= 100
    assert not used["train"] & (used["held out"] | used["new to the base"])
    assert quickstart.openmoji(names["train"][0][0]).size == (64, 64)


def test_it_runs_from_drawings_to_sheet(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_image_base(tmp_path / "base", "flux1")
    out = tmp_path / "run"
    settings = ["schedule.steps=2", "batching.rows=2", "evaluation.at_start=false"]
    quickstart.main(
        ["--base", str(base), "--output", str(out), "--names", "2", *(a for s in settings for a in ("--set", s))]
    )
    assert len(list((out / "pictures").glob("*.png"))) == len(list((out / "pictures").glob("*.txt"))) == 50
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 2 * 64
        assert sheet.height > 4 * 64
    said = capsys.readouterr().out
    assert re.search(r"OpenMoji +0\.000", said), "the real drawings have no distance to themselves"
    assert "adapter at 0.5" in said
    assert f"--adapter {out / 'adapter'}" in said.replace("\n", "")
