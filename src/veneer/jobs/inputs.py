"""The files that jobs read: copies of what was uploaded, under its own names, until the job has ended.

    jobs' folder/inputs/kq7vz2mh/train/tickets.jsonl         kq7vz2mh: the id in the name of what comes of it

So a file may be deleted as soon as a job was made of it, and messages say `tickets.jsonl:3`.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

from veneer.files.rights import private_folder
from veneer.jobs.files import Files, UploadedFile
from veneer.jobs.store import UNFINISHED, JobStore, jobs_home
from veneer.library.store import CHUNK

_GRACE = 3600.0
"""Seconds for which a folder without a job is let be: its job may be on its way."""


def _inputs() -> Path:
    return jobs_home() / "inputs"


def put_input(files: Files, id: str, which: str, file: UploadedFile) -> Path:
    """A copy for one job. `which`: train, validation, or held-out/0 and on. Blocks."""
    private_folder(jobs_home())
    folder = _inputs() / id / which
    folder.mkdir(parents=True, exist_ok=True)
    return files.put_in(file, folder)


_LINE = re.compile(rb"\S[^\n]*")


def count_lines(path: Path, most: int) -> int:
    """Lines with something in them, no more than `most`: then the rest is not read. Nobody sends so many blank lines
    that others wait for it: they are passed over in C, and the interpreter's lock is free between chunks."""
    count, within = 0, False  # within: a line that is counted
    with path.open("rb") as file:
        while count < most and (chunk := file.read(CHUNK)):
            begin = chunk.find(b"\n") if within else 0
            if begin < 0 or (not within and chunk.isspace()):
                continue
            end = begin
            for line in _LINE.finditer(chunk, begin):
                count, end = count + 1, line.end()
            within = end == len(chunk)
    return min(count, most)


def drop_inputs(id: str) -> None:
    """Of a job that was not made."""
    shutil.rmtree(_inputs() / id, ignore_errors=True)


def sweep_inputs(jobs: JobStore) -> int:
    """Removes those of jobs that have ended, or were never made. Returns how many."""
    folder = _inputs()
    if not folder.is_dir():
        return 0
    old = [each for each in folder.iterdir() if each.stat().st_mtime < time.time() - _GRACE]
    needed: set[str] = set()
    after, more = None, bool(old)
    while more:
        page, more = jobs.jobs(None, after=after, limit=1000, states=UNFINISHED)
        needed |= {str(job.about.get("input")) for job in page}
        after = page[-1].id if page else None
    gone = [each for each in old if each.name not in needed]
    for each in gone:
        shutil.rmtree(each, ignore_errors=True)
    return len(gone)
