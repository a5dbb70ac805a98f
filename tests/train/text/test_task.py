"""Text runs on a tiny base: output, interruption at any step, and errors for invalid input."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forks import Forked
from tests.tiny_base import tiny_base_dir
from tests.train.stopping import interrupt_at
from tests.train.text.tiny_runs import TENSORS, train, values_of, write_rows
from veneer.core.attach import attach
from veneer.errors import AdapterError, CheckpointError, Interrupted, NoGain, PreflightError, TrainingError
from veneer.files.safetensors import read_tensors
from veneer.formats import peft
from veneer.formats.card import read_card
from veneer.models.text.base import TextBase, load_text
from veneer.train import checkpoint, loop
from veneer.train.config.load import config_from
from veneer.train.events import Checked, Evaluated, Event, Note, Probed, Resolved, Saved, Stepped
from veneer.train.report.log import read_log
from veneer.train.text import task as run
from veneer.train.text.batches import Batch
from veneer.train.text.save import RunResult
from veneer.train.text.task import run_text

ROOT = Path(__file__).resolve().parents[3]

Whole = tuple[Path, RunResult, list[Event]]


@pytest.fixture(scope="module")
def whole(shared: Path, base: TextBase) -> Whole:
    """Return one uninterrupted run; many tests share it."""
    events: list[Event] = []
    result = train(shared, shared / "whole", base, on_event=events.append)
    return shared / "whole", result, events


def test_run_learns_and_reports_its_result(whole: Whole) -> None:
    _, result, events = whole
    assert result.steps == 10
    assert result.validation < result.validation_before
    steps = [e for e in events if isinstance(e, Stepped)]
    assert [e.step for e in steps] == list(range(1, 11))
    assert result.tokens == sum(e.tokens for e in steps)
    assert result.learned_tokens == sum(e.learned_tokens for e in steps)
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 50e6
    keys = "adapter digest steps tokens learned_tokens tokens_per_second peak_memory_bytes loss validation"
    expected = set(keys.split())
    assert expected <= result.to_dict().keys()
    json.dumps(result.to_dict(), allow_nan=False)
    assert [e.step for e in events if isinstance(e, Evaluated)] == [0, 4, 8, 10]
    assert {3, 6, 9, 10} <= {e.step for e in events if isinstance(e, Saved)}


def test_events_are_in_the_documented_order(whole: Whole) -> None:
    kinds = [type(e) for e in whole[2]]
    order = [Resolved, Checked, Probed, Evaluated, Stepped]
    assert sorted(kinds.index(k) for k in order) == [kinds.index(k) for k in order]
    resolved = next(e for e in whole[2] if isinstance(e, Resolved))
    assert resolved.settings["base.dtype"] == "float32"
    assert "float32" in resolved.sources["base.dtype"]
    assert resolved.settings["memory.activation_checkpointing"] == "off"
    assert "GB free" in resolved.sources["memory.activation_checkpointing"]
    assert set(resolved.settings) == set(resolved.sources)


def test_output_folder_contains_adapter_card_log_and_report(whole: Whole, base: TextBase) -> None:
    folder, result, _ = whole
    card = read_card(folder)
    assert card.digest == result.digest == peft.read_folder(folder, base.model).digest()
    assert card.card.base_fingerprint == base.fingerprint
    assert card.card.data_digest.startswith("sha256:")
    assert card.card.recipe["optimizer"]["learning_rate"] == 3e-3
    assert card.card.metrics["validation_loss"] == result.validation
    assert str(folder) not in json.dumps(card.card.recipe)
    assert len([r for r in read_log(folder / "log.jsonl") if r["event"] == "stepped"]) == 10
    page = (folder / "report.html").read_text()
    for piece in (result.digest, base.fingerprint, "loraplus_ratio", "<svg", "veneer generate"):
        assert piece in page
    assert {p.name for p in (folder / "checkpoints").iterdir()} <= {f"step-{n:08d}" for n in range(11)}


def test_base_and_random_state_are_restored(shared: Path, tmp_path: Path) -> None:
    own = load_text(str(shared / "tiny-base"))
    before = {name: t.clone() for name, t in own.model.state_dict().items()}
    random_before, python_before = torch.get_rng_state(), random.getstate()
    train(shared, tmp_path / "out", own)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert random.getstate() == python_before
    assert not own.model.training
    after = own.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    attach(own.model).detach()  # `attach` raises if an adapter is still attached


def test_the_same_run_twice_gives_the_same_bytes(whole: Whole, shared: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # the caller's random state has no effect
    again = train(shared, tmp_path / "again")
    assert again.digest == whole[1].digest
    for name in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (whole[0] / name).read_bytes()


DONE = ("stepped", "evaluated")
KILL = """
import os, shutil, signal, sys
from pathlib import Path
from tests.forks import expect, fork
from tests.train.text.tiny_runs import train

