"""One server process for all attacks that it outlives as it was. Not a package's: where several processes share the
files, those of a package do not come one after another."""

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
    """The server has no request left from earlier tests."""
    one_server.wait(lambda: one_server.series("vllm:num_requests_running") == 0)
    one_server.wait(lambda: one_server.series("vllm:num_requests_waiting") == 0)
    return one_server


@pytest.fixture(scope="session")
def trainer(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that also trains."""
    with target(shop, tmp_path_factory.mktemp("training"), "--train") as server:
        yield server
