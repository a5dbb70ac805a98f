"""Veneer homes of their own, with the kernels that this session compiled."""

from __future__ import annotations

import os
from pathlib import Path


def home_with_kernels(folder: Path) -> Path:
    """`folder`, made where it is not there, as a home for VENEER_HOME. A process whose home has no kernels compiles and
    tries them, which takes ten seconds; they are named by what they were compiled from, so that all may share them."""
    folder.mkdir(exist_ok=True)
    if not (folder / "kernels").exists():
        (folder / "kernels").symlink_to(os.environ["VENEER_TEST_KERNELS"])  # tests/conftest.py
    return folder
