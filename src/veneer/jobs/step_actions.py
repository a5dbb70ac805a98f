"""Actions on a job's steps: fork a step, store its adapter, get its sample images.

    forked(store, job, 300, ["optimizer.learning_rate=1e-4"])      a new job that starts from step 300
    kept_step(store, job, 300, alias="prod")                       support@prod is the adapter of step 300
    sample_file(store, store.get(…), 300)                          the image grid of step 300

A step can be forked and stored if the job has added its adapter to the library: with `checkpoint.adapters`
during training, or as the job's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, counted
from veneer.jobs.store import Job, JobStore
from veneer.jobs.validate import submitted
from veneer.library.names import check_alias
from veneer.library.queries import Version
from veneer.plan.tables import Device
from veneer.serve.tenancy.store import Store
from veneer.train.config.load import RunConfig, config_from
from veneer.train.config.text import TrainConfig

_KEPT = ("dropout",)
"""Keys of `adapter` that a fork keeps; the rest comes from the starting adapter."""


def _step_reference(store: JobStore, job: Job, step: int | None = None) -> str:
    """Return the library's reference of a step's adapter.

    `step`: None for the job's result, else for the newest step. Raises ConfigError that lists the available
    steps."""
    found = {point.step: point.reference for point in store.checkpoints(None, job.id) if point.reference}
    made = (job.result or {}).get("reference")
    if step is None and (made or found):
        return str(made or found[max(found)])
    if step is not None and step in found:
        return str(found[step])
    if step is not None and made and step == (job.result or {}).get("kept_step"):
        return str(made)
    have = ", ".join(map(str, sorted(found)[-10:]))
    fix = f"there are those of {have}" if have else "a job keeps them with checkpoint.adapters=true"
    of = "any step" if step is None else f"step {step}"
    raise ConfigError(f"the adapter of {of} of {job.id} is not in the library", where="step", fix=fix)


def fork_config(store: JobStore, job: Job, step: int | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a job's configuration that starts from one of its steps, with overrides.

    Raises ConfigError for an image run, a step without an adapter in the library, and invalid settings."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in job.config.items()}
    adapter = {key: value for key, value in dict(values.get("adapter") or {}).items() if key in _KEPT}
    values["adapter"] = {**adapter, "start": _step_reference(store, job, step)}
    values["output"] = str(job.folder.parent / "fork")
    config, _ = config_from({**values, "adapter": adapter}, overrides)
    if not isinstance(config, TrainConfig):
        what = "a run on pictures begins with an adapter of its own, and cannot go on from another's"
        raise ConfigError(what, where=job.id, fix="submit it anew with more steps")
    return config_from(values, overrides)[0]


def forked(
    store: JobStore,
    job: str,
    step: int | None = None,
    overrides: Sequence[str] = (),
    *,
    tenant: str | None = None,
    name: str = "",
    tenants: Store | None = None,
    device: Device | None = None,
) -> Job:
    """Create a job on the same rows that starts from a step of `job`, and return it.

    The new job is validated, and queued or failed. `tenant`: owner of `job`; None for any owner. `name`: the
    new adapter's name; default: the same name, as the next version. Raises UnknownJob, ConfigError and the
    errors of `submitted`."""
    found = store.get(tenant, job)
    config = fork_config(store, found, step, overrides)
    own = found.name.removeprefix(f"{found.tenant}/") if found.tenant else found.name
    about: dict[str, Any] = {"fork": {"job": found.id, "step": step}}
    if "input" in found.about:  # input files stay until both jobs have ended
        about["input"] = found.about["input"]
    return submitted(store, config, tenant=found.tenant, name=name or own, tenants=tenants, device=device, about=about)


def kept_step(
    store: JobStore, job: str, step: int | None = None, *, alias: str = "", tenant: str | None = None
) -> Version:
    """Store a step's adapter as the newest version of the job's name.

    `alias`: alias to point to the version. Raises UnknownJob, ConfigError."""
    found = store.get(tenant, job)
    if alias:
        check_alias(alias)
    library = store.library
    reference = _step_reference(store, found, step)
    version = library.find(reference)
    if version.name != found.name:
        source = f"step {version.version} of {found.id}"
        version = library.add(
            library.resolve(reference), found.name, tags=[f"step-of:{found.id}"], source=source
        ).version
    return library.alias(version.reference, alias) if alias else version


def sample_file(store: JobStore, job: Job, step: int) -> Path:
    """Return the file of a step's sample images. Raises ConfigError if none exists."""
    drawn = {int(event.data["step"]): str(event.data["file"]) for event in store.events_of(None, job.id, "sample")}
    runs = sorted(job.folder.glob("attempt-*[0-9]"), key=lambda place: int(place.name.rpartition("-")[2]))
    places = [run / drawn[step] for run in reversed(runs)] if step in drawn else []
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        have = counted(len(drawn), "sheet")
        raise ConfigError(
            f"there are no sample pictures of step {step} of {job.id}",
            where="step",
            fix=f"it has drawn {have}: after steps {', '.join(map(str, sorted(drawn)))}"
            if drawn
            else "samples.prompts and samples.every say what is drawn, and when",
        )
    return found
