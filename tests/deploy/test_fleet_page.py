"""The page about fleets names files, targets, services and values that exist; the demo loses no request."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from veneer.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "fleet.md").read_text(encoding="utf-8")
COMMAND_LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines() if line.strip()
]


def values_at(path: str) -> object:
    found: object = yaml.safe_load((ROOT / "deploy/helm/veneer/values.yaml").read_text(encoding="utf-8"))
    for key in path.split("."):
        assert isinstance(found, dict)
        assert key in found, path
        found = found[key]
    return found


def test_commands_name_what_exists() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text(encoding="utf-8"))["services"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    checked = 0
    for line in COMMAND_LINES:
        match shlex.split(line, comments=True):
            case ["make", target]:
                assert target in targets
            case ["docker", "compose", "exec", service, "veneer", command, *_]:
                assert service in services
                assert command in COMMANDS
            case ["docker", "compose", "up", "--wait", *rest]:
                assert all(each.partition("=")[0] in services for each in rest if not each.startswith("--"))
            case ["helm", "install", _, chart, *rest]:
                assert (ROOT / chart / "Chart.yaml").is_file()
                for each in rest[1::2]:
                    values_at(each.partition("=")[0])
            case ["kubectl", "create", "secret", "generic", name, *_]:
                assert name in (values_at("secret"), values_at("engineSecret"))
            case ["cd" | "sh", path]:
                assert (ROOT / path).exists() or (ROOT / "deploy/compose" / path).exists()
            case other:
                raise AssertionError(f"nothing checks {other}")
        checked += 1
    assert checked == len(COMMAND_LINES) > 8


@pytest.mark.fleet
@pytest.mark.slow
def test_the_demo_loses_no_request(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples/demo_cluster.py", "--output", tmp_path / "cluster", "--seconds", "4"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = re.findall(r"^\| (.+?) \| (\d+) \| \d+ \| (\d+) \|", ran.stdout, flags=re.M)
    assert {"PostgreSQL", "Redis", "S3", "engine 1", "router", "door 2", "worker 1", "Ray head"} <= {r[0] for r in rows}
    assert all(int(answered) > 0 and lost == "0" for _, answered, lost in rows)
