"""Running jobs as a library records them, without a process that trains."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.studio.conftest import HOSTILE
from veneer.jobs.store import Job, JobCheckpoint, JobEvent, JobStore


def parcel_rows(folder: Path) -> Path:
    """Write a file of thirty hostile rows. Return its path."""
    file = folder / "rows.jsonl"
    lines = [{"prompt": f"Where is parcel {i}? {HOSTILE}", "completion": f"Shelf {i % 7}."} for i in range(30)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def recorded_job(
    store: JobStore,
    base: Path,
    rows: Path,
    home: Path,
    *,
    tenant: str = "",
    published: str = "support@1",
    rewards: dict[str, float] | None = None,
) -> Job:
    """Record a running job with two steps, and a sample image in the server's home folder.

    published: reference of the adapter that the second step published
    rewards: additional metrics of the steps and evaluations
    """
    config = {"base": {"name": str(base)}, "data": {"train": str(rows)}}
    config |= {"checkpoint": {"adapters": True}, "schedule": {"steps": 4}}
    job = store.create(tenant, config, name="lesson")
    validating = store.acquire("here", 3600, "validating", only=job.id)
    store.queue(validating, {"tokens": 100, "steps": 4})
    lease = store.acquire("here", 3600, only=job.id)
    metrics = {"steps": 4, "tokens": 20, "seconds": 0.5, "memory_bytes": 5 * 10**8, "tokens_per_second": 40.0}
    metrics |= {"learning_rate": 1e-4, **(rewards or {})}
    events = [JobEvent("info", "metrics", f"step {n}", {"step": n, "loss": 3 - n, **metrics}) for n in (1, 2)]
    for n in (0, 1, 2):
        score = {"step": n, "validation_loss": 3.5 - n, "best": n > 0, **(rewards or {})}
        events.append(JobEvent("info", "validation", "", score))
    events += [
        JobEvent("info", "sample", "", {"step": 2, "file": "samples/step-2.png", "seconds": 1.0}),
        JobEvent("warn", "note", f"warning: {HOSTILE}"),
    ]
    points = [JobCheckpoint(1, {"loss": 2.0}), JobCheckpoint(2, {"loss": 1.0}, reference=published)]
    store.record(lease, events, points, trained=(2, 4, 40))
    folder = home / "jobs" / job.id / "attempt-1" / "samples"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(folder / "step-2.png")
    return job
