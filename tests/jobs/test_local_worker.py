"""A server's background worker hides secrets from other users of the machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.serve.http.toy import wait_for
from veneer.jobs.local_worker import background_worker


def test_worker_arguments_have_no_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    earlier, tenants = psutil.Process().children(), "postgresql://u:secret@h/d"
    with background_worker(library=str(tmp_path / "library"), tenants=tenants, log=lambda text: None):
        (child,) = wait_for(lambda: [each for each in psutil.Process().children() if each not in earlier])
        wait_for(lambda: "veneer.cli.main" in child.cmdline())  # until exec, the child has this process's arguments
        arguments, variables = child.cmdline(), child.environ()
    assert "secret" not in " ".join(arguments)
    assert variables["VENEER_TENANTS"] == tenants
