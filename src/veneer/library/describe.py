"""What the library wants to know of an adapter's files: which they are, and what they hold.

`describe_adapter` reads whatever `formats` can; another takes its place as an argument of `Library.add`. Knows formats;
nothing of names or the index.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "veneer.json", "README.md")
_MAX_WORDS = 20_000


@dataclass(frozen=True)
class Content:
    """`place`: the folder or file. `files`: name -> path of what is kept. `left_out`: what else lies in the folder."""

    place: Path
    files: dict[str, Path]
    left_out: list[str]


@dataclass
class AdapterDescription:
    """What is known of an adapter. `digest`: core's, "" where its format is not understood. `card`: the fields of
    core.adapter.Card as JSON, each of which may be missing."""

    digest: str = ""
    format: str = ""
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def trigger_words(self) -> list[str]:
        return _texts(self.card.get("trigger_words"))

    @property
    def parents(self) -> list[str]:
        return _texts(self.card.get("parents"))

    def columns(self, size: int) -> dict[str, Any]:
        """The row of the index, without the id."""
        text = {k: str(self.card.get(k) or "") for k in ("base", "base_fingerprint", "kind", "licence", "created")}
        base_name = text["base"].rstrip("/").rpartition("/")[2].lower()
        told = {k: v for k, v in self.card.items() if k != "targets"}  # many, and nobody searches for them
        words = " ".join([self.format, *_leaves(told)]).lower()[:_MAX_WORDS]
        return {
            "digest": self.digest,
            "format": self.format,
            "kind": text["kind"],
            "base": text["base"],
            "base_name": base_name,
            "fingerprint": text["base_fingerprint"],
            "licence": text["licence"],
            "created": text["created"],
            "size": size,
            "card": json.dumps(self.card, sort_keys=True, ensure_ascii=False, allow_nan=False),
            "words": words,
        }


def content_of(path: Path) -> Content:
    """The files of the adapter at `path`. Raises AdapterError if there is none."""
    if path.is_file():
        return Content(path, {path.name: path}, [])
    if not path.is_dir():
        raise AdapterError("there is no such file or folder", where=str(path))
    here = path if (path / PEFT_FILES[0]).is_file() else path / "adapter"
    if not (here / PEFT_FILES[0]).is_file():
        single = sorted(p.name for p in path.glob("*.safetensors"))
        fix = f"give one of its files: {', '.join(single[:5])}" if single else None
        raise AdapterError(f"the folder has no {PEFT_FILES[0]}", where=str(path), fix=fix)
    inside = sorted(p.name for p in here.iterdir())
    return Content(
        here,
        {n: here / n for n in PEFT_FILES if (here / n).is_file()},
        [n for n in inside if n not in PEFT_FILES],
    )


def describe_adapter(path: Path) -> AdapterDescription:
    """An adapter of any format, read whole: its digest under canonical names, its format and its card.
    Raises AdapterError for anything that is not an adapter, or that has a tensor of unknown meaning."""
    from veneer.formats.read import read

    reading = read(path)
    return AdapterDescription(reading.adapter.digest(), reading.format, reading.adapter.card.to_dict())


def _texts(value: Any) -> list[str]:
    """The distinct texts of a list, in order; a card from elsewhere may hold anything."""
    return list(dict.fromkeys(v for v in value if isinstance(v, str) and v)) if isinstance(value, list) else []


def _leaves(value: Any) -> list[str]:
    """Every text in a card but digests."""
    if isinstance(value, dict):
        return [text for v in value.values() for text in _leaves(v)]
    if isinstance(value, list):
        return [text for v in value for text in _leaves(v)]
    return [value] if isinstance(value, str) and value and not value.startswith("sha256:") else []
