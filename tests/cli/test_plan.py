"""`veneer plan`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.run import run
from tests.tiny_base import tiny_base_dir

ONE_COMMAND = ["plan", "--base", "meta-llama/Llama-3.1-70B", "--gpu", "h100-80gb", "--rows", "5000"]
ONE_COMMAND += ["--tokens-per-row", "600", "--epochs", "3", "--price", "2.5"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_newcomer_gets_an_answer_with_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, *ONE_COMMAND)
    assert ran.code == 0
    first = ran.out.splitlines()
    assert first[0].startswith("It does not fit as given")
    assert "base.quantise=nf4" in first[1]
    assert "at $2.5 an hour" in first[2]
    assert "adapters of" in ran.out


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    assert run(capsys, *ONE_COMMAND).out in page


def test_json_and_text_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, *ONE_COMMAND, "--json").out)
    assert f"${found['cost']:,.2f}" in run(capsys, *ONE_COMMAND).out


def test_it_needs_neither_torch_nor_weights() -> None:
    code = (
        "import sys\nfrom veneer.cli.main import main\n"
        f"try:\n    main({ONE_COMMAND!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr


def test_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "plan", "--base", "flux.1-dev", "--gpu", "rtx-4090", "--rows", "20", "--epochs", "35")
    assert "recompute activations and a 4-bit base" in ran.out
    small = run(capsys, "plan", "--base", "sdxl", "--gpu", "rtx-4090", "--rows", "20", "--size", "512")
    assert small.out.startswith("It fits")


def test_a_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = tiny_base_dir(tmp_path)
    rows = [{"messages": [{"role": "user", "content": "hi " * 40}, {"role": "assistant", "content": "yes"}]}] * 12
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = f"base: {base}\ndata: {{train: d.jsonl}}\noutput: out\nbatching: {{rows: 4}}\n"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    found = json.loads(run(capsys, "plan", str(tmp_path / "c.yaml"), "schedule.epochs=2", "--json").out)
    assert found["steps"] == 6
    assert "guessed from characters" in found["facts"]["note"]
    exact = run(capsys, "plan", str(tmp_path / "c.yaml"), "--rows", "100", "--tokens-per-row", "50", "--json").out
    assert json.loads(exact)["tokens"] == 3 * 100 * 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan"], "nothing to plan"),
        (["plan", "--base", "smollm2-135m"], "a plan needs --rows"),
        (["plan", "--base", "smollm2-135m", "--rows", "5"], "needs --tokens-per-row"),
        (["plan", "--base", "meta-llama/Llama-3.1-7B", "--rows", "5"], "no base 'meta-llama/Llama-3.1-7B'"),
        (["plan", "c.yaml", "--rank", "8", "--epochs", "2"], "--epochs, --rank: the configuration says it"),
        (["plan", "--base", "sdxl", "--rows", "5", "--longest", "9"], "--longest: the base is for pictures"),
        (
            ["plan", "--base", "smollm2-135m", "--rows", "5", "--tokens-per-row", "9", "--size", "512"],
            "--size: the base is for text",
        ),
        (["plan", "--base", "sdxl", "--gpu", "rtx-4091", "--rows", "5"], "no GPU 'rtx-4091'"),
    ],
)
def test_what_is_missing_or_unknown_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    ran = run(capsys, *arguments)
    assert ran.code == 2
    assert said in ran.err


def test_the_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "plan", "--list")
    assert "h100-80gb" in ran.out
    assert "meta-llama/Llama-3.1-405B" in ran.out


def test_a_calibration_is_taken_kept_and_used(capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path) -> None:
    base = str(tiny_base_dir(tmp_path))
    ran = run(
        capsys, "plan", "--calibrate", "--base", base, "--dtype", "float32", "--rows", "10", "--tokens-per-row", "64"
    )
    assert ran.code == 0, ran.err
    assert "measured here with" in ran.out
    assert (home / "plan-calibration.json").is_file()
