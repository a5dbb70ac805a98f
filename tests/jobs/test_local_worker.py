"""A worker next to a server: what other users of the machine can see."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from veneer.jobs.local_worker import background_worker


def test_worker_arguments_have_no_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    earlier, end = psutil.Process().children(), time.monotonic() + 30
    with background_worker(
        library=str(tmp_path / "library"), tenants="postgresql://u:secret@h/d", log=lambda text: None
    ):
        while not (started := [each for each in psutil.Process().children() if each not in earlier]):
            assert time.monotonic() < end
            time.sleep(0.01)
        # until exec, the child is a fork of this process
        while "veneer.cli.main" not in (arguments := started[0].cmdline()):
            assert time.monotonic() < end
            time.sleep(0.01)
        variables = started[0].environ()
    assert "secret" not in " ".join(arguments)
    assert variables["VENEER_TENANTS"] == "postgresql://u:secret@h/d"
