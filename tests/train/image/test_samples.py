"""Where a run keeps the pictures that it draws itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.errors import ResourceError
from veneer.train.image.samples import create_folder


def test_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    assert create_folder(tmp_path / "cache" / "class").is_dir()
    (tmp_path / "file").touch()
    for place in ("file", "file/class"):
        with pytest.raises(ResourceError, match="there can be no folder") as error:
            create_folder(tmp_path / place)
        assert error.value.where == str(tmp_path / place)
