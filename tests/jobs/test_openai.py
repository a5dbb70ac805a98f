"""Jobs as tenants see them, without the server's paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.jobs.fakes import taken
from veneer.jobs.openai import error_to_openai, event_to_openai, job_to_openai
from veneer.jobs.store import Job, JobEvent, JobStore

pytestmark = pytest.mark.parametrize("library", ["sqlite"], indirect=True)


@pytest.mark.parametrize(
    "data",
    [
        {"train": ["/secret/place/a.jsonl", "/secret/place/b.jsonl"], "validation": ["/secret/place/v.jsonl"]},
        {"train": "/secret/place/a.jsonl"},
        {"pictures": "/secret/place/drawings"},
    ],
)
def test_errors_name_uploaded_files(store: JobStore, data: dict[str, object]) -> None:
    job = store.create("acme", {"base": {"name": "smollm2-135m"}, "data": data}, name="support")
    where = "/secret/place/a.jsonl" if "train" in data else "/secret/place/drawings"
    event = JobEvent("warn", "preflight", f"{where}:3 is no row", {"findings": [{"text": f"see {where}:3"}]})
    error = {"kind": "data", "message": "no row", "where": f"{where}/x:3"}
    failed = store.finish(taken(store, state="validating"), error=error)
    for text in (str(event_to_openai(job, event)), str(error_to_openai(failed))):
        assert "/secret" not in text
        assert Path(where).name in text


ASKED = {
    "hyperparameters": {"batch_size": "auto", "n_epochs": 2, "learning_rate_multiplier": "auto"}, "model": "toy",
    "training_file": "file-1", "validation_file": None, "tuned": "ft:toy", "metadata": None, "suffix": None,
    "integrations": [],
}  # fmt: skip


def failed_job(store: JobStore, method: str = "supervised", **error: str) -> Job:
    """Return a job on `/secret/data.jsonl` that failed with this error."""
    config = {"base": {"name": "smollm2-135m"}, "data": {"train": "/secret/data.jsonl"}, "seed": 1}
    request: dict[str, Any] = {**ASKED, "kind": method}
    if method != "supervised":
        request["hyperparameters"] = {**request["hyperparameters"], "beta": 0.2}
    store.create("acme", config, name="support", about={"openai": request})
    return store.finish(taken(store, state="validating"), error=error)


def test_error_is_one_line_without_settings(store: JobStore) -> None:
    """The error names the wrong rows, but no settings that the client cannot change."""
    problems = "".join(f"\n  - /secret/data.jsonl:{n}: 9000 tokens" for n in range(1, 21))
    message = f"20 of 40 rows are longer than data.max_length, 256 tokens:{problems}"
    fix = "set data.max_length=9000 (more memory), or data.long_rows=drop or cut"
    error = error_to_openai(failed_job(store, kind="data", message=message, fix=fix))
    rows = "; ".join(f"data.jsonl:{n}: 9000 tokens" for n in (1, 2, 3))
    assert error["message"] == f"20 of 40 rows are longer than the base's context, 256 tokens: {rows}; and 17 more"
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    error = {"kind": "data", "message": "no row", "where": "/secret/data.jsonl:3", "fix": "send rows"}
    short = error_to_openai(failed_job(store, **error))
    assert short["message"] == "data.jsonl:3: no row (send rows)"


def test_preflight_event_is_one_line(store: JobStore) -> None:
    findings = [
        {"level": "warn", "check": "schedule", "text": "the whole run is 6 steps", "fix": "fewer batching.rows"},
        {"level": "ok", "check": "learned", "text": "24 of 638 (4%) tokens are learned, in 12 rows", "fix": ""},
        {"level": "ok", "check": "memory", "text": "about 131.1 MB beyond the base", "fix": ""},
    ]
    event = JobEvent("info", "preflight", "one row:\n" * 20, {"findings": findings, "sample": []})
    public = event_to_openai(failed_job(store, kind="data", message="no row"), event)
    expected = "the rows were checked: the whole run is 6 steps; 24 of 638 (4%) tokens are learned, in 12 rows"
    assert (public["message"], public["data"]) == (expected, {})


def test_internal_notes_of_a_run_are_hidden_from_clients(store: JobStore) -> None:
    job = store.create("acme", {"base": "tiny"}, name="support")
    note = JobEvent("info", "note", "peak memory 0.57 GB, 0.02 predicted (+2710%)")
    store.record(taken(store, state="validating"), [note, JobEvent("warn", "note", "its process died: killed")])
    every, for_clients = (store.events("acme", job.id, diagnostics=d)[0] for d in (True, False))
    assert [event.kind for event in every] == ["state", "note", "note"]
    assert [event.level for event in for_clients] == ["info", "warn"]


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_job_matches_the_clients_type(store: JobStore, method: str) -> None:
    """The job validates strictly against OpenAI's own type."""
    job = job_to_openai(failed_job(store, method, kind="data", message="no row"))
    read = FineTuningJob.model_validate(job, strict=True)
    assert read.hyperparameters.to_dict() == {"batch_size": "auto", "n_epochs": 2, "learning_rate_multiplier": "auto"}
    assert read.method.type == method
