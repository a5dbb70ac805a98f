"""An adapter trained on the tiny base, which is quantized to 4 bits."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny_base import tiny_base_dir
from veneer.train.config.load import config_from
from veneer.train.text.task import run_text


def qlora_run(folder: Path) -> tuple[Path, str, Path]:
    """Train in `folder`. Return (base folder, adapter folder, file of training rows)."""
    base = tiny_base_dir(folder)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(24):
            asked = {"role": "user", "content": f"The printer number {i} does not work."}
            answer = {"role": "assistant", "content": json.dumps({"team": "it" if i % 2 else "billing"})}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    values = {
        "base": {"name": str(base), "quantize": "nf4", "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "split": 4},
        "output": str(folder / "run"),
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"steps": 12},
        "batching": {"rows": 8},
    }
    run_text(config_from(values)[0], on_event=lambda event: None)
    return base, str(folder / "run"), folder / "rows.jsonl"
