"""Read a batch file: one JSON object per line, with prompt, mix and seed.

    {"prompt": "a fox", "adapters": ["brand:0.8"], "seed": 5}
    {"prompt": "a fox", "adapters": ["brand:0.4", "look:0.6@steps=0.5-1"], "negative": "blurry"}
    {"prompt": "a fox", "adapters": []}

The caller's settings are the defaults for keys that a line does not have. One error lists all invalid lines.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.errors import DataError, VeneerError, bullets, counted, nearest
from veneer.imaging.adapters import parse_use
from veneer.imaging.generate import ImageRequest

_BATCH_KEYS = ("prompt", "adapters", "seed", "negative")


def read_batch(path: str | Path, shared: ImageRequest | None = None) -> list[ImageRequest]:
    """Return the requests of a file, in order.

    shared: the defaults for keys that a line does not have.

    Raises DataError for an unreadable or empty file, and for invalid lines, with every line number and
    problem."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError("there is no such batch file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the batch cannot be read: {error}", where=str(path)) from error
    requests: list[ImageRequest] = []
    bad: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, because a prompt can contain U+2028
        if line.strip():
            try:
                requests.append(_parse_line(line, shared or ImageRequest("")))
            except VeneerError as error:
                bad.append(f"line {number}: {error.what}" + (f" ({error.fix})" if error.fix else ""))
    if bad:
        message = f"the batch has {counted(len(bad), 'invalid line')}:\n{bullets(bad)}"
        raise DataError(message, where=str(path), fix=f"lines like {_EXAMPLE}")
    if not requests:
        raise DataError("the batch has no lines", where=str(path), fix=f"write one line per picture: {_EXAMPLE}")
    return requests


_EXAMPLE = '{"prompt": "a fox", "adapters": ["brand:0.8"], "seed": 5, "negative": "blurry"}'


def _parse_line(line: str, shared: ImageRequest) -> ImageRequest:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    for key in row.keys() - set(_BATCH_KEYS):
        suggestion = nearest(key, _BATCH_KEYS, 1)
        raise DataError(f"unknown key {key!r}" + (f", the nearest is {suggestion[0]!r}" if suggestion else ""))
    if "prompt" not in row:
        raise DataError("no prompt")
    if "adapters" in row:
        specs = row.pop("adapters")
        if not isinstance(specs, list) or not all(isinstance(spec, str) for spec in specs):
            raise DataError(f'adapters is {specs!r}; it must be a list of strings, as in ["brand:0.8"]')
        row["uses"] = tuple(parse_use(spec) for spec in specs)
    return replace(shared, **row)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dictionary.

    Raises ValueError for duplicate keys, because the JSON parser would silently keep only the last value."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return fields
