"""What the reference model says of each answer: computed once, and kept by content.

    logps = cached(examples, path, key, compute)         log p of each example; only what is not in the file is computed

A line of the file is ["sha256 of whose log-probabilities, tokens and trained-mask", log p], so that a changed row, base
or adapter is another line and nothing is ever stale. Lines are added as they are computed: a run that is stopped finds
them. Does not know models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from veneer.train.checkpoint import disk_errors
from veneer.train.devices import ALONE, Devices
from veneer.train.text.encode import Example

__all__ = ["cached"]

_CHUNK = 256  # examples between two writes


def cached(
    examples: Sequence[Example],
    path: Path,
    key: str,
    compute: Callable[[Sequence[Example]], list[float]],
    say: Callable[[str], None] = lambda line: None,
    devices: Devices = ALONE,
) -> list[float]:
    """log p of each of the examples. `key`: whose they are (base, precision, adapter). `say` hears what is done. With
    several devices the first reads and writes the file, and `compute` is called on all.

    Equal examples are computed once. Raises ResourceError for a full disk and what `compute` raises."""
    known = devices.gather(_read(path) if devices.first else {})[0]
    names = [_name(key, e) for e in examples]
    missing = {name: e for name, e in zip(names, examples, strict=True) if name not in known}
    # Long ones first, so that what does not fit shows at once, and like with like.
    order = sorted(missing.items(), key=lambda item: (-item[1].tokens, item[0]))
    total = len(set(names))
    say(f"reference: log-probabilities of {total:,} answers, {total - len(order):,} of them known already")
    for at in range(0, len(order), _CHUNK):
        chunk = order[at : at + _CHUNK]
        lines = list(zip((name for name, _ in chunk), compute([e for _, e in chunk]), strict=True))
        known.update(lines)
        if devices.first:
            _add(path, lines)
        say(f"reference: {min(at + _CHUNK, len(order)):,} of {len(order):,} computed")
    return [known[name] for name in names]


def _add(path: Path, lines: Sequence[tuple[str, float]]) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _name(key: str, example: Example) -> str:
    content = json.dumps([key, example.input_ids, [int(t) for t in example.trained]], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _read(path: Path) -> dict[str, float]:
    """What the file has; a last line that a kill cut short is left out, and what follows it begins a new line."""
    known: dict[str, float] = {}
    if not path.is_file():
        return known
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        try:
            name, value = json.loads(line)
            known[str(name)] = float(value)
        except (ValueError, TypeError):
            continue
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return known
