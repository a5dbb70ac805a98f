"""The commands, variables, series and log keys of docs/how-to/observe.md, run against a server."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict
from typing import Any

import pytest
import yaml

from tests.serve.http.test_telemetry import app, asked, collector  # noqa: F401
from tests.serve.http.toy import free_port, responses, wait_for
from tests.serve.test_observe import exported_names, program, server
from tests.test_readme import ROOT, blocks
from veneer.serve.settings import Objectives

PAGE = (ROOT / "docs" / "how-to" / "observe.md").read_text(encoding="utf-8")
ENVIRONMENT = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
SHELL = [line for body in blocks(PAGE, "sh") for line in body.splitlines()]


def test_the_server_exports_every_series_on_the_page():
    with server() as here:
        named = set(re.findall(r"`((?:vllm|veneer):\w+)`", PAGE))
        assert len(named) > 5
        exported = exported_names(here.get("/metrics").text)
        assert {name for name in named if name not in exported and f"{name}_bucket" not in exported} == set()


def test_opentelemetry_knows_every_variable_on_the_page():
    from opentelemetry.sdk import environment_variables

    named = set(re.findall(r"OTEL_[A-Z_]+", PAGE + ENVIRONMENT))
    assert len(named) > 4
    assert named <= set(vars(environment_variables))


def test_the_exports_on_the_page_turn_traces_on(collector, monkeypatch):  # noqa: F811
    receiver, bodies = collector
    for name, value in re.findall(r"^export (\w+)=(\S+)$", "\n".join(SHELL), re.M):
        monkeypatch.setenv(name, value.replace(":4318", f":{receiver.server_port}"))
    assert responses(app(), [asked()])[0].status_code == 200
    wait_for(lambda: bodies, 60)


def test_the_access_log_has_the_keys_on_the_page(capsys):
    (example,) = blocks(PAGE, "json")
    responses(app(log=True), [asked()])
    line: dict[str, Any] = json.loads(capsys.readouterr().err)
    assert line.keys() == json.loads(example).keys()


def test_the_objectives_on_the_page_are_the_defaults():
    (example,) = blocks(PAGE, "yaml")
    assert yaml.safe_load(example) == {"objectives": asdict(Objectives())}


@pytest.mark.fleet
def test_the_commands_on_the_page_run(tmp_path):
    curl, prometheus = (next(line for line in SHELL if line.startswith(name)) for name in ("curl", "prometheus"))
    with server() as here:
        ran = subprocess.run(["sh", "-c", curl.replace("http://", "").replace("localhost:8000", here.url)],
                             capture_output=True, text=True, check=True)  # fmt: skip
        assert exported_names(ran.stdout)
    port = free_port()
    command = [program("prometheus"), *prometheus.split()[1:], f"--storage.tsdb.path={tmp_path}"]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=stderr, cwd=ROOT)
    try:
        wait_for(lambda: b"Server is ready" in log.read_bytes() or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait()
