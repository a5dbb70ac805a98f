"""A task defined in a few lines gets a complete run: checks, training, resuming, evaluation, saving,
verification and reports.

The tests of text and image runs cover their own tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.errors import CheckpointError
from veneer.files.safetensors import encode_tensors, read_tensors
from veneer.ops.cpu.memory import peak_resident
from veneer.ops.profile import profile, use_profile
from veneer.train import checkpoint
from veneer.train.checkpoint import Progress, write_atomically
from veneer.train.config.load import config_from
from veneer.train.events import Event, Listener, Note, Stepped, to_record
from veneer.train.loop import EvalResult, Learner, Micro, Step
from veneer.train.preflight import Finding, Report
from veneer.train.report.log import read_log
from veneer.train.run import Task, carry_out, due, newest_checkpoint, opened, raise_if_stopped
from veneer.train.save import Outcome


def lines(folder: Path, slope: float = 3.0) -> Task[Outcome]:
    """Return a task that fits y = w·x by least squares."""
    x = torch.linspace(-1, 1, 24)
    w, file = nn.Parameter(torch.zeros(())), folder / "line.safetensors"

    def loss(batch: list[int]) -> Tensor:
        return (w * x[batch] - slope * x[batch]).square().sum()

    def score(stop: Callable[[], bool]) -> EvalResult:
        return EvalResult(float(loss(list(range(24))).detach()), 24, 24, likelihood=False)

    def save(result: Outcome, progress: Progress, emit: Listener) -> Outcome:
        write_atomically(file, b"".join(encode_tensors({"w": w.detach()})))
        return replace(result, adapter=str(file))

    def prove() -> str:
        assert torch.equal(read_tensors(file)[0]["w"], w.detach())
        return "read back: the same line"

    return Task(
        learner=Learner({"w.B": w}, loss, score=score),
        steps=[Step((Micro(2, 2, (i, i + 1), lambda i=i: [i, i + 1]),), (i + 2) / 24) for i in range(0, 24, 2)],
        ends=[12],
        result=lambda outcome, progress: outcome,
        save=save,
        prove=prove,
    )


def go(folder: Path, on_event: Listener = lambda event: None, *, slope: float = 3.0, **keys: Any) -> Outcome:
    options = {key: keys.pop(key) for key in ("resume", "allow_other_machine", "dry_run") if key in keys}
    values = {
        "base": "none",
        "data": {"train": "points"},
        "output": str(folder),
        "optimizer": {"learning_rate": 0.1},
        "evaluation": {"every": 4},
        "checkpoint": {"every": 4},
        **keys,
    }
    config, sources = config_from(values)
    with opened(config, unit="points", on_event=on_event, sources=sources, **options) as run:
        newest, report = newest_checkpoint(run), Report()
        report.add(Finding("ok", "points", "24 points") if slope else Finding("stop", "points", "flat"))
        run.emit_checks(report, [("base.dtype", "float32", "points are")])
        raise_if_stopped(run, report)
        return carry_out(run, lines(folder, slope), report, newest)


def test_custom_task_gets_a_complete_run(tmp_path: Path) -> None:
    seen: list[Event] = []
    result = go(tmp_path / "out", seen.append)
    assert (result.steps, result.stopped, result.kept_step) == (12, "finished", 12)
    assert result.validation < result.validation_before
    assert Path(result.adapter).is_file()
    assert any(isinstance(e, Note) and e.text == "read back: the same line" for e in seen)
    assert read_log(tmp_path / "out" / "log.jsonl") == json.loads(json.dumps([to_record(e) for e in seen]))
    page = Path(result.report).read_text(encoding="utf-8")
    for said in ("Validation loss", "24 points", "float32"):
        assert said in page
    assert checkpoint.latest(tmp_path / "out" / "checkpoints") == tmp_path / "out" / "checkpoints" / "step-00000012"


def test_the_peak_covers_this_run_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.ones(75_000_000)  # 300 MB that the process allocated before the run
    before = peak_resident()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device=None: 0)
    reset: list[int] = []
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", reset.append)
    monkeypatch.setattr("torch.cuda.get_rng_state_all", list)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    peak = go(tmp_path / "out").peak_memory_bytes
    assert 0 < peak < before - 200_000_000
    assert reset == [0]


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    """A second run in the same folder, new or resumed, changes nothing while the first one is running."""
    refused: list[str] = []

    def again(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            with pytest.raises(CheckpointError, match="another run is writing into this folder") as caught:
                go(tmp_path / "out", resume=True)
            refused.append(str(caught.value))

    go(tmp_path / "alone")
    go(tmp_path / "out", again)
    assert len(refused) == 1
    first, second = (tmp_path / name / "line.safetensors" for name in ("alone", "out"))
    assert first.read_bytes() == second.read_bytes()
    assert [r["step"] for r in read_log(tmp_path / "out" / "log.jsonl") if r["event"] == "stepped"] == [*range(1, 13)]


def test_a_resumed_run_uses_the_profile_of_its_checkpoint(tmp_path: Path) -> None:
    there, used = replace(profile(), processor="elsewhere"), list[str]()
    with use_profile(there):
        go(tmp_path / "out")
    go(tmp_path / "out", lambda event: used.append(profile().processor), resume=True)
    assert set(used) == {"elsewhere"}
    state = tmp_path / "out" / "checkpoints" / "step-00000012" / "state.json"
    state.write_text(state.read_text().replace('"rms_norm": "', '"rms_norm": "unknown '))
    with pytest.raises(CheckpointError, match="rms_norm"):
        go(tmp_path / "out", resume=True)
    seen: list[Event] = []
    go(tmp_path / "out", seen.append, resume=True, allow_other_machine=True)
    assert any(isinstance(e, Note) and "results differ in the last bits" in e.text for e in seen)


def test_due_returns_steps_with_an_evaluation() -> None:
    assert due(5, [4, 8, 12], 12, start=True) == {0, 5, 10}
    assert due("epoch", [4, 8, 12], 12, start=False) == {4, 8, 12}
