"""An adapter's card: `veneer.json` for programs, `README.md` for people.

    veneer.json = {"veneer": 1, "digest": "sha256:…", "files": {name: "sha256:…"}, …every field of core.Card}

Unknown keys are reported and kept in the card's `extra`, so that data from a newer version of the card is not
lost. Equal cards give equal bytes in both files. This module handles JSON and Markdown, and does not depend
on tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from veneer.core.adapter import Adapter, Card, hub_id
from veneer.errors import AdapterError, bullets
from veneer.files.safetensors import strict_json

CARD_FILE = "veneer.json"
README_FILE = "README.md"
_VERSION = 1
_MAX_CARD_BYTES = 16 << 20
MARK = (
    "<!-- written by veneer: edit freely, and remove this line to keep your edits when the adapter is saved again -->"
)


@dataclass
class CardFile:
    """A card read from a file.

    `digest`: digest of the adapter. `files`: SHA-256 of the other files in the folder. `unknown`: unknown
    keys, which are also in `card.extra`."""

    card: Card
    digest: str = ""
    files: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def file_digest(data: Path | Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of a file, or of bytes in chunks, as `sha256:<hex>`."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for chunk in data:
        digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def card_bytes(card: Card, *, digest: str = "", files: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of `veneer.json`.

    Raises AdapterError for values that JSON cannot represent."""
    body = {"veneer": _VERSION, "digest": digest, "files": dict(files or {}), **card.to_dict()}
    try:
        text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the card holds a value that JSON cannot represent: {error}", where=CARD_FILE) from None
    return text.encode() + b"\n"


def read_card(folder: str | Path) -> CardFile:
    """Return the card in a folder.

    Raises AdapterError if the card cannot be read. One error lists all fields that have the wrong type."""
    path = Path(folder) / CARD_FILE
    where = str(path)
    try:
        if path.stat().st_size > _MAX_CARD_BYTES:
            raise AdapterError(f"{path.stat().st_size:,} bytes are too many for a card", where=where)
        raw = strict_json(path.read_bytes(), where=where)
    except OSError as error:
        raise AdapterError(f"cannot read the card: {error.strerror or error}", where=where) from None
    if not isinstance(raw, dict):
        raise AdapterError("the card is not a JSON object", where=where)
    version, digest, files = raw.pop("veneer", None), raw.pop("digest", ""), raw.pop("files", {})
    problems = []
    if version != _VERSION:
        problems.append(f"veneer = {version!r}: this veneer reads cards of version {_VERSION}")
    if not isinstance(digest, str):
        problems.append(f"digest = {digest!r}: text is expected")
    if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
        problems.append("files: names with their sha256 are expected")
    elif bad := [n for n in files if "/" in n or "\\" in n or n in ("", ".", "..") or "\0" in n]:
        problems.append(f"files: {bad} are not names of files next to the card")
    card, unknown = Card(), sorted(set(raw) - {f.name for f in fields(Card)})
    for f in fields(Card):
        if f.name in raw:
            problem = _type_problem(raw[f.name], getattr(card, f.name))
            if problem:
                problems.append(f"{f.name} = {str(raw[f.name])[:60]!r}: {problem}")
            else:
                setattr(card, f.name, raw[f.name])
    if problems:
        raise AdapterError(
            f"the card cannot be read:\n{bullets(problems, None)}", where=where, fix="correct it, or delete it"
        )
    card.alpha = float(card.alpha)
    card.extra = {**card.extra, **{key: raw[key] for key in unknown}}
    return CardFile(card, digest, dict(files), unknown)


def _type_problem(value: Any, default: Any) -> str | None:
    """Return an error message if `value` has the wrong type, else None.

    `default`: the field's default, which determines the expected type."""
    if isinstance(default, float):
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return None if ok else "a number is expected"
    if isinstance(default, int):
        return None if type(value) is int else "expected an integer"
    if isinstance(default, list):
        ok = isinstance(value, list) and all(isinstance(v, str) for v in value)
        return None if ok else "a list of texts is expected"
    expected = "a mapping" if isinstance(default, dict) else "text"
    return None if isinstance(value, type(default)) else f"{expected} is expected"


