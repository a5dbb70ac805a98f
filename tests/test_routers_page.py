"""The commands of docs/how-to/routers.md start an engine, a router and a front door, which answers a tenant."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.forks import Forked
from tests.homes import home_with_kernels
from tests.serve.http.toy import free_port, wait_for
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.test_routers import FILES, LONG, program, with_addresses
from tests.serve.whole import is_ready, make_shop
from tests.test_readme import ROOT, blocks
from veneer.serve.tenancy.store import Store

PAGE = (ROOT / "docs" / "how-to" / "routers.md").read_text(encoding="utf-8")


def test_the_page_links_every_router_file():
    linked = re.findall(r"\(\.\./\.\./deploy/routers/([^)]+)\)", PAGE)
    assert sorted(linked) == sorted(file.name for file in FILES.iterdir())


def test_plugins_of_the_endpoint_picker_are_declared():
    """llm-d: each reference must name a plug-in of the list `plugins`, whose default name is its type."""
    (text,) = blocks((FILES / "llm-d.md").read_text(encoding="utf-8"), "yaml")
    config = yaml.safe_load(text)
    (profile,) = config["schedulingProfiles"]
    used = {each["pluginRef"] for each in profile["plugins"]}
    used.add(config["flowControl"]["defaultPriorityBand"]["fairnessPolicyRef"])
    assert used == {each["type"] for each in config["plugins"]}
    assert config["featureGates"] == ["flowControl"]  # without it, flowControl has no effect


@contextmanager
def shell(line: str, folder: Path, env: dict[str, str]) -> Iterator[None]:
    """Run a shell command in the background, and end it afterwards."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(line, shell=True, cwd=folder, env=env, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.fleet
def test_the_commands_start_a_fleet(tmp_path):
    """Addresses, the base and the databases are this test's; options and order are the page's."""
    shop = make_shop(tmp_path, ("plain",))
    key = new_tenant(store := Store(str(tmp_path / "tenants.sqlite")), "acme", ["*"])
    store.close()
    engine, router, door = free_port(), free_port(), free_port()
    (tmp_path / "haproxy.cfg").write_text(with_addresses("haproxy.cfg", [f"http://127.0.0.1:{engine}"], router))
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    env |= {"VENEER_HOME": str(home_with_kernels(tmp_path / "home")), "VENEER_VLLM_CACHE": str(tmp_path / "mixes")}
    env["PATH"] = f"{Path(program('haproxy', 'haproxy')).parent}:{env['PATH']}"
    local = {"s3://bucket/library": shop.library.location, " VENEER_LIBRARY_INDEX=postgresql://db/library": ""}
    local |= {"--base BASE": f"--base {shop.base_dir}", "router:8000": f"127.0.0.1:{router}"}
    local |= {"postgresql://db/tenants": str(tmp_path / "tenants.sqlite")}
    (lines,) = blocks(PAGE, "sh")
    ports = iter((engine, door))
    with ExitStack() as running:
        for raw in lines.splitlines():
            line = re.sub(r"\s+#.*$", "", raw)
            for before, after in local.items():
                line = line.replace(before, after)
            if line.startswith("export "):
                env |= dict(word.split("=", 1) for word in line.split()[1:])
            elif line.startswith("veneer "):
                port = next(ports)
                command = ["-c", "from veneer.cli.main import main; main()", *line.split()[1:], "--port", str(port)]
                server = Forked(command, env=env, log=tmp_path / f"log{port}", cwd=tmp_path)
                running.callback(server.wait)
                running.callback(server.kill)
                url = f"http://127.0.0.1:{port}"
                wait_for(lambda at=url, it=server: it.poll() is not None or is_ready(at), LONG)
                assert server.poll() is None, (tmp_path / f"log{port}").read_text()[-3000:]
            else:
                running.enter_context(shell(line, tmp_path, env))
                wait_for(lambda: (tmp_path / "keys").exists(), LONG)
        assert not list(ports)
        body = {"model": "plain", "prompt": "a", "max_tokens": 3}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"http://127.0.0.1:{door}/v1/completions", json=body, headers=headers, timeout=LONG)
        assert answer.status_code == 200, answer.text
        assert httpx.post(f"http://127.0.0.1:{engine}/v1/completions", json=body).status_code == 401
