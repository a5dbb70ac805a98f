"""Tests of `make gpu` that need no GPU.

They cover every line of the sides that run veneer, time limits, failures, and the page. No peer runs and
nothing is timed. If a side fails, the assertion prints its output.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script_module
from veneer.plan.memory import Load
from veneer.plan.plan import TrainingJob, text_plan
from veneer.plan.shape import text_shape
from veneer.plan.tables import base_config, device_named

ROOT = Path(__file__).resolve().parents[2]
FIGURE = {"metric": "training", "value": 100.0, "unit": "tokens/s", "roofline": 400.0, "planned": 80.0}


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield script_module(ROOT / "benchmarks" / "gpu.py", "gpu_benchmark")


def run(gpu: Any, sides: Any, launch: Any, work: Path, minutes: float = 10.0, dry: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = gpu.run(
        sides, launch, work, dry=dry, minutes=minutes, command="the command", say=lambda line: None
    )
    return found


def ran(gpu: Any, value: float = 100.0, metric: str = "training") -> Any:
    return gpu.Outcome("ran", 1.0, figures=[{**FIGURE, "metric": metric, "value": value}])


# -- all sides in this process, because a process per side would spend most of the time on imports ---------------------


@pytest.fixture(scope="module")
def dry(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def here(side: Any, task: Any, limit: float) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a separate process would not fail on warnings either
                return gpu.outcome_of(json.loads(json.dumps(side.run(task))), 0.0)
        except Exception:
            return gpu.Outcome("failed", why=traceback.format_exc())

    return run(gpu, gpu.SIDES, here, tmp_path_factory.mktemp("dry"), dry=True)


def test_every_own_side_runs_and_no_peer_does(gpu: Any, dry: dict[str, Any]) -> None:
    for side in [gpu.PROBE, *gpu.SIDES]:
        outcome = dry[side.key]
        assert outcome.status == ("left out" if side.needs else "ran"), outcome.why
    for part in gpu.PARTS:
        values = [f["value"] for key, o in dry.items() if key.startswith(f"{part}:") for f in o.figures]
        assert values, part
        assert all(isinstance(v, int | float) for v in values), values
    for part, metric in {"train": "training", "qlora": "training", "serve": "8 adapters", "flux": "training"}.items():
        figures = next(o.figures for key, o in dry.items() if key.startswith(f"{part}: veneer"))
        speed = next(f for f in figures if f["metric"] == metric)
        assert min(speed[name] for name in ("value", "roofline", "planned")) > 0


def test_the_page_names_figures_versions_and_command(gpu: Any, dry: dict[str, Any]) -> None:
    result = gpu.result_of(dry, gpu.about_of(dry))
    assert set(result) == {"machine", "rows", "bars", "sides"}
    assert all(set(r) == {"name", "metric", "value", "unit"} for r in result["rows"])
    assert list(gpu.lines_of(result))
    page = gpu.page(json.loads(json.dumps(result)))
    assert page.startswith("# a CPU, dry run\n")
    for text in ("| train: veneer, Llama 3 8B, bf16 | training |", "12,473 tokens/s", "- torch: ", "`the command`"):
        assert text in page
    for line in page.splitlines():
        assert "None" not in line or "| failed |" in line


# -- limits and failures -----------------------------------------------------------------------------------------------


def test_a_failed_side_leaves_the_others_unchanged(gpu: Any, tmp_path: Path) -> None:
    broken = "train: veneer, Llama 3 8B, bf16"

    def launch(side: Any, task: Any, limit: float) -> Any:
        return gpu.Outcome("failed", 1.0, "exit code 1: it | broke\nhere") if side.key == broken else ran(gpu)

    done = run(gpu, gpu.SIDES, launch, tmp_path)
    assert [key for key, o in done.items() if o.bad] == [broken]
    assert {o.status for key, o in done.items() if key != broken} == {"ran"}
    page = gpu.page(gpu.result_of(done, {"card": "a card"}))
    assert re.search(r"^\| train: veneer.* \| failed \| 1 \| .* \| exit code 1: it / broke here \|$", page, flags=re.M)


def test_sides_respect_their_limit_and_the_remaining_time(gpu: Any, tmp_path: Path) -> None:
    limits = {}

    def launch(side: Any, task: Any, limit: float) -> Any:
        limits[side.key] = limit
        return ran(gpu)

    run(gpu, gpu.SIDES, launch, tmp_path)
    assert limits == {side.key: side.limit for side in [gpu.PROBE, *gpu.SIDES]}
    run(gpu, gpu.SIDES, launch, tmp_path, minutes=0.5)
    assert max(limits.values()) <= 30
    done = run(gpu, gpu.SIDES, launch, tmp_path, minutes=0)
    assert {o.status for o in done.values()} == {"no time left"}
    own = [side for side in gpu.SIDES if not side.needs]
    assert sum(side.limit for side in [gpu.PROBE, *own]) <= 600
    assert gpu.SIDES[: len(own)] == own  # peers come last


def test_other_sides_get_the_probes_rates(gpu: Any, tmp_path: Path) -> None:
    told = {}

    def launch(side: Any, task: Any, limit: float) -> Any:
        told[side.key] = task.probe
        return replace(ran(gpu), more={"probe": {"operations": 4e14, "bandwidth": 3e12}})

    run(gpu, gpu.SIDES[:1], launch, tmp_path)
    assert told == {"probe: the card": None, "tests: marked gpu": {"operations": 4e14, "bandwidth": 3e12}}


def test_a_process_returns_its_result_or_a_reason(gpu: Any, tmp_path: Path) -> None:
    def watched(code: str, limit: float = 100.0) -> Any:
        return gpu.watched([sys.executable, "-S", "-c", code], limit, tmp_path)

    result = {"figures": [FIGURE], "notes": ["a note"], "card": {"card": "X"}}
    good = watched(f"print('words'); print('RESULT ' + {json.dumps(json.dumps(result))}); print('more words')")
    assert (good.status, good.figures, good.notes, good.more) == ("ran", [FIGURE], ["a note"], {"card": {"card": "X"}})
    out = watched('print(\'RESULT {"left_out": "too large"}\')')
    assert (out.status, out.why) == ("left out", "too large")
    bad = watched("raise SystemExit('no such card')")
    assert (bad.status, bad.why) == ("failed", "exit code 1: no such card")
    silent = watched("print('words')")
    assert (silent.status, silent.why) == ("failed", "exit code 0: words")
    late = watched("import time; time.sleep(600)", 0.2)
    assert late.status == "timed out"
    assert late.bad


def code_with_figure(tmp_path: Path) -> str:
    """Return code that reports a figure, then creates the file `told`."""
    result = {"figures": [FIGURE], "notes": ["a note"], "card": {"card": "X"}}
    told = f"print('RESULT ' + {json.dumps(json.dumps(result))}, flush=True)"
    return f"{told}; open({str(tmp_path / 'told')!r}, 'w').close()"


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("raise SystemExit('no more memory')", "failed"),
        (
            "print('RESULT {\"figures', flush=True); import os; os._exit(9)",
            "failed",
        ),  # stops in the middle of the next report
        ("import time; time.sleep(600)", "timed out"),
    ],
)
def test_figures_before_a_failure_are_reported(
    gpu: Any, then: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen.wait

    def wait(self: Any, timeout: float | None = None) -> int:
        if timeout is not None and status == "timed out":
            while not (tmp_path / "told").exists():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired("", timeout)
        return real(self)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    found = gpu.watched([sys.executable, "-S", "-c", f"{code_with_figure(tmp_path)}; {then}"], 100.0, tmp_path)
    assert (found.status, found.figures, found.notes) == (status, [FIGURE], ["a note"]), found.why
    assert found.more == {"card": {"card": "X"}}
    assert found.bad
    page = gpu.page(gpu.result_of({"train: veneer": found}, {"card": "X"}))
    assert "| train: veneer | training | 100 tokens/s |" in page
    assert f"| train: veneer | {status} |" in page


def test_stopped_tests_count_up_to_the_last_result(gpu: Any) -> None:
    said = (
        "collected 4 items\n\ntests/a.py::test_one PASSED [ 25%]\ntests/a.py::test_two[x y] FAILED [ 50%]\n"
        "tests/b.py::test_three SKIPPED (why) [ 75%]\ntests/b.py::test_four "
    )
    found = sys.modules["_gpu_sides"].ended_tests(said, 90)
    assert {f["metric"]: f["value"] for f in found["figures"]} == {"passed": 1, "failed": 1, "skipped": 1}
    assert "after tests/b.py::test_three" in found["notes"][0]
    assert found["notes"][1:] == ["tests/a.py::test_two[x y]: failed"]
    assert sys.modules["_gpu_sides"].ended_tests("", 90)["figures"][0]["value"] == 0


def test_the_page_is_written_after_each_side(gpu: Any, tmp_path: Path) -> None:
    after: list[set[str]] = []

    def launch(side: Any, task: Any, limit: float) -> Any:
        if side.key == "qlora: veneer, Llama 3 8B, nf4":
            raise KeyboardInterrupt
        return replace(ran(gpu), more={"card": {"card": "Card 1"}} if side is gpu.PROBE else {})

    def keep(done: dict[str, Any]) -> None:
        where, _ = gpu.written(gpu.result_of(done, gpu.about_of(done)), tmp_path)
        after.append({key for key in done if f"| {key} | {done[key].status} |" in where.read_text(encoding="utf-8")})

    done = gpu.run(gpu.SIDES, launch, tmp_path, dry=False, minutes=10.0, command="", say=lambda line: None, keep=keep)
    assert [o.status for o in done.values()] == ["ran", "ran", "ran", "stopped"]
    assert [len(keys) for keys in after] == [1, 2, 3, 4]
    assert {f.name for f in tmp_path.iterdir()} == {"card-1.md", "card-1.json"}


def test_sides_not_run_keep_earlier_figures(gpu: Any, tmp_path: Path) -> None:
    about = {"card": "X"}
    gpu.written(gpu.result_of({"serve: vLLM": ran(gpu, 1), "train: veneer": ran(gpu, 2)}, about), tmp_path)
    for status in ("no time left", "not installed", "stopped"):
        now = {"serve: vLLM": gpu.Outcome(status), "train: veneer": gpu.Outcome("failed", why="it broke")}
        _, result = gpu.written(gpu.result_of(now, about), tmp_path)
        assert result["sides"]["serve: vLLM"]["figures"][0]["value"] == 1
        assert result["sides"]["train: veneer"]["status"] == "failed", "that was tried"
    (tmp_path / "x.json").write_text('{"sides": ', encoding="utf-8")
    where, result = gpu.written(gpu.result_of({"train: veneer": ran(gpu, 3)}, about), tmp_path)
    assert set(result["sides"]) == {"train: veneer"}, "ten minutes are not lost to a file that cannot be read"
    assert where.with_suffix(".json.unread").exists()


def test_a_signal_ends_the_side_and_its_processes(gpu: Any, tmp_path: Path) -> None:
    """The benchmark's child process reports a figure, starts a process and sends SIGTERM to its parent."""
    begin = "import os, signal, subprocess, sys, time; own = subprocess.Popen([sys.executable, '-S', '-c', "
    begin += f"'import time; time.sleep(600)']); open({str(tmp_path / 'own')!r}, 'w').write(str(own.pid)); "
    code = f"{code_with_figure(tmp_path)}; {begin}os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    with gpu.stoppable():
        found = gpu.watched([sys.executable, "-S", "-c", code], 100.0, tmp_path)
    assert (found.status, found.figures) == ("stopped", [FIGURE])
    if not Path("/proc/self").exists():
        return
    own = Path(f"/proc/{(tmp_path / 'own').read_text(encoding='utf-8')}/stat")
    deadline = time.monotonic() + 60
    while own.exists() and own.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.01)


