"""Canary release: compare a job's adapter, move its route or alias, roll back.

    compared = compare_job(store, lease, tenants, result, base)     scores of base, serving, new; on the card
    place_job(store, lease, tenants, reference, compared)           moves the route or alias, as the rule says

    promote_job(store, tenants, "acme", job)                        manually: all users
    rollback_job(store, tenants, "acme", job)                       restores the targets from before the job

| promotion rule | the new version gets |
| none           | the route's weight of users, and shadows the others if the route says so; then manual |
| met            | all users |
| not met        | no user; with `shadow` it answers as a shadow; the serving version stays |

Without a serving version, the comparison uses the base, and the first accepted version gets all users. An
alias points to one version: without a rule, a person moves it, unless the alias does not exist yet.

Each action is an event of the job, written before the next action, and the route's history says which
revisions are the job's, so that a worker can continue after a kill. An action that fails (the route was moved
meanwhile, the serving version cannot be read) becomes a warning event and moves nothing; the adapter is in
the library anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, Interrupted, counted
from veneer.files.atomic import atomic_write
from veneer.jobs.post_training import AfterJob, CanaryRoute, HeldOut, held_out_rows, serving_version
from veneer.jobs.store import Job, JobEvent, JobLease, JobStore, LeaseLost, WrongState
from veneer.jobs.validate import after_section, error_json, is_retryable, job_config
from veneer.library.database import reading
from veneer.library.library import Library, NotInLibrary
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import Route, Store, UnknownName
from veneer.train.config.text import TrainConfig

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

_WHOLE = 10_000
"""Total weight of a route: the resolution of a route's weights."""


# -- automatic actions of a job ----------------------------------------------------------------------------------------


def compare_job(
    store: JobStore, lease: JobLease, tenants: Store | None, result: Mapping[str, Any], base: TextBase | None
) -> dict[str, Any] | None:
    """Compare the new adapter, write the scores to its card, return the event's data.

    The data has `scores` of base, serving and new, the serving version and the route's revision. Returns None
    if no evaluation is configured or the evaluation failed. `base`: the run's base. Raises LeaseLost and
    transient errors."""
    after = after_section(lease.job)
    if after is None or after.evaluate is None:
        return None
    assert base is not None  # a job with an evaluation keeps its base
    adapter = Path(result["adapter"])
    compare = partial(_compare, lease.job, after, after.evaluate, store.library, tenants, adapter, base)
    data = _do_once(store, lease, "evaluation", "it could not be compared", compare).data
    if "scores" not in data:
        return None
    _write_card(adapter, data)
    return data


def place_job(
    store: JobStore, lease: JobLease, tenants: Store | None, reference: str, compared: Mapping[str, Any] | None
) -> None:
    """Move the job's route or alias once, for the adapter `reference`.

    Raises LeaseLost and transient errors."""
    after = after_section(lease.job)
    if after is None or (after.route is None and after.alias is None):
        return
    kind = "alias" if after.route is None else "route"
    place = partial(_apply_promotion, lease.job, after, store.library, tenants, reference, compared)
    _do_once(store, lease, kind, f"the {kind} stays as it is", place)


def _do_once(store: JobStore, lease: JobLease, kind: str, failure: str, do: Callable[[], JobEvent]) -> JobEvent:
    """Return the job's event of this kind; else record the event of `do`, or a warning if `do` fails.

    Raises LeaseLost, Interrupted and transient errors."""
    for event in store.events_of(None, lease.job.id, kind):
        return event
    store.get_lease(lease.job.id, lease.token)  # a cancelled job moves nothing
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
        raise ConfigError("there is no tenants' database where the job ran", where="after.route", fix=fix)
    return tenants


def _compare(
    job: Job, after: AfterJob, held_out: HeldOut, library: Library, tenants: Store | None, adapter: Path, base: TextBase
) -> JobEvent:
    from veneer.models.loading import errors_only
    from veneer.serve.engine.offline import answering
    from veneer.train.text.evaluate import score_mixes

    config = job_config(job, adapter)
    assert isinstance(config, TrainConfig)  # checked on submission
    rows = held_out_rows(held_out, config)
    data: dict[str, Any] = {"rows": len(rows), "serving": None}
    if after.route is not None:
        number, route = _current(_require(tenants), job.tenant, after.route.name)
        serving = serving_version(route, job.name)
        data |= {"route": after.route.name, "move": number}
        data["serving"] = None if serving is None else library.find(serving).reference
    elif after.alias is not None:
        data["serving"] = _version(library, f"{job.name}@{after.alias}")
    mixes: dict[str, list[tuple[str, float]]] = {"base": [], "new": [(str(adapter), 1.0)]}
    if data["serving"] is not None:
        mixes["serving"] = [(str(library.resolve(data["serving"])), 1.0)]
    options: dict[str, Any] = {
        "generate": held_out.answered,
        "max_new_tokens": held_out.max_new_tokens,
        "answering": answering,
    }
    long_rows_cut = config.data.model_copy(update={"long_rows": "cut"})
    with errors_only():
        results = score_mixes(base, rows, mixes, data=long_rows_cut, **options)
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


