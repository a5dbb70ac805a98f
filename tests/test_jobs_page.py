"""The commands and Python code of docs/how-to/jobs.md run, and the page's table of states is complete.

tests/cli/test_jobs.py runs `worker` and `watch`.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.cli.run import run
from tests.jobs.small import small_config
from tests.test_readme import ROOT, blocks
from veneer.jobs.post_training import parse_after
from veneer.jobs.process import run_job
from veneer.jobs.store import TRANSITIONS, JobStore
from veneer.library.library import open_library

PAGE = (ROOT / "docs" / "how-to" / "jobs.md").read_text(encoding="utf-8")


def test_commands_of_the_page_run(
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
        if words[2] == "submit":
            job = ran.out.split()[0]
    assert "training_price=4.000000\ntraining_budget=500.000000\ntraining_jobs=4\n" in ran.out
    (code,) = blocks(PAGE, "python")
    exec(compile(code, "jobs.md", "exec"), {})
    assert f"{job} cancelled 0 3 None" in capsys.readouterr().out


def test_example_of_the_page_reaches_a_canary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the page's commands and configuration on the tiny base. The test itself takes the worker's place."""
    monkeypatch.chdir(tmp_path)
    by_hand, by_rule = (yaml.safe_load(block) for block in blocks(PAGE, "yaml"))
    small = small_config(tmp_path)
    (tmp_path / "rows.jsonl").rename(tmp_path / "tickets.jsonl")
    shutil.copy(tmp_path / "tickets.jsonl", tmp_path / "held-out.jsonl")
    given = small | by_hand | {"base": small["base"]}
    given["after"]["evaluate"]["max_new_tokens"] = 4
    (tmp_path / "support.yaml").write_text(yaml.safe_dump(given))
    (commands,) = blocks(PAGE, "bash")
    job, told = "", []
    for line in commands.splitlines():
        words = shlex.split(re.sub(r"ftjob-\w{24}", job, line), comments=True)
        if words[1] == "worker":
            _work()
            continue
        ran = run(capsys, *words[1:])
        job = ran.out.split()[0] if words[2] == "submit" else job
        told.append(ran.out.strip())
    canary = "support of acme -> acme/support@1 90%, acme/support@2 10%; shadow acme/support@2 for 100%"
    first, later, shown = told[2], told[4], told[5]
    assert (first, later) == ("support of acme -> acme/support@1 100%", canary)
    assert "evaluation   on 12 held-out rows: exact_match: base 0, acme/support@1 " in shown
    assert "route        acme/support@2 gets 0.1 of the users of support, acme/support@1 the others" in shown
    assert told[-2:] == ["support points to acme/support@2", "support points to acme/support@1"]
    parse_after(by_rule["after"], tmp_path)
    (tmp_path / "wrong.yaml").write_text(
        yaml.safe_dump(given | {"after": {**by_rule["after"], "promote": {"metric": "exact_mach"}}})
    )
    assert "did you mean exact_match" in run(capsys, "jobs", "submit", "wrong.yaml", "--tenant", "acme", code=2).err


def _work() -> None:
    with open_library() as library:
        lease = JobStore(library).acquire("here", 600)
        assert run_job(library, lease.job.id, lease.token) == 0


def test_table_of_states_is_complete() -> None:
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \|$", PAGE.partition("| state |")[2].partition("In Python")[0], re.M)
    told = {state: {re.sub(r" \(.*\)", "", word) for word in after.split(", ")} for state, after in rows}
    assert told == {state: set(after) for state, after in TRANSITIONS.items() if after}
