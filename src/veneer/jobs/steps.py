"""What one does with the steps of a job: go on from one with other settings, keep one, look at its sample pictures.

    forked(store, job, 300, ["optimizer.learning_rate=1e-4"])      a new job that begins where the other one was
    kept_step(store, job, 300, alias="prod")                       support@prod is the adapter of step 300
    sample_file(store.get(…), 300)                                 the sheet of pictures after step 300

A step can be gone on from, asked and kept where the job has put its adapter into the library: with
`checkpoint.adapters`, while it trains, or as what the job made.
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
"""Of `adapter`, what a run has of its own that goes on from another's."""


def _step_reference(store: JobStore, job: Job, step: int | None = None) -> str:
    """The adapter of a step in the library; without one what the job made, or the newest that there is. Raises
    ConfigError for a step that has none, with those that do."""
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
    """The configuration of a job that goes on from a step of another: its own, from there, with `overrides`. Raises
    ConfigError for pictures, for a step that has no adapter in the library, and for settings that cannot be."""
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
    """A new job of the same rows that begins with the adapter of a step of `job`, looked at and queued, or failed.
    `tenant`: whose `job` is, None for anybody's. `name`: of its adapter, by default the same, as its next version.
    Raises UnknownJob, ConfigError, and what `submitted` does."""
    found = store.get(tenant, job)
    config = fork_config(store, found, step, overrides)
    own = found.name.removeprefix(f"{found.tenant}/") if found.tenant else found.name
    about: dict[str, Any] = {"fork": {"job": found.id, "step": step}}
    if "input" in found.about:  # what it reads stays as long as one of the two has not ended
        about["input"] = found.about["input"]
    return submitted(store, config, tenant=found.tenant, name=name or own, tenants=tenants, device=device, about=about)


def kept_step(
    store: JobStore, job: str, step: int | None = None, *, alias: str = "", tenant: str | None = None
) -> Version:
    """The adapter of a step as the newest version of the job's name, under an `alias` where one is given. Raises
    UnknownJob, ConfigError."""
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
    """The sheet of sample pictures that a job has drawn after a step. Raises ConfigError where there is none."""
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
