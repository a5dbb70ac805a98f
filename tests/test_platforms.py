"""The package on macOS and Windows, faked in processes on Linux (`tests/platforms.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.platforms import modules, run_as
from tests.train.text.tiny_runs import with_rows

SCRIPTS = {"veneer.train.rewards.limited_child"}
"""Started only where Python functions are limited, which Windows cannot do."""
STEPS = ["imported", "trained", "resumed", "added", "served", "refused"]
WHOLE = """
import importlib, shutil, sys
for name in {names!r}:
    importlib.import_module(name)
print("imported")

from pathlib import Path
from tests.serve.http.toy import served
from tests.train.text.tiny_runs import train
from veneer.library.library import open_library
from veneer.ops.cpu import compiled
from veneer.train.checkpoint import latest
from veneer.ops.cpu.memory import keep_freed_memory, peak_resident, return_freed_memory, trim_heap
folder = Path({folder!r})
with keep_freed_memory(), return_freed_memory():
    trim_heap()
    assert peak_resident() > 0
short = {{"schedule": {{"steps": 2}}, "evaluation": {{"every": 2}}, "checkpoint": {{"every": 1}}}}
train(folder, folder / "out", **short)
assert compiled.kernels() is None, "only the C compilers of Linux are known to build them"
assert sys.platform != "win32" or "Windows" in compiled.status()
print("trained")

shutil.rmtree(latest(folder / "out" / "checkpoints"))
train(folder, folder / "out", resume=True, **short)
print("resumed")

from veneer.files.safetensors import read_tensors
from veneer.library.maintenance import gc, verify_library
with open_library(folder / "library") as library:
    library.add(folder / "out", "tickets")
    library.add(folder / "out", "again")
    assert read_tensors(library.resolve("tickets") / "adapter_model.safetensors")[0]
    library.remove("again")
    assert verify_library(library).ok
    gc(library, grace=0)
print("added")

import asyncio, httpx
from veneer.serve.build import build
from veneer.serve.checks import check_settings
from veneer.serve.settings import EngineSettings, ServeSettings
settings = ServeSettings(str(folder / "tiny-base"), engine=EngineSettings(cache_bytes=16 << 20), dtype="float32",
                         device="cpu", library=str(folder / "library"))
built = build(settings, print, check_settings(settings))
async def begin():
    await built.start()
    await built.load()
asyncio.run(begin())
with served(built.app) as url:
    body = {{"model": "tickets", "prompt": "The printer", "max_tokens": 3, "temperature": 0}}
    answer = httpx.post(f"{{url}}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
asyncio.run(built.stop())
print("served")

from veneer.errors import VeneerError
from veneer.serve.tenancy.journal import Journal
from veneer.train.devices import launch
from veneer.train.rewards.limited import LimitedFunction
from veneer.train.rewards.sandbox import bubblewrap
refused = [("bubblewrap", lambda: bubblewrap(folder))]
if sys.platform == "win32":
    refused += [("ledger", lambda: Journal(folder / "journal", "server", 1 << 20)), ("devices", lambda: launch(2, []))]
    refused += [("function", lambda: LimitedFunction("grade", source="def grade(sample, item): return 1"))]
for what, do in refused:
    try:
        do()
    except VeneerError as error:
        assert "Linux" in str(error) and error.fix, error
    else:
        raise AssertionError(f"{{what}} is not refused")
print("refused")

from veneer.cli.main import main
sys.argv = ["veneer", "doctor"]
try:
    main()
except SystemExit as ended:
    assert ended.code == (sys.platform == "darwin")  # which lacks a compiler here
"""


@pytest.mark.parametrize("platform", ["win32", pytest.param("darwin", marks=pytest.mark.slow)])
def test_everything_imports_trains_saves_and_serves(platform: str, tmp_path: Path) -> None:
    code = WHOLE.format(names=[name for name in modules() if name not in SCRIPTS], folder=str(with_rows(tmp_path)))
    ran = run_as(platform, code, VENEER_HOME=str(tmp_path / "home"))
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert [line for line in ran.stdout.split() if line in STEPS] == STEPS
