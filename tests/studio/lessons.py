"""Jobs as they stand in a library while they run, without a process that trains."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.studio.conftest import HOSTILE
from veneer.jobs.store import Job, JobCheckpoint, JobEvent, JobStore


def parcel_rows(folder: Path) -> Path:
    """Thirty rows that somebody made to do harm."""
    file = folder / "rows.jsonl"
    lines = [{"prompt": f"Where is parcel {i}? {HOSTILE}", "completion": f"Shelf {i % 7}."} for i in range(30)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def told_lesson(
    store: JobStore,
    base: Path,
    rows: Path,
    home: Path,
    *,
    tenant: str = "",
    of: str = "support@1",
    rewards: dict[str, float] | None = None,
    made: str = "",
) -> Job:
    """A job on whose way is what a run tells: two steps, of which the second can be asked as `of`, and a sheet of
    pictures. `home`: its server's. `rewards`: what its steps and evaluations measured beside the loss. `made`: the
    adapter that the job made, if it has succeeded."""
    config = {
        "base": {"name": str(base)},
        "data": {"train": str(rows)},
        "checkpoint": {"adapters": True},
        "schedule": {"steps": 4},
    }
    job = store.create(tenant, config, name="lesson")
    looked = store.take("here", 3600, "validating", only=job.id)
    assert looked is not None
    store.queue(looked, {"tokens": 100, "steps": 4})
    lease = store.take("here", 3600, only=job.id)
    assert lease is not None
    measured = {"steps": 4, "tokens": 20, "seconds": 0.5, "memory_bytes": 5 * 10**8, "tokens_per_second": 40.0}
    events = [
        JobEvent(
            "info",
            "metrics",
            f"step {n}",
            {"step": n, "loss": 3 - n, "learning_rate": 1e-4, **measured, **(rewards or {})},
        )
        for n in (1, 2)
    ]
    events += [
        JobEvent("info", "validation", "", {"step": n, "validation_loss": 3.5 - n, "best": n > 0, **(rewards or {})})
        for n in (0, 1, 2)
    ]
    events += [
        JobEvent("info", "sample", "", {"step": 2, "file": "samples/step-2.png", "seconds": 1.0}),
        JobEvent("warn", "note", f"warning: {HOSTILE}"),
    ]
    points = [JobCheckpoint(1, {"loss": 2.0}), JobCheckpoint(2, {"loss": 1.0}, reference=of)]
    store.note(lease, events, points, trained=(2, 4, 40))
    folder = home / "jobs" / job.id / "attempt-1" / "samples"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(folder / "step-2.png")
    if made:
        store.finish(lease, result={"reference": made})
    return job
