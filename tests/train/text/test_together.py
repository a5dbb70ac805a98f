"""Runs trained in one pass of the base: each equals the run trained separately, even if others fail."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.train.text.tiny_runs import TENSORS, merged, values_of, with_rows
from veneer.errors import ConfigError, DataError, Interrupted, TrainingError, VeneerError
from veneer.files.safetensors import read_tensors
from veneer.models.text.base import TextBase
from veneer.train.config.load import config_from
from veneer.train.events import Event, Note, Stepped
from veneer.train.report.log import read_log
from veneer.train.text import together
from veneer.train.text.save import RunResult
from veneer.train.text.task import run_text
from veneer.train.text.together import run_texts

TOLERANCE = 1e-5
"""Tolerance relative to the largest entry, in float32, over ten steps."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with the tiny base, forty tickets, and twelve preference pairs."""
    folder = with_rows(tmp_path_factory.mktemp("together"))
    pairs = (
        {"prompt": f"The printer {i} is silent.", "chosen": "it", "rejected": "billing, I guess"} for i in range(12)
    )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


CUSTOMERS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {
        "adapter": {"rank": 8, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"], "dropout": 0.0},
        "optimizer": {"learning_rate": 1e-3, "loraplus_ratio": 4.0, "clip": 0.1}, "schedule": {"steps": 6},
        "seed": 5, "checkpoint": {"every": 4},
    },
    "c": {
        "adapter": {"rank": 3, "targets": ["o_proj", "gate_proj"], "rslora": True, "dropout": 0.1},
        "batching": {"rows": 1}, "data": {"limit": 30, "split": 0}, "optimizer": {"name": "sgd", "learning_rate": 0.5},
        "evaluation": {"every": "epoch"},
    },
    "d": {"adapter": {"rank": 2, "init": "pissa", "dropout": 0.0}, "schedule": {"steps": 9, "warmup": 3}},
    "dora": {"adapter": {"rank": 4, "dora": True}, "schedule": {"steps": 5}},
    "loha": {"adapter": {"rank": 2, "kind": "loha", "dropout": 0.0}, "schedule": {"steps": 4}},
}  # fmt: skip


def config_of(shared: Path, output: Path, *more: dict[str, Any]) -> Any:
    values = values_of(shared, output)
    for sections in more:
        values = merged(values, sections)
    return config_from(values)[0]


def train(
    shared: Path,
    place: Path,
    base: TextBase,
    customers: dict[str, dict[str, Any]],
    *,
    on_event: Callable[[str, Event], None] = lambda name, event: None,
    **options: Any,
) -> dict[str, RunResult | VeneerError]:
    """Train the runs in one pass, each in a folder with its name."""
    configs = [config_of(shared, place / name, own) for name, own in customers.items()]
    listeners = [lambda event, name=name: on_event(name, event) for name in customers]
    results = run_texts(configs, base=base, listeners=listeners, **options)
    return dict(zip(customers, results, strict=True))


@pytest.fixture(scope="module")
def alone(shared: Path, base: TextBase) -> Callable[[str], Path]:
    """Return a function that trains one customer separately and returns the run's folder."""

    def made(name: str) -> Path:
        output = shared / "alone" / name
        if not output.exists():
            run_text(config_of(shared, output, CUSTOMERS[name]), base=base, on_event=lambda event: None)
        return output

    return made


@pytest.fixture(scope="module")
def group(shared: Path, base: TextBase) -> tuple[Path, dict[str, RunResult | VeneerError], list[tuple[str, Event]]]:
    """Return the runs of all customers, trained in one pass; many tests share them."""
    events: list[tuple[str, Event]] = []
    results = train(shared, shared / "group", base, CUSTOMERS, on_event=lambda *event: events.append(event))
    return shared / "group", results, events


