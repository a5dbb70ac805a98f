"""Faster paths for a base while it trains: nothing here yet but the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["fast"]


@contextmanager
def fast(model: Any) -> Iterator[None]:
    """The model runs its fast paths inside the with-block."""
    yield