def _apply_promotion(
    job: Job,
    after: AfterJob,
    library: Library,
    tenants: Store | None,
    reference: str,
    compared: Mapping[str, Any] | None,
) -> JobEvent:
    """Move the route or alias as the promotion rule says, and return the event."""
    kind, name = ("alias", f"{job.name}@{after.alias}") if after.route is None else ("route", after.route.name)
    rule, met, text, refusal = after.promote, None, "", ""
    if after.evaluate is not None and compared is None:
        refusal = "it was not compared"
    elif rule is not None:
        met = None if compared is None else rule.holds(compared["scores"])
        text = f"`{rule}` is {'met' if met else 'not met'}: "
        refusal = f"`{rule}` could not be decided" if met is None else ""
    data: dict[str, Any] = {}
    if refusal:
        text = f"{refusal}: {name} stays as it is"
    elif after.route is None:
        action, data = _move_alias(name, library, reference, compared, met)
        text += action
    else:
        action, data = _move_route(job, after.route, library, _require(tenants), reference, compared, met)
        text += action
    return JobEvent("info", kind, text, {kind: name, "reference": reference, "promoted": False, **data})


def _version(library: Library, name: str) -> str | None:
    """Return the reference that an alias points to; None if the alias does not exist."""
    try:
        return library.find(name).reference
    except NotInLibrary:
        return None


def _move_alias(
    name: str, library: Library, reference: str, compared: Mapping[str, Any] | None, met: bool | None
) -> tuple[str, dict[str, Any]]:
    current, serving = _version(library, name), None if compared is None else compared["serving"]
    if not met and not (met is None and serving is None and current in (None, reference)):
        return f"{name} stays as it is", {}
    if current not in (serving, reference):  # `reference`: moved before a kill
        fix = "veneer jobs promote, if the alias is to point to the job's adapter"
        raise ConfigError(f"{name} was changed since {reference} was compared", where="after.alias", fix=fix)
    library.alias(reference, name.rpartition("@")[2])
    text = f"{name} points to {reference}" + ("" if serving is None else f" instead of {serving}")
    return text, {"before": serving, "promoted": True}


def _move_route(
    job: Job,
    route: CanaryRoute,
    library: Library,
    tenants: Store,
    reference: str,
    compared: Mapping[str, Any] | None,
    met: bool | None,
) -> tuple[str, dict[str, Any]]:
    name = route.name
    number, now = _current(tenants, job.tenant, name)
    if revisions := _own_revisions(job, _history(tenants, job.tenant, name)):  # moved before a kill
        return f"{name} was moved", {"move": max(revisions), "promoted": bool(met)}
    if compared is not None and compared.get("move", number) != number:
        raise routes.RouteMoved(f"{name} was changed since {reference} was compared", where="route")
    serving, shadow = serving_version(now, job.name), None
    if met or (serving is None and met is None):
        targets = [(reference, 1)]
        text = f"{name} points to {reference}" + ("" if serving is None else f" instead of {serving}")
    elif serving is None or serving == reference or (met is False and not route.shadow):
        return f"{name} stays as it is", {}
    else:
        part = 0 if met is False else round(route.weight * _WHOLE)
        targets, shadow = [(serving, _WHOLE - part), (reference, part)], reference if route.shadow else None
        text = f"{reference} gets {part / _WHOLE:.4g} of the users of {name}, {serving} the others"
        text += f"; {reference} answers unseen too" if shadow else ""
    options: dict[str, Any] = {"shadow": shadow, "actor": f"job {job.id}", "from_move": number, "check": library.find}
    revision = routes.set_route(tenants, name, targets, tenant=job.tenant, **options)
    return text, {"move": revision.move, "promoted": bool(met)}


def _current(tenants: Store, tenant: str, route: str) -> tuple[int, Route | None]:
    """Return (number of the current revision or 0, the route or None)."""
    number = next((int(move["move"]) for move in _history(tenants, tenant, route) if move["current"]), 0)
    return number, tenants.refresh().routes.get((tenant, route))


def _history(tenants: Store, tenant: str, route: str) -> list[dict[str, Any]]:
    try:
        with reading(tenants.engine) as c:
            return routes.route_history(c, route, tenant=tenant)
    except UnknownName:
        return []


def _own_revisions(job: Job, history: list[dict[str, Any]]) -> set[int]:
    """Return the revisions made for a job, automatically or manually."""
    return {int(move["move"]) for move in history if move["who"] in (f"job {job.id}", f"job {job.id} by hand")}


# -- manual actions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Where a job's route or alias points, as text and as JSON values."""

    text: str
    json: Mapping[str, Any]


