"""Helpers for tests of names and sources: saved adapters, and the reasons of refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.test_use import adapter_for
from veneer.core.adapter import Adapter
from veneer.formats import peft
from veneer.models.text.base import TextBase
from veneer.serve.names.catalog import Catalog
from veneer.serve.request import Refused


@dataclass(eq=False)
class Ready:
    adapter: Adapter
    bytes: int


Make = Callable[..., Catalog]


def saved(base: TextBase, folder: Path, seed: int = 0, **card: Any) -> str:
    """Write an adapter in PEFT's layout. Return its digest."""
    adapter = adapter_for(base, seed, **card)
    peft.write_folder(adapter, folder)
    return peft.load_folder(folder).adapter.digest()


def of(digest: str) -> tuple[tuple[str, float], ...]:
    return ((digest, 1.0),)


def refused(call: Callable[[], Any]) -> Refused:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value


def reason(error: Refused) -> str:
    assert error.code == "adapter_unusable", error
    return error.what.partition(":")[0]
