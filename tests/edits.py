"""Helper that edits a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit_json(path: Path, *drop: str, **changes: Any) -> None:
    """Remove the keys `drop` from the object in the file, and set the keys `changes`."""
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(kept | changes))
