"""Canary release: compare a job's adapter, move its route, roll back.

    compared = compare_job(store, lease, tenants, result, base)     scores base, serving and new adapter
    release_job(store, lease, tenants, reference, compared)           moves the route according to the rule

    promote_job(store, tenants, "acme", job)                        manual: all users get the new adapter
    rollback_job(store, tenants, "acme", job)                       restores the targets from before the job

| promotion rule | the new version gets |
| none           | the share of users in the route's weight; if `shadow` is set, it also answers as a shadow |
| met            | all users |
| not met        | no users; if `shadow` is set, it answers as a shadow; the serving version stays |

Without a serving version, the comparison uses the base, and the first accepted version gets all users.

Each action is recorded as an event of the job before the next action starts, and the route's history shows
which revisions the job made. The job of a killed worker can therefore be continued by another worker. An
action that fails (for example, because the route was moved meanwhile or the serving version cannot be read)
is recorded as a warning and moves nothing; the adapter is added to the library anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, Interrupted, counted
from veneer.files.atomic import atomic_write
from veneer.jobs.post_training import AfterJob, held_out_rows, serving_version
from veneer.jobs.store import Job, JobEvent, JobLease, JobStore, LeaseLost, WrongState
from veneer.jobs.validate import after_section, error_json, is_retryable, job_config
from veneer.library.database import reading
from veneer.library.library import Library
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import Route, Store, UnknownName
from veneer.train.config.text import TrainConfig

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

_WHOLE = 10_000
"""Total weight of a route's targets: users can be split in steps of 1/10,000."""


# -- automatic actions of a job ----------------------------------------------------------------------------------------


def compare_job(
    store: JobStore, lease: JobLease, tenants: Store | None, result: Mapping[str, Any], base: TextBase | None
) -> dict[str, Any] | None:
    """Compare the new adapter, write its scores to its card, and return event data.

    The data has the `scores` of the base, the serving version and the new adapter, the name of the serving
    version, and the route's revision. Returns None if the job has no evaluation or the evaluation failed.

    base: the run's base.

    Raises LeaseLost and transient errors."""
    after = after_section(lease.job)
    if after is None or after.evaluate is None:
        return None
    assert base is not None  # a job with an evaluation keeps its base in memory
    adapter = Path(result["adapter"])
    compare = partial(_compare, store.library, tenants, lease.job, after, adapter, base)
    data = _do_once(store, lease, "evaluation", "the adapter could not be compared", compare).data
    if "scores" not in data:
        return None
    _write_card(adapter, data)
    return data


def release_job(
    store: JobStore, lease: JobLease, tenants: Store | None, reference: str, compared: dict[str, Any] | None
) -> None:
    """Move the job's route for the adapter `reference`, at most once per job.

    Raises LeaseLost and transient errors."""
    after = after_section(lease.job)
    if after is None or after.route is None:
        return
    place = partial(_move_route, store.library, tenants, lease.job, after, reference, compared)
    _do_once(store, lease, "route", "the route stays as it is", place)


def _do_once(store: JobStore, lease: JobLease, kind: str, failure: str, do: Callable[[], JobEvent]) -> JobEvent:
    """Run an action once per job, and return its event.

    If the job already has an event of this kind, returns that event. If `do` fails, records a warning
    instead. Raises LeaseLost, Interrupted and transient errors."""
    for event in store.events_of(None, lease.job.id, kind):
        return event
    # Raises LeaseLost if the job was cancelled: its route must then not move.
    store.get_lease(lease.job.id, lease.token)
    try:
        event = do()
    except (LeaseLost, Interrupted):
        raise
    except Exception as error:
        if is_retryable(error):
            raise
        details = error_json(error)
        text = f"{failure}: {details['message']}" + (f" ({details['fix']})" if "fix" in details else "")
        event = JobEvent("warn", kind, text, {"error": details})
    store.record(lease, [event])
    return event


def _require(tenants: Store | None) -> Store:
    if tenants is None:
        fix = "give the worker --tenants, or VENEER_TENANTS"
        raise ConfigError("the job's worker has no tenants' database", where="after.route", fix=fix)
    return tenants


