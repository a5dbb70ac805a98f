"""Describe an adapter for the library: list its files and read its card.

`describe_adapter` reads every format that `formats` supports; a caller of `Library.add` can pass another
function instead. This module does not depend on names or the index.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError
from veneer.formats.card import sample_messages
from veneer.formats.folder import MLX_FILE

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", MLX_FILE, "veneer.json", "README.md")
"""The files in an adapter's folder that the library stores."""
_MAX_WORDS = 20_000
_PICTURE = re.compile(r"data:(image/(?:jpeg|png|webp));base64,([A-Za-z0-9+/=]+)")


@dataclass(frozen=True)
class Gain:
    """An adapter's gain over its base on held-out data.

    before: the loss before training.
    after: the loss of the saved adapter.
    rewarded: whether the losses are from reinforcement learning, where a loss is minus the mean reward."""

    before: float
    after: float
    rewarded: bool = False

    @property
    def share(self) -> float | None:
        """Return the relative change of the loss: −0.38 means a 38 % lower loss.

        None for rewards, and for a loss of 0 before training."""
        return self.after / self.before - 1 if self.before > 1e-9 and not self.rewarded else None

    def __str__(self) -> str:
        if self.rewarded:
            return f"held-out reward {0.0 - self.before:.4g} → {0.0 - self.after:.4g}"
        share = "" if self.share is None else f" ({self.share:+.0%})".replace("-", "−").replace("%", " %")
        return f"held-out loss {self.before:.4g} → {self.after:.4g}{share}"


def gain_of(card: Mapping[str, Any]) -> Gain | None:
    """Return the gain recorded in a card; None if the card has no held-out losses."""
    metrics = _dict(card, "metrics")
    initial, final = (_number(metrics.get(f"validation_loss{when}")) for when in ("_before", ""))
    rewarded = "reward_failed" in _dict(metrics, "measured")
    return None if initial is None or final is None else Gain(initial, final, rewarded)


def card_picture(card: Mapping[str, Any]) -> tuple[str, bytes] | None:
    """Return an image adapter's thumbnail as (media type, bytes).

    None if the card has no thumbnail, or if the thumbnail's image type is not allowed."""
    match = _PICTURE.fullmatch(str(_dict(card, "extra").get("thumbnail")))
    try:
        return (match[1], base64.b64decode(match[2], validate=True)) if match else None
    except binascii.Error:
        return None


def card_sample(card: Mapping[str, Any]) -> dict[str, str] | None:
    """Return a held-out prompt with the base's and the adapter's completions.

    Keys: `prompt`, `base`, `adapter`. `prompt` is the last message only; `card_prompt` returns all messages.
    None if the card has no sample."""
    sample = _dict(_dict(card, "extra"), "sample")
    texts = {key: text for key in ("prompt", "base", "adapter") if isinstance(text := sample.get(key), str)}
    return texts if len(texts) == 3 else None


def card_prompt(card: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages of the card's sample prompt, including the system message.

    [] if there is no sample prompt."""
    return sample_messages(_dict(card, "extra"))


@dataclass(frozen=True)
class Content:
    """The files of an adapter.

    path: the folder or file.
    files: name -> path of the files that the library stores.
    left_out: names of the other files in the folder.
    """

    path: Path
    files: dict[str, Path]
    left_out: list[str]


@dataclass
class AdapterDescription:
    """What the library records about an adapter.

    digest: the adapter's canonical digest; "" if the format is unknown.
    card: the fields of core.adapter.Card as JSON; any field can be missing."""

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
        """Return the adapter's row for the table `entries`, without id and manifest."""
        text = {k: str(self.card.get(k) or "") for k in ("base", "base_fingerprint", "kind", "licence", "created")}
        base_name = text["base"].rstrip("/").rpartition("/")[2].lower()
        # without `targets`: the list is long, and searching for a target name is not useful
        searched = {k: v for k, v in self.card.items() if k != "targets"}
        words = " ".join([self.format, *_leaves(searched)]).lower()[:_MAX_WORDS]
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

    def figures(self) -> dict[str, Any]:
        """Return the adapter's rank and gain, which the index sorts by."""
        rank, gain = self.card.get("rank"), gain_of(self.card)
        rank_or_0 = rank if type(rank) is int and 0 <= rank < 2**31 else 0
        return {"rank": rank_or_0, "gain": gain.share if gain else None}


def content_of(path: Path) -> Content:
    """Return the files of the adapter at `path`.

    Raises AdapterError if there is no adapter at `path`."""
    if path.is_file():
        return Content(path, {path.name: path}, [])
    if not path.is_dir():
        raise AdapterError("there is no such file or folder", where=str(path))
    folder = path if (path / PEFT_FILES[0]).is_file() else path / "adapter"
    if not (folder / PEFT_FILES[0]).is_file():
        single = sorted(p.name for p in path.glob("*.safetensors"))
        fix = f"give one of its files: {', '.join(single[:5])}" if single else None
        raise AdapterError(f"the folder has no {PEFT_FILES[0]}", where=str(path), fix=fix)
    names = [n for n in PEFT_FILES if (folder / n).is_file()]
    if "adapter_model.safetensors" in names and MLX_FILE in names:
        names.remove(MLX_FILE)  # with both formats in the folder, PEFT's file is read
    left_out = sorted(p.name for p in folder.iterdir() if p.name not in names)
    return Content(folder, {n: folder / n for n in names}, left_out)


def describe_adapter(path: Path) -> AdapterDescription:
    """Return the canonical digest, format and card of an adapter in any format.

    Raises AdapterError if the files are not an adapter, or if the meaning of a tensor is unknown."""
    from veneer.formats.read import read

    reading = read(path)
    return AdapterDescription(reading.adapter.digest(), reading.format, reading.adapter.card.to_dict())


def _dict(card: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a card's field if it is a dict, otherwise {}.

    Cards from other tools can contain other types."""
    part = card.get(key)
    return part if isinstance(part, dict) else {}


def _texts(value: Any) -> list[str]:
    """Return the distinct strings of a list, in order; [] if it is not a list."""
    return list(dict.fromkeys(v for v in value if isinstance(v, str) and v)) if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    """Return a card's number as a float; None for any other value."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e9 else None


def _leaves(value: Any) -> list[str]:
    """Return every string in a card except digests and images."""
    if isinstance(value, dict):
        return [text for v in value.values() for text in _leaves(v)]
    if isinstance(value, list):
        return [text for v in value for text in _leaves(v)]
    return [value] if isinstance(value, str) and value and not value.startswith(("sha256:", "data:")) else []
