"""One run trained by several processes: losses, adapter and result equal those of one process, replicated
or sharded.

Uses two gloo processes on the CPU. Two processes add numbers in a different order than one, so float32 losses
agree to 1e-5 relative, and adapters to 1e-5 of their largest entry after ten steps of AdamW.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.shared_runs import FAILS, ONE_ROW, PICTURES, SHARDED, numbers, preferences
from tests.train.text.tiny_runs import TENSORS, train, values_of, with_rows
from tests.train.tiny_pictures import run as train_pictures
from veneer.errors import ConfigError
from veneer.files.safetensors import read_tensors
from veneer.train import checkpoint, devices
from veneer.train.config.load import config_from
from veneer.train.devices import ALONE, Devices, balance, digest_of, launch
from veneer.train.events import Event
from veneer.train.preflight import RunSubject, check_devices
from veneer.train.report.log import read_log

ROOT = Path(__file__).resolve().parents[2]
SIZES = st.lists(st.integers(1, 500), max_size=40)


# --- distribution of work ---------------------------------------------------------------------------------------------


@given(SIZES, st.integers(1, 9))
def test_work_is_distributed_completely_and_evenly(sizes: list[int], count: int) -> None:
    hands = balance(sizes, count)
    assert sorted(index for hand in hands for index in hand) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes, default=0)  # Graham's bound for longest-first scheduling
    dealt = [Devices(rank, count).deal(sizes) for rank in range(count)]
    assert [[index for index, counts in hand if counts] for hand in dealt] == hands


@given(SIZES, st.integers(1, 9))
def test_lockstep_gives_equal_numbers_and_counts_each_item_once(sizes: list[int], count: int) -> None:
    dealt = [Devices(rank, count, lockstep=True).deal(sizes) for rank in range(count)]
    assert len({len(hand) for hand in dealt}) == 1
    assert sorted(i for hand in dealt for i, counts in hand if counts) == list(range(len(sizes)))


def test_one_process_needs_no_distributed_torch(tmp_path: Path) -> None:
    assert ALONE.deal([3, 9, 9, 1]) == [(0, True), (1, True), (2, True), (3, True)]
    assert ALONE.gather("x") == ["x"]
    code = (
        "import sys; from veneer.train.devices import joined\n"
        "with joined('cpu') as d: d.agree('x', 'y'); d.gather(1); assert d.first and d.device == 'cpu'\n"
        "assert not __import__('torch').distributed.is_initialized()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_digest_depends_on_names_bits_and_shapes() -> None:
    a = {"x": torch.zeros(2, 3), "y": torch.ones(2)}
    seen = {digest_of(a), digest_of({**a, "x": torch.zeros(3, 2)}), digest_of({**a, "y": torch.ones(2).double()})}
    seen |= {digest_of({**a, "x": -torch.zeros(2, 3)}), digest_of({"x": a["x"], "z": a["y"]}), digest_of(a, 1)}
    assert len(seen) == 6
    assert digest_of(dict(reversed(a.items()))) == digest_of(a)


@pytest.mark.parametrize(
    ("count", "shard", "level", "said"),
    [
        (2, False, "ok", "2 devices share the micro-batches of each step; each device holds the full base"),
        (2, True, "ok", "each device holds a part of the frozen weights"),
        (1, True, "warn", "this run has one"),
    ],
)
def test_preflight_reports_distribution_over_devices(count: int, shard: bool, level: str, said: str) -> None:
    values = {"base": "b", "data": {"train": "t"}, "output": "o", "memory": {"shard": shard}}
    (found,) = check_devices(RunSubject(base=None, config=config_from(values)[0], devices=count))
    assert found.level == level
    assert said in found.text


# --- runs of two processes ----------------------------------------------------------------------------------------


class Runs:
    """Results by name of the run.

    `one`: from a single process. `two`: from each of two processes. `ended`: exit code of the last run, whose
    second process is killed. `said`: output of that run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.one: dict[str, dict[str, Any]] = {}
        self.two: list[dict[str, Any]] = []
        self.ended = 0
        self.said = ""

    def alone(self, name: str, act: Any, output: str, **sections: Any) -> None:
        events: list[Event] = []
        result = act(self.folder, self.folder / output, on_event=events.append, **sections)
        self.one[name] = {**numbers(events), "digest": result.digest, "output": output}

    def tensors(self, output: str) -> dict[str, torch.Tensor]:
        return read_tensors(next((self.folder / output).glob("*.safetensors")))[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("devices")
    runs = Runs(with_rows(folder))
    runs.alone("two", train, "one", **ONE_ROW, checkpoint={"every": 3, "keep": 9})
    runs.alone("idle", train, "one-idle", batching={"rows": 1}, schedule={"steps": 4})
    for name, sections in SHARDED.items():
        memory = {"activation_checkpointing": "off"}
        runs.alone(name, train, f"one-{name}", **{**sections, "memory": memory})
    write_pairs(folder / "pairs.jsonl")
    for name, sections in preferences(folder).items():
        runs.alone(name, train, f"one-{name}", **{**sections, "memory": {"activation_checkpointing": "off"}})
    runs.alone("pictures", train_pictures, "one-pictures", **PICTURES)
    (folder / "killed.json").write_text(json.dumps(values_of(folder, folder / "killed", **ONE_ROW)))
    with printed_to(folder / "printed"):
        runs.ended = launch(2, [sys.executable, "-m", "tests.train.shared_runs", str(folder)])
    before, *_, runs.said = (folder / "printed").read_text().rpartition(f"{FAILS}\n")
    assert before.count(FAILS) == 1, runs.said
    runs.two = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]
    return runs


@contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Redirect stderr of this process and of its children to a file."""
    with path.open("a") as file, redirect_stderr(file):
        own = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)


def write_pairs(path: Path) -> None:
    with path.open("w") as file:
        for i in range(20):
            prompt = f"The printer number {i} {'still ' * (i % 4)}does not work."
            pair = {
                "prompt": prompt,
                "chosen": "Thank you, we look at it.",
                "rejected": f"Try again{' later' * (i % 3)}.",
            }
            file.write(json.dumps(pair) + "\n")


def same_adapter(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=1e-5 * max(1.0, float(tensor.abs().max())))


@pytest.mark.parametrize("name", ["two", "idle", *SHARDED, "dpo", "dpo-shard", "kto-shard", "pictures"])
def test_two_processes_train_like_one(name: str, runs: Runs) -> None:
    """The runs cover dropout, an idle process, sharding, recomputed DoRA, full copies, preferences, and
    pictures."""
    one, two = runs.one[name], runs.two[0][name]
    for mine, other in zip(one["extra"], two["extra"], strict=True):
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-5)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert two["tokens"] == one["tokens"]
    for (loss, rows, trained, extra), (l2, r2, t2, e2) in zip(one["validation"], two["validation"], strict=True):
        assert (r2, t2) == (rows, trained)
        assert l2 == pytest.approx(loss, rel=1e-5)
        assert e2 == pytest.approx(extra, rel=1e-4)
    same_adapter(runs.tensors(one["output"]), runs.tensors(name))


def test_only_the_first_process_reports(runs: Runs) -> None:
    first, second = runs.two
    for name in ("two", "idle", *SHARDED, "pictures"):
        assert first[name]["heard"] > 5
        assert second[name]["heard"] == 0
        assert first[name]["digest"] == second[name]["digest"] != ""
    assert any("logits equal bit for bit" in note for note in first["shard"]["notes"])


def test_resuming_on_equal_devices_is_bit_for_bit(runs: Runs) -> None:
    assert (runs.folder / "two-then-two" / TENSORS).read_bytes() == (runs.folder / "two" / TENSORS).read_bytes()
    logged = [r["step"] for r in read_log(runs.folder / "two-then-two" / "log.jsonl") if r["event"] == "stepped"]
    assert logged == list(range(1, 11))


def test_resuming_on_other_devices_differs_only_by_rounding(runs: Runs, tmp_path: Path) -> None:
    same_adapter(runs.tensors("two"), runs.tensors("one-then-two"))
    notes = runs.two[0]["one-then-two"]["notes"]
    assert any("devices was 1 and is 2" in note for note in notes)
    assert any("resuming after step 6" in note for note in notes)
    result = train(
        runs.folder, runs.folder / "stopped", resume=True, **ONE_ROW
    )  # two processes started this run, one finishes it
    assert result.steps == 10
    same_adapter(runs.tensors("one"), runs.tensors("stopped"))


def test_each_process_stores_its_shard_of_the_weights(runs: Runs) -> None:
    for seen in runs.two:
        whole, part = seen["shard"]["held"][-2:]
        assert part == pytest.approx(whole / 2, rel=0.02)
    notes = runs.two[0]
    for name in ("shard", "shard-nf4", "shard-int8", "dpo-shard"):
        assert any("after reading" in note for note in notes[name]["notes"])
    for name in ("shard-dora", "shard-whole"):
        assert any("each process reads all weights, because" in note for note in notes[name]["notes"])


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_base_uses_the_same_fast_paths(name: str, runs: Runs) -> None:
    def ways(seen: dict[str, Any]) -> str:
        (note,) = [note for note in seen[name]["notes"] if note.startswith("fast paths: ")]
        return str(note)

    assert ways(runs.two[0]) == ways(runs.one)
    assert "LlamaMLP" in ways(runs.one)
    assert "last layer only at trained tokens" in ways(runs.one)


def test_a_non_finite_loss_ends_both_processes_once(runs: Runs) -> None:
    found = [seen["not-finite"] for seen in runs.two]
    assert {f["kind"] for f in found} == {"TrainingError"}
    assert found[0]["what"] == found[1]["what"]
    assert "rows.jsonl:" in found[0]["where"]
    assert sorted(f["told"] for f in found) == [False, True]
    assert not (runs.folder / "not-finite" / TENSORS).exists()


def test_signal_to_one_process_stops_and_saves_both(runs: Runs) -> None:
    found = [seen["stopped"] for seen in runs.two]
    assert {f["kind"] for f in found} == {"Interrupted"}
    assert {f["code"] for f in found} == {143}  # both report the signal, no matter which received it
    assert found[0]["what"] == found[1]["what"]
    assert sorted(f["told"] for f in found) == [False, True]
    assert checkpoint.latest(runs.folder / "stopped" / "checkpoints") is not None
    assert "after step" in found[0]["what"]


# --- launching --------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def stop(number, frame):
    print(f"{rank} was asked", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print(f"{rank} of {os.environ['WORLD_SIZE']} at {os.environ['LOCAL_RANK']}", flush=True)
if sys.argv[1] == "wait":
    if rank == 0:
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
sys.exit(int(sys.argv[1]) if rank == 1 else 0)
"""


