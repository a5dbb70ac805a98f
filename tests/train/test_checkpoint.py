"""Checkpoints are complete or absent, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from veneer.errors import CheckpointError, ResourceError
from veneer.ops.profile import profile, use_profile
from veneer.train import checkpoint
from veneer.train.checkpoint import Progress
from veneer.train.optim import make_optimizer

ROOT = Path(__file__).resolve().parents[2]


def _parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=g)) for name, shape in (("m.A", (2, 3)), ("m.B", (4, 2)))}


def _move(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=g)
    optimizer.step()


def _save(folder: Path, step: int, parameters: dict[str, nn.Parameter] | None = None, **options: Any) -> Path:
    parameters = parameters or _parameters()
    options = {"optimizer": make_optimizer(parameters, learning_rate=0.1), "identity": {}} | options
    progress = Progress(step=step, best_step=options.pop("best_step", None))
    return checkpoint.save(folder, parameters=parameters, progress=progress, **options)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_a_restored_run_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    a = _parameters()
    optimizer = make_optimizer(a, name=name, learning_rate=0.1, loraplus_ratio=3.0, weight_decay=0.1)
    _move(a, optimizer, 1)
    path = _save(tmp_path, 1, a, optimizer=optimizer)
    _move(a, optimizer, 2)

    b = _parameters(seed=9)
    other = make_optimizer(b, name=name, learning_rate=0.1, loraplus_ratio=3.0, weight_decay=0.1)
    restored = checkpoint.restore(path, parameters=b, optimizer=other, identity={})
    assert (restored.progress.step, restored.notes) == (1, [])
    _move(b, other, 2)
    for name_, p in a.items():
        assert torch.equal(p, b[name_])


def test_a_changed_environment_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = _parameters()
    optimizer = make_optimizer(a, learning_rate=0.1)
    path = _save(tmp_path, 1, a, optimizer=optimizer)
    monkeypatch.setattr(checkpoint, "processor_name", lambda: "another processor")
    (note,) = checkpoint.restore(path, parameters=a, optimizer=optimizer, identity={}).notes
    assert note.startswith("processor was ")
    assert note.endswith("'another processor': results can differ in the last bits")


def test_a_checkpoint_keeps_its_profile(tmp_path: Path) -> None:
    """A resume on a processor with other rates computes as the checkpoint's processor did."""
    here, notes = profile(), list[str]()
    there = replace(here, gflops={"float32": {"1x1x1": 311.0}, "bfloat16": {"1x1x1": 167.0}})
    with use_profile(there):
        path = _save(tmp_path, 1)
    assert here.arithmetic == "bfloat16"
    with checkpoint.machine_of(path, allow_other=False, note=notes.append):
        assert profile() == there
        assert profile().arithmetic == "float32"
    assert profile() == here
    assert notes == []


def test_an_implementation_that_is_missing_here_stops_a_resume(tmp_path: Path) -> None:
    there, notes = replace(profile(), bandwidth=1.0), list[str]()
    with use_profile(there):
        path = _save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    state["machine"]["ops"]["rms_norm"] = "newer"
    (path / "state.json").write_text(json.dumps(state))
    with (
        pytest.raises(CheckpointError, match=r"1 of the checkpoint's ops differently: rms_norm \(newer there") as error,
        checkpoint.machine_of(path, allow_other=False, note=notes.append),
    ):
        pytest.fail("the run began")
    assert "--allow-other-machine" in str(error.value.fix)
    with checkpoint.machine_of(path, allow_other=True, note=notes.append):
        assert profile() != there
    (note,) = notes
    assert "rms_norm (newer there" in note
    assert note.endswith("results differ in the last bits")


@pytest.mark.parametrize("content", ["{", "{}", '{"machine": {}}', '{"machine": {"profile": {}, "ops": {}}}'])
def test_a_checkpoint_without_a_profile_changes_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(content)
    with checkpoint.machine_of(tmp_path, allow_other=False, note=pytest.fail):
        assert profile().key == "tests"


