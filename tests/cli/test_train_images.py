"""`veneer train` on pictures, selected by data.pictures: the JSON object, the dry run, and the Python
functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import veneer
from tests.cli.run import run
from tests.tiny_image_base import tiny_image_base
from tests.train.tiny_pictures import drawings
from veneer.errors import ConfigError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train-images")
    tiny_image_base(folder, "flux1")
    drawings(folder / "drawings")
    (folder / "run.yaml").write_text(
        "base: ./tiny-flux1\ndata: {pictures: drawings, trigger: sks, split: 2}\noutput: out\nbatching: {rows: 2}\n"
        "schedule: {steps: 2}\nadapter: {rank: 2}\n"
    )
    return folder / "run.yaml"


def test_stdout_has_only_the_json(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, "train", str(config), f"output={tmp_path / 'out'}", "--json")
    result = json.loads(out)
    assert result["adapter"] == str(tmp_path / "out" / "out.safetensors")
    for key in ("digest", "pictures", "pictures_per_second", "loss", "validation", "hashes", "sheet"):
        assert result[key], key
    assert "pictures/s" in err
    assert "tokens" not in err


def test_the_output_names_files_and_the_next_command(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, err = run(capsys, "train", str(config), f"output={tmp_path / 'out'}")
    assert out == ""
    assert "veneer image --base" in err
    assert str(tmp_path / "out" / "report.html") in err


def test_a_dry_run_writes_only_a_sheet(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = run(capsys, "train", str(config), f"output={tmp_path / 'out'}", "--dry-run").err
    assert "the model's view of each picture is in" in err
    assert not (tmp_path / "out").exists()


def test_unknown_key_names_the_nearest(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean `loss.snr_gamma`?" in run(capsys, "train", str(config), "loss.snr_gama=5", code=2).err


def test_train_text_and_train_image_name_each_other(config: Path) -> None:
    with pytest.raises(ConfigError, match="train_image"):
        veneer.train_text(config)
    with pytest.raises(ConfigError, match="train_text"):
        veneer.train_image({"base": "b", "data": {"train": "x.jsonl"}, "output": "o"})