def _compare(
    library: Library, tenants: Store | None, job: Job, after: AfterJob, adapter: Path, base: TextBase
) -> JobEvent:
    from veneer.models.loading import errors_only
    from veneer.serve.engine.offline import answering
    from veneer.train.text.evaluate import score_mixes

    config, held_out = job_config(job, adapter), after.evaluate
    assert isinstance(config, TrainConfig)  # the job was validated when it was submitted
    assert held_out is not None
    rows = held_out_rows(held_out, config)
    data: dict[str, Any] = {"rows": len(rows), "serving": None}
    if after.route is not None:
        history, route = _read_route(_require(tenants), job.tenant, after.route.name)
        serving = serving_version(route, job.name)
        data |= {"route": after.route.name, "move": _current(history)}
        data["serving"] = None if serving is None else library.find(serving).reference
    mixes: dict[str, list[tuple[str, float]]] = {"base": [], "new": [(str(adapter), 1.0)]}
    if data["serving"] is not None:
        mixes["serving"] = [(str(library.resolve(data["serving"])), 1.0)]
    options: dict[str, Any] = {"generate": held_out.answered, "max_new_tokens": held_out.max_new_tokens}
    long_rows_cut = config.data.model_copy(update={"long_rows": "cut"})
    with errors_only():
        results = score_mixes(base, rows, mixes, data=long_rows_cut, answering=answering, **options)
    scores = {name: {m: _finite(getattr(each, m)) for m in held_out.metrics} for name, each in results.items()}
    data["scores"] = {"base": scores["base"], "serving": scores.get("serving", scores["base"]), "new": scores["new"]}
    return JobEvent("info", "evaluation", _comparison_text(data), data)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _comparison_text(data: Mapping[str, Any]) -> str:
    scores = data["scores"]
    columns = {"base": "base", **({"serving": data["serving"]} if data["serving"] else {}), "new": "new"}
    parts = []
    for metric in scores["new"]:
        values = {column: scores[name][metric] for name, column in columns.items()}
        each = (f"{column} {'not measured' if v is None else f'{v:.4g}'}" for column, v in values.items())
        parts.append(f"{metric}: {', '.join(each)}")
    return f"on {counted(data['rows'], 'held-out row')}: {'; '.join(parts)}"


def _write_card(folder: Path, data: Mapping[str, Any]) -> None:
    """Write the scores to the adapter's card and README. Idempotent."""
    from veneer.formats.card import CARD_FILE, README_FILE, card_bytes, is_ours, read_card, readme_bytes
    from veneer.formats.peft import load_folder

    there, scores = read_card(folder), data["scores"]
    held_out: dict[str, Any] = {"rows": data["rows"], "base": scores["base"], "adapter": scores["new"]}
    if data["serving"]:
        held_out |= {"serving": scores["serving"], "served": data["serving"]}
    card = replace(there.card, metrics=there.card.metrics | {"held_out": held_out})
    if is_ours(folder / README_FILE):
        adapter = replace(load_folder(folder).adapter, card=card)
        atomic_write(folder / README_FILE, [readme_bytes(adapter, digest=there.digest, name=folder.name)])
    atomic_write(folder / CARD_FILE, [card_bytes(card, digest=there.digest, files=there.files)])


def _move_route(
    library: Library, tenants: Store | None, job: Job, after: AfterJob, reference: str, compared: dict[str, Any] | None
) -> JobEvent:
    """Move the route according to the promotion rule, and return the event."""
    assert after.route is not None  # checked by `release_job`
    route, name, rule, met, shadow, text = after.route, after.route.name, after.promote, None, None, ""

    def event(action: str, **moved: Any) -> JobEvent:
        return JobEvent("info", "route", action, {"route": name, "reference": reference, "promoted": False} | moved)

    if after.evaluate is not None and compared is None:
        return event(f"the adapter was not compared: {name} stays as it is")
    if rule is not None:
        met = None if compared is None else rule.holds(compared["scores"])
        if met is None:
            return event(f"`{rule}` could not be decided: {name} stays as it is")
        text = f"`{rule}` is {'met' if met else 'not met'}: "
    tenant_store = _require(tenants)
    history, now = _read_route(tenant_store, job.tenant, name)
    if revisions := _own_revisions(job, history):  # an earlier attempt moved the route and was then killed
        return event(f"{text}{name} was moved", move=max(revisions), promoted=bool(met))
    number = _current(history)
    if compared is not None and compared.get("move", number) != number:
        raise routes.RouteMoved(f"{name} changed after {reference} was compared with it", where="route")
    serving = serving_version(now, job.name)
    if met or (serving is None and met is None):
        targets = [(reference, 1)]
        text += f"{name} points to {reference}" + ("" if serving is None else f" instead of {serving}")
    elif serving is None or serving == reference or (met is False and not route.shadow):
        return event(f"{text}{name} stays as it is")
    else:
        part = 0 if met is False else round(route.weight * _WHOLE)
        targets, shadow = [(serving, _WHOLE - part), (reference, part)], reference if route.shadow else None
        text += f"{reference} gets {part / _WHOLE:.4g} of the users of {name}, {serving} the others"
        text += f"; {reference} also answers as a shadow" if shadow else ""
    options: dict[str, Any] = {"shadow": shadow, "actor": f"job {job.id}", "from_move": number, "check": library.find}
    revision = routes.set_route(tenant_store, name, targets, tenant=job.tenant, **options)
    return event(text, move=revision.move, promoted=bool(met))


