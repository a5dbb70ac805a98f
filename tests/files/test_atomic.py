"""Files appear completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from veneer.errors import AdapterError
from veneer.files.atomic import atomic_write


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_atomic_write_refuses_devices_and_pipes(tmp_path: Path) -> None:
    """As root, `-o /dev/null` would replace the device."""
    place = tmp_path / "pipe"
    os.mkfifo(place)
    with pytest.raises(AdapterError, match="the path is a device or a pipe"):
        atomic_write(place, [b"x"])
    assert place.is_fifo()
    assert list(tmp_path.iterdir()) == [place]
