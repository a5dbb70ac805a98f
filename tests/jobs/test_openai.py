"""What a tenant reads of a job: nothing of where things are, whatever the job reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.library.conftest import quick  # noqa: F401
from veneer.jobs.openai import shown_error, shown_event
from veneer.jobs.store import JobEvent, JobStore
from veneer.library.library import open_library


@pytest.mark.parametrize(
    "data",
    [
        {"train": ["/secret/place/a.jsonl", "/secret/place/b.jsonl"], "validation": ["/secret/place/v.jsonl"]},
        {"train": "/secret/place/a.jsonl"},
        {"pictures": "/secret/place/drawings"},
    ],
)
def test_files_are_told_by_their_names(quick: Path, data: dict[str, object]) -> None:  # noqa: F811
    with open_library(quick / "library") as library:
        store = JobStore(library)
        made = store.create("acme", {"base": {"name": "smollm2-135m"}, "data": data}, name="support")
        lease = store.take("here", 60, "validating", only=made.id)
        assert lease is not None
        where = "/secret/place/a.jsonl" if "train" in data else "/secret/place/drawings"
        event = JobEvent("warn", "preflight", f"{where}:3 is no row", {"findings": [{"text": f"see {where}:3"}]})
        told = str(shown_event(made, event))
        failed = store.finish(lease, error={"kind": "data", "message": "no row", "where": f"{where}/x:3"})
        error = str(shown_error(failed))
    for text in (told, error):
        assert "/secret" not in text
        assert Path(where).name in text
