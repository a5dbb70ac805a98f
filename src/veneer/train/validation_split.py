"""Select a run's held-out rows or images if the configuration does not name them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from veneer.errors import DataError


def _sha256(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def hold_out(
    keys: Iterable[str],
    items: int,
    split: int | float | None,
    *,
    seed: int,
    default: int,
    noun: str = "rows",
    order: Callable[[bytes], bytes] = _sha256,
) -> list[int]:
    """Return the indices of the held-out items, in ascending order.

    The choice depends on a seeded hash of each item's key (`order`), not on the order or names of files, so
    items with equal keys are always in the same part.

    items: number of keys. split: a number (int), a share (float; at least one item), or None for `default`.
    noun: what the items are called in messages.

    Raises DataError if no training item would be left."""
    if split is None:
        split = default
    count = split if isinstance(split, int) else max(1, round(split * items)) if split > 0 else 0
    if count == 0:
        return []
    if count >= items:
        text = f"data.split: {split} holds out {count} {noun} of {items}: nothing is left to train on"
        raise DataError(text, fix="hold out fewer, or provide more data")
    # Eight bytes of each hash, so that the hashes of a million rows take little memory.
    hashes = np.frombuffer(b"".join(order(f"{seed}|{key}".encode())[:8] for key in keys), ">u8")
    sequence = np.argsort(hashes, kind="stable")
    selected: list[int] = []
    for _, group in itertools.groupby(map(int, sequence), key=hashes.__getitem__):
        indices = list(group)
        if len(selected) + len(indices) <= count:
            selected += indices
        if len(selected) == count:
            break
    return sorted(selected)
