"""Read a batch file: one JSON object per line, with its prompt, mix and seed.

    {"prompt": "a fox", "adapters": ["brand:0.8"], "seed": 5}
    {"prompt": "a fox", "adapters": ["brand:0.4", "look:0.6@steps=0.5-1"], "negative": "blurry"}
    {"prompt": "a fox", "adapters": []}

The caller's settings apply to keys that a line does not have. One error lists all faults of a file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.errors import DataError, VeneerError, bullets, nearest
from veneer.imaging.adapters import parse_use
from veneer.imaging.generate import ImageRequest

_BATCH_KEYS = ("prompt", "adapters", "seed", "negative")


def read_batch(path: str | Path, shared: ImageRequest | None = None) -> list[ImageRequest]:
    """Return the requests of a file, in order.

    `shared`: the values of missing keys. Raises DataError for an unreadable or empty file, and for invalid
    lines: the error lists every line number and fault."""
    place = Path(path).expanduser()
    try:
        text = place.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        near = nearest(place.name, beside, 1)
        fix = f"did you mean {place.with_name(near[0])}?" if near else None
        raise DataError("there is no such batch", where=str(path), fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the batch cannot be read: {error}", where=str(path)) from error
    asks: list[ImageRequest] = []
    bad: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a prompt can contain U+2028
        if line.strip():
            found = _asked(line, shared or ImageRequest(""))
            if isinstance(found, ImageRequest):
                asks.append(found)
            else:
                bad += [f"line {number}: {problem}" for problem in found]
    if bad:
        faults = f"{len(bad)} fault{'s' * (len(bad) > 1)}"
        raise DataError(f"the batch has {faults}:\n{bullets(bad)}", where=str(path), fix=f"lines like {_EXAMPLE}")
    if not asks:
        raise DataError("the batch has no lines", where=str(path), fix=f"a line for each picture: {_EXAMPLE}")
    return asks


_EXAMPLE = '{"prompt": "a fox", "adapters": ["brand:0.8"], "seed": 5, "negative": "blurry"}'


def _asked(line: str, shared: ImageRequest) -> ImageRequest | list[str]:
    """Return the request of a line, or a list of its faults."""
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return [f"not JSON: {error}"]
    if not isinstance(row, dict):
        return ["not a JSON object"]
    bad: list[str] = []
    for key in row:
        if key not in _BATCH_KEYS:
            near = nearest(key, _BATCH_KEYS, 1)
            bad.append(f"unknown key {key!r}" + (f", the nearest is {near[0]!r}" if near else ""))
    for key in ("prompt", "negative"):
        if not isinstance(row.get(key, ""), str):
            bad.append(f"{key} is {row[key]!r}, and a text is wanted")
    if not row.get("prompt"):
        bad.append("it has no prompt")
    if type(row.get("seed", 0)) is not int:
        bad.append(f"seed is {row['seed']!r}, and a whole number is wanted")
    specs = row.get("adapters", [])
    if not isinstance(specs, list) or not all(isinstance(spec, str) for spec in specs):
        bad.append(f'adapters is {specs!r}, and a list of texts is wanted, as in ["brand:0.8"]')
    if bad:
        return bad
    try:
        if "adapters" in row:
            row["uses"] = tuple(parse_use(spec) for spec in row.pop("adapters"))
        return replace(shared, **row)
    except VeneerError as error:
        return [error.what + (f" ({error.fix})" if error.fix else "")]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; raise ValueError for duplicate keys.

    JSON readers would keep the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return found
