"""`veneer plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run import run
from tests.tiny_base import tiny_base_dir

ONE_COMMAND = ["plan", "--base", "meta-llama/Llama-3.1-70B", "--gpu", "h100-80gb", "--rows", "5000"]
ONE_COMMAND += ["--tokens-per-row", "600", "--epochs", "3", "--price", "2.5"]
SMALL = ["plan", "--base", "smollm2-135m", "--rows", "5", "--tokens-per-row", "9"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_a_newcomer_gets_an_answer_with_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, *ONE_COMMAND)
    first = ran.out.splitlines()
    assert first[0].startswith("It does not fit")
    assert "base.quantize=nf4" in first[1]
    assert "at $2.5 an hour" in first[2]
    assert "adapters of" in ran.out


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    assert run(capsys, *ONE_COMMAND).out in page


def test_json_and_text_agree(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, *ONE_COMMAND, "--json").out)
    assert f"${found['cost']:,.2f}" in run(capsys, *ONE_COMMAND).out


def test_image_bases_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "plan", "--base", "flux.1-dev", "--gpu", "rtx-4090", "--rows", "20", "--epochs", "35")
    assert "recompute activations and a 4-bit base" in ran.out
    small = run(capsys, "plan", "--base", "sdxl", "--gpu", "rtx-4090", "--rows", "20", "--size", "512")
    assert small.out.startswith("It fits")


def test_a_configuration_is_planned_from_its_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = tiny_base_dir(tmp_path)
    rows = [{"messages": [{"role": "user", "content": "hi " * 40}, {"role": "assistant", "content": "yes"}]}] * 12
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = f"base: {base}\ndata: {{train: d.jsonl}}\noutput: out\nbatching: {{rows: 4}}\n"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    found = json.loads(run(capsys, "plan", str(tmp_path / "c.yaml"), "schedule.epochs=2", "--json").out)
    assert found["steps"] == 6
    assert "estimated as one per 4 characters" in found["facts"]["note"]
    exact = run(capsys, "plan", str(tmp_path / "c.yaml"), "--rows", "100", "--tokens-per-row", "50", "--json").out
    assert json.loads(exact)["tokens"] == 3 * 100 * 50


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["plan"], "nothing to plan"),
        (["plan", "--base", "smollm2-135m"], "a plan needs --rows"),
        (["plan", "--base", "smollm2-135m", "--rows", "5"], "needs --tokens-per-row"),
        (["plan", "--base", "meta-llama/Llama-3.1-7B", "--rows", "5"], "no base 'meta-llama/Llama-3.1-7B'"),
        ([*SMALL, "--size", "512"], "data.resolution"),
        (["plan", "--base", "sdxl", "--gpu", "rtx-4091", "--rows", "5"], "no GPU 'rtx-4091'"),
        ([*SMALL, "--gpu", ""], "no GPU ''"),
        ([*SMALL, "--quantize", "nf5"], "nf5"),
        ([*SMALL, "--dtype", "float61"], "float61"),
        ([*SMALL, "--gpus", "2"], "--gpus: the plan is for this machine's processor"),
        (["plan", "--base", "./nowhere", "--rows", "5"], "there is no ./nowhere"),
        (["plan", "--base", ".", "--rows", "5"], "there is no config.json in ."),
        (["plan", "--base", "", "--rows", "5"], "no base '' is in the table"),
    ],
)
def test_missing_and_unknown_options_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    _, out, err = run(capsys, *arguments, code=2)
    assert (out, error in err) == ("", True)


@pytest.mark.parametrize(
    ("option", "setting"), [("--rank=64", "adapter.rank=64"), ("--dtype=float32", "base.dtype=float32")]
)
def test_options_equal_their_settings(capsys: pytest.CaptureFixture[str], option: str, setting: str) -> None:
    gpu = ["--gpu", "h100-80gb"]
    assert (
        run(capsys, *SMALL, *gpu, option).out == run(capsys, *SMALL, *gpu, setting).out != run(capsys, *SMALL, *gpu).out
    )


def test_the_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "plan", "--list")
    assert "h100-80gb" in ran.out
    assert "meta-llama/Llama-3.1-405B" in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "catalogue-flux", "--rows", "9", "--tokens-per-row", "90"], "--tokens-per-row: no effect"),
        (["--base", "smollm2-135m", "--rows", "9", "--tokens-per-row", "90", "--before", "1"], "--before: no effect"),
    ],
)
def test_options_without_effect_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run(capsys, "plan", *arguments, code=2).err