def test_launch_returns_the_first_failure(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(3, [sys.executable, "-c", CHILD, "0"]) == 0
    said = capfd.readouterr().out
    assert sorted(said.splitlines()) == [f"{rank} of 3 at {rank}" for rank in range(3)]
    assert launch(2, [sys.executable, "-c", CHILD, "7"]) == 7


def test_signal_to_launcher_reaches_each_process_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, [sys.executable, "-c", CHILD, "wait"]) == 130
    said = capfd.readouterr().out
    assert (said.count("0 was asked"), said.count("1 was asked")) == (1, 1)


def test_hanging_processes_are_ended(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(devices, "PATIENCE", 0.3)
    code = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit(3)"
    assert launch(2, [sys.executable, "-c", code]) == 3
    assert "process 0 of 2 was ended by SIGTERM" in capfd.readouterr().err


def test_missing_devices_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.own_device("cpu", 5, 6) == "cpu"
    with pytest.raises(ConfigError, match="needs its own device"):
        devices.own_device("cuda:1", 0, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no CUDA device"):
        devices.own_device("cuda", 0, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes were started on a machine with 2"):
        devices.own_device("cuda", 3, 4)


# --- one of them fails --------------------------------------------------------------------------------------------

FAULT = "import sys; from tests.train.shared_runs import failing; failing(sys.argv[1], sys.argv[2:])"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(
    ("fault", "shard"),
    [
        ("kill", False),
        *(pytest.param(*f, marks=pytest.mark.slow) for f in (("error", False), ("error", True), ("kill", True))),
    ],
)
def test_a_failed_process_ends_all_with_one_message(
    fault: str, shard: bool, runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if (fault, shard) == ("kill", False):
        code, said, output = runs.ended, runs.said, runs.folder / "killed"
    else:
        output = tmp_path / "out"
        config = tmp_path / "config.json"
        config.write_text(json.dumps(values_of(runs.folder, output, **ONE_ROW)))
        command = [sys.executable, "-c", FAULT, fault, "train", str(config)]
        code = launch(2, [*command, "memory.shard=true"] if shard else command)
        said = capfd.readouterr().err
    assert code == 2
    assert said.count("error:") == 1, said
    assert "Traceback" not in said
    if fault == "kill":
        for words in ("another process of this run ended", "process 1 of 2 was ended by SIGKILL", "--resume"):
            assert words in said
    else:
        assert "out of memory on a batch of" in said
        assert "rows.jsonl:" in said
    assert not (output / TENSORS).exists()
