"""After SIGKILL at any moment, the ledger has every answered request exactly once, with its usage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.tenancy.conftest import RedisServer

ROOT = Path(__file__).resolve().parents[3]


def drive(*arguments: str) -> dict[str, int]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.serve.tenancy.driver", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    found: dict[str, int] = json.loads(ran.stdout)
    return found


@pytest.mark.slow
def test_the_ledger_agrees_with_clients_after_kills(where: str, quick: Path, request: pytest.FixtureRequest) -> None:
    """The driver compares the ledger with the clients after each run.

    Kills are random, so runs repeat until both counts of `seen` are positive.
    """
    remote = where.startswith("postgresql")
    # requests interrupted by a kill, and finished requests that were recovered from the journal
    seen = {"interrupted": 0, "from_journal": 0}
    for seed in range(1, 7):
        folder = quick / str(seed)  # an empty database and an empty journal folder for each run
        folder.mkdir()
        place = request.getfixturevalue("postgres")() if remote else str(folder / "tenants.sqlite")
        done = drive("load", place, str(folder), "2" if remote else "4", str(seed))
        assert done["answered"] > 10
        seen = {kind: seen[kind] + done[kind] for kind in seen}
        if all(seen.values()):
            return
    raise AssertionError(seen)


def test_a_kill_at_many_steps_of_a_request(quick: Path) -> None:
    assert drive("points", str(quick / "tenants.sqlite"), str(quick), "3")["steps"] > 10


@pytest.mark.slow
def test_kill_at_each_step_of_a_request(where: str, quick: Path) -> None:
    assert drive("points", where, str(quick), "1")["steps"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_longer_soak(where: str, quick: Path, seed: int) -> None:
    assert drive("load", where, str(quick), "25", str(seed))["answered"] > 200


@pytest.mark.slow
def test_two_servers_lose_no_bill_and_exceed_no_limit_when_killed(postgres: Callable[[], str], quick: Path) -> None:
    """Without Redis, two servers admit at most twice the limit (see `docs/how-to/several-doors.md`)."""
    done = drive("doors", postgres(), str(quick), "4", "1")
    assert done["answered"] > 100
    assert done["refused"] > 0


@pytest.mark.fleet
def test_with_redis_two_killed_servers_never_exceed_a_limit(
    postgres: Callable[[], str], quick: Path, redis_server: RedisServer
) -> None:
    done = drive("doors", postgres(), str(quick), "4", "1", redis_server.url)
    assert done["answered"] > 100
    assert done["refused"] > 0
