"""`veneer train`: the JSON object, the dry run, Ctrl-C, and errors."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.cli.run import run
from tests.forks import Forked
from tests.tiny_base import tiny_base_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny_base_dir(folder)
    rows = [{"prompt": f"Where is parcel {i}?", "completion": f"Shelf {i % 7}."} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "run.yaml").write_text(
        "base: ./tiny-base\ndata: {train: rows.jsonl, split: 4}\noutput: out\nbatching: {rows: 4}\n"
        "schedule: {steps: 4}\nadapter: {rank: 2}\n"
    )
    return folder / "run.yaml"


def test_stdout_has_only_the_json(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, "train", str(config), f"output={tmp_path / 'out'}", "adapter.rank=3", "--json")
    result = json.loads(out)
    assert result["adapter"] == str(tmp_path / "out")
    assert result["steps"] == 4
    for key in ("digest", "tokens", "learned_tokens", "tokens_per_second", "peak_memory_bytes", "loss", "validation"):
        assert result[key], key
    assert re.search(r"adapter\.rank +3 +override `adapter\.rank=3`", err)
    assert re.search(r"output\.directory .*override", err)
    assert "step 4/4" in err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


def test_options_and_settings_train_without_a_file(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "desk.jsonl").write_text((config.parent / "rows.jsonl").read_text())
    base = ("--base", str(config.parent / "tiny-base"))
    given = ("--data", "desk.jsonl", "--rank", "3", "--steps", "2", "batching.rows=4")
    result = json.loads(run(capsys, "train", *base, *given, "--json").out)
    assert (result["steps"], Path(result["adapter"]).resolve()) == (2, tmp_path / "runs" / "desk")
    assert json.loads((tmp_path / "runs" / "desk" / "adapter_config.json").read_text())["r"] == 3
    assert "data.train" in run(capsys, "train", *base, code=2).err


def test_text_output_lists_the_locations(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, "train", str(config), f"output={tmp_path / 'out'}")
    assert out == ""
    assert str(tmp_path / "out" / "report.html") in err
    assert "veneer generate" in err


def test_a_dry_run_writes_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, "train", str(config), f"output={tmp_path / 'out'}", "--dry-run", "--json")
    assert json.loads(out)["preflight"]["ok"]
    assert "Checks before step one" in err
    assert "longest batch" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lerning_rate=1"], "optimizer.learning_rate"),
        (["base=no-such-base"], "no-such-base"),
        (["data.train=nothing.jsonl"], "nothing.jsonl"),
        (["adapter.targets=[q_prj]"], "q_proj"),
    ],
    ids=["misspelt", "base", "data", "target"],
)
def test_a_mistake_prints_one_error_and_exits_with_2(
    arguments: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = run(capsys, "train", str(config), f"output={tmp_path / 'out'}", *arguments, code=2).err
    assert message in err
    assert "error:" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_misspelled_key_names_the_nearest_and_its_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = config.with_name("wrong.yaml")
    wrong.write_text(config.read_text().replace("schedule: {steps: 4}", "schedule:\n  stepz: 4"))
    err = run(capsys, "train", str(wrong), f"output={tmp_path / 'out'}", code=2).err
    assert "stepz" in err
    assert "schedule.steps" in err
    assert "wrong.yaml:6" in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_exits_130_with_the_resume_command(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "with space"
    command = ["train", str(config), f"output={output}", "schedule.steps=4000", "evaluation.every=4000"]
    code = "import sys; from veneer.cli.main import main; main(sys.argv[1:])"
    run = Forked(["-c", code, *command], env=os.environ, log=tmp_path / "log", cwd=ROOT)
    log, until = output / "log.jsonl", time.monotonic() + 60
    while time.monotonic() < until and (not log.exists() or '"stepped"' not in log.read_text()):
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    ended, err = run.wait(60), (tmp_path / "log").read_text()
    assert ended == 130, err
    assert "Traceback" not in err
    assert "the state is saved" in err
    assert re.search(r"veneer train \S+run\.yaml 'output=.*with space' .*--resume", err)
    assert list((output / "checkpoints").glob("step-*"))
    assert not (output / "adapter_model.safetensors").exists()


def test_processes_of_another_launcher_are_not_restarted(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes were started already" in run(capsys, "train", str(config), "--devices", "2", code=2).err


def test_several_configurations_are_trained_in_one_pass(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run follows its own file; overrides apply to all runs.

    A run that cannot start is reported and sets the exit code."""
    files = []
    for name, rank, data in (("a", 2, "rows.jsonl"), ("b", 3, "rows.jsonl"), ("bad", 2, "nothing.jsonl")):
        text = (
            config.read_text().replace("output: out", f"output: {tmp_path / name}").replace("rank: 2", f"rank: {rank}")
        )
        files.append(config.parent / f"{name}.yaml")
        files[-1].write_text(text.replace("rows.jsonl", data))
    words = [*map(str, files), "schedule.steps=2"]
    _, out, err = run(capsys, "train", *words, "--json", code=2)
    runs = json.loads(out)["runs"]
    assert [run["config"] for run in runs] == [str(file) for file in files]
    assert [run.get("steps") for run in runs] == [2, 2, None]
    assert "nothing.jsonl" in runs[2]["error"] + str(runs[2]["where"])
    assert f"error: {files[2]}: " in err
    assert f"{files[0]}: step 2/2" in err
    for name, rank in (("a", 2), ("b", 3)):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == rank
    assert "one process" in run(capsys, "train", *words[:2], "--devices", "2", code=2).err
