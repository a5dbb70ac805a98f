"""Veneer homes with the kernels that this session compiled."""

from __future__ import annotations

import os
from pathlib import Path


def home_with_kernels(folder: Path) -> Path:
    """Create a folder for VENEER_HOME that shares this session's kernels; return the folder.

    A process without kernels compiles and tests them, which takes ten seconds."""
    folder.mkdir(exist_ok=True)
    if not (folder / "kernels").exists():
        (folder / "kernels").symlink_to(os.environ["VENEER_TEST_KERNELS"])  # tests/conftest.py
    return folder
