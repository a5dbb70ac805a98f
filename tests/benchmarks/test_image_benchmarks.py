"""The image benchmarks run, agree with diffusers + PEFT on losses, and report in the common format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("name", ["image_generation.py", "image_training.py"])
def test_it_says_what_it_measures(name: str) -> None:
    assert "processor time" in run(name, "--help").stdout


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "agrees"),
    [("image_generation.py", "latents' error over PEFT's"), ("image_training.py", "furthest loss")],
)
def test_quick_run_agrees_with_peft(name: str, agrees: str) -> None:
    ran = run(name, "--quick", "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert set(result) == {"machine", "rows", "bars"}
    assert all(b["ok"] for b in result["bars"] if agrees in b["name"])
    assert any(agrees in b["name"] for b in result["bars"])
