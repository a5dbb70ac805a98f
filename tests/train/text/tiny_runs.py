"""Text runs that take about a second, on the tiny base and forty tickets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_base import tiny_base_dir
from veneer.models.text.base import TextBase
from veneer.train.config.load import config_from
from veneer.train.text.save import RunResult
from veneer.train.text.task import run_text

TENSORS = "adapter_model.safetensors"


def write_rows(path: Path) -> None:
    """Write forty tickets as training rows."""
    with path.open("w") as file:
        for i in range(20):
            for thing, team in (("printer", "it"), ("invoice", "billing")):
                question = {"role": "user", "content": f"The {thing} number {i} {'still ' * (i % 4)}does not work."}
                answer = {"role": "assistant", "content": json.dumps({"team": team})}
                file.write(json.dumps({"messages": [question, answer]}) + "\n")


def with_rows(folder: Path) -> Path:
    """Create a folder with the tiny base and the tickets."""
    tiny_base_dir(folder)
    write_rows(folder / "rows.jsonl")
    return folder


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with `more` merged section by section."""
    out = dict(values)
    for section, value in more.items():
        current = values.get(section)
        out[section] = {**current, **value} if isinstance(value, dict) and isinstance(current, dict) else value
    return out


def values_of(folder: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """Return a configuration for ten steps; `sections` are merged into it."""
    values = {
        "base": {"name": str(folder / "tiny-base")},
        "data": {"train": str(folder / "rows.jsonl"), "split": 8},
        "output": str(output),
        "batching": {"rows": 4, "micro_rows": 2},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"steps": 10},
        "adapter": {"rank": 4, "dropout": 0.2},
        "evaluation": {"every": 4},
        "checkpoint": {"every": 3},
    }
    return merged(values, sections)


def train(
    folder: Path,
    output: Path,
    loaded: TextBase | None = None,
    *,
    resume: bool = False,
    dry_run: bool = False,
    force: bool = False,
    on_event: Any = None,
    **sections: Any,
) -> RunResult:
    """Train a run and return its result. `loaded`: the base, if it is already loaded."""
    config, sources = config_from(values_of(folder, output, **sections))
    listen = on_event or (lambda event: None)
    return run_text(config, resume=resume, dry_run=dry_run, force=force, on_event=listen, base=loaded, sources=sources)