def test_random_generators_are_restored() -> None:
    def draw() -> tuple[Any, ...]:
        return (torch.rand(3).tolist(), random.random(), random.gauss(0, 1))

    random.gauss(0, 1)  # gauss generates two values and caches the second
    state = checkpoint.rng_state()
    first = draw()
    checkpoint.rng_restore(state)
    assert draw() == first


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir", "write"])
def test_a_full_disk_keeps_the_last_checkpoint(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = _save(tmp_path, 1)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if function == "write":
            patch.setattr(checkpoint, "replace_file", full)
        elif function == "mkdir":
            patch.setattr(Path, "mkdir", full)
        else:
            patch.setattr(os, function, full)
        with pytest.raises(ResourceError, match="disk is full") as error:
            _save(tmp_path, 2)
    assert "--resume" in str(error.value.fix)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    checkpoint.read_checkpoint(good)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=2, best_step=1)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["1", "2", "3"]
    _save(tmp_path, 4, keep=2, best_step=4)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["1", "3", "4"]  # step 1 was best until step 3
    _save(tmp_path, 5, keep=2, best_step=4)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["4", "5"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000005"


def test_a_foreign_checkpoint_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    path = _save(tmp_path, 1, identity={"optimizer": {"learning_rate": 1e-4, "name": "adamw"}, "data": "abc"})
    parameters = _parameters(seed=4)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = make_optimizer(parameters, learning_rate=0.1)
    other = {"optimizer": {"learning_rate": 2e-4, "name": "adamw"}, "data": "abc"}
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(path, parameters=parameters, optimizer=optimizer, identity=other)
    assert "optimizer.learning_rate: 0.0001 in the checkpoint, 0.0002 now" in str(error.value)
    assert "data" not in error.value.what
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_refused_and_named(file: str, damage: str, tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    target = path / file
    content = bytearray(target.read_bytes())
    if damage == "gone":
        target.unlink()
    elif damage == "cut":
        target.write_bytes(content[: len(content) // 2])
    else:
        content[2 if file == "state.json" else -2] ^= 0xFF
        target.write_bytes(content)
    parameters = _parameters()
    optimizer = make_optimizer(parameters, learning_rate=0.1)
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(path, parameters=parameters, optimizer=optimizer, identity={})
    assert "step-00000001" in str(error.value)


@pytest.mark.parametrize("part", ["optimizer", "progress", "random"])
def test_refused_checkpoint_leaves_state_unchanged(part: str, tmp_path: Path) -> None:
    """The parameters, the optimizer and the random state stay unchanged, whichever part is invalid."""
    a = _parameters()
    optimizer = make_optimizer(a, learning_rate=0.1)
    _move(a, optimizer, 1)
    path = _save(tmp_path, 1, a, optimizer=optimizer)
    state = json.loads((path / "state.json").read_text())
    if part == "progress":
        state["progress"]["a field of later versions"] = 1
    elif part == "random":
        words = checkpoint.rng_state() | {"python": torch.tensor([99, 1], dtype=torch.int64)}
        save_file(words, path / "random.safetensors")
        state["files"]["random.safetensors"] = sha256((path / "random.safetensors").read_bytes()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))
    b = _parameters(seed=9)
    other = make_optimizer(b, name="sgd" if part == "optimizer" else "adamw", learning_rate=0.1)
    before = {name: p.detach().clone() for name, p in b.items()}
    drawn = checkpoint.rng_state()
    with pytest.raises(CheckpointError):
        checkpoint.restore(path, parameters=b, optimizer=other, identity={})
    assert all(torch.equal(before[name], p) for name, p in b.items())
    assert not other.state
    assert all(torch.equal(value, drawn[name]) for name, value in checkpoint.rng_state().items())


def test_other_parameters_are_listed(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    other = {"m.A": nn.Parameter(torch.zeros(2, 5)), "n.B": nn.Parameter(torch.zeros(1))}
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_parameters(path, other)
    for part in ("m.A", "(2, 3)", "(2, 5)", "m.B: not in the run", "n.B: not in the checkpoint"):
        assert part in error.value.what


def test_checkpoint_contains_no_pickle(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((path / "state.json").read_text())["progress"]["step"] == 1
