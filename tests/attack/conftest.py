"""One server process for each file of attacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attack.harness import Server, target
from tests.serve.whole import Shop, make_shop


@pytest.fixture(scope="package")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("shop"), ["plain", "dora"])


@pytest.fixture(scope="module")
def server(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with target(shop, tmp_path_factory.mktemp("home")) as made:
        yield made
