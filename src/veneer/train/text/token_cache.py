"""Encoded tables on disk, memory-mapped, in `tokens/` of the veneer home.

    tokens/NAME/tokens.bin, texts.bin, about.json      NAME: sha256 of everything that determines the tokens

A table is written under a temporary name and renamed when it is complete, so incomplete tables of killed writers
are never read, and concurrent runs can write the same table. The least recently used tables are deleted when all
tables together exceed `MOST_BYTES`; a run can still read a deleted table that it has open.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from veneer.errors import ResourceError
from veneer.files.atomic import flush_folder, new_folder, replace_file
from veneer.models.home import veneer_home
from veneer.train.text.encode import TEXT, EncodedTable

MOST_BYTES = 20_000_000_000
_ABOUT = "about.json"
_ABANDONED = 3600
"""Seconds without a write after which a temporary folder belongs to a killed writer."""


def read_table(name: str) -> tuple[EncodedTable, dict[str, Any]] | None:
    """Return a table and what `write_table` stored with it, or None if there is no complete table."""
    folder = veneer_home() / "tokens" / name
    try:
        about = json.loads((folder / _ABOUT).read_bytes())
        table = _mapped(folder)
        os.utime(folder)
        is_complete = about["sizes"] == [len(table.tokens), len(table.texts)]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (table, about) if is_complete else None


def write_table(
    name: str, chunks: Iterable[EncodedTable], check: Callable[[EncodedTable], dict[str, Any]]
) -> tuple[EncodedTable, dict[str, Any]]:
    """Write the chunks as one table, and return the mapped table and the result of `check`.

    check: called with the whole table before it is published; an error that it raises discards the table.

    Raises ResourceError if the files cannot be written."""
    folder = veneer_home() / "tokens" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make_room(folder.parent)
        if (found := read_table(name)) is not None:  # another run wrote it since this run looked
            return found
        shutil.rmtree(folder, ignore_errors=True)  # a damaged table
        with new_folder(folder) as temporary, contextlib.ExitStack() as held:
            errors: dict[int, str] = {}
            if not gc.get_freeze_count():
                held.callback(gc.unfreeze)
            gc.freeze()  # otherwise, garbage collection of the libraries' objects takes a tenth of the time
            with open(temporary / "tokens.bin", "wb") as tokens, open(temporary / "texts.bin", "wb") as texts:
                for chunk in chunks:
                    tokens.write(chunk.tokens.tobytes())
                    texts.write(chunk.texts.tobytes())
                    errors |= chunk.errors
                for file in (tokens, texts):
                    file.flush()
                    os.fsync(file.fileno())
            table = _mapped(temporary)
            table.errors = errors
            about = check(table) | {"sizes": [len(table.tokens), len(table.texts)]}
            replace_file(temporary / _ABOUT, [json.dumps(about).encode()])
            flush_folder(temporary)
            del table  # some systems cannot rename a folder with open files
    except OSError as error:
        if (found := read_table(name)) is not None:  # another run wrote the table first
            return found
        text = f"the tokens of the data cannot be written: {error.strerror or error}"
        fix = "free some space (four bytes per token), or set VENEER_HOME to a writable folder"
        raise ResourceError(text, where=str(folder), fix=fix) from None
    _make_room(folder.parent, keep=folder)
    return _mapped(folder), about


def _mapped(folder: Path) -> EncodedTable:
    """Return the table of a folder. Raises OSError, ValueError."""

    def mapped(name: str, dtype: Any) -> Any:
        path = folder / name
        return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)

    return EncodedTable(mapped("tokens.bin", np.int32), mapped("texts.bin", TEXT))


def _make_room(home: Path, keep: Path | None = None) -> None:
    """Delete the files of killed writers, and the least recently used tables beyond `MOST_BYTES`."""
    tables: list[tuple[float, Path, int]] = []
    for folder in home.iterdir():
        with contextlib.suppress(OSError):  # another run deletes it too
            used, files = folder.stat().st_mtime, [file.stat() for file in folder.iterdir()]
            if folder.suffix != ".tmp":
                tables.append((used, folder, sum(file.st_size for file in files)))
            elif time.time() - max([used, *(file.st_mtime for file in files)]) > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
    total = sum(size for _, _, size in tables)
    for _, folder, size in sorted(tables):
        if total > MOST_BYTES and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
