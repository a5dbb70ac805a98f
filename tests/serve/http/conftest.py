"""One live server for each file of tests, as new for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyText, live
from veneer.serve.http.house import LoraNumbers


@pytest.fixture(scope="module")
def text() -> ToyText:
    return ToyText(tools=True)


@pytest.fixture(scope="module")
def _served(text: ToyText) -> Iterator[Live]:
    with live(ToyEngine(text), ToyCatalog()) as served:
        yield served


@pytest.fixture
def server(_served: Live) -> Live:
    house = _served.house
    _served.engine = house.engine = ToyEngine(_served.engine.text)
    _served.catalog = house.catalog = ToyCatalog()
    house.loras, house.default, house.phase = LoraNumbers(), {}, "ready"
    house.__post_init__()  # metrics from zero
    return _served
