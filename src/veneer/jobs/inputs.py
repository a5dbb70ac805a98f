"""The files that jobs read: copies of what was uploaded, under its own names, until the job has ended.

    jobs' folder/inputs/kq7vz2mh/train/tickets.jsonl         kq7vz2mh: the id in the name of what comes of it

So a file may be deleted as soon as a job was made of it, and messages say `tickets.jsonl:3`.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from veneer.files.rights import private_folder
from veneer.jobs.files import Files, UploadedFile
from veneer.jobs.store import UNFINISHED, Job, JobStore, jobs_home

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


def input_bytes(job: Job) -> int | None:
    """Return the total size of the files that validating a job reads; None if one is not a file on this machine."""
    data, after = job.config.get("data"), job.about.get("after") or {}
    sections: list[Any] = [data, after.get("evaluate")]
    names: list[Any] = []
    for section in sections:
        for key in ("train", "validation", "data"):
            value = section.get(key) if isinstance(section, dict) else None
            names += [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    try:
        return sum(os.stat(str(name)).st_size for name in names)
    except (OSError, ValueError):
        return None


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
