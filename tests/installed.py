"""An installed veneer that differs from this clone, for tests of installation commands."""

from __future__ import annotations

from pathlib import Path

import pytest


def install_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that veneer 9.9 is installed from an index, and return the folder of its metadata.

    A file direct_url.json there makes it an installation from a clone, a file or a repository (PEP 610)."""
    about = folder / "veneer-9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: veneer\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(folder)
    return about