def sample_messages(extra: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages of a card's sample prompt (`extra["sample"]`), or [].

    The messages have the form of a training row. Older cards stored only the user's text."""
    sample = extra.get("sample") if isinstance(extra, Mapping) else None
    if not isinstance(sample, Mapping):
        return []
    messages, prompt = sample.get("messages"), sample.get("prompt")
    if isinstance(messages, list) and messages and all(_is_text_message(m) for m in messages):
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else []


def _is_text_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def opening(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the system message and the first user message of a conversation; "" if missing."""
    system = ""
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            break
        if role in ("system", "developer"):
            system = f"{system}\n\n{content}" if system else content
        else:
            return system, content if role == "user" else ""
    return system, ""


def is_ours(readme: Path) -> bool:
    """Return whether a README can be replaced: the file is missing or has veneer's mark."""
    try:
        return MARK in readme.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def readme_bytes(adapter: Adapter, *, digest: str, base_name: str = "", name: str = "adapter") -> bytes:
    """Return `README.md`: front matter for hubs, a table of properties, and usage."""
    import yaml

    card = adapter.card
    base = base_name or card.base
    short_base = base.rstrip("/").rsplit("/", 1)[-1] if base.startswith(("/", "~", ".")) else base
    hub_base = hub_id(short_base)
    front: dict[str, Any] = {
        "library_name": "peft",
        "tags": sorted({"lora", "veneer"} | ({"dora"} if _dora(adapter) else set())),
    }
    if hub_base:
        front["base_model"] = hub_base
        front["tags"] = [f"base_model:adapter:{hub_base}", *front["tags"]]
    if card.kind in ("text", "image"):
        front["pipeline_tag"] = {"text": "text-generation", "image": "text-to-image"}[card.kind]
    if card.kind == "image":
        front["library_name"] = "diffusers"
    if card.licence:
        front["license"] = card.licence
    lines = ["---", yaml.safe_dump(front, sort_keys=True, allow_unicode=True).strip(), "---", MARK, "", f"# {name}", ""]
    lines += [f"A low-rank adapter{f' for `{hub_base}`' if hub_base else ''}.", ""]
    properties = {
        "pairs": len(adapter.pairs),
        "full copies": ", ".join(sorted(adapter.modules)),
        "token rows": sum(len(r.indices) for r in adapter.token_rows.values()) or "",
        "rank": card.rank or "",
        "alpha": f"{card.alpha:g}" if card.alpha else "",
        "targets": ", ".join(card.targets),
        "size": f"{adapter.size_bytes():,} bytes",
        "digest": digest,
        "base fingerprint": card.base_fingerprint,
        "data digest": card.data_digest,
        "trigger words": ", ".join(card.trigger_words),
        "parents": ", ".join(card.parents),
        "created": card.created,
    }
    lines += ["| | |", "| --- | --- |", *(f"| {k} | {_cell(v)} |" for k, v in properties.items() if v != ""), ""]
    for title, table in (("Results", card.metrics), ("Recipe", card.recipe)):
        if table:
            lines += [f"## {title}", "", "| | |", "| --- | --- |"]
            lines += [f"| {_cell(k)} | {_cell(v)} |" for k, v in sorted(_flat(table).items())] + [""]
    messages = sample_messages(card.extra)
    lines += _image_use(short_base or "BASE") if card.kind == "image" else _text_use(short_base or "BASE", messages)
    return ("\n".join(lines) + "\n").encode()


def _text_use(base: str, messages: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines of the usage section for a text adapter.

    messages: a sample prompt, in the form of the training rows."""
    system, _ = opening(messages)
    command = generate_command(base, "FOLDER", messages)
    system_note = (
        [f"The training rows had this system message; include it in every prompt.\n\n{_fenced(system)}\n"]
        if system
        else []
    )
    return [
        *("## Use", "", *system_note, _fenced(command, "bash"), ""),
        *("or with PEFT:", "", "```python"),
        *("from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""),
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{hub_id(base)}"), "FOLDER")',
        "```",
        *(_quantized_copy_lines(base) if hub_id(base) != base else []),
    ]


def _quantized_copy_lines(base: str) -> list[str]:
    """Return lines on how to get the exact weights that the adapter was trained on."""
    copy = f"The adapter was trained on veneer's copy of `{hub_id(base)}`, `{base}`, whose weights were quantized once."
    return ["", f"{copy} `veneer base get {base}` prints the folder of the copy, which `from_pretrained` also accepts."]


def generate_command(base: str, adapter: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Return a `veneer generate` command with a prompt in the form of the training rows.

    The command includes the system message of `messages`."""
    system, text = opening(messages)
    command = f"veneer generate {shlex.quote(text or '…')} --base {shlex.quote(base)} --adapter {shlex.quote(adapter)}"
    return f"{command} --system {shlex.quote(system)}" if system else command


def _fenced(text: str, language: str = "") -> str:
    """Return a Markdown code block with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _image_use(base: str) -> list[str]:
    return [
        *("## Use", "", "```bash", f'veneer image "…" --base {base} --adapter FOLDER:0.8 -o out.png', "```", ""),
        *("or with diffusers:", "", "```python", "from diffusers import DiffusionPipeline", ""),
        f'pipe = DiffusionPipeline.from_pretrained("{base}")',
        'pipe.load_lora_weights("FOLDER")',
        "```",
    ]


def _dora(adapter: Adapter) -> bool:
    return any(p.magnitude is not None for p in adapter.pairs.values())


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
