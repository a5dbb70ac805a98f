"""`veneer data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cli.run import run
from tests.tiny_base import tiny_base_dir
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
        "a.png": one["caption"],
        "b.png": "my own",
    }
    before = (folder / "a.txt").read_bytes()
    again = run(capsys, *command)
    assert again.out == "0 captions written, 2 already existed\n"
    assert "float32" not in again.err, "nothing is loaded where nothing is to be said"
    run(capsys, *command, "--overwrite")
    assert (folder / "a.txt").read_bytes() == before, "the same model says the same"
    assert (folder / "b.txt").read_text().startswith("sks, ")


def test_caption_errors_are_reported(capsys: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    put(folder, "a.png", None)
    (folder / "b.png").write_bytes(b"")
    wrong = {("--model", str(tmp_path)): "no config.json", ("--dtype", "float7"): "float7", ("--device", "tpu"): "tpu"}
    for options, said in wrong.items():
        assert said in run(capsys, "data", "caption", str(folder), "--model", "x/y", *options, code=2).err
    run(capsys, "data", "caption", str(folder), code=2)
    ran = run(
        capsys, "data", "caption", str(folder), "--model", str(tiny_vision(tmp_path)), "--max-tokens", "4", code=2
    )
    assert "b.png: an empty file" in ran.err
    assert (folder / "a.txt").exists()


def test_data_show_and_preview_inspect_a_run(capsys: Any, tmp_path: Path) -> None:
    base, file = tiny_base_dir(tmp_path), tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Where is parcel {i}?", "completion": f"Shelf {i % 7}."} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "x"}]))
    shown = json.loads(run(capsys, "data", "show", str(file), "--base", str(base), "--only", "unusable", "--json").out)
    assert [row["where"] for row in shown["rows"]] == [f"{file}:25"]
    table = run(capsys, "data", "show", str(file), "--base", str(base), "--limit", "3")
    assert table.out.count("Where is parcel") == 3
    assert "25 rows examined" in table.err
    settings = (f"base={base}", f"data.train={file}", "adapter.rank=2", "schedule.steps=4")
    assert "rows.jsonl:25" in run(capsys, "data", "preview", *settings, code=2).out
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    look = run(capsys, "data", "preview", *settings)
    assert "⟦Shelf" in look.out
    assert "fits" in look.out
    run(capsys, "data", "show", str(file), code=2)


def test_one_caption_is_changed(capsys: Any, tmp_path: Path) -> None:
    put(tmp_path, "a.png", "old")
    assert run(capsys, "data", "caption", str(tmp_path / "a.png"), "a new one").out.endswith("a.txt: a new one\n")
    assert [p.caption for p in read_pictures(settings(tmp_path))[0]] == ["a new one"]
    run(capsys, "data", "caption", str(tmp_path), "a new one", code=2)
