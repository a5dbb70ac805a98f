"""The migration from OpenAI, between two servers with OpenAI's routes; one stands in for OpenAI."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.jobs.http.test_tuning import PAIR, ROW, Jobs, created, sent, serving
from tests.scripts import script_module
from tests.test_readme import ROOT
from veneer.train.config.load import config_from

SCRIPT = ROOT / "examples" / "leave_openai.py"


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Jobs, Jobs]]:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENAI_API_KEY", "acme")
    monkeypatch.setenv("VENEER_API_KEY", "acme")
    with ExitStack() as stack:
        theirs, ours = (stack.enter_context(serving(tmp_path / name)) for name in ("theirs", "ours"))
        monkeypatch.setenv("OPENAI_BASE_URL", f"{theirs.server.url}/v1")
        yield theirs, ours


def test_script_on_the_docs_page_runs(
    servers: tuple[Jobs, Jobs], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "how-to" / "leave-openai.md").read_text(encoding="utf-8")
    code, more = re.findall(r"```python\n(.*?)```", page, re.S)
    for name in ("tickets.jsonl", "held-out.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROW) + "\n")
    here = {"http://127.0.0.1:8000": servers[1].server.url, '"none"': '"acme"', "smollm2-135m": "toy"}
    here |= {"tickets.jsonl": str(tmp_path / "tickets.jsonl"), "open(": "opened("}
    more = more.replace("held-out.jsonl", str(tmp_path / "held-out.jsonl"))
    for theirs, ours in here.items():
        assert theirs in code
        code, more = code.replace(theirs, ours), more.replace(theirs, ours)
    with ExitStack() as files:
        run: dict[str, Any] = {"opened": lambda *given: files.enter_context(open(*given))}
        exec(textwrap.dedent(code), run)
        assert run["job"].training_file == run["file"].id
        exec(textwrap.dedent(more), run)
        run["client"].close()
    assert run["job"].to_dict()["after"]["route"]["name"] == "support"
    assert "created" in capsys.readouterr().out


def finished(theirs: Jobs, client: openai.OpenAI, **asked: Any) -> Any:
    job = created(client, **asked)
    theirs.store.finish(theirs.trained(), result={"reference": "x@1"})
    return client.fine_tuning.jobs.retrieve(job.id)


def run(*arguments: str) -> int:
    script = script_module(SCRIPT, "leave_openai")
    return int(script.main(list(arguments)))


def test_files_and_jobs_are_moved_once(
    servers: tuple[Jobs, Jobs], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = servers
    folder, to = tmp_path / "from-openai", f"{ours.server.url}/v1"
    with theirs.client() as there, ours.client() as here:
        file = sent(there, [ROW] * 3)
        dpo: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2}}}
        first = finished(theirs, there, training_file=file, suffix="Support", seed=7, metadata={"a": "b"})
        second = finished(theirs, there, training_file=sent(there, [PAIR]), validation_file=file, method=dpo)
        gone = finished(theirs, there, training_file=sent(there, name="gone.jsonl"))
        there.files.delete(gone.training_file)
        broken = finished(theirs, there, training_file=sent(there, [ROW, {"messages": "Hi"}], "broken.jsonl"))
        created(there)  # a job that has not succeeded is skipped

        assert run("--to", to, "--list") == 0
        listed = capsys.readouterr().out
        assert all(f"{job.id}  {job.fine_tuned_model}  {job.training_file}" in listed for job in (first, second))
        assert here.files.list().data == []
        for _ in range(2):
            assert run("--to", to, "--folder", str(folder), "--train", "toy") == 1
            told = capsys.readouterr().err
            assert f"{gone.id} was not moved" in told
            assert f"{broken.id} was not moved" in told
            assert "broken.jsonl:2: `messages` should be a list" in told
        assert len(here.files.list().data) == 2
        moved = json.loads((folder / "moved.json").read_text())
        assert moved.keys() == {file, second.training_file, first.id, second.id}
        assert here.files.content(moved[file]).read() == there.files.content(file).read()
        again = here.fine_tuning.jobs.retrieve(moved[first.id])
        assert (again.seed, again.metadata, again.training_file) == (7, {"a": "b"}, moved[file])
        assert again.to_dict()["user_provided_suffix"] == "support"
        config, _ = config_from({**ours.store.get("acme", moved[second.id]).config, "output": "o"})
        assert config.preference.loss == "dpo"  # type: ignore[union-attr]
        assert config.preference.beta == 0.3  # type: ignore[union-attr]
        assert config.schedule.epochs == 2  # type: ignore[union-attr]
        assert len(here.fine_tuning.jobs.list().data) == 2