def killed(limit):
    calls = 0
    def killing(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped
    os.fsync, os.rename, shutil.rmtree = killing(os.fsync), killing(os.rename), killing(shutil.rmtree)
    train(Path(sys.argv[1]), Path(sys.argv[2]), resume=True)

for limit in sys.argv[3:]:
    expect(fork(lambda: killed(int(limit))), killed=True)
    found = os.listdir(sys.argv[2])
    assert "checkpoints" in found and "adapter_model.safetensors" not in found, found
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_and_resumed_bytes_are_equal(whole: Whole, shared: Path, base: TextBase, tmp_path: Path) -> None:
    """The run uses dropout. It is killed twice while it saves a checkpoint, then before and during the removal of
    old checkpoints."""
    output = tmp_path / "killed"
    command, log = ["-c", KILL, str(shared), str(output), "16", "9", "23", "27"], tmp_path / "log"
    assert Forked(command, env=os.environ, log=log, cwd=ROOT).wait(120) == 0, log.read_text()
    events: list[Event] = []
    result = train(shared, output, base, resume=True, on_event=events.append)
    first = next(e.step for e in events if isinstance(e, Stepped))
    assert first > 1
    assert any(isinstance(e, Note) and "resuming after step" in e.text for e in events)
    for name in (TENSORS, "adapter_config.json"):
        assert (output / name).read_bytes() == (whole[0] / name).read_bytes()
    assert (result.digest, result.tokens, result.loss) == (whole[1].digest, whole[1].tokens, whole[1].loss)
    logged, whole_log = (
        [(r["event"], r["step"], r.get("loss")) for r in read_log(folder / "log.jsonl") if r["event"] in DONE]
        for folder in (output, whole[0])
    )
    assert logged == whole_log
    assert not list((output / "checkpoints").glob(".*"))


def test_interrupted_runs_resume_exactly(whole: Whole, shared: Path, base: TextBase, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    with pytest.raises(Interrupted) as error:
        train(shared, output, base, on_event=interrupt_at(5))
    assert error.value.exit_code == 130
    assert "after step 5 of 10" in error.value.what
    assert "--resume" in str(error.value.fix)
    assert not (output / TENSORS).exists()
    assert checkpoint.latest(output / "checkpoints") == output / "checkpoints" / "step-00000005"
    train(shared, output, base, resume=True)
    assert (output / TENSORS).read_bytes() == (whole[0] / TENSORS).read_bytes()


def test_resuming_with_other_micro_batches_is_reported(shared: Path, base: TextBase, tmp_path: Path) -> None:
    """The size of micro-batches can depend on the device's free memory, which can change between runs."""
    events: list[Event] = []
    short = {"schedule": {"steps": 2}, "evaluation": {"every": 2}}
    with pytest.raises(Interrupted):
        train(shared, tmp_path / "cut", base, on_event=interrupt_at(1), **short)
    train(shared, tmp_path / "cut", base, resume=True, on_event=events.append, batching={"micro_tokens": 64}, **short)
    assert Note("tokens of a micro-batch was 2048 and is 64: results can differ in the last bits") in events


def test_prefetched_batches_give_the_same_bytes(
    whole: Whole, shared: Path, base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefetches as on a GPU, with the CPU as the device."""
    threads: set[str] = set()

    def send(batch: Batch) -> Batch:
        threads.add(threading.current_thread().name)
        return batch.sent(base.device)

    monkeypatch.setattr(run, "sender", lambda device: send)
    output = tmp_path / "ahead"
    with pytest.raises(Interrupted):
        train(shared, output, base, on_event=interrupt_at(5))
    train(shared, output, base, resume=True)
    assert (output / TENSORS).read_bytes() == (whole[0] / TENSORS).read_bytes()
    assert threads == {"next batch_0"}


def test_resuming_a_finished_run_changes_nothing(whole: Whole, shared: Path, base: TextBase, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(whole[0], output)
    result = train(shared, output, base, resume=True)
    assert (output / TENSORS).read_bytes() == (whole[0] / TENSORS).read_bytes()
    assert result.validation == whole[1].validation
    logged = [r["step"] for r in read_log(output / "log.jsonl") if r["event"] == "stepped"]
    assert logged == list(range(1, 11))


def test_resuming_without_a_checkpoint_starts_and_reports_it(shared: Path, base: TextBase, tmp_path: Path) -> None:
    events: list[Event] = []
    result = train(shared, tmp_path / "new", base, resume=True, on_event=events.append, schedule={"steps": 2})
    assert result.steps == 2
    assert any(isinstance(e, Note) and "starts from its beginning" in e.text for e in events)


def test_resuming_with_other_settings_is_refused(whole: Whole, shared: Path, base: TextBase, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(whole[0], output)
    with pytest.raises(PreflightError, match=r"adapter\.rank: 4 in the checkpoint, 8 now"):
        train(shared, output, base, resume=True, adapter={"rank": 8})
    other = tmp_path / "other.jsonl"
    other.write_text((shared / "rows.jsonl").read_text().replace("printer", "scanner"))
    with pytest.raises(CheckpointError, match="training rows"):
        train(shared, output, base, resume=True, data={"train": str(other)})


def test_a_dry_run_checks_everything_and_writes_nothing(shared: Path, base: TextBase, tmp_path: Path) -> None:
    events: list[Event] = []
    result = train(shared, tmp_path / "dry", base, dry_run=True, on_event=events.append)
    assert not (tmp_path / "dry").exists()
    assert result.dry_run
    assert result.steps == 10
    assert result.preflight["ok"]
    assert any(isinstance(e, Probed) for e in events)
    assert not any(isinstance(e, Stepped) for e in events)
    assert result.to_dict()["preflight"]["findings"]


@pytest.mark.parametrize(("keep", "kept_step", "loss"), [("best", 3, 3.0), ("last", 6, 3.1)])
def test_best_or_last_state_is_saved(
    shared: Path,
    base: TextBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: str,
    kept_step: int,
    loss: float,
) -> None:
    """The validation loss is lowest after step 3. After three worse evaluations, the run stops and saves the
    state of step 3, or of step 6 with `evaluation.keep: last`."""
    losses = iter([9.0, 5.0, 4.0, 3.0, 3.5, 3.25, 3.1, 1.0])
    monkeypatch.setattr(run, "score_examples", lambda *args, **options: loop.EvalResult(next(losses), 1, 1))
    events: list[Event] = []
    result = train(
        shared, tmp_path / "out", base, on_event=events.append, evaluation={"every": 1, "patience": 3, "keep": keep}
    )
    assert (result.stopped, result.steps) == ("early stopping", 6)
    assert (result.kept_step, result.validation, result.validation_before) == (kept_step, loss, 9.0)
    assert any(isinstance(e, Note) and "kept the adapter of step 3" in e.text for e in events) == (keep == "best")
    saved = peft.read_folder(tmp_path / "out", base.model)
    state, _ = read_tensors(tmp_path / "out" / "checkpoints" / f"step-{kept_step:08d}" / "adapter.safetensors")
    assert all(torch.equal(pair.A, state[f"{name}.A"]) for name, pair in saved.pairs.items())


@pytest.mark.parametrize(
    "adapter",
    [{"dora": True}, {"init": "pissa"}, {"init": "olora", "rslora": True}, {"modules_to_save": ["lm_head"]}],
    ids=["dora", "pissa", "olora", "full copy"],
)
def test_every_kind_of_adapter_is_saved(adapter: dict[str, Any], shared: Path, base: TextBase, tmp_path: Path) -> None:
    events: list[Event] = []
    train(shared, tmp_path / "out", base, adapter=adapter, schedule={"steps": 2}, on_event=events.append)
    sentence = next(e.text for e in events if isinstance(e, Note) and "read back" in e.text)
    assert "logits equal" in sentence
    if "init" not in adapter:
        assert "bit for bit" in sentence


def test_wrong_adapter_file_is_detected(
    shared: Path, base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.write_adapter

    def wrong(adapter: Any, folder: Path, base: TextBase) -> str:
        return real(adapter.mapped(lambda t: t * 1.01), folder, base)

    monkeypatch.setattr(run, "write_adapter", wrong)
    with pytest.raises(AdapterError, match="adapter's logits are not equal to"):
        train(shared, tmp_path / "out", base, schedule={"steps": 2})


def test_recomputation_starts_above_nine_tenths_of_memory(tmp_path: Path) -> None:
    # With two layers, only the first would save activations, because the last layer processes only the tokens
    # that count in the loss. So the test uses four layers.
    base = load_text(str(tiny_base_dir(tmp_path, num_hidden_layers=4)))
    write_rows(tmp_path / "rows.jsonl")
    needs = train(tmp_path, tmp_path / "out", base, dry_run=True).preflight["numbers"]
    between = (needs["memory_needed"] + needs["memory_checkpointed"]) / 2e9
    events: list[Event] = []
    train(tmp_path, tmp_path / "out", base, dry_run=True, on_event=events.append, memory={"limit_gb": between})
    resolved = next(e for e in events if isinstance(e, Resolved))
    assert resolved.settings["memory.activation_checkpointing"] == "on"
    assert "above 90%" in resolved.sources["memory.activation_checkpointing"]


def test_a_run_that_exceeds_memory_needs_force(shared: Path, base: TextBase, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="this run does not fit"):
        train(shared, tmp_path / "out", base, memory={"limit_gb": 0.01})
    assert not (tmp_path / "out").exists()
    assert train(shared, tmp_path / "out", base, memory={"limit_gb": 0.01}, force=True).steps > 0


def test_report_compares_results_with_the_plan(shared: Path, base: TextBase, tmp_path: Path) -> None:
    page = Path(train(shared, tmp_path / "out", base).report).read_text(encoding="utf-8")
    assert page.count(" predicted") >= 2
    assert "predicted_peak_bytes" in (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8")


# --- invalid input: a clear error, and no partial output --------------------------------------------------------------


def test_nan_losses_name_rows(shared: Path, base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = run.text_loss, 0

    def loss(*args: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return real(*args) * (float("nan") if calls == 14 else 1.0)

    monkeypatch.setattr(run, "text_loss", loss)
    output = tmp_path / "out"
    with pytest.raises(TrainingError) as error:
        train(shared, output, base)
    assert "rows.jsonl:" in str(error.value.where)
    assert not (output / TENSORS).exists()
    state = checkpoint.read_checkpoint(checkpoint.latest(output / "checkpoints"))  # type: ignore[arg-type]
    assert state["progress"]["step"] >= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_code_trains_saves_and_resumes_on_cuda(shared: Path, tmp_path: Path) -> None:
    """The loss is close to that of the CPU run, memory is measured on the device, and the run can resume."""
    on_cuda = {"name": str(shared / "tiny-base"), "device": "cuda", "dtype": "float32"}
    on_cpu = train(shared, tmp_path / "cpu", adapter={"dropout": 0.0})
    values = values_of(shared, tmp_path / "cuda", adapter={"dropout": 0.0}) | {"base": on_cuda}
    config, _ = config_from(values)

    with pytest.raises(Interrupted):
        run_text(config, on_event=interrupt_at(5))
    result = run_text(config, resume=True, on_event=lambda event: None)
    assert result.steps == 10
    assert result.loss == pytest.approx(on_cpu.loss, rel=1e-3)
    assert 0 < result.peak_memory_bytes < torch.cuda.get_device_properties(0).total_memory


def test_worse_runs_save_nothing(shared: Path, base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are those of a diverged run: 2.6 before training, and at best 9.1 after."""
    losses = iter([2.6, 9.1, 20.4])
    monkeypatch.setattr(run, "score_examples", lambda *args, **options: loop.EvalResult(next(losses), 1, 1))
    events: list[Event] = []
    evaluation = {"every": 5}
    with pytest.raises(NoGain, match=r"20\.4000 after step 10, 2\.6000 before training") as error:
        train(shared, tmp_path / "wild", base, on_event=events.append, evaluation=evaluation)
    assert error.value.exit_code == 3
    scored = [e for e in events if isinstance(e, Evaluated)]
    assert [(e.best, e.worse) for e in scored] == [(False, False), (False, True), (False, True)]
    assert not (tmp_path / "wild" / "adapter_model.safetensors").exists()
    assert (tmp_path / "wild" / "checkpoints").is_dir()
    # with the option that the error suggests, the adapter is saved
    notes: list[Event] = []
    result = train(
        shared, tmp_path / "wild", base, resume=True, on_event=notes.append, evaluation=evaluation | {"keep": "last"}
    )
    assert (result.validation_before, result.validation, result.kept_step) == (2.6, 20.4, 10)
    assert any(isinstance(e, Note) and "warning: validation loss" in e.text for e in notes)
    assert (tmp_path / "wild" / "adapter_model.safetensors").exists()
