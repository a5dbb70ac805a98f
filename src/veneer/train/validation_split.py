"""Select a run's held-out rows or images if the configuration does not name them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from veneer.errors import DataError


class Keyed(Protocol):
    """An item that can be held out: a row or an image.

    key: a hash of all its trained content."""

    @property
    def key(self) -> str: ...


_AnyKeyed = TypeVar("_AnyKeyed", bound=Keyed)


def _sha256(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def hold_out(
    items: Sequence[_AnyKeyed],
    split: int | float | None,
    *,
    seed: int,
    default: int,
    noun: str = "rows",
    order: Callable[[bytes], bytes] = _sha256,
) -> tuple[list[_AnyKeyed], list[_AnyKeyed]]:
    """Return (training items, held-out items).

    The choice depends on a seeded hash of each item's content (`order`), not on the order or names of files,
    so identical items are always in the same list. Both lists keep the order of `items`.

    split: a number (int), a share (float; at least one item), or None for `default`. noun: what the items are
    called in messages.

    Raises DataError if no training item would be left."""
    if split is None:
        split = default
    count = split if isinstance(split, int) else max(1, round(split * len(items))) if split > 0 else 0
    if count == 0:
        return list(items), []
    if count >= len(items):
        text = f"data.split: {split} holds out {count} {noun} of {len(items)}: nothing is left to train on"
        raise DataError(text, fix="hold out fewer, or provide more data")
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.key, []).append(i)
    selected: set[int] = set()
    for key in sorted(groups, key=lambda key: order(f"{seed}|{key}".encode())):
        if len(selected) + len(groups[key]) <= count:
            selected.update(groups[key])
        if len(selected) == count:
            break
    return [item for i, item in enumerate(items) if i not in selected], [items[i] for i in sorted(selected)]
