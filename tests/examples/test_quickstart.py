"""The quickstart runs on a tiny base, and the commands that it suggests exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.run import run
from tests.test_readme import parse, roomy, small_config
from tests.tiny_base import tiny_base_dir


def test_the_quickstart_trains_evaluates_and_suggests_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = roomy(tiny_base_dir(tmp_path))
    (tmp_path / "config.yaml").write_text(small_config(), encoding="utf-8")

    options = {"--base": str(base), "--config": "config.yaml", "--output": "runs/quickstart", "--tickets": "4"}
    printed = run(capsys, "quickstart", *(word for pair in options.items() for word in pair)).out
    for word in (
        "4 held-out tickets",
        "accuracy",
        "valid JSON",
        "loss",
        "tokens/s",
        "peak memory",
        "MB",
        "base",
        "wanted",
    ):
        assert word in printed
    assert (tmp_path / "runs" / "quickstart" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    lines = re.findall(r"^ +\S*veneer (.*)$", printed, flags=re.M)
    assert [parse(f"veneer {line}")[0] for line in lines] == ["generate", "adapter", "train"]
