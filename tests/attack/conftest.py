"""One server process for all attacks; each attack must leave the server unchanged.

This folder is not a package: if it were, parallel test processes would not run its tests one after
another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attack.harness import Server, target
from tests.serve.whole import Shop, make_shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("shop"), ["plain", "dora"])


@pytest.fixture(scope="session")
def one_server(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with target(shop, tmp_path_factory.mktemp("home")) as server:
        yield server


@pytest.fixture(scope="module")
def server(one_server: Server) -> Server:
    """Return the server, once no request of earlier tests is left."""
    one_server.wait(lambda: one_server.series("vllm:num_requests_running") == 0)
    one_server.wait(lambda: one_server.series("vllm:num_requests_waiting") == 0)
    return one_server


@pytest.fixture(scope="session")
def trainer(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server that also trains."""
    with target(shop, tmp_path_factory.mktemp("training"), "--train") as server:
        yield server