def _alias_placement(name: str, version: str | None) -> Placement:
    text = f"{name} points to {version}" if version else f"{name} was removed: it did not exist before the job"
    return Placement(text, {"alias": name, "version": version})


def _route_placement(name: str, route: Route | None) -> Placement:
    if route is None:
        return Placement(f"{name} was removed: it did not exist before the job", {"route": None})
    targets = ", ".join(target for target, _ in route.targets)
    return Placement(f"{name} points to {targets}", {"route": routes.route_fields(route)})


def promote_job(store: JobStore, tenants: Store | None, tenant: str | None, job_id: str) -> Placement:
    """Point the job's route or alias to the job's adapter, for all users.

    Raises UnknownJob, WrongState, ConfigError."""
    job, after = _job_with_target(store, tenant, job_id)
    if job.result is None:
        raise WrongState(
            f"job {job.id} is {job.state}", where="job", fix="only a job that has succeeded can be promoted"
        )
    reference, library = str(job.result["reference"]), store.library
    data: dict[str, Any] = {"promoted": True}
    if after.route is not None:
        tenant_store, kind, name = _require(tenants), "route", after.route.name
        _, current = _current(tenant_store, job.tenant, name)
        if current is not None and current.targets == ((reference, 1),) and current.shadow is None:
            return _route_placement(name, current)
        actor = f"job {job.id} by hand"
        revision = routes.set_route(
            tenant_store, name, [(reference, 1)], tenant=job.tenant, actor=actor, check=library.find
        )
        placement = _route_placement(name, revision)
    else:
        kind, name = "alias", f"{job.name}@{after.alias}"
        previous, placement = _version(library, name), _alias_placement(name, reference)
        if previous == reference:
            return placement
        library.alias(reference, name.rpartition("@")[2])
        data["before"] = previous
    store.add_event(job.tenant, job.id, JobEvent("info", kind, f"promoted: {placement.text}", {kind: name, **data}))
    return placement


def rollback_job(store: JobStore, tenants: Store | None, tenant: str | None, job_id: str) -> Placement:
    """Restore the targets of the job's route or alias from before the job.

    A route keeps its users. A route or alias that did not exist before the job is removed. Raises UnknownJob,
    WrongState, and ConfigError if the job did not move the route or alias, or if it was moved again since."""
    job, after = _job_with_target(store, tenant, job_id)
    if after.route is not None:
        kind, placement = "route", _roll_back_route(job, after.route.name, store.library, _require(tenants))
    else:
        kind, placement = "alias", _roll_back_alias(store, job, f"{job.name}@{after.alias}")
    event = JobEvent("info", kind, f"rolled back: {placement.text}", {"promoted": False})
    store.add_event(job.tenant, job.id, event)
    return placement


def _roll_back_route(job: Job, route: str, library: Library, tenants: Store) -> Placement:
    actor, history = f"job {job.id} taken back", _history(tenants, job.tenant, route)
    revisions = _own_revisions(job, history)
    number = next((int(move["move"]) for move in history if move["current"]), None)
    if number not in revisions:
        fix = f"veneer tenant route history {route}" + (f" --tenant {job.tenant}" if job.tenant else "")
        raise _not_current(job, route, fix, moved=bool(revisions))
    before = {int(move["move"]): move["before"] for move in history}
    while number in revisions and before[number] is not None:
        number = int(before[number])
    if number in revisions:
        routes.remove_route(tenants, route, tenant=job.tenant, actor=actor)
        return _route_placement(route, None)
    revision = routes.rollback_route(
        tenants, route, tenant=job.tenant, actor=actor, moves=revisions, check=library.find
    )
    return _route_placement(route, revision)


def _roll_back_alias(store: JobStore, job: Job, name: str) -> Placement:
    library = store.library
    moved = [event.data for event in store.events_of(None, job.id, "alias") if event.data.get("promoted")]
    if not moved or _version(library, name) != (job.result or {}).get("reference"):
        raise _not_current(job, name, f"veneer library alias, or show {job.name}", moved=bool(moved))
    previous = moved[-1]["before"]
    if previous is None:
        library.remove(name)
    else:
        library.alias(previous, name.rpartition("@")[2])
    return _alias_placement(name, previous)


def _not_current(job: Job, name: str, fix: str, *, moved: bool) -> ConfigError:
    message = f"{name} is not where job {job.id} moved it" if moved else f"job {job.id} did not move {name}"
    return ConfigError(message, where="job", fix=fix)


def _job_with_target(store: JobStore, tenant: str | None, job_id: str) -> tuple[Job, AfterJob]:
    """Return a job and its `after` section, which has a route or an alias.

    Raises UnknownJob, and WrongState if the section has neither."""
    job = store.get(tenant, job_id)
    after = after_section(job)
    if after is None or (after.route is None and after.alias is None):
        fix = "a section `after` with a route in its file; or veneer tenant route set, veneer library alias"
        raise WrongState(f"job {job.id} has no route and no alias", where="job", fix=fix)
    return job, after
