"""Add a job's checkpoints to the library as adapters; find a step's sample images.

    publish_checkpoints(library, "acme/support-kq7vz2mh", run, adapter)   {40: "acme/support-kq7vz2mh@40"}
    publish_steps(library, job, run)           during training: {40: "support.jp8v6w@40"}
    store_checkpoint(store, job, 300, alias="prod")       support@prod is the adapter of step 300
    sample_file(store, store.get(…), 300)      the file with the sample images of step 300

The checkpoint of step 40 becomes version 40 with the alias `@ckpt-step-40`. The job's final adapter becomes
the version after all checkpoints, so that the name without a version means the final adapter. An adapter that
was published during training, or as the job's result, can be stored under the job's name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veneer.errors import ConfigError
from veneer.files.safetensors import read_tensors
from veneer.formats.peft import load_folder, write_folder
from veneer.jobs.store import Job, JobStore
from veneer.library.library import Library
from veneer.library.names import check_alias, checkpoint_alias
from veneer.library.queries import Version
from veneer.train.checkpoint import by_step, is_shared

STEPS_TAG = "steps-of:"
"""Prefix of the tag on checkpoints of a running job; the job's id follows."""


def job_of_tag(tag: str) -> str:
    """Return the job id in a tag; "" if the tag has none."""
    kind, _, job = tag.partition(":")
    return job if kind in ("job", "step-of", "steps-of") else ""


def checkpoint_name(job: Job) -> str:
    """Return the library name for a job's checkpoints during training.

    It differs from the job's name, so that an unfinished adapter is never the newest version of the job's
    name."""
    return f"{job.name}.{job.id[-6:].lower()}"


def _published(library: Library, name: str) -> dict[int, str]:
    """Return {version number: reference} for a name in the library."""
    return {v.version: v.reference for v in library.search(name=name, all_versions=True) if v.name == name}


def publish_steps(library: Library, job: Job, run: Path) -> dict[int, str]:
    """Add a run's checkpoints to the library, and return step -> reference.

    Only checkpoints with an adapter folder (`checkpoint.adapters`) are added. Versions that already exist are
    not changed."""
    name = checkpoint_name(job)
    references, published = dict[int, str](), _published(library, name)
    for step, folder in by_step(run / "checkpoints").items():
        adapter = folder / "adapter"
        if not adapter.is_dir():
            continue
        if step not in published:
            file = adapter / "adapter.safetensors"
            about: dict[str, Any] = {"tags": [f"{STEPS_TAG}{job.id}"], "source": f"step {step} of {job.id}"}
            added = library.add(file if file.is_file() else adapter, name, number=step, **about)
            published[step] = added.version.reference
        references[step] = published[step]
    return references


def publish_checkpoints(
    library: Library, name: str, run: Path, adapter: Path, log: Callable[[str], None]
) -> dict[int, str]:
    """Add the run's requested checkpoints to the library; return step -> reference.

    If the library already has a version for a step, the step is not added again: after a kill, the card would
    have different times, so the same checkpoint would become another version. A checkpoint whose tensors differ
    in name or shape from the final adapter's is skipped.

    adapter: the run's final adapter.
    log: called with a warning for each skipped checkpoint."""
    final = load_folder(adapter).adapter
    references, published = dict[int, str](), _published(library, name)
    for step, folder in by_step(run / "checkpoints").items():
        if is_shared(folder):
            continue
        state, _ = read_tensors(folder / "adapter.safetensors")
        checkpoint = final.mapped(torch.clone)
        tensors = dict(checkpoint.tensors())
        expected, found = ({key: tuple(t.shape) for key, t in each.items()} for each in (tensors, state))
        key = next((key for key in expected | found if found.get(key) != expected.get(key)), None)
        if key is not None:
            why = f"{key} is {found.get(key, 'missing')}, but {expected.get(key, 'missing')} in the final adapter"
            log(f"warning: the checkpoint of step {step} was not added to the library: {why}")
            continue
        for key, tensor in tensors.items():
            tensor.copy_(state[key])
        if step not in published:
            with tempfile.TemporaryDirectory() as temporary:
                write_folder(checkpoint, Path(temporary) / "adapter")
                added = library.add(Path(temporary) / "adapter", name, source=f"step {step}", number=step)
            published[step] = added.version.reference
        library.alias(published[step], checkpoint_alias(step))
        references[step] = published[step]
    return references


def store_checkpoint(
    store: JobStore, job_id: str, step: int | None = None, *, alias: str = "", tenant: str | None = None
) -> Version:
    """Store a checkpoint's adapter as the newest version of the job's name.

    Returns the version.

    step: the checkpoint's step; by default, the job's result is stored, or the newest step if there is none.
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
        version = library.add(library.resolve(reference), job.name, tags=[f"step-of:{job.id}"], source=source).version
    return library.alias(version.reference, alias) if alias else version


def sample_file(store: JobStore, job: Job, step: int) -> Path:
    """Return the file with a step's sample images.

    Raises ConfigError if there is no such file."""
    samples = {int(event.data["step"]): str(event.data["file"]) for event in store.events_of(None, job.id, "sample")}
    attempts = sorted(job.folder.glob("attempt-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))
    for attempt in reversed(attempts):
        if step in samples and (attempt / samples[step]).is_file():
            return attempt / samples[step]
    steps = ", ".join(map(str, sorted(samples)))
    fix = f"the job has samples after steps {steps}" if steps else "set samples.prompts and samples.every"
    raise ConfigError(f"job {job.id} has no sample images of step {step}", where="step", fix=fix)
