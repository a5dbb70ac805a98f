"""One live server for each file of tests; a fresh one where a test changes what is served."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyText, live


@pytest.fixture(scope="module")
def text() -> ToyText:
    return ToyText(tools=True)


@pytest.fixture
def server(text: ToyText) -> Iterator[Live]:
    with live(ToyEngine(text), ToyCatalog()) as served:
        yield served
