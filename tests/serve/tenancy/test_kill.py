"""SIGKILL at any moment: a request that was answered is in the ledger with what it took, and none is there twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def drive(*arguments: str) -> dict[str, int]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.serve.tenancy.driver", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-5000:]
    found: dict[str, int] = json.loads(ran.stdout)
    return found


def test_a_server_killed_under_load_and_what_its_clients_saw(where: str, quick: Path) -> None:
    done = drive("load", where, str(quick), "2" if where.startswith("postgresql") else "4", "1")
    assert done["answered"] > 10
    assert done["interrupted"] > 0
    assert done["from_notes"] > 0  # answered, and the kill came before the commit


def test_a_kill_at_many_steps_of_a_request(quick: Path) -> None:
    assert drive("points", str(quick / "tenants.sqlite"), str(quick), "3")["steps"] > 10


@pytest.mark.slow
def test_a_kill_at_each_step_of_a_request(where: str, quick: Path) -> None:
    assert drive("points", where, str(quick), "1")["steps"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_longer_soak(where: str, quick: Path, seed: int) -> None:
    assert drive("load", where, str(quick), "25", str(seed))["answered"] > 200
