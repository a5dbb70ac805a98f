"""Copies of uploaded files, which jobs read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.jobs.fakes import queued
from veneer.jobs.input_files import sweep_inputs
from veneer.jobs.store import JobStore, jobs_home


@pytest.mark.parametrize("library", ["sqlite"], indirect=True)
def test_sweep_keeps_inputs_of_unfinished_and_new_jobs(store: JobStore, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    queued(store, about={"input": "unfinished"})
    store.cancel("acme", queued(store, about={"input": "ended"}).id)
    inputs = jobs_home() / "inputs"
    for name in ("unfinished", "ended", "orphan", "new"):
        (inputs / name / "train").mkdir(parents=True)
        if name != "new":
            os.utime(inputs / name, (0, 0))
    sweep_inputs(store)
    assert {folder.name for folder in inputs.iterdir()} == {"unfinished", "new"}