def assert_same(one: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    """Assert that two folders have equal adapters, each tensor within `tolerance` times its largest entry."""
    actual, expected = read_tensors(one / TENSORS)[0], read_tensors(other / TENSORS)[0]
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("name", CUSTOMERS)
def test_each_run_equals_its_separate_run(name: str, group: Any, alone: Callable[[str], Path]) -> None:
    root, results, _ = group
    assert isinstance(results[name], RunResult), results[name]
    assert_same(root / name, alone(name))
    numbers = []
    for folder in (root, alone(name).parent):
        events = [r for r in read_log(folder / name / "log.jsonl") if r["event"] in ("stepped", "evaluated")]
        numbers.append([(r["step"], r["loss"], r["extra"]["token_accuracy"]) for r in events])
    (steps, losses, accuracies), expected = (list(zip(*actual, strict=True)) for actual in numbers)
    assert steps == expected[0]
    assert losses == pytest.approx(expected[1], rel=1e-5)
    assert accuracies == pytest.approx(expected[2], abs=0.05)  # rounding can change one token
    assert name != "a" or len(set(accuracies)) > 1


def test_one_forward_pass_serves_all_mixes(
    shared: Path, base: TextBase, group: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of all runs share a pass; if they exceed a micro-batch, they use several passes."""
    notes = {name: [e.text for n, e in group[2] if n == name and isinstance(e, Note)] for name in CUSTOMERS}
    assert "4 runs in one pass of the base" in notes["a"]
    assert any("a separate pass" in note and "DoRA" in note for note in notes["dora"])
    assert any("a separate pass" in note and "more than pairs" in note for note in notes["loha"])
    assert not any("a separate pass" in note for name in "abcd" for note in notes[name])
    passes: list[list[int]] = []

    def counted(model: Any, ids: Any, lengths: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        passes.append(list(lengths))
        return rows_nll(model, ids, lengths, *args, **kwargs)

    rows_nll = together.rows_nll
    monkeypatch.setattr(together, "rows_nll", counted)
    short = {"batching": {"rows": 2, "micro_rows": 2}, "schedule": {"steps": 2}, "data": {"split": 0}}
    customers = {str(i): {**short, "seed": i} for i in range(3)}
    train(shared, tmp_path / "one", base, customers)
    assert [len(lengths) for lengths in passes] == [6, 6]
    several = [sum(lengths) for lengths in passes]
    passes.clear()
    narrow = {**short, "batching": {"rows": 2, "micro_tokens": min(several) * 2 // 3}}
    train(
        shared, tmp_path / "two", base, {name: {**own, **narrow, "seed": int(name)} for name, own in customers.items()}
    )
    assert len(passes) > 2
    assert max(map(sum, passes)) <= min(several) * 2 // 3
    for name in customers:
        assert_same(tmp_path / "two" / name, tmp_path / "one" / name)


def test_recomputed_activations(shared: Path, base: TextBase, alone: Callable[[str], Path], tmp_path: Path) -> None:
    """When a layer is recomputed, it gets the same dropout masks."""
    memory = {"memory": {"activation_checkpointing": "on"}}
    results = train(shared, tmp_path, base, {name: {**CUSTOMERS[name], **memory} for name in "ac"})
    assert all(isinstance(result, RunResult) for result in results.values())
    for name in "ac":
        assert_same(tmp_path / name, alone(name))


def test_preference_run_gets_its_own_pass(
    shared: Path, base: TextBase, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    data = {"train": str(shared / "pairs.jsonl"), "split": 0}
    dpo = {"data": data, "preference": {"loss": "dpo"}, "schedule": {"steps": 3}, "optimizer": {"learning_rate": 1e-3}}
    results = train(shared, tmp_path, base, {"dpo": dpo, "b": CUSTOMERS["b"]})
    assert all(isinstance(result, RunResult) for result in results.values()), results
    run_text(config_of(shared, tmp_path / "alone", dpo), base=base, on_event=lambda event: None)
    assert_same(tmp_path / "dpo", tmp_path / "alone")
    assert_same(tmp_path / "b", alone("b"))


def test_a_failed_run_spares_others(shared: Path, base: TextBase, alone: Callable[[str], Path], tmp_path: Path) -> None:
    """One run gets a non-finite loss, which puts NaN into shared tensors but must not reach other runs. Another
    run's data cannot be read."""
    wild = {"optimizer": {"name": "sgd", "learning_rate": 1e30, "clip": None}, "seed": 7, "evaluation": {"every": 50}}
    bad = {"data": {"train": str(shared / "nothing.jsonl")}}
    results = train(shared, tmp_path, base, {"a": CUSTOMERS["a"], "wild": wild, "bad": bad, "c": CUSTOMERS["c"]})
    error = results["wild"]
    assert isinstance(error, TrainingError)
    assert "not finite" in error.what
    assert "rows.jsonl" in str(error.where)
    assert isinstance(results["bad"], DataError)
    assert not (tmp_path / "bad").exists()
    for name in "ac":
        assert isinstance(results[name], RunResult)
        assert_same(tmp_path / name, alone(name))


class Killed(Exception):
    """Raised to simulate a killed process: no code of the run executes after it."""


FEW = {name: CUSTOMERS[name] for name in ("a", "b", "c", "dora")}


@pytest.fixture(scope="module")
def few(shared: Path, base: TextBase) -> Path:
    """Return the folder of uninterrupted runs with different lengths, checkpoints and evaluations."""
    train(shared, shared / "few", base, FEW)
    return shared / "few"


def bytes_of(place: Path) -> dict[str, bytes]:
    return {name: (place / name / TENSORS).read_bytes() for name in FEW}


@pytest.mark.parametrize(("who", "step"), [("a", 3), ("dora", 5), ("c", 10)])
def test_a_killed_group_resumes(who: str, step: int, shared: Path, base: TextBase, few: Path, tmp_path: Path) -> None:
    """Covers a group in which some runs have ended, and a step that only some runs have completed."""

    def kill(name: str, event: Event) -> None:
        if name == who and isinstance(event, Stepped) and event.step == step:
            raise Killed

    with pytest.raises(Killed):
        train(shared, tmp_path, base, FEW, on_event=kill)
    results = train(shared, tmp_path, base, FEW, resume=True)
    assert all(isinstance(result, RunResult) for result in results.values()), results
    assert bytes_of(tmp_path) == bytes_of(few)


def test_a_signal_stops_all_runs_and_they_resume(shared: Path, base: TextBase, few: Path, tmp_path: Path) -> None:
    events: list[tuple[str, Event]] = []

    def stop(name: str, event: Event) -> None:
        events.append((name, event))
        if name == "b" and isinstance(event, Stepped) and event.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="the state of 4 runs is saved"):  # dora is not evaluated yet
        train(shared, tmp_path, base, FEW, on_event=stop)
    last = {name: max(e.step for n, e in events if n == name and isinstance(e, Stepped)) for name in FEW}
    assert set(last.values()) == {5}
    train(shared, tmp_path, base, FEW, resume=True)
    assert bytes_of(tmp_path) == bytes_of(few)


def test_a_failed_run_stays_out_of_a_resumed_group(shared: Path, base: TextBase, tmp_path: Path) -> None:
    """In a resumed group, the failed run would change the last bits of the other runs. It can be resumed by
    itself, and a note says that it was part of a group."""
    sgd = {"optimizer": {"name": "sgd", "learning_rate": 0.01}, "schedule": {"steps": 8}, "evaluation": {"every": 50}}
    customers = {"a": {**CUSTOMERS["a"], "schedule": {"steps": 8}}, "b": sgd}

    def poison(name: str, event: Event) -> None:
        if name == "b" and isinstance(event, Stepped) and event.step == 4:
            raise TrainingError("made up")

    def kill(name: str, event: Event) -> None:
        poison(name, event)
        if name == "a" and isinstance(event, Stepped) and event.step == 7:
            raise Killed

    whole = train(shared, tmp_path / "whole", base, customers, on_event=poison)
    assert isinstance(whole["b"], TrainingError)
    with pytest.raises(Killed):
        train(shared, tmp_path / "killed", base, customers, on_event=kill)
    results = train(shared, tmp_path / "killed", base, customers, resume=True)
    assert isinstance(results["b"], VeneerError)
    assert "ended early, after step 3" in results["b"].what
    assert (tmp_path / "killed/a" / TENSORS).read_bytes() == (tmp_path / "whole/a" / TENSORS).read_bytes()
    notes: list[Event] = []
    run_text(config_of(shared, tmp_path / "killed/b", sgd), base=base, resume=True, on_event=notes.append)
    assert any("trained together with 1 other run up to this step" in e.text for e in notes if isinstance(e, Note))


def test_a_dry_run_tries_each_and_writes_nothing(shared: Path, base: TextBase, tmp_path: Path) -> None:
    results = train(shared, tmp_path, base, {name: CUSTOMERS[name] for name in "ab"}, dry_run=True)
    assert [result.steps for result in results.values() if isinstance(result, RunResult)] == [10, 6]
    assert not list(tmp_path.iterdir())


def test_incompatible_configurations_are_named_by_file_and_key(shared: Path, tmp_path: Path) -> None:
    one = config_of(shared, tmp_path / "a")
    other = config_of(shared, tmp_path / "a", {"memory": {"limit_gb": 3.0}})
    other = other.model_copy(update={"base": other.base.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(ConfigError) as error:
        run_texts([one, other], names=["one.yaml", "other.yaml"])
    assert "base.dtype: 'auto' in one.yaml, 'bfloat16' in other.yaml" in error.value.what
    assert "memory.limit_gb: None in one.yaml, 3.0 in other.yaml" in error.value.what
    assert "output.directory" in error.value.what
