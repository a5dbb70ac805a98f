"""`veneer doctor`."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from tests.cli.run import run
from veneer.ops import choice, measuring, probe
from veneer.ops.choice import OPS
from veneer.ops.cpu import compiled


def unwrapped(out: str) -> list[str]:
    """The lines before they were broken."""
    return out.replace("\n" + " " * 12, " ").splitlines()


def test_it_says_first_whether_all_is_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran = run(capsys, "doctor")
    first, *lines = unwrapped(ran.out)
    assert (ran.code, first) == (0, "all is well")
    assert [line.split()[0] for line in lines] == ["home", "disk", "compiler", "card", "extras", "hub", "port"]
    assert json.loads(run(capsys, "doctor", "--json").out)["well"] is True


def test_a_fault_is_named_first_with_its_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    ran = run(capsys, "doctor")
    first, *lines = unwrapped(ran.out)
    assert (ran.code, first) == (1, "2 problems: home, compiler")
    assert any(line.startswith("home ") and "set VENEER_HOME" in line for line in lines)


def test_a_port_in_use_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        holder = socket.create_server(("127.0.0.1", 8000))
    except OSError:  # another process has the port
        holder = socket.socket()
    with holder:
        assert "8000 is in use: choose another with --port" in " ".join(run(capsys, "doctor").out.split())


def test_what_is_said_is_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "doctor", "--ops", "--quick", "--json").out)
    assert found["torch"] == torch.__version__
    assert found["compiled"] == compiled.status()
    assert found["processor"] == measuring.this_machine()
    assert set(found["ops"]["cpu"]) == set(OPS)
    assert found["ops"]["cpu"] == {op: one._asdict() for op, one in choice.choices("cpu").items()}
    assert found["threads"] == torch.get_num_threads()
    assert found["probe"] is None


def test_about_ten_lines_name_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "doctor", "--ops", "--quick")
    assert ran.code == 0
    lines = unwrapped(ran.out)
    assert 12 <= len(lines) <= 25
    said = [name for line in lines if line.startswith("ops ") for name in line.rpartition(": ")[2].split(", ")]
    assert sorted(said) == sorted(OPS)
    assert any(line.startswith("compiled ") and compiled.status() in line for line in lines)


def test_pinned_ops_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    with choice.pinned(rms_norm="torch"):
        lines = unwrapped(run(capsys, "doctor", "--ops", "--quick").out)
    assert compiled.kernels() is None or any("by torch (pinned by VENEER_OPS): rms_norm" in line for line in lines)


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_no_line_is_wider_than_the_terminal_or_a_hundred(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(compiled, "status", lambda: "a reason " * 40)
    out = run(capsys, "doctor", "--ops", "--quick").out
    assert max(map(len, out.splitlines())) <= min(columns, 100)
    assert all(line[:12].strip() or line.startswith(" " * 12) for line in out.splitlines() if line)


@pytest.mark.parametrize(("threads", "said"), [(1, "; 1 thread; "), (2, "; 2 threads; ")])
def test_one_thread_is_no_threads(
    threads: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert said in " ".join(run(capsys, "doctor", "--ops", "--quick").out.split())


def test_what_is_measured_is_said_to_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "rows_attend": choice.Choice("tiles, tiles32, torch", "measured, the first unless another is clearly faster"),
        "dropout": choice.Choice("compiled", "the first that takes what it is given"),
    }
    monkeypatch.setattr(choice, "choices", lambda device: found)
    lines = unwrapped(run(capsys, "doctor", "--ops", "--quick").out)
    assert "ops cpu     by the fastest of tiles, tiles32 and torch (measured at first use): rows_attend" in lines
    assert "ops cpu     by compiled (the first that takes what it is given): dropout" in lines


def test_every_device_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a card")
    lines = unwrapped(run(capsys, "doctor", "--ops", "--quick").out)
    for device in ("cpu", "cuda"):
        ours = [line for line in lines if line.startswith(f"ops {device} ")]
        assert sorted(name for line in ours for name in line.rpartition(": ")[2].split(", ")) == sorted(OPS)


def test_quick_tells_what_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = measuring.Kept(tmp_path / "choices.json", "here")
    key = f"rms_norm bfloat16 64, {torch.get_num_threads()} threads"
    with choice.own_choices(kept=lambda: kept):
        assert "measured    nothing yet" in run(capsys, "doctor", "--ops", "--quick").out
        kept.put(key, measuring.Measured("torch", {"torch": 1.0, "compiled": 2.0}))
        kept.put(key.replace("64", "96"), measuring.Measured("compiled", {"torch": 2.0, "compiled": 1.0}))
        kept.put(key.replace("64", "128"), measuring.Measured("compiled", {"torch": 2.0, "compiled": 1.0}))
        lines = unwrapped(run(capsys, "doctor", "--ops", "--quick").out)
        each = unwrapped(run(capsys, "doctor", "--ops", "--quick", "--measured").out)
    assert "measured    rms_norm compiled (2), torch (1); in as many classes of sizes: --measured shows each" in lines
    assert f"measured    {key}: torch 1 ms (compiled 2)" in each
    assert not any("nothing yet" in line for line in [*lines, *each])


def test_the_probe_is_told_beside_its_floor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = probe.LayerProbe("bfloat16", 2048, 4e11, 0.08, 0.06)
    monkeypatch.setattr(probe, "probe_layer", lambda dtype: found)
    said = " ".join(run(capsys, "doctor", "--ops").out.split())
    assert "2,048 tokens of bfloat16: 80 ms, 75% of its floor of 60 ms at 400 GFLOP/s" in said
    told = json.loads(run(capsys, "doctor", "--ops", "--json").out)["probe"]
    assert told["share"] == pytest.approx(0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_runs_a_layer_and_its_products(dtype: torch.dtype) -> None:
    found = probe.probe_layer(dtype, rows=2, length=16, seconds=0.0)
    assert found.tokens == 32
    assert min(found.rate, found.seconds, found.floor, found.share) > 0


def test_the_page_shows_the_command() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    assert "veneer doctor" in page
