"""The commands, rows and configurations of docs/how-to/distillation.md work with the tiny base."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.how_to import run_commands
from tests.test_readme import ROOT, blocks
from tests.tiny_base import tiny_base_dir

PAGE = (ROOT / "docs" / "how-to" / "distillation.md").read_text(encoding="utf-8")


def test_commands_of_the_page_train_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (rows,), values, (commands,) = (blocks(PAGE, kind) for kind in ("json", "yaml", "bash"))
    Path("tickets.jsonl").write_text(rows * 5)
    base = str(tiny_base_dir(tmp_path))
    large, small, told = (yaml.safe_load(text) for text in values)
    short = {"base": base, "schedule": {"steps": 2}}
    Path("teacher.yaml").write_text(yaml.safe_dump(large | short))
    Path("distill.yaml").write_text(yaml.safe_dump(small | short | {"evaluation": {"every": 1, "keep": "last"}}))
    told["distillation"]["max_tokens"] = 8
    Path("told.yaml").write_text(yaml.safe_dump(small | short | told | {"output": "runs/told"}))
    told_last = run_commands(capsys, (*commands.splitlines(), "veneer train told.yaml --dry-run"), base)[-1]
    assert "tokens per request are saved" in told_last
    assert Path("answers.jsonl").exists()
