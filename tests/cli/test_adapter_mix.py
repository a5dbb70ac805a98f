"""`veneer adapter mix|resize|extract|diff|strength`: output, `--json`, exit codes, and all commands on the
docs page."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.run import run
from tests.formats.twins import linear_pairs
from veneer.formats import peft

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "mix.md"
NAMES = ["model.layers.0.q", "model.layers.1.q"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Create the adapters and models that the docs page names, and work in their folder."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("style", "product")):
        peft.write_folder(linear_pairs(NAMES, rank=2, width=8, seed=i), tmp_path / "runs" / name)
    weights = {f"{n}.weight": torch.rand(8, 8) for n in NAMES}
    for name, by in (("base-model", 1.0), ("tuned-model", 1.1)):
        (tmp_path / name).mkdir()
        save_file({n: (by * t).bfloat16() for n, t in weights.items()}, tmp_path / name / "model.safetensors")
    return tmp_path


def test_every_command_on_the_page_runs(here, capsys):
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        assert run(capsys, *shlex.split(command)[1:]).out.strip()


def test_json_is_one_object_with_the_errors(here, capsys):
    made = json.loads(run(capsys, "adapter", "mix", "runs/style:0.8", "runs/product:-0.5", "-o", "m", "--json").out)
    assert made["error"] < 1e-6
    assert made["ranks"] == {"4": 2}
    small = json.loads(run(capsys, "adapter", "resize", "m", "-o", "s", "--rank", "1", "--json").out)
    assert 0 < small["error"] < 1
    assert set(small["parts"]) == set(NAMES)
    found = json.loads(run(capsys, "adapter", "diff", "m", "s", "--json").out)
    assert found["all"]["difference"] == pytest.approx(small["error"], rel=1e-4)
    shown = json.loads(run(capsys, "adapter", "strength", "m", "--json").out)
    assert set(shown["blocks"]) == {"model.layers.0", "model.layers.1"}


def test_errors_are_reported_without_a_traceback(here, capsys):
    for arguments, words in (
        (["mix", "runs/style", "runs/product", "-o", "m", "--method", "ties"], "give a rank"),
        (["mix", "runs/style", "-o", "m", "--method", "mean"], "there is no method"),
        (["resize", "runs/style", "-o", "m"], "a resize needs a size"),
        (["strength", "runs/style", "--blocks", "down=1"], "matches no module"),
    ):
        ran = run(capsys, "adapter", *arguments, code=2)
        assert words in ran.err
        assert "Traceback" not in ran.err
        assert not (here / "m").exists()


def test_overflowing_strengths_and_mixes_are_refused_by_name(here, capsys):
    ran = run(capsys, "adapter", "mix", "runs/style:1e300", "runs/product", "-o", "m", code=2)
    assert "the strength of 'runs/style' is 1e+300" in ran.err
    peft.write_folder(linear_pairs(NAMES, width=8, scale=1e4), here / "runs" / "loud")
    ran = run(capsys, "adapter", "mix", "runs/loud:9999", "runs/product", "-o", "m", "--dtype", "float16", code=2)
    assert "the mix of runs/loud:9999 + runs/product:1 does not fit into float16: model.layers" in ran.err
    assert not (here / "m").exists()
