"""Fixtures: one tiny text base per module, also for modules that define their own `shared` folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.text.tiny_runs import with_rows
from veneer.models.text.base import TextBase, load_text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with the tiny base and forty tickets."""
    return with_rows(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(shared: Path) -> TextBase:
    return load_text(str(shared / "tiny-base"))
