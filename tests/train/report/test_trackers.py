"""Trackers, each in its real offline mode, and what is left of a run when one of them fails."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.report.test_log import score, step
from veneer.errors import ConfigError, MissingExtraError
from veneer.train.config.text import ReportSection
from veneer.train.events import Event, Note, Resolved, Sampled
from veneer.train.report import trackers
from veneer.train.report.trackers import check_trackers, tracked

SETTINGS = Resolved({"adapter.rank": 8, "adapter.targets": ["q_proj"]}, {})


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's, whose tables take seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: str) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow keeps files in ./mlruns
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


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
    assert [(s.step, round(s.value, 4)) for s in read.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3333),
        (4, 0.25),
        (5, 0.2),
    ]
    assert read.Scalars("validation/loss")[-1].step == 5
    assert read.Tags()["images"] == ["samples"]


def test_wandb_continues_the_run_after_resuming(tmp_path: Path) -> None:
    import wandb

    _run("wandb", tmp_path, range(1, 4), tags=["nightly"])
    kept = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    time.sleep(1.1)  # its folders are told apart by the second
    _run("wandb", tmp_path, range(3, 6), resumed=True)
    wandb.teardown()  # its service writes on for a moment
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{kept}/run-{kept}.wandb"))
    assert files
    steps, project, config = [], set(), {}
    for file in files:
        for record in _wandb_records(file):
            if record.HasField("history"):
                values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                if "train/loss" in values:
                    steps.append((record.history.step.num, values["train/loss"]))
            if record.HasField("run"):
                project.add(record.run.project)
                config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    assert dict(steps) == {n: 1 / n for n in range(1, 6)}
    assert project == {"support"}
    assert config["adapter.rank"] == 8


def _wandb_records(file: Path) -> Iterator[Any]:
    """What W&B's own program would upload: LevelDB's log format (checksum, length, type; blocks of 32 KiB) after seven
    bytes of its own, with a record of its protocol in each entry."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def test_mlflow_has_each_step_once_after_resuming(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    _run("mlflow", tmp_path, range(1, 4))
    _run("mlflow", tmp_path, range(3, 6), resumed=True)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("support")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(n, 1 / n) for n in range(1, 6)]
    assert run.info.status == "FINISHED"
    assert run.data.params["adapter.rank"] == "8"
    assert [f.path for f in client.list_artifacts(run.info.run_id, "samples")] == ["samples/step-2.png"]


def test_trackio_keeps_a_run_on_this_machine(tmp_path: Path) -> None:
    import sqlite3

    _run("trackio", tmp_path, range(1, 4))
    _run("trackio", tmp_path, range(4, 6), resumed=True)
    (database,) = (tmp_path / "trackio").glob("support*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    losses = {n: json.loads(m)["train/loss"] for _, n, m in rows if "train/loss" in json.loads(m)}
    assert losses == {n: 1 / n for n in range(1, 6)}
    assert len({name for name, _, _ in rows}) == 1


def test_a_failing_tracker_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def down(*given: Any, **more: Any) -> None:
        raise ConnectionError("no route to the tracking server")

    monkeypatch.setattr(MlflowClient, "log_batch", down)
    monkeypatch.setattr(MlflowClient, "log_artifact", down)
    report = ReportSection(trackers=("mlflow", "tensorboard"))
    heard: list[Event] = []
    settings = Resolved({}, {})
    with tracked(report, tmp_path, settings, False, heard.append) as tell:
        for n in range(1, 4):
            tell(step(n))
    assert [e.text for e in heard if isinstance(e, Note)] == [
        "warning: mlflow failed and gets no more events: no route to the tracking server"
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with (
        pytest.raises(ConfigError, match="mlflow could not start"),
        tracked(ReportSection(trackers=("mlflow",)), tmp_path, SETTINGS, False, lambda event: None),
    ):
        pass
    assert not (tmp_path / "trackers.json").exists()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="wandb, trackio") as caught:
        check_trackers(ReportSection(trackers=("wandb", "trackio")))
    assert "veneer[wandb,trackio]" in (caught.value.fix or "")