def _read_route(tenants: Store, tenant: str, route: str) -> tuple[list[dict[str, Any]], Route | None]:
    """Return (a route's history, the route or None)."""
    try:
        with reading(tenants.engine) as c:
            history = routes.route_history(c, route, tenant=tenant)
    except UnknownName:
        history = []
    return history, tenants.refresh().routes.get((tenant, route))


def _current(history: list[dict[str, Any]]) -> int:
    """Return the number of the current revision, or 0 if the route does not exist."""
    return next((int(move["move"]) for move in history if move["current"]), 0)


def _own_revisions(job: Job, history: list[dict[str, Any]]) -> set[int]:
    """Return the numbers of the revisions that a job made, automatically or manually."""
    return {int(move["move"]) for move in history if move["who"] in (f"job {job.id}", f"job {job.id} by hand")}


# -- manual actions ----------------------------------------------------------------------------------------------------


_Placement = tuple[str, Mapping[str, Any]]


def _placement(name: str, route: Route | None) -> _Placement:
    if route is None:
        return f"{name} was removed: it did not exist before the job", {"route": None}
    targets = ", ".join(target for target, _ in route.targets)
    return f"{name} points to {targets}", {"route": routes.route_fields(route)}


def promote_job(store: JobStore, tenants: Store | None, tenant: str | None, job_id: str) -> _Placement:
    """Point the job's route to the job's adapter, for all users.

    Returns the route's targets as (text, JSON values).

    Raises UnknownJob, WrongState, ConfigError."""
    job, name = _job_and_route(store, tenant, job_id)
    if job.result is None:
        fix = "only a job that has succeeded can be promoted"
        raise WrongState(f"job {job.id} is {job.state}", where="job", fix=fix)
    reference, tenant_store = str(job.result["reference"]), _require(tenants)
    current = tenant_store.refresh().routes.get((job.tenant, name))
    if current is not None and current.targets == ((reference, 1),) and current.shadow is None:
        return _placement(name, current)
    options: dict[str, Any] = {"actor": f"job {job.id} by hand", "check": store.library.find}
    placed = _placement(name, routes.set_route(tenant_store, name, [(reference, 1)], tenant=job.tenant, **options))
    event = JobEvent("info", "route", f"promoted: {placed[0]}", {"route": name, "promoted": True})
    store.add_event(job.tenant, job.id, event)
    return placed


def rollback_job(store: JobStore, tenants: Store | None, tenant: str | None, job_id: str) -> _Placement:
    """Restore the targets that the job's route had before the job.

    Each user gets the target from before the job. A route that did not exist before the job is removed. Returns
    the route's targets as (text, JSON values). Raises UnknownJob, WrongState, and ConfigError if the job did
    not move the route, or if the route was moved again since."""
    job, name = _job_and_route(store, tenant, job_id)
    tenant_store = _require(tenants)
    options: dict[str, Any] = {"tenant": job.tenant, "actor": f"job {job.id} taken back"}
    history, _ = _read_route(tenant_store, job.tenant, name)
    revisions, number = _own_revisions(job, history), _current(history)
    if number not in revisions:
        message = f"{name} is not where job {job.id} moved it" if revisions else f"job {job.id} did not move {name}"
        fix = f"veneer tenant route history {name}" + (f" --tenant {job.tenant}" if job.tenant else "")
        raise ConfigError(message, where="job", fix=fix)
    before = {int(move["move"]): move["before"] for move in history}
    while number in revisions and before[number] is not None:
        number = int(before[number])
    moved = None
    if number in revisions:
        routes.remove_route(tenant_store, name, **options)
    else:
        moved = routes.rollback_route(tenant_store, name, **options, moves=revisions, check=store.library.find)
    placed = _placement(name, moved)
    event = JobEvent("info", "route", f"rolled back: {placed[0]}", {"promoted": False})
    store.add_event(job.tenant, job.id, event)
    return placed


def _job_and_route(store: JobStore, tenant: str | None, job_id: str) -> tuple[Job, str]:
    """Return a job and the name of the route in its `after` section.

    Raises UnknownJob, and WrongState if the job has no route."""
    job = store.get(tenant, job_id)
    after = after_section(job)
    if after is None or after.route is None:
        fix = "add an `after` section with a route to the job's file, or use veneer tenant route set"
        raise WrongState(f"job {job.id} has no route", where="job", fix=fix)
    return job, after.route.name