def test_a_missing_peer_is_reported_as_not_installed(gpu: Any, tmp_path: Path) -> None:
    peer = gpu.Side("qlora", "nobody", 60, lambda task: {}, "no_such_package")
    outcome = gpu.in_a_process({})(peer, gpu.Task(str(tmp_path)), 60)
    assert (outcome.status, outcome.why) == ("not installed", f"{sys.executable} has no no_such_package")
    missing = str(tmp_path / "python")
    outcome = gpu.in_a_process({"no_such_package": missing})(peer, gpu.Task(str(tmp_path)), 60)
    assert outcome.status == "not installed"
    assert missing in outcome.why


def test_the_command_runs_a_side_in_its_own_process(gpu: Any, tmp_path: Path, capfd: Any) -> None:
    code = gpu.main(["--dry", "--only", "probe", "--out", str(tmp_path), "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert json.loads(out)["sides"]["probe: the card"]["status"] == "ran"
    assert {f.name for f in tmp_path.iterdir()} == {"a-cpu-dry-run.md", "a-cpu-dry-run.json"}
    with pytest.raises(SystemExit):
        gpu.main(["--only", "training"])
    assert "--only has no training; there are probe, tests, train, qlora, large" in capfd.readouterr().err


# -- bars and stored results -------------------------------------------------------------------------------------------


def test_bars_cover_the_sides_that_ran(gpu: Any) -> None:
    done = {
        "tests: marked gpu": ran(gpu, 0, "failed"),
        "train: veneer, Llama 3 8B, bf16": ran(gpu, 13_000),
        "qlora: veneer, Llama 3 8B, nf4": ran(gpu, 9000),
        "qlora: Unsloth": ran(gpu, 8000),
        "serve: veneer, Llama 3 8B": ran(gpu, 5000, "8 adapters"),
        "serve: vLLM": gpu.Outcome("not installed"),
    }
    bars = {b["name"]: (b["want"], b["ok"]) for b in gpu.bars_of(done, "NVIDIA H100 80GB HBM3")}
    assert bars == {
        "gpu tests that fail": ("≤ 0", True),
        "Llama 3 8B, bf16, tokens/s (NeMo AutoModel's as published)": ("≥ 1.25e+04", True),
        "training over Unsloth's": ("≥ 1.2", False),
    }
    done["serve: vLLM"] = ran(gpu, 4000, "8 adapters")
    bars = {b["name"]: b["ok"] for b in gpu.bars_of(done, "NVIDIA L4")}
    assert bars == {"gpu tests that fail": True, "training over Unsloth's": False, "8 adapters over vLLM's": True}


# -- the plan's settings -----------------------------------------------------------------------------------------------


def plan_of(base: str, card: str, load: Load) -> Any:
    device = device_named(card)
    return text_plan("", text_shape(base_config(base)), load, device, TrainingJob(1))


def test_a_side_runs_the_planned_settings(gpu: Any) -> None:
    sides = sys.modules["_gpu_sides"]
    s = sides.CARD
    load = Load((s.length,) * s.rows)
    settled, why = sides.settled(plan_of(s.text, "h100-80gb", load))
    assert (settled, why) == (load, "")
    rows = (s.large_row,) * (s.large_tokens // s.large_row)
    seventy = Load(rows, micros=-(-16 // len(rows)), quantize="nf4")
    assert sides.settled(plan_of(s.large, "h100-80gb", seventy)) == (seventy, "")
    changed = plan_of(s.text, "rtx-4090", load)
    settled, why = sides.settled(changed)
    assert (settled is None) == bool(why)
    none, why = sides.settled(plan_of(s.large, "rtx-4090", seventy))
    assert none is None
    assert "GB" in why


# -- command line ------------------------------------------------------------------------------------------------------


def test_the_makefile_and_the_page_list_every_part(gpu: Any) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(
        r"^gpu: \$\(VENV\)/\.ready-peers ## .+\n\t@\$\(RUN\) benchmarks/gpu\.py \$\(GPU_FLAGS\)$", makefile, re.M
    )
    assert re.search(r"^\.PHONY:.* gpu ", makefile, re.M)
    page = (ROOT / "docs" / "how-to" / "gpu.md").read_text(encoding="utf-8")
    for part in gpu.PARTS:
        assert f"| `{part}` |" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "nan"], "above 0, as 10, and is nan"),
        (["--python", "vllm"], "PEER=PATH is wanted"),
        (["--python", "vlm=python3"], "a PEER of bitsandbytes, unsloth, vllm"),
        (["--python", "vllm=/no/such/python"], "there is no program /no/such/python"),
        (["--python", f"vllm={sys.executable}", "--python", f"vllm={sys.executable}"], "names vllm twice"),
        (["--only", "train,serv"], "--only has no serv;"),
        (["--out", "{file}/inside"], "is not a folder"),
    ],
)
def test_invalid_options_are_refused_before_any_work(
    gpu: Any,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "run", lambda *_, **__: pytest.fail("work has begun"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        gpu.main(["--dry", *(each.format(file=tmp_path / "file") for each in arguments)])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
