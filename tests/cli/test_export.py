"""`veneer export`, and the commands of docs/how-to/export.md."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader

from tests.cli.run import run
from tests.test_readme import ROOT, blocks
from tests.tiny_base import tiny_base_dir
from veneer.cli.export import loss_warning
from veneer.train.config.load import config_from
from veneer.train.text.task import run_text

PAGE = (ROOT / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")
SYSTEM = "Answer with a team."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and two adapters, in runs/."""
    folder = tmp_path_factory.mktemp("export")
    base = tiny_base_dir(folder)
    with (folder / "held-out.jsonl").open("w") as file:
        for i in range(24):
            team = "it" if i % 2 else "billing"
            turns = [("system", SYSTEM), ("user", f"The printer number {i} does not work."), ("assistant", team)]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    values = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(folder / "held-out.jsonl"), "split": 4},
        "output": str(folder / "runs" / "quickstart"),
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"steps": 12},
        "batching": {"rows": 8},
    }
    run_text(config_from(values)[0], on_event=lambda event: None)
    shutil.copytree(folder / "runs" / "quickstart", folder / "runs" / "polite")
    return folder


@pytest.mark.parametrize("line", blocks(PAGE, "sh")[0].splitlines())
def test_page_commands_run(
    line: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(trained / "runs")
    (tmp_path / "held-out.jsonl").symlink_to(trained / "held-out.jsonl")
    ran = run(capsys, *shlex.split(line)[1:])
    assert "loss on" in ran.err
    made = sorted(f.name for f in tmp_path.iterdir() if not f.is_symlink())
    assert made in (["support.gguf"], ["support"], ["quickstart-f16.gguf"])
    file = tmp_path / made[0] if made[0].endswith(".gguf") else tmp_path / "support" / "model.gguf"
    assert len(GGUFReader(file).tensors) == 20


def test_losses_of_base_adapter_and_export_are_shown(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)  # the recipe has only the names of data files
    adapter, output = str(trained / "runs" / "quickstart"), str(tmp_path / "x.gguf")
    ran = run(capsys, "export", adapter, "--for", "gguf", "-o", output, "--json")
    result = json.loads(ran.out)
    assert result["rows"] == 4, ran.err
    assert result["loss"]["adapters"] < 0.8 * result["loss"]["base"]
    assert result["loss"]["export"] == pytest.approx(result["loss"]["adapters"], abs=0.01)
    assert result["bytes"] == Path(output).stat().st_size
    scored = run(
        capsys, "eval", "--adapter", adapter, "--data", str(trained / "held-out.jsonl"), "--loss-only", "--json",
        "--dtype", "float32",
    )  # fmt: skip
    every = run(
        capsys, "export", adapter, "--for", "gguf", "-o", output, "--force", "--json",
        "--data", str(trained / "held-out.jsonl"),
    )  # fmt: skip
    assert json.loads(every.out)["loss"]["adapters"] == pytest.approx(json.loads(scored.out)[adapter]["loss"], rel=1e-4)
    again = run(capsys, "export", adapter, "--for", "gguf", "-o", output, code=2)
    assert "--force" in again.err


def test_export_goes_on_without_rows_and_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(capsys, "export", str(trained / "runs" / "quickstart"), "--for", "gguf", "-o", str(tmp_path / "x.gguf"))
    assert "the loss was not measured" in ran.err
    assert "--data" in ran.err
    assert (tmp_path / "x.gguf").exists()


def test_modelfile_has_the_constant_system_message(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(trained / "runs" / "quickstart")
    run(capsys, "export", adapter, "--for", "ollama", "-o", str(tmp_path / "x"))
    assert f'SYSTEM """{SYSTEM}"""' in (tmp_path / "x" / "Modelfile").read_text()
    other = tmp_path / "other.jsonl"
    other.write_text((trained / "held-out.jsonl").read_text().replace(SYSTEM, "Another one.", 1))
    run(capsys, "export", adapter, "--for", "ollama", "-o", str(tmp_path / "y"), "--data", str(other))
    assert "SYSTEM" not in (tmp_path / "y" / "Modelfile").read_text()


def test_warning_compares_the_loss_with_the_gain() -> None:
    assert loss_warning({"base": 3.0, "adapters": 1.0, "export": 2.5}, "q4_k_m") == ""
    warning = loss_warning({"base": 3.0, "adapters": 2.9, "export": 3.2}, "q4_k_m")
    assert all(part in warning for part in ("warning", "q4_k_m", "0.3000", "0.1000"))


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--for", "tape"), "gguf, ollama"), (("--for", "gguf", "--type", "q2_k"), "q8_0"), ((), "--for")],
    ids=["target", "type", "no target"],
)
def test_unknown_targets_and_types_list_the_known(
    more: tuple[str, ...], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run(capsys, "export", str(trained / "runs" / "quickstart"), *more, code=2).err
