"""Input files of jobs: copies of uploaded files that keep the uploads' file names.

    jobs' folder/inputs/kq7vz2mh/train/tickets.jsonl         kq7vz2mh: the id in the new adapter's name

The copies stay until the job has ended, so a client can delete the uploaded file as soon as the job exists.
Because of the names, messages can refer to `tickets.jsonl:3`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import DataError
from veneer.files.rights import private_folder
from veneer.jobs.files import Files, UploadedFile
from veneer.jobs.store import UNFINISHED, JobStore, jobs_home
from veneer.train.records import read_data_files
from veneer.train.text.rows import Row, RowsSummary, UnusableRow, parse_rows

_GRACE = 3600.0
"""Seconds that a folder without a job is kept, because its job may still be created."""


LINE_FILES = (".jsonl", ".ndjson", ".csv", ".tsv")
"""File name extensions of line-based formats, whose first rows can be read without the rest."""
_BEGINNING, _QUOTED_LINES = 256 << 10, 200
"""Bytes read from a file's start, and maximum lines removed at the end of these bytes.

Lines are removed until no quoted cell is cut off."""


@dataclass(frozen=True)
class FilePreview:
    """The first rows of an uploaded file.

    complete: whether `rows` are all rows of the file.
    problem: why the rows cannot be read; `about` is then None."""

    columns: tuple[str, ...] = ()
    rows: tuple[Row | UnusableRow, ...] = ()
    complete: bool = False
    about: RowsSummary | None = None
    problem: str = ""


def preview_file(files: Files, file: UploadedFile, format: str, columns: Mapping[str, str], most: int) -> FilePreview:
    """Read up to `most` rows from the first 256 KiB of a file. This call blocks.

    format, columns: as in `parse_rows`."""
    if not file.filename.lower().endswith(LINE_FILES):
        kinds = ", ".join(LINE_FILES)
        return FilePreview(problem=f"A preview needs one of these file types: {kinds}. Paste rows of other file types.")
    with files.open(file) as source:
        data = source.read(_BEGINNING + 1)
    if cut := len(data) > _BEGINNING:
        data = data[: data.rfind(b"\n", 0, _BEGINNING) + 1]
        for _ in range(_QUOTED_LINES if file.filename.lower().endswith((".csv", ".tsv")) else 0):
            if data.count(b'"') % 2 == 0:
                break
            data = data[: data.rfind(b"\n", 0, len(data) - 1) + 1]
    if not data:
        return FilePreview(problem=f"The first row has more than {_BEGINNING >> 10} KiB.")
    with tempfile.TemporaryDirectory(prefix="veneer-rows-") as folder:
        path, names = Path(folder) / file.filename.lstrip("."), tuple[str, ...]()
        path.write_bytes(data)
        try:
            records = read_data_files([str(path)], most)
            names = tuple(dict.fromkeys(str(name) for record in records for name in record.values))
            rows, about = parse_rows([str(path)], format=format, columns=columns, limit=most)
        except DataError as error:
            where = f"{error.where}: " if error.where else ""
            return FilePreview(names, problem=f"{where}{error.what}".replace(f"{folder}/", ""))
    return FilePreview(names, tuple(rows), not cut and len(rows) < most, about)


def _inputs() -> Path:
    return jobs_home() / "inputs"


def copy_input(files: Files, id: str, part: str, file: UploadedFile) -> Path:
    """Copy a file for a job, and return the copy's path. This call blocks.

    part: train, validation, or held-out/0, held-out/1, …"""
    private_folder(jobs_home())
    folder = _inputs() / id / part
    folder.mkdir(parents=True, exist_ok=True)
    return files.copy_to(file, folder)


def remove_inputs(id: str) -> None:
    """Remove the copies made for a job that could not be created."""
    shutil.rmtree(_inputs() / id, ignore_errors=True)


def sweep_inputs(jobs: JobStore) -> None:
    """Remove the copies made for jobs that ended or never existed."""
    old = [each for each in _inputs().glob("*") if each.stat().st_mtime < time.time() - _GRACE]
    unfinished, _ = jobs.jobs(None, limit=1 << 31, states=UNFINISHED)
    needed = {job.about.get("input") for job in unfinished}
    for each in old:
        if each.name not in needed:
            shutil.rmtree(each, ignore_errors=True)
