"""Changes of a JSON file on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit_json(path: Path, *drop: str, **changes: Any) -> None:
    """Remove the keys `drop` from the file's object and set others."""
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(kept | changes))
