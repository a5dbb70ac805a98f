"""docs/how-to/serve.md does what it says: its commands and programs run against a server on a tiny base; those about
the library run in this process.

The feature table names tests that exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.test_use import adapter_for
from tests.serve.http.toy import free_port
from tests.test_readme import ROOT, blocks, roomy
from tests.tiny_base import tiny_base_dir
from veneer.cli.main import main
from veneer.formats import peft
from veneer.models.text.base import load_text

PAGE = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
SHELL = [line for body in blocks(PAGE, "") for line in body.splitlines()]
START = next(line for line in SHELL if line.startswith("veneer serve"))

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="the page's commands are curl's")


class Place:
    """A folder with the tiny base under the page's name for it, an adapter in runs/quickstart, and `veneer`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        made = roomy(tiny_base_dir(folder))
        made.rename(folder / "smollm2-135m")
        base = load_text(str(folder / "smollm2-135m"))
        peft.write_folder(adapter_for(base, 1), folder / "runs" / "quickstart")
        (folder / "bin").mkdir()
        program = folder / "bin" / "veneer"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from veneer.cli.main import main; main()" "$@"\n')
        program.chmod(0o755)
        self.port = free_port()
        self.env = {
            **os.environ,
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT / "src"),
            "VENEER_LIBRARY": str(folder / "library"),
        }

    def here(self, text: str) -> str:
        text = re.sub(r"--base smollm2-135m\b", "--base ./smollm2-135m", text)
        return text.replace("--port 8000", f"--port {self.port}").replace("localhost:8000", f"127.0.0.1:{self.port}")

    def does(self, line: str) -> str:
        if not line.startswith("veneer "):
            return self.run("bash", "-c", self.here(line))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("VENEER_LIBRARY", self.env["VENEER_LIBRARY"])
            with pytest.raises(SystemExit) as end:
                main(shlex.split(self.here(line))[1:])
        assert not end.value.code
        return ""

    def run(self, *command: str) -> str:
        ran = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
        return ran.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The first block's commands up to the server's start, and the server."""
    made = Place(tmp_path_factory.mktemp("serve"))
    first = blocks(PAGE, "")[0].splitlines()
    assert len(first) == 5
    assert first[0] == 'pip install "veneer[serve]"'
    assert first[2] == START
    made.does(first[1])
    log = (made.folder / "log").open("w")
    server = subprocess.Popen(
        ["bash", "-c", f"exec {made.here(START).removesuffix('&')}"], cwd=made.folder, env=made.env, stderr=log
    )
    try:
        made.does(first[3])
        yield made
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        log.close()


def test_every_command_answers(place: Place) -> None:
    ran = 0
    for line in SHELL[4:]:
        command = line.partition("  #")[0]
        if not command or command.startswith("veneer serve") or "/v1/images/" in command:
            continue  # pictures: tests/serve/http/surfaces/test_images.py
        out = place.does(command.replace("curl -s ", "curl -s --fail-with-body "))
        ran += 1
        if "/v1/chat/completions" in command:
            assert json.loads(out)["model"] == "support@prod"
        elif '"stream": true' in command:
            assert out.rstrip().endswith("data: [DONE]")
        elif "/metrics" in command:
            names = re.findall(r"`((?:vllm|veneer):\w+)`", PAGE)
            assert len(names) >= 5
            assert all(name in out for name in names)
            assert 'veneer:adapter_requests_total{adapter="support@prod",reason=' in out
    assert ran == 7


def test_every_program_runs(place: Place) -> None:
    programs = blocks(PAGE, "python")
    assert len(programs) == 2
    for program in programs:
        out = place.run(sys.executable, "-c", place.here(program))
        assert out.strip()
    # A tiny base may fill its 60 tokens with white space: what is there is how the form begins.
    assert re.fullmatch(r'\{\s*("priority"\s*(:\s*(".*)?)?)?', out.rstrip(), re.S)


def test_the_table_of_reasons_is_the_one_of_the_code() -> None:
    from veneer.serve.names import adapter_sources as shelf

    told = set(re.findall(r"\| (\w+) +\| (\d{3}) ", shelf.__doc__ or ""))
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\d{3}) \|", PAGE, flags=re.M)
    assert len(told) > 10
    assert {(name, status) for names, status in rows for name in re.findall(r"`(\w+)`", names)} == told


def test_the_numbers_are_the_codes_own() -> None:
    from veneer.serve.names.catalog import MAX_MIX
    from veneer.serve.settings import EngineSettings, HttpSettings

    settings = EngineSettings()
    assert f"`--max-batch`, {settings.rows} |" in PAGE
    assert f"answers that run or wait | `queue`, {settings.queue:,};" in PAGE
    assert f"in a mix | {MAX_MIX} |" in PAGE
    assert f"a body | {HttpSettings().max_body >> 20} MiB |" in PAGE
    assert f"The first {HttpSettings().metric_adapters} adapters" in PAGE
    assert f"`1G` holds {(1 << 30) // (2 * 30 * 3 * 64 * 2) // 1000},000" in PAGE


def test_the_tests_that_the_feature_table_names_are_there() -> None:
    table = (ROOT / "docs" / "reference" / "serving-features.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    first, *_, last = [
        re.findall(r"^\| (?!---)([^|]+?) \|", part, flags=re.M) for part in re.split(r"^## .*", table, flags=re.M)
    ]
    assert [row for row in last if not row.startswith("pictures:")] == first
