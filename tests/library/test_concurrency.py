"""Several processes use a library, and are killed at any point.

Commits stay complete, and leftovers are collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def drive(*arguments: str) -> dict[str, int]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.library.driver", *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    found: dict[str, int] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("seed", [1])
def test_library_survives_killed_processes(place: str, index: str | None, seed: int) -> None:
    done = drive("random", place, index or "", "4" if place.startswith("s3:") else "1.1", str(seed))
    assert done["kills"] >= 3
    assert done["operations"] > 0


def test_library_stays_consistent_after_kills(quick: Path) -> None:
    assert drive("points", str(quick), "5")["steps"] > 30


@pytest.mark.slow
def test_library_stays_consistent_after_a_kill_at_each_step(quick: Path) -> None:
    assert drive("points", str(quick), "1")["steps"] > 30


@pytest.mark.slow
def test_a_kill_at_each_step_with_postgresql(quick: Path, postgres: Callable[[], str]) -> None:
    assert drive("points", str(quick), "1", *(postgres() for _ in range(150)))["steps"] > 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_library_survives_a_longer_run_of_kills(place: str, index: str | None, seed: int) -> None:
    done = drive("random", place, index or "", "25", str(seed))
    assert done["kills"] > 10
    assert done["operations"] > done["gc"] > 0
