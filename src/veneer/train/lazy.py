"""Sequences whose items are created when they are read, so that a million rows take no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

_T = TypeVar("_T")


class Lazy(Sequence[_T]):
    """A sequence of `count` items, in which item i is `make(i)`. Slices are lists."""

    def __init__(self, count: int, make: Callable[[int], _T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> list[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | list[_T]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        return self._make(range(self._count)[index])  # range handles negative indices and raises IndexError


def token_counts(items: Sequence[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the number of tokens and of trained tokens of each item, two arrays of shape (items,)."""
    if (known := getattr(items, "counts", None)) is not None:
        return known  # type: ignore[no-any-return]
    pairs = [(item.tokens, item.trained_tokens) for item in items]
    tokens, trained = np.array(pairs, np.int64).reshape(-1, 2).T.copy()
    return tokens, trained
