"""`veneer doctor`."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.cli.run import run
from tests.installed import install_record
from veneer.ops.cpu import compiled
from veneer.ops.dispatch import OPS, choices, override_ops
from veneer.ops.profile import processor_name, profile
from veneer.serve.engines import find_vllm


def unwrapped(out: str) -> list[str]:
    """Return the lines of an output, with continuation lines joined to their first line."""
    return out.replace("\n" + " " * 12, " ").splitlines()


def test_doctor_prints_the_verdict_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, *lines = unwrapped(run(capsys, "doctor").out)
    assert first == "no problems found"
    assert [line.split()[0] for line in lines[: lines.index("")]] == [
        "home",
        "disk",
        "compiler",
        "card",
        "extras",
        "hub",
    ]
    assert json.loads(run(capsys, "doctor", "--json").out)["well"] is True


def test_problems_are_listed_first_with_a_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    first, *lines = unwrapped(run(capsys, "doctor", code=1).out)
    assert first == "2 problems: home, compiler"
    assert any(line.startswith("home ") and "set VENEER_HOME" in line for line in lines)


def test_ops_report_matches_dispatch(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "doctor", "--ops", "--json").out)
    assert found["torch"] == torch.__version__
    assert found["compiled"] == compiled.status()
    assert found["processor"] == processor_name()
    assert set(found["ops"]["cpu"]) == set(OPS)
    assert found["ops"]["cpu"] == {op: one._asdict() for op, one in choices("cpu").items()}
    assert found["threads"] == torch.get_num_threads()


def test_ops_lines_name_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    lines = unwrapped(run(capsys, "doctor", "--ops").out)
    assert 12 <= len(lines) <= 25
    said = [name for line in lines if line.startswith("ops ") for name in line.rpartition(": ")[2].split(", ")]
    assert sorted(said) == sorted(OPS)
    assert any(line.startswith("compiler ") and compiled.status() in line for line in lines)


def test_overridden_ops_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    with override_ops(rms_norm="torch"):
        lines = unwrapped(run(capsys, "doctor", "--ops").out)
    assert compiled.kernels() is None or any("by torch (set by VENEER_OPS): rms_norm" in line for line in lines)


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_lines_fit_the_terminal_and_100_columns(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(compiled, "status", lambda: "a reason " * 40)
    out = run(capsys, "doctor", "--ops").out
    assert max(map(len, out.splitlines())) <= min(columns, 100)
    assert all(line[:12].strip() or line.startswith(" " * 12) for line in out.splitlines() if line)


def test_ops_are_listed_for_every_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a card")
    lines = unwrapped(run(capsys, "doctor", "--ops").out)
    for device in ("cpu", "cuda"):
        ours = [line for line in lines if line.startswith(f"ops {device} ")]
        assert sorted(name for line in ours for name in line.rpartition(": ")[2].split(", ")) == sorted(OPS)


def test_the_profile_is_shown_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "doctor").out.splitlines()
    said = " ".join(" ".join(lines).split())
    assert "memory is read at 30 GB/s; bfloat16 weights are multiplied in bfloat16" in said
    table = [line.split() for line in lines[-5:]]
    assert table[0] == ["GFLOP/s", "16", "rows", "256", "rows", "1024", "rows"]
    for dtype, *rates in table[1:]:
        assert rates == [f"{rate:.0f}" for rate in profile().gflops[dtype].values()]
    told = json.loads(run(capsys, "doctor", "--json").out)["profile"]
    assert told == asdict(profile())


def test_measure_renews_the_profile(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unset VENEER_PROFILE" in run(capsys, "doctor", "--measure", code=2).err
    new = replace(profile(), provisional=True, gflops={"int8": {"1x1x1": 7.0}})
    monkeypatch.setattr("veneer.ops.profile.renew", lambda: new)
    said = " ".join(run(capsys, "doctor", "--measure").out.split())
    assert "the next command that needs the profile measures it again" in said
    assert said.endswith("GFLOP/s 1 rows int8 7")


def wheel(folder: Path, name: str, version: str, files: dict[str, str], entry_points: str = "") -> None:
    """Write a wheel for pip."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-{version}.dist-info"
    metadata = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "RECORD": ""}
    metadata["WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata["entry_points.txt"] = entry_points
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, **{f"{about}/{file}": text for file, text in metadata.items()}}.items():
            archive.writestr(path, text)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, from which pip installs. The installed veneer is version 9.9, from an index."""
    install_record(tmp_path / "installed", monkeypatch)
    for name in ("PYTHONPATH", "VENEER_VLLM_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index"), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_vllm_is_installed_in_an_environment_that_the_server_finds(
    capsys: pytest.CaptureFixture[str], index: Path
) -> None:
    """pip runs for real, on wheels of a folder. First there is no vLLM; then the command is repeated."""
    failed = run(capsys, "doctor", "--install-vllm", code=2)
    for words in ("cannot install vLLM: exit code 1", "-m pip install vllm", "repeat veneer doctor --install-vllm"):
        assert words in failed.err
    assert find_vllm() is None

    registry = '_MODELS = {\n    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),\n}\n'
    wheel(index, "vllm", "0.32.0", {"vllm/__init__.py": "", "vllm/model_executor/models/registry.py": registry})
    plugin = "[vllm.general_plugins]\nveneer = veneer.serve.fleet.vllm_plugin:register\n"
    wheel(index, "veneer", "9.9", {"veneer/__init__.py": ""}, plugin)
    done = run(capsys, "doctor", "--install-vllm")
    found = find_vllm()
    assert found is not None
    assert found.python in done.out + done.err
    assert (found.version, found.plugin, found.architectures) == ("0.32.0", True, {"LlamaForCausalLM"})
