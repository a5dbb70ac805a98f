"""Trackers in their real offline modes, and trackers that fail during a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.report.test_log import score, step
from veneer.errors import ConfigError, MissingExtraError, install_command
from veneer.train.config.text import ReportSection
from veneer.train.events import Event, Note, Resolved, Sampled
from veneer.train.report import trackers
from veneer.train.report.trackers import check_trackers, tracked

SETTINGS = Resolved({"adapter.rank": 8, "adapter.targets": ["q_proj"]}, {})


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def _run(name: str, folder: Path, steps: range, *, resumed: bool = False, **given: Any) -> list[Event]:
    heard: list[Event] = []
    report = ReportSection.model_validate({"trackers": [name], "project": "support", **given})
    with tracked(report, folder, SETTINGS, resumed, heard.append) as tell:
        for n in steps:
            tell(step(n, 1 / n))
        tell(score(steps[-1]))
        sheet = folder / "samples" / "step-2.png"
        sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(sheet)
        tell(Sampled(steps[-1], "samples/step-2.png", 0.1))
    return heard


def test_tensorboard_hides_repeated_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run("tensorboard", tmp_path, range(1, 4))
    _run("tensorboard", tmp_path, range(3, 6), resumed=True)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    losses = [(s.step, round(s.value, 4)) for s in read.Scalars("train/loss")]
    assert losses == [(n, round(1 / n, 4)) for n in range(1, 6)]
    assert read.Scalars("validation/loss")[-1].step == 5
    assert read.Tags()["images"] == ["samples"]


def test_wandb_continues_the_run_after_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    logged: list[tuple[Any, ...]] = []
    real = wandb.Run.log

    def log(run: Any, values: dict[str, Any], step: int) -> None:
        if "train/loss" in values:
            logged.append((run.id, run.project, run.config["adapter.rank"], step, values["train/loss"]))
        real(run, values, step=step)

    monkeypatch.setattr(wandb.Run, "log", log)
    _run("wandb", tmp_path, range(1, 4), tags=["nightly"])
    kept = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    time.sleep(1.1)  # names of W&B's folders contain the second
    _run("wandb", tmp_path, range(3, 6), resumed=True)
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{kept}/run-{kept}.wandb"))) == 2
    assert logged == [(kept, "support", 8, n, 1 / n) for n in (1, 2, 3, 3, 4, 5)]


def test_a_failing_tracker_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def down(*given: Any, **more: Any) -> None:
        raise ConnectionError("no route to the tracking server")

    monkeypatch.setattr(wandb.Run, "log", down)
    heard: list[Event] = []
    report = ReportSection(trackers=("wandb", "tensorboard"))
    with tracked(report, tmp_path, SETTINGS, False, heard.append) as tell:
        for n in range(1, 4):
            tell(step(n))
    assert heard == [Note("warning: wandb failed and will not receive further events: no route to the tracking server")]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path: Path) -> None:
    report = ReportSection(trackers=("wandb",), tags=("x" * 100,))
    with (
        pytest.raises(ConfigError, match="wandb could not start"),
        tracked(report, tmp_path, SETTINGS, False, lambda event: None),
    ):
        pass
    assert not (tmp_path / "trackers.json").exists()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="wandb, tensorboard") as caught:
        check_trackers(ReportSection(trackers=("wandb", "tensorboard")))
    assert install_command("wandb,tensorboard") in (caught.value.fix or "")
