"""The Objectives view: each tenant sees its own answers, the operator sees all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.http.toy import wait_for
from tests.studio.conftest import OPERATOR, StudioServer, tenant_keys
from tests.studio.page_socket import page_html

Shared = tuple[StudioServer, dict[str, str]]


@pytest.fixture(scope="module")
def shared(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Yield a server whose first tokens are always too late, and whose other times never are."""
    folder = tmp_path_factory.mktemp("objectives")
    keys = tenant_keys(folder / "tenants.sqlite")
    config = folder / "server.yaml"
    config.write_text("objectives: {first_token: 0.000001, between_tokens: 1000, slow: 0.1, failed: 0.001}\n")
    options = ("--tenants", str(folder / "tenants.sqlite"), "--admin-key", OPERATOR, "--config", str(config))
    with StudioServer(folder, *tiny, *options) as server:
        yield server, keys


def rows(server: StudioServer, key: str) -> dict[str, list[str]]:
    """Return the table of the page: tenant -> texts of the other columns."""
    with httpx.Client(base_url=server.address, follow_redirects=True, timeout=60) as client:
        client.post("/studio/enter", data={"key": key})
        page = page_html(client.get("/studio/objectives"))
    found = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    return {cells[0]: [re.sub("<.*?>", "", cell) for cell in cells[1:]] for cells in found if cells}


def test_a_tenant_sees_its_own_answers_and_the_operator_sees_all(shared: Shared) -> None:
    server, keys = shared
    assert rows(server, keys["operator"]) == {}
    for tenant, count in (("acme", 2), ("globex", 1)):
        body = {"model": f"{tenant}/tone", "prompt": "Where is my parcel?", "max_tokens": 3}
        for _ in range(count):
            headers = {"authorization": f"Bearer {keys[tenant]}"}
            httpx.post(f"{server.address}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
    levels = ["0.0% missed", "100.0% met", "100.0% met"]
    wait_for(lambda: len(rows(server, keys["operator"])) == 3, 60)
    assert rows(server, keys["acme"]) == {"acme": ["2", *levels]}
    assert rows(server, keys["globex"]) == {"globex": ["1", *levels]}
    everyone = {"all tenants": ["3", *levels], "acme": ["2", *levels], "globex": ["1", *levels]}
    assert rows(server, keys["operator"]) == everyone


def test_the_page_shows_the_objectives_of_the_configuration_file(shared: Shared) -> None:
    server, keys = shared
    with httpx.Client(base_url=server.address, follow_redirects=True, timeout=60) as client:
        client.post("/studio/enter", data={"key": keys["operator"]})
        page = page_html(client.get("/studio/objectives"))
    for text in ("First token within 1e-06 s", "At most 1000 s between tokens", "90% of answers", "99.9% of answers"):
        assert text in page
