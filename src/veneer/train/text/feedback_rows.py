"""What somebody thinks of answers, as rows in a file that `veneer train` reads: which of two is better, or what the
answer should have been.

    add_row(file, preference_row(messages, chosen, rejected))        a vote       -> the format `preference`
    add_row(file, corrected_row(messages, answer))                   a correction -> the format `messages`

A server with tenants keeps the same in its database (serve/tenancy/feedback.py), where the answers are kept.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from veneer.errors import DataError
from veneer.models.home import veneer_home
from veneer.train.text.rows import read_rows

_Messages = Sequence[Mapping[str, Any]]


def preference_row(messages: _Messages, chosen: str, rejected: str) -> dict[str, Any]:
    """Of two answers to `messages`, `chosen` is better. Raises DataError where they are one."""
    if chosen == rejected:
        raise DataError("both answers are the same, so none is better", fix="ask again with a temperature above 0")
    return {"prompt": _turns(messages), "chosen": [_answer(chosen)], "rejected": [_answer(rejected)]}


def corrected_row(messages: _Messages, answer: str) -> dict[str, Any]:
    """What the answer to `messages` should have been."""
    return {"messages": [*_turns(messages), _answer(answer)]}


def _turns(messages: _Messages) -> list[dict[str, Any]]:
    if not messages:
        raise DataError("there is nothing that was asked", fix="a prompt")
    return [dict(message) for message in messages]


def _answer(text: str) -> dict[str, Any]:
    if not text.strip():
        raise DataError("an answer without a word teaches nothing", fix="write what it should have been")
    return {"role": "assistant", "content": text}


def judged_file(base: str, kind: Literal["preference", "messages"]) -> Path:
    """Where rows of a kind are kept on a machine whose owner judges: in the veneer home, for each base."""
    own = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip(".-") or "base"
    return veneer_home() / "judged" / own / {"preference": "votes.jsonl", "messages": "corrections.jsonl"}[kind]


def add_row(file: str | Path, row: Mapping[str, Any]) -> int:
    """Adds a row to the end of a file of JSON lines, made where there is none, and syncs it. Returns how many the file
    has now. Raises DataError where the file has rows of another format, or some that cannot be read; nothing is added
    then."""
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.read_bytes() if path.exists() else b""
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    if path.suffix != ".jsonl":
        raise DataError("rows are added to files of JSON lines", where=str(path), fix="a name that ends in .jsonl")
    count = 0
    if there.strip():
        rows, about = read_rows([str(path)])
        count = len(rows)
        if (wanted := "preference" if "chosen" in row else "messages") != about.format:
            raise DataError(
                f"this file has rows of {about.format}, and this is one of {wanted}",
                where=str(path),
                fix="another file",
            )
    lead = b"\n" if there and not there.endswith(b"\n") else b""
    with path.open("ab") as out:  # one write to the end: two who add at once do not mingle
        out.write(lead + line)
        out.flush()
        os.fsync(out.fileno())
    return count + 1
