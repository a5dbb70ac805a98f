"""docs/how-to/jobs.md: its commands run, its states are those that there are, its Python finds what was submitted.

What waits for a worker (`worker`, `watch`) is run by tests/cli/test_jobs.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.cli.run import run
from tests.jobs.small import small_config
from tests.test_readme import ROOT, blocks
from veneer.jobs.store import TRANSITIONS

PAGE = (ROOT / "docs" / "how-to" / "jobs.md").read_text(encoding="utf-8")


def test_the_pages_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    (tmp_path / "support.yaml").write_text(yaml.safe_dump(small_config(tmp_path) | {"output": "runs/support"}))
    job = ""
    for line in "\n".join(blocks(PAGE, "")).splitlines():
        words = shlex.split(re.sub(r"ftjob-\w{24}", job, line), comments=True)
        if not words or words[1] == "worker" or words[2] == "watch":
            continue
        ran = run(capsys, *words[1:])
        assert ran.code == 0, f"{line}\n{ran.out}{ran.err}"
        if words[2] == "submit":
            job = ran.out.split()[0]
    assert "acme    4.000000  500.000000  4" in ran.out
    (code,) = blocks(PAGE, "python")
    exec(compile(code, "jobs.md", "exec"), {})
    assert f"{job} cancelled 0 3 None" in capsys.readouterr().out


def test_the_pages_states_are_those_that_there_are() -> None:
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \|$", PAGE.partition("| state |")[2].partition("In Python")[0], re.M)
    told = {state: {re.sub(r" \(.*\)", "", word) for word in after.split(", ")} for state, after in rows}
    assert told == {state: set(after) for state, after in TRANSITIONS.items() if after}
