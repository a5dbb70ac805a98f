"""`veneer jobs` and `veneer worker`: from a configuration to an adapter, with real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.run import run
from tests.jobs.small import STEPS, small_config
from veneer.cli.main import main
from veneer.jobs.local_worker import background_worker
from veneer.jobs.store import JobStore
from veneer.library.library import open_library
from veneer.serve.build import Extension
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import tenants_at
from veneer.train.rewards.sandbox import sandbox_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    (made / "support.yaml").write_text(yaml.safe_dump(small_config(made) | {"output": "runs/support"}))
    return made


def test_command_line_trains_from_config_to_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A background worker, like that of `veneer serve --train`, runs the job in a separate process.

    That process finds the tenants' routes."""
    at, tenants = ("--library", str(folder / "library")), str(folder / "tenants.sqlite")
    with tenants_at(tenants) as known:
        manage.add_tenant(known, "acme", actor="test")
    after = {
        "evaluate": {"metrics": ["loss"]},
        "route": {"name": "help"},
        "promote": {"metric": "loss", "against": "base", "by": -1.0},
    }
    given = yaml.safe_load((folder / "support.yaml").read_text()) | {"after": after}
    (folder / "looped.yaml").write_text(yaml.safe_dump(given))
    asked = ("submit", str(folder / "looped.yaml"), "--tenant", "acme", "--name", "support", "--tenants", tenants)
    job = json.loads(run(capsys, "jobs", *at, *asked, "--json").out)
    assert (job["state"], job["name"], job["steps"]) == ("queued", "acme/support", STEPS)
    said: list[str] = []
    with background_worker(library=str(folder / "library"), tenants=tenants, log=said.append):
        watched = run(capsys, "jobs", *at, "watch", job["id"], "--tenant", "acme", code=None)
    assert watched.code == 0, watched.out + job_log(folder, job["id"])
    assert f"step {STEPS} of {STEPS}: loss" in watched.out
    assert not said
    shown = run(capsys, "jobs", *at, "show", job["id"]).out
    assert "adapter      acme/support@1" in shown
    assert "cost         0.00 for " in shown
    assert "route        `loss better than base by at least -1` is met: help points to acme/support@1" in shown
    listed = json.loads(run(capsys, "jobs", *at, "list", "--state", "succeeded", "--json").out)
    assert [(found["id"], found["step"]) for found in listed["jobs"]] == [(job["id"], STEPS)]
    assert "no jobs" in run(capsys, "jobs", *at, "list", "--tenant", "best").out
    with open_library(folder / "library") as library:
        version = library.find("acme/support@1")
        assert (version.tags, version.source) == ([f"job:{job['id']}"], f"job {job['id']}")
        assert version.card["base"] == str(folder / "tiny-base")
    for what in ("show", "watch", "cancel", "pause", "resume", "logs"):
        _, out, err = run(capsys, "jobs", *at, what, job["id"], "--tenant", "best", code=2)
        assert (out, "there is no job" in err) == ("", True)
    assert "is succeeded and cannot be cancelled" in run(capsys, "jobs", *at, "cancel", job["id"], code=2).err
    run(capsys, "jobs", *at, "logs", job["id"])


def job_log(folder: Path, job: str) -> str:
    with open_library(folder / "library") as library:
        log = JobStore(library).get(None, job).log
    return log.read_text() if log.is_file() else "no log"


def test_submit_reports_why_a_job_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at, config = ("--library", str(folder / "other")), str(folder / "support.yaml")
    (folder / "broken.jsonl").write_text("{\n")
    out = run(capsys, "jobs", *at, "submit", config, f"data.train={folder / 'broken.jsonl'}", code=2).out
    assert ("failed" in out, "broken.jsonl:1" in out) == (True, True)
    assert "did you mean `adapter.rank`?" in run(capsys, "jobs", *at, "submit", config, "adapter.rang=3", code=2).err
    assert "cannot name an adapter" in run(capsys, "jobs", *at, "submit", config, "--name", "No Name", code=2).err
    run(capsys, "worker", "--until-idle", "--library", str(folder / "other"))  # finds no job to run


def test_training_server_starts_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker uses the server's library and tenants, and ends with the server."""
    told: list[Any] = []

    @contextmanager
    def background_worker(**options: object) -> Iterator[None]:
        told.append({name: options[name] for name in ("library", "tenants")})
        yield
        told.append("worker ended")

    monkeypatch.setattr("veneer.jobs.local_worker.background_worker", background_worker)

    def training(service: Any, library: Any, **options: object) -> Extension:
        told.append(options)
        return Extension()

    monkeypatch.setattr("veneer.jobs.build.training", training)
    monkeypatch.setattr("veneer.serve.server.serve", lambda settings, say, **more: told.append(more))
    with pytest.raises(SystemExit) as end:
        main(["serve", "--base", "tiny", "--library", "there", "--tenants", "t.sqlite", "--train"])
    assert not end.value.code
    beside, serving, ended = told[:3]
    assert (beside, ended) == ({"library": "there", "tenants": "t.sqlite"}, "worker ended")
    serving["extends"][0](None, None)
    assert told[3:] == [{"python_graders": False, "session_days": 30.0}]


def test_python_graders_need_a_sandbox_before_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise sandbox_error("bubblewrap (bwrap) is not installed")

    monkeypatch.setattr("veneer.train.rewards.limited.working_sandbox", none)
    monkeypatch.setattr("veneer.serve.server.serve", lambda *given, **more: pytest.fail("it started"))
    ran = run(capsys, "serve", "--base", "tiny", "--train", "--python-graders", code=2)
    assert "Python from clients cannot run here: bubblewrap (bwrap) is not installed" in ran.err
