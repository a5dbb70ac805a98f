"""Store human feedback on completions as rows that `veneer train` reads.

A person either chooses one of two completions, or corrects a completion.

    add_row(file, preference_row(messages, chosen, rejected))        a choice     -> the format `preference`
    add_row(file, corrected_row(messages, answer))                   a correction -> the format `messages`

A server with tenants stores feedback in its database instead (serve/tenancy/feedback.py).
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
    """Return the row for a choice between two completions of `messages`.

    Raises DataError if the completions are equal."""
    if chosen == rejected:
        raise DataError("both answers are the same, so neither is better", fix="ask again with a temperature above 0")
    return {"prompt": _turns(messages), "chosen": [_answer(chosen)], "rejected": [_answer(rejected)]}


def corrected_row(messages: _Messages, answer: str) -> dict[str, Any]:
    """Return the row for a corrected completion of `messages`."""
    return {"messages": [*_turns(messages), _answer(answer)]}


def _turns(messages: _Messages) -> list[dict[str, Any]]:
    if not messages:
        raise DataError("the prompt is empty", fix="write a prompt")
    return [dict(message) for message in messages]


def _answer(text: str) -> dict[str, Any]:
    if not text.strip():
        raise DataError("the answer is empty", fix="write the corrected answer")
    return {"role": "assistant", "content": text}


def feedback_file(base: str, kind: Literal["preference", "messages"]) -> Path:
    """Return the file for feedback rows of this kind and base, inside the veneer home.

    Used on a machine without tenants."""
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip(".-") or "base"
    return veneer_home() / "judged" / folder / {"preference": "votes.jsonl", "messages": "corrections.jsonl"}[kind]


def add_row(file: str | Path, row: Mapping[str, Any]) -> int:
    """Append a row to a JSONL file and sync the file to disk; create the file if it does not exist.

    Returns the file's number of rows. Raises DataError, without adding the row, if the file has rows of
    another format or unreadable rows."""
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    if path.suffix != ".jsonl":
        fix = "use a file name that ends in .jsonl"
        raise DataError("rows can only be added to JSON Lines files", where=str(path), fix=fix)
    count = 0
    if content.strip():
        rows, metadata = read_rows([str(path)])
        count = len(rows)
        if (format := "preference" if "chosen" in row else "messages") != metadata.format:
            text = f"this file has rows in `{metadata.format}` format, but the new row has `{format}` format"
            raise DataError(text, where=str(path), fix="use another file")
    lead = b"\n" if content and not content.endswith(b"\n") else b""
    with path.open("ab") as out:  # one write per row, so that concurrent writers do not interleave
        out.write(lead + line)
        out.flush()
        os.fsync(out.fileno())
    return count + 1
