"""Actions on a job's checkpoints: store an adapter, find sample images.

    store_checkpoint(store, job, 300, alias="prod")       support@prod is the adapter of step 300
    sample_file(store, store.get(…), 300)                 the sheet of sample images of step 300

A checkpoint can be stored if its adapter is in the library: published during training (with
`checkpoint.adapters`) or added as the job's result.
"""

from __future__ import annotations

from pathlib import Path

from veneer.errors import ConfigError
from veneer.jobs.store import Job, JobStore
from veneer.library.names import check_alias
from veneer.library.queries import Version


def store_checkpoint(
    store: JobStore, job_id: str, step: int | None = None, *, alias: str = "", tenant: str | None = None
) -> Version:
    """Store a checkpoint's adapter as the newest version of the job's name.

    Returns the version.

    step: default: the job's result if there is one, else the newest step.
    alias: an alias that will point to the version.

    Raises UnknownJob, and ConfigError (with the available steps) if this step is not in the library."""
    job, library = store.get(tenant, job_id), store.library
    if alias:
        check_alias(alias)
    references = {point.step: point.reference for point in store.checkpoints(None, job.id) if point.reference}
    reference = references.get(max(references, default=0) if step is None else step)
    if step is None and job.result is not None:
        reference = job.result["reference"]
    if reference is None:
        steps = ", ".join(map(str, sorted(references)[-10:]))
        message = f"the adapter of {'any step' if step is None else f'step {step}'} of {job.id} is not in the library"
        fix = f"the library has steps {steps}" if steps else "train with checkpoint.adapters=true"
        raise ConfigError(message, where="step", fix=fix)
    version = library.find(reference)
    if version.name != job.name:
        source = f"step {version.version} of {job.id}"
        folder = library.resolve(reference)
        version = library.add(folder, job.name, tags=[f"step-of:{job.id}"], source=source).version
    return library.alias(version.reference, alias) if alias else version


def sample_file(store: JobStore, job: Job, step: int) -> Path:
    """Return the file with a step's sample images.

    Raises ConfigError if there is no such file."""
    samples = {int(event.data["step"]): str(event.data["file"]) for event in store.events_of(None, job.id, "sample")}
    attempts = sorted(job.folder.glob("attempt-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))
    for attempt in reversed(attempts):
        if step in samples and (attempt / samples[step]).is_file():
            return attempt / samples[step]
    fix = "set samples.prompts and samples.every"
    if samples:
        fix = f"the job has samples after steps {', '.join(map(str, sorted(samples)))}"
    raise ConfigError(f"job {job.id} has no sample images of step {step}", where="step", fix=fix)
