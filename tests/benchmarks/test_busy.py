"""The busy-machine benchmark: its load processes are busy and end, and its report has the common format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.scripts import script_module

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script_module(ROOT / "benchmarks" / "busy.py", "busy_benchmark")


def test_neighbours_work_while_inside_and_are_gone_afterwards(busy: Any) -> None:
    before = set(psutil.Process().children())
    with busy.neighbours(2):
        started = set(psutil.Process().children()) - before
        assert len(started) == 2
        end = time.monotonic() + 20
        while any(p.cpu_times().user < 0.05 for p in started):
            assert time.monotonic() < end
            time.sleep(0.01)
    assert set(psutil.Process().children()) == before


def test_an_unknown_part_is_refused_with_the_known_ones() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "busy.py"), "--only", "training,mixing"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "--only has no mixing; there are training, serving, pictures" in ran.stderr


@pytest.mark.peers
def test_it_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "busy.py"), "--quick", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert set(result) == {"machine", "rows", "bars"}
    assert {b["name"].partition(":")[0] for b in result["bars"]} == {"training", "serving", "pictures"}
    told = {(r["name"], r["metric"]): r["value"] for r in result["rows"]}
    for name in ("training: PEFT", "pictures: diffusers + PEFT"):
        assert told[name, "beside two"] > 0
