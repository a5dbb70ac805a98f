"""Runs that sample completions with the tiny base, for tests of reinforcement and distillation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_base import tiny_base_dir
from tests.train.stopping import interrupt_at
from tests.train.text.tiny_runs import TENSORS, merged
from veneer.errors import Interrupted
from veneer.models.text.base import TextBase
from veneer.serve.engine.live import live_sampler
from veneer.train.config.load import config_from
from veneer.train.events import Event
from veneer.train.report.log import read_log
from veneer.train.text.save import RunResult
from veneer.train.text.task import run_text

_TIMED = {"drawn_seconds", "prompt_cached"}  # times differ; a resumed process starts with an empty cache

REWARDED: dict[str, Any] = {
    "batching": {"rows": 2, "micro_rows": 6}, "optimizer": {"learning_rate": 1e-2},
    "schedule": {"steps": 6, "name": "constant"}, "adapter": {"rank": 4}, "evaluation": {"every": 3},
    "checkpoint": {"every": 2},
    "reinforcement": {
        "loss": "grpo", "group": 6, "max_tokens": 8,
        "rewards": [
            {"kind": "regex", "pattern": "e"},
            {"kind": "regex", "name": "team", "pattern": "(it|hr)", "column": "team", "weight": 0.5},
        ],
    },
}  # fmt: skip


def with_prompts(folder: Path, row: Callable[[int], dict[str, str]]) -> Path:
    """Create a folder with the tiny base and twelve prompts. `row(i)` returns more fields for row i."""
    tiny_base_dir(folder)
    lines = [{"prompt": f"The printer number {i} does not answer.", **row(i)} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_of(settings: dict[str, Any], shared: Path, output: Path, **sections: Any) -> Any:
    """Return the configuration of a run on the folder from `with_prompts`.

    `sections` are merged into the settings key by key."""
    values: dict[str, Any] = {
        "base": str(shared / "tiny-base"),
        "data": {"train": str(shared / "prompts.jsonl"), "split": 2},
        "output": str(output),
        **settings,
    }
    return config_from(merged(values, sections))[0]


def run_drawn(
    config: Any,
    base: TextBase,
    on_event: Callable[[Event], None] | None = None,
    resume: bool = False,
    sampler: Any = live_sampler,
) -> RunResult:
    return run_text(config, base=base, resume=resume, on_event=on_event or (lambda event: None), sampler=sampler)


def measured(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step, without its loss."""
    return [r["extra"] for r in read_log(folder / "log.jsonl") if r["event"] == "stepped"]


def stopped_and_resumed(run: Callable[..., Any], folder: Path, at: int) -> None:
    """Assert that an interrupted and resumed run ends with the same bytes and log as an uninterrupted run.

    run: `run(output, on_event, resume)`
    at: step after which the run is interrupted with Ctrl-C"""

    run(folder / "whole", None, False)
    with pytest.raises(Interrupted):
        run(folder / "parts", interrupt_at(at), False)
    run(folder / "parts", None, True)
    same_ends(folder / "parts", folder / "whole")


def same_ends(one: Path, other: Path) -> None:
    """Assert that two runs have equal adapters and equal metrics for every step."""
    assert (one / TENSORS).read_bytes() == (other / TENSORS).read_bytes()
    ours, theirs = ([{k: v for k, v in x.items() if k not in _TIMED} for x in measured(each)] for each in (one, other))
    assert ours == theirs
