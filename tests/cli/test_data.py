"""`veneer data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cli.run import run
from tests.tiny_vision import tiny_vision
from tests.train.make_pictures import put, settings
from veneer.train.image.pictures import read_pictures


def test_caption_writes_what_training_reads(capsys: Any, tmp_path: Path) -> None:
    model, folder = tiny_vision(tmp_path), tmp_path / "pictures"
    put(folder, "a.png", None)
    put(folder, "b.png", "my own")
    command = ("data", "caption", str(folder), "--model", str(model), "--max-tokens", "8", "--trigger", "sks")
    told = json.loads(run(capsys, *command, "--json").out)
    (one,) = told["written"]
    assert (one["picture"], one["file"], told["had"], told["failed"]) == ("a.png", str(folder / "a.txt"), 1, [])
    assert one["caption"].startswith("sks, ")
    assert {p.name: p.caption for p in read_pictures(settings(folder))[0]} == {
        "a.png": one["caption"], "b.png": "my own",
    }  # fmt: skip
    before = (folder / "a.txt").read_bytes()
    again = run(capsys, *command)
    assert (again.code, again.out) == (0, "0 captions written, 2 were there\n")
    assert "float32" not in again.err, "nothing is loaded where nothing is to be said"
    assert run(capsys, *command, "--overwrite").code == 0
    assert (folder / "a.txt").read_bytes() == before, "the same model says the same"
    assert (folder / "b.txt").read_text().startswith("sks, ")


def test_what_goes_wrong_is_told(capsys: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    put(folder, "a.png", None)
    (folder / "b.png").write_bytes(b"")
    wrong = {
        ("--to", "csv"): "'csv' is not a form of captions",
        ("--model", str(tmp_path)): "no config.json",
        ("--dtype", "float7"): "float7",
        ("--device", "tpu"): "tpu",
    }
    for options, said in wrong.items():
        ran = run(capsys, "data", "caption", str(folder), "--model", "x/y", *options)
        assert ran.code == 2
        assert said in ran.err
    assert run(capsys, "data", "caption", str(folder)).code == 2
    ran = run(capsys, "data", "caption", str(folder), "--model", str(tiny_vision(tmp_path)), "--max-tokens", "4")
    assert ran.code == 2
    assert "b.png: an empty file" in ran.err
    assert (folder / "a.txt").exists()
