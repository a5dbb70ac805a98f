"""The commands and programs of docs/how-to/serve.md run against a server with a tiny base.

Library commands run in this process.
"""

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
from typing import Any

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


class Session:
    """A folder with what the page's commands need.

    It contains the tiny base under the page's name, an adapter in runs/quickstart, and the program `veneer`.
    """

    def __init__(self, folder: Path, **config: Any) -> None:
        """`config`: values for the base's configuration."""
        self.folder = folder
        made = roomy(tiny_base_dir(folder, **config))
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

    def localize(self, text: str) -> str:
        text = re.sub(r"--base smollm2-135m\b", "--base ./smollm2-135m", text)
        return text.replace("--port 8000", f"--port {self.port}").replace("localhost:8000", f"127.0.0.1:{self.port}")

    def execute(self, line: str) -> str:
        if not line.startswith("veneer "):
            return self.run("bash", "-c", self.localize(line))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("VENEER_LIBRARY", self.env["VENEER_LIBRARY"])
            with pytest.raises(SystemExit) as end:
                main(shlex.split(self.localize(line))[1:])
        assert not end.value.code
        return ""

    def run(self, *command: str) -> str:
        ran = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
        return ran.stdout


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Run the commands of the page's first block, and yield the session while the server runs."""
    made = Session(tmp_path_factory.mktemp("serve"))
    first = blocks(PAGE, "")[0].splitlines()
    assert len(first) == 5
    assert first[0] == 'pip install -e ".[serve]"'
    assert first[2] == START
    made.execute(first[1])
    log = (made.folder / "log").open("w")
    server = subprocess.Popen(
        ["bash", "-c", f"exec {made.localize(START).removesuffix('&')}"], cwd=made.folder, env=made.env, stderr=log
    )
    try:
        made.execute(first[3])
        yield made
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        log.close()


def test_commands_of_the_page_answer(session: Session) -> None:
    ran = 0
    for line in SHELL[4:]:
        command = line.partition("  #")[0]
        if not command or command.startswith("veneer serve") or "/v1/images/" in command:
            continue  # pictures: tests/serve/http/surfaces/test_images.py
        out = session.execute(command.replace("curl -s ", "curl -s --fail-with-body "))
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


def test_programs_of_the_page_run(session: Session) -> None:
    programs = blocks(PAGE, "python")
    assert len(programs) == 2
    for program in programs:
        out = session.run(sys.executable, "-c", session.localize(program))
        assert out.strip()
    # the tiny base can use up its 60 tokens on white space inside the object
    assert re.fullmatch(r'\{\s*("priority"\s*(:\s*(".*)?)?)?', out.rstrip(), re.S)


def test_table_of_refusals_equals_the_code() -> None:
    from veneer.serve.names import adapter_sources as shelf

    documented = set(re.findall(r"\| (\w+) +\| (\d{3}) ", shelf.__doc__ or ""))
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\d{3}) \|", PAGE, flags=re.M)
    assert len(documented) > 10
    assert {(name, status) for names, status in rows for name in re.findall(r"`(\w+)`", names)} == documented


def test_limits_on_the_page_equal_the_code() -> None:
    from veneer.serve.names.catalog import MAX_MIX
    from veneer.serve.settings import EngineSettings, HttpSettings

    settings = EngineSettings()
    assert f"`--max-batch`, {settings.rows} |" in PAGE
    assert f"answers that run or wait | `queue`, {settings.queue:,};" in PAGE
    assert f"in a mix | {MAX_MIX} |" in PAGE
    assert f"a body | {HttpSettings().max_body >> 20} MiB |" in PAGE
    assert f"The first {HttpSettings().metric_adapters} adapters" in PAGE
    assert f"`1G` holds {(1 << 30) // (2 * 30 * 3 * 64 * 2) // 1000},000" in PAGE


def test_tests_named_in_the_feature_table_exist() -> None:
    table = (ROOT / "docs" / "reference" / "serving-features.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    first, *_, last = [
        re.findall(r"^\| (?!---)([^|]+?) \|", part, flags=re.M) for part in re.split(r"^## .*", table, flags=re.M)
    ]
    assert [row for row in last if not row.startswith("pictures:")] == first
