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
SMALL = ["plan", "--base", "smollm2-135m", "--rows", "5", "--tokens-per-row", "9"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_newcomer_gets_an_answer_with_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, *ONE_COMMAND)
    assert ran.code == 0
    first = ran.out.splitlines()
    assert first[0].startswith("It does not fit as given")
    assert "base.quantize=nf4" in first[1]
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
        ([*SMALL, "--gpu", ""], "no GPU ''"),
        ([*SMALL, "--quantize", "nf5"], "'nf5' is not a quantization"),
        ([*SMALL, "--quantize", "keep"], "'keep' is not a quantization"),
        ([*SMALL, "--dtype", "float61"], "'float61' is not a precision"),
        ([*SMALL, "--gpus", "2"], "--gpus: the plan is for this machine's processor"),
        ([*SMALL, "--price", "3"], "--price: the plan is for this machine's processor"),
        ([*SMALL, "--longest", "5"], "the longest row has 5 tokens, and rows have 9 on average"),
        ([*SMALL, "--longest", "99999999999"], "--longest"),
        ([*SMALL, "--epochs", "inf"], "inf is not a finite number"),
        ([*SMALL, "--epochs", "nan"], "--epochs"),
        ([*SMALL, "base.dtype=float32"], "base.dtype=float32 changes a configuration, and there is none"),
        (["plan", "--base", "./nowhere", "--rows", "5"], "there is no ./nowhere"),
        (["plan", "--base", ".", "--rows", "5"], "there is no config.json in ."),
        (["plan", "--base", "", "--rows", "5"], "no base '' is in the table"),
        (["plan", "--bas", "smollm2-135m"], "No such option: --bas"),
    ],
)
def test_what_is_missing_or_unknown_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(capsys, *arguments)
    assert ran.code == 2
    assert said in ran.err
    assert not ran.out


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


def test_the_smallest_card_of_each_base_is_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    shown = page.partition("veneer plan --smallest-card\n```")[2].partition("```text\n")[2].partition("```")[0]

    def rows(text: str) -> dict[tuple[str, ...], tuple[str, ...]]:
        """(base, side) -> card and settings."""
        words = [line.split() for line in text.splitlines()[1:]]
        return {(w[0], w[1]): (w[2], *w[8:]) for w in words}

    printed = rows(run(capsys, "plan", "--smallest-card").out)
    assert len(rows(shown)) >= 12
    assert rows(shown).items() <= printed.items()
    pairs = page.partition("one picture with 1 before it")[2].partition("```")[0]
    with_before = rows(run(capsys, "plan", "--smallest-card", "--before", "1").out)
    assert len(rows(pairs)) >= 8
    assert rows(pairs).items() <= with_before.items()
    assert with_before.keys() < printed.keys()  # of bases that edit alone
    found = json.loads(run(capsys, "plan", "--smallest-card", "--base", "flux.1-dev", "--json").out)["cards"]
    assert [(row["size"], f"{row['card_gb']}") for row in found] == [
        (int(side), card[0]) for (name, side), card in printed.items() if name == "FLUX.1-dev"
    ]
    assert run(capsys, "plan", "--smallest-card", "--base", "flux.2-dev", "--size", "16384").out.endswith(
        "no card of the table\n"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "h100-80gb"], "--gpu: --smallest-card looks for the card"),
        (["--base", "flux.1-dev", "--quantize", "nf4"], "--quantize"),
        (["--base", "Qwen/Qwen3-8B"], "no image base that can be planned"),
        (["--base", "flux.1-dve"], "did you mean"),
        (["--base", "flux.1-dev", "--targets", "atention"], "does not know the targets"),
        (["config.yaml"], "--config"),
        (["--base", "flux.1-dev", "--before", "3"], "takes at most 1 picture before each, and the plan is of 3"),
        (["--base", "flux.1-schnell", "--before", "1"], "this base edits no pictures"),
        (["--base", "black-forest-labs/FLUX.2-klein-4B", "--before", "5"], "at most 4 pictures before each"),
        (["--base", "stabilityai/stable-diffusion-xl-base-1.0", "--before", "1"], "this base edits no pictures"),
        (["--before", "11"], "no base takes 11 pictures before each"),
    ],
)
def test_the_smallest_card_takes_nothing_that_it_looks_for(
    capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    ran = run(capsys, "plan", "--smallest-card", *options)
    assert ran.code == 2
    assert said in ran.err
