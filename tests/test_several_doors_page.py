"""The commands of docs/how-to/several-doors.md start two servers that share tenants, adapters and limits.

PostgreSQL, Redis and S3 (moto) are real servers on this machine, in place of the page's addresses.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.adapters.test_use import adapter_for
from tests.forks import Forked
from tests.homes import home_with_kernels
from tests.library.conftest import _s3_server, postgres, s3  # noqa: F401
from tests.serve.http.toy import free_port, wait_for
from tests.serve.tenancy.conftest import RedisServer, new_tenant, redis_server  # noqa: F401
from tests.serve.whole import is_ready
from tests.test_readme import ROOT, blocks, roomy
from tests.tiny_base import tiny_base_dir
from veneer.formats import peft
from veneer.library.library import open_library
from veneer.models.text.base import load_text
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store

PAGE = (ROOT / "docs" / "how-to" / "several-doors.md").read_text(encoding="utf-8")
LINES = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]
EXPORTS = [word for line in LINES if line.startswith("export ") for word in shlex.split(line, comments=True)[1:]]
(SERVE,) = [shlex.split(line) for line in LINES if line.startswith("veneer serve ")]


def test_the_page_has_no_other_commands_and_its_variables_exist() -> None:
    assert all(line.startswith(("export ", "veneer serve ")) for line in LINES)
    documented = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    named = {word.partition("=")[0] for word in EXPORTS} | set(re.findall(r"\bVENEER_[A-Z_]+", PAGE))
    assert "VENEER_REDIS_URL" in named
    assert not [name for name in named if f"`{name}`" not in documented]


@pytest.fixture
def environment(
    postgres: Callable[[], str],  # noqa: F811
    s3: str,  # noqa: F811
    redis_server: RedisServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Export the page's variables, with the addresses of real servers."""
    addresses = {"postgresql": postgres(), "s3": f"{s3}/library", "redis": redis_server.url}
    for word in EXPORTS:
        name, value = word.split("=", 1)
        monkeypatch.setenv(name, addresses[value.partition(":")[0]])


@pytest.mark.fleet
@pytest.mark.usefixtures("environment")
def test_two_servers_share_keys_adapters_and_limits(tmp_path: Path) -> None:
    folder = roomy(tiny_base_dir(tmp_path)).rename(tmp_path / "smollm2-135m")
    peft.write_folder(adapter_for(load_text(str(folder)), 0), tmp_path / "run")
    store, servers = Store(os.environ["VENEER_TENANTS"]), []
    with ExitStack() as stack, open_library() as library:
        stack.callback(store.close)
        library.add(tmp_path / "run", "acme/support")
        for n in range(2):
            home, port = tmp_path / f"server-{n}", free_port()
            home.mkdir()
            env = os.environ | {"VENEER_HOME": str(home_with_kernels(home))}
            command = ["./smollm2-135m" if word == "smollm2-135m" else word for word in SERVE[1:]]
            command = ["-c", "from veneer.cli.main import main; main()", *command, "--port", str(port)]
            server = Forked(command, env=env, log=home / "log", cwd=tmp_path)
            stack.callback(server.wait)
            stack.callback(server.kill)
            servers.append((server, f"http://127.0.0.1:{port}", home / "log"))
        for server, url, log in servers:
            wait_for(lambda server=server, url=url: server.poll() is not None or is_ready(url), 300)
            assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        key = new_tenant(store, "acme", ["acme/*"])
        manage.change_settings(store, "acme", {"requests_per_day": 3}, actor="me")

        def ask(n: int) -> httpx.Response:
            body = {"model": "acme/support", "prompt": "The door", "max_tokens": 2, "temperature": 0}
            url, headers = f"{servers[n % 2][1]}/v1/completions", {"Authorization": f"Bearer {key}"}
            return httpx.post(url, json=body, headers=headers, timeout=120)

        answers = [ask(n) for n in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert len({answer.json()["choices"][0]["text"] for answer in answers[:3]}) == 1
