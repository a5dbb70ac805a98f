"""One live server per test module, reset before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyText, live


@pytest.fixture(scope="module")
def text() -> ToyText:
    return ToyText(tools=True)


@pytest.fixture(scope="module")
def _served(text: ToyText) -> Iterator[Live]:
    with live(ToyEngine(text), ToyCatalog()) as served:
        yield served


@pytest.fixture
def server(_served: Live) -> Live:
    service = _served.service
    _served.engine = service.engine = ToyEngine(_served.engine.text)
    _served.catalog = service.catalog = ToyCatalog()
    service.phase = "ready"
    service.__post_init__()  # resets metrics and counters
    return _served
