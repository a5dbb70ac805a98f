"""The tiny text base, once for each module; a module may have a `shared` folder of its own with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.text.tiny_runs import with_rows
from veneer.models.text.base import TextBase, load_text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base and forty tickets."""
    return with_rows(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(shared: Path) -> TextBase:
    return load_text(str(shared / "tiny-base"))
