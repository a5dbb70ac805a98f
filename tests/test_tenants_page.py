"""All commands of docs/how-to/tenants.md run against the server that the page starts.

Commands run in this process, requests run in curl, and the server is a separate process.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.test_use import adapter_for
from tests.cli.run import run
from tests.forks import Forked
from tests.homes import home_with_kernels
from tests.serve.http.toy import ToyCatalog, free_port
from tests.test_readme import ROOT, blocks, roomy
from tests.tiny_base import tiny_base_dir
from veneer.formats import peft
from veneer.models.text.base import load_text

PAGE = (ROOT / "docs" / "how-to" / "tenants.md").read_text(encoding="utf-8")
LINES = [re.sub(r"\s+#.*$", "", line) for body in blocks(PAGE, "") for line in body.splitlines()]

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="the page's calls are curl's")


class Terminal:
    """A terminal in which exported variables apply to later lines."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.patch, self.capsys = folder, monkeypatch, capsys
        self.server: Forked | None = None
        self.key = ""
        self.port = free_port()

    def localize(self, line: str) -> str:
        line = line.replace("--base smollm2-135m", "--base ./smollm2-135m").replace("3f9a0c21d4", self.key)
        return line.replace("--port 8000", f"--port {self.port}").replace("localhost:8000", f"127.0.0.1:{self.port}")

    def execute(self, line: str) -> str:
        line = self.localize(line)
        name, inner = "", line
        if line.startswith("export "):
            name, inner = re.fullmatch(r"export (?:(\w+)=)?\$\((.*)\)", line).groups()  # type: ignore[union-attr]
        if inner.startswith("veneer serve"):
            command = ["-c", "from veneer.cli.main import main; main()", *shlex.split(inner)[1:]]
            given = [word for word in command if word != "&"]
            self.server = Forked(given, env=os.environ, log=self.folder / "log", cwd=self.folder)
            return ""
        if inner.startswith("veneer "):
            out = run(self.capsys, *shlex.split(inner)[1:]).out
        else:
            called = (
                inner if " -sf " in inner or " -w " in inner else inner.replace("curl ", "curl --fail-with-body ", 1)
            )
            ran = subprocess.run(["bash", "-c", called], cwd=self.folder, capture_output=True, text=True, timeout=120)
            assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}\n{(self.folder / 'log').read_text()}"
            out = ran.stdout
        if line.startswith("export "):
            pairs = [(name, out.strip())] if name else [tuple(word.split("=", 1)) for word in out.split()]
            for key, value in pairs:
                self.patch.setenv(key, value)
        return out


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Terminal]:
    roomy(tiny_base_dir(tmp_path)).rename(tmp_path / "smollm2-135m")
    base = load_text(str(tmp_path / "smollm2-135m"))
    for seed, name in enumerate(("quickstart", "second", "third", "acme")):
        peft.write_folder(adapter_for(base, seed), tmp_path / "runs" / name)
    home = home_with_kernels(tmp_path / "home")
    for name in [n for n in os.environ if n.startswith("VENEER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VENEER_HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    made = Terminal(tmp_path, monkeypatch, capsys)
    yield made
    if made.server is not None:
        made.server.send_signal(signal.SIGTERM)
        made.server.wait(60)


def test_commands_of_the_page_run(terminal: Terminal) -> None:
    outputs: dict[str, str] = {}
    for line in LINES:
        if line:
            outputs[line] = out = terminal.execute(line)
            if line.startswith("export GLOBEX"):
                terminal.key = os.environ["GLOBEX"][4:14]
                assert terminal.key in out
    assert len(outputs) > 40
    assert "tenants.sqlite, so requests need a key" in (terminal.folder / "log").read_text()

    def output_path(start: str) -> str:
        return next(out for line, out in outputs.items() if line.startswith(start))

    models = json.loads(next(out for line, out in outputs.items() if "/v1/models" in line))["data"]
    assert [m["id"] for m in models][1:] == ["acme/support"]
    answers = {json.loads(out)["model"] for line, out in outputs.items() if "/v1/completions" in line}
    assert answers == {"acme/support", "support@2", "chat"}
    assert "VENEER_ADMIN_KEY=vnr-admin-" in output_path("export $(veneer tenant admin-key)")
    usage = outputs["veneer tenant usage"]
    assert "acme/support@1" in usage or "acme/support" in usage
    assert "support@2" in usage
    put = next(out for line, out in outputs.items() if "-X PUT" in line and "/admin/routes" in line)
    assert json.loads(put)["targets"] == {"support@1": 70, "support@2": 30}

    # the admin key is accepted; its hash and a tenant's key are refused
    url = f"http://127.0.0.1:{terminal.port}"
    codes = "curl -s -o /dev/null -w '%{http_code}' "
    assert terminal.execute(f"{codes} {url}/v1/models") == "401"
    hashed = os.environ["VENEER_ADMIN_KEY_HASH"]
    request = f'{codes} {url}/admin/tenants -H "Authorization: Bearer '
    assert [terminal.execute(f'{request}{key}"') for key in ("$VENEER_ADMIN_KEY", hashed, "$ACME")] == [
        "200",
        "401",
        "403",
    ]


def test_page_names_every_admin_route(tmp_path: Path) -> None:
    from fastapi.routing import APIRoute

    from veneer.serve.tenancy.admin import admin_router
    from veneer.serve.tenancy.keys import make_admin_key
    from veneer.serve.tenancy.tenants import Tenants

    tenants = Tenants(str(tmp_path / "t.sqlite"), admin_key=make_admin_key(), watch=False)
    routes = [route.path for route in admin_router(tenants, ToyCatalog()).routes if isinstance(route, APIRoute)]
    tenants.close()
    assert len(routes) == 20
    for path in routes:
        last = path.rsplit("/", 1)[-1].strip("{}")
        assert last in PAGE or last in ("tenant", "key"), f"{path} is not on the page"
