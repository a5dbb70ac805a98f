"""Folders for VENEER_HOME that contain the kernels compiled in this test session."""

from __future__ import annotations

import os
from pathlib import Path


def home_with_kernels(folder: Path) -> Path:
    """Create `folder` for VENEER_HOME, linked to this session's kernels; return it.

    Without the link, each process would compile and test the kernels, which takes ten seconds."""
    folder.mkdir(exist_ok=True)
    if not (folder / "kernels").exists():
        (folder / "kernels").symlink_to(os.environ["VENEER_TEST_KERNELS"])  # tests/conftest.py
    return folder
