"""A job that trains in seconds: the tiny base, twelve rows, three steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_base import tiny_base_dir

STEPS = 3


def small_config(folder: Path, steps: int = STEPS, **sections: Any) -> dict[str, Any]:
    """Return a job's config; create its base and rows in `folder` if missing."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        questions = [f"The printer number {i} {'still ' * (i % 3)}does not work." for i in range(12)]
        lines = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": "it"}]} for a in questions
        ]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"base": str(tiny_base_dir(folder)), "data": {"train": str(rows), "split": 4}}
    config |= {"adapter": {"rank": 2}, "batching": {"rows": 2}, "schedule": {"steps": steps}}
    config |= {"optimizer": {"learning_rate": 3e-3}, "checkpoint": {"every": 1}}
    return config | {"evaluation": {"every": 2, "keep": "last"}} | sections
