"""Ctrl-C or SIGTERM stops both quickstarts and `veneer train` with one message and a shell's exit code.

Uses real processes and signals. Two of the six cases run by default: a quickstart with SIGTERM here, and
`veneer train` with Ctrl-C in tests/cli/test_train.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.test_readme import roomy, small_config
from tests.tiny_base import tiny_base_dir
from tests.tiny_image_base import tiny_image_base

ROOT = Path(__file__).resolve().parents[2]


def endless() -> str:
    """Return a configuration with about ten seconds of steps, so that the signal comes early."""
    config = small_config()
    assert "epochs: 1 " in config
    return config.replace("epochs: 1 ", "epochs: 600 ")


def stopped_after(command: list[str], first: Path, number: int, folder: Path) -> tuple[int, str]:
    """Run a command, send it a signal once the log `first` has a step; return (exit code, stderr)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    given_up = threading.Timer(180, process.kill)
    given_up.start()
    try:
        while process.poll() is None and '"gradient_norm"' not in (first.read_text() if first.is_file() else ""):
            threading.Event().wait(0.05)
        process.send_signal(number)
        _, said = process.communicate()
    finally:
        given_up.cancel()
    return process.returncode, said


def check(code: int, said: str, number: int) -> None:
    assert code == 128 + number, said
    assert "stopped after step" in said
    assert "the state is saved" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert len(said.partition("error: ")[2].splitlines()) == 3, (
        said
    )  # the lines are what, where and fix; nothing follows


@pytest.fixture(scope="module")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roomy(tiny_base_dir(tmp_path_factory.mktemp("text")))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_the_quickstart(text_base: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "config.yaml").write_text(endless(), encoding="utf-8")
    command = [str(ROOT / "examples" / "quickstart.py"), "--base", str(text_base), "--config", "config.yaml"]
    out = tmp_path / "run"
    check(*stopped_after([*command, "--output", str(out)], out / "log.jsonl", number, tmp_path), number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_image_quickstart(tmp_path: Path, number: int) -> None:
    base, out = tiny_image_base(tmp_path / "base", "flux1"), tmp_path / "run"
    command = [str(ROOT / "examples" / "campaign" / "run.py"), "--small", "--base", str(base), "--output", str(out)]
    settings = ["schedule.steps=1500", "batching.rows=2", "evaluation.at_start=false"]
    command += [a for s in settings for a in ("--set", s)]
    check(*stopped_after(command, out / "product" / "log.jsonl", number, tmp_path), number)


@pytest.mark.slow
def test_veneer_train_exits_with_143_after_sigterm(text_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(endless(), encoding="utf-8")
    settings = ["config.yaml", f"base={text_base}", "output=run"]
    command = ["-m", "veneer.cli.main", "train", *settings]
    code, said = stopped_after(command, tmp_path / "run" / "log.jsonl", signal.SIGTERM, tmp_path)
    assert code == 143, said
    assert "continue with: veneer train" in said
    assert "Traceback" not in said
