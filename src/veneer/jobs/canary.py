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
from veneer.jobs.post_training import AfterJob, CanaryRoute, HeldOut, held_out_rows, serving_of
from veneer.jobs.store import Job, JobEvent, JobLease, JobStore, LeaseLost, WrongState
from veneer.jobs.validate import after_of, job_config, may_pass, told
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
    after = after_of(lease.job)
    if after is None or after.evaluate is None:
        return None
    adapter = Path(result["adapter"])
    there = _told(store, lease.job, "evaluation")
    if there is None:
        assert base is not None  # a compared job is trained alone, so its base is here
        compare = partial(_compared, lease.job, after, after.evaluate, store.library, tenants, adapter, base)
        there = _tried(store, lease, "evaluation", "it could not be compared", compare)
    if "scores" not in there.data:
        return None
    _on_card(adapter, there.data)
    return there.data


def place_job(
    store: JobStore, lease: JobLease, tenants: Store | None, reference: str, compared: Mapping[str, Any] | None
) -> None:
    """Move the job's route or alias once, for the adapter `reference`.

    Raises LeaseLost and transient errors."""
    after = after_of(lease.job)
    if after is None or (after.route is None and after.alias is None):
        return
    kind = "route" if after.route is not None else "alias"
    if _told(store, lease.job, kind) is not None:
        return
    place = partial(_placed, lease.job, after, store.library, tenants, reference, compared)
    _tried(store, lease, kind, f"the {kind} stays as it is", place)


def _tried(store: JobStore, lease: JobLease, kind: str, otherwise: str, do: Callable[[], JobEvent]) -> JobEvent:
    """Record and return the event of `do`, or a warning event if `do` fails.

    Raises LeaseLost, Interrupted and transient errors."""
    store.get_lease(lease.job.id, lease.token)  # a cancelled job moves nothing
    try:
        event = do()
    except (LeaseLost, Interrupted):
        raise
    except Exception as error:
        if may_pass(error):
            raise
        found = told(error)
        text = f"{otherwise}: {found['message']}" + (f" ({found['fix']})" if "fix" in found else "")
        event = JobEvent("warn", kind, text, {"error": found})
    store.note(lease, [event])
    return event


def _told(store: JobStore, job: Job, kind: str) -> JobEvent | None:
    return next(iter(store.events_of(None, job.id, kind)), None)


def _known(tenants: Store | None) -> Store:
    if tenants is None:
        fix = "give the worker --tenants, or VENEER_TENANTS"
        raise ConfigError("there is no tenants' database where the job ran", where="after.route", fix=fix)
    return tenants


# -- scores ------------------------------------------------------------------------------------------------------------


def _compared(
    job: Job, after: AfterJob, held: HeldOut, library: Library, tenants: Store | None, adapter: Path, base: TextBase
) -> JobEvent:
    from veneer.models.loading import errors_only
    from veneer.serve.engine.offline import answering
    from veneer.train.text.evaluate import score_mixes

    config = job_config(job, adapter)
    assert isinstance(config, TrainConfig)  # checked on submission
    rows = held_out_rows(held, config)
    data: dict[str, Any] = {"rows": len(rows), "serving": None}
    mixes: dict[str, list[tuple[str, float]]] = {"base": [], "new": [(str(adapter), 1.0)]}
    if after.route is not None:
        move, now = _standing(_known(tenants), job.tenant, after.route.name)
        serving = serving_of(now, job.name)
        data |= {"route": after.route.name, "move": move}
        data["serving"] = None if serving is None else library.find(serving).reference
    elif after.alias is not None:
        data["serving"] = _version(library, f"{job.name}@{after.alias}")
    if data["serving"] is not None:
        mixes["serving"] = [(str(library.resolve(data["serving"])), 1.0)]
    with errors_only():
        found = score_mixes(
            base,
            rows,
            mixes,
            data=config.data.model_copy(update={"long_rows": "cut"}),
            generate=held.answered,
            max_new_tokens=held.max_new_tokens,
            answering=answering,
        )
    scores = {name: {m: _finite(getattr(each, m)) for m in held.metrics} for name, each in found.items()}
    data["scores"] = {"base": scores["base"], "serving": scores.get("serving", scores["base"]), "new": scores["new"]}
    return JobEvent("info", "evaluation", _text(data), data)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _text(data: Mapping[str, Any]) -> str:
    scores = data["scores"]
    columns = {"base": "base", **({"serving": data["serving"]} if data["serving"] else {}), "new": "new"}
    parts = []
    for metric in scores["new"]:
        values = {shown: scores[name][metric] for name, shown in columns.items()}
        each = (f"{shown} {'not measured' if v is None else f'{v:.4g}'}" for shown, v in values.items())
        parts.append(f"{metric}: {', '.join(each)}")
    return f"on {counted(data['rows'], 'held-out row')}: {'; '.join(parts)}"


def _on_card(folder: Path, data: Mapping[str, Any]) -> None:
    """Write the scores to the adapter's card and README. Idempotent."""
    from veneer.formats.card import CARD_FILE, README_FILE, card_bytes, is_ours, read_card, readme_bytes
    from veneer.formats.peft import load_folder

    there, scores = read_card(folder), data["scores"]
    held: dict[str, Any] = {"rows": data["rows"], "base": scores["base"], "adapter": scores["new"]}
    if data["serving"]:
        held |= {"serving": scores["serving"], "served": data["serving"]}
    card = replace(there.card, metrics=there.card.metrics | {"held_out": held})
    if is_ours(folder / README_FILE):
        shown = replace(load_folder(folder).adapter, card=card)
        atomic_write(folder / README_FILE, [readme_bytes(shown, digest=there.digest, name=folder.name)])
    atomic_write(folder / CARD_FILE, [card_bytes(card, digest=there.digest, files=there.files)])


# -- routes and aliases ------------------------------------------------------------------------------------------------


def _verdict(after: AfterJob, compared: Mapping[str, Any] | None) -> tuple[bool | None, str, str]:
    """Return (rule is met, in words, why nothing may move).

    The first is None without a rule; the third is "" if the route or alias may move."""
    if after.evaluate is not None and compared is None:
        return None, "", "it was not compared"
    if (rule := after.promote) is None:
        return None, "", ""
    met = rule.holds(compared["scores"]) if compared is not None else None
    if met is None:
        return None, "", f"`{rule}` could not be decided"
    return met, f"`{rule}` is {'met' if met else 'not met'}: ", ""


def _version(library: Library, name: str) -> str | None:
    """Return the reference that an alias points to; None if the alias does not exist."""
    try:
        return library.find(name).reference
    except NotInLibrary:
        return None


def _pointed(
    name: str, library: Library, reference: str, compared: Mapping[str, Any] | None, met: bool | None
) -> tuple[str, dict[str, Any]]:
    now, before = _version(library, name), None if compared is None else compared["serving"]
    if not met and not (met is None and before is None and now in (None, reference)):
        return f"{name} stays as it is", {}
    if now not in (before, reference):  # `reference`: moved before a kill
        fix = "veneer jobs promote, if the job's is to be there"
        raise ConfigError(f"{name} was moved since {reference} was compared", where="after.alias", fix=fix)
    library.alias(reference, name.rpartition("@")[2])
    text = f"{name} leads to {reference}" + ("" if before is None else f", and not to {before}")
    return text, {"before": before, "promoted": True}


def _standing(tenants: Store, tenant: str, route: str) -> tuple[int, Route | None]:
    """Return (number of the current revision or 0, the route or None)."""
    now = next((move for move in _moves(tenants, tenant, route) if move["current"]), None)
    return (0 if now is None else int(now["move"])), tenants.look().routes.get((tenant, route))


def _moves(tenants: Store, tenant: str, route: str) -> list[dict[str, Any]]:
    try:
        with reading(tenants.engine) as c:
            return routes.route_history(c, route, tenant=tenant)
    except UnknownName:
        return []


def _hand(job: Job) -> str:
    return f"job {job.id} by hand"


def _of_job(job: Job, moves: list[dict[str, Any]]) -> list[int]:
    """Return the revisions made for a job, automatically or manually."""
    return [int(move["move"]) for move in moves if move["who"] in (f"job {job.id}", _hand(job))]


def _placed(
    job: Job,
    after: AfterJob,
    library: Library,
    tenants: Store | None,
    reference: str,
    compared: Mapping[str, Any] | None,
) -> JobEvent:
    kind, name = ("alias", f"{job.name}@{after.alias}") if after.route is None else ("route", after.route.name)
    met, said, why_not = _verdict(after, compared)
    if why_not:
        text, data = f"{why_not}: {name} stays as it is", dict[str, Any]()
    elif after.route is None:
        text, data = _pointed(name, library, reference, compared, met)
    else:
        text, data = _shared_out(job, after.route, library, _known(tenants), reference, compared, met)
    about = {kind: name, "reference": reference, "promoted": False, **data}
    return JobEvent("info", kind, said + text, about)


def _shared_out(
    job: Job,
    route: CanaryRoute,
    library: Library,
    tenants: Store,
    reference: str,
    compared: Mapping[str, Any] | None,
    met: bool | None,
) -> tuple[str, dict[str, Any]]:
    name = route.name
    move, now = _standing(tenants, job.tenant, name)
    if mine := _of_job(job, _moves(tenants, job.tenant, name)):  # moved before a kill
        return f"{name} was moved", {"move": max(mine), "promoted": bool(met)}
    if compared is not None and compared.get("move", move) != move:
        raise routes.RouteMoved(f"{name} was moved since {reference} was compared", where="route")
    serving = serving_of(now, job.name)
    if met or (serving is None and met is None):
        targets, shadow = [(reference, 1)], None
        text = f"{name} leads to {reference}" + ("" if serving is None else f", and not to {serving}")
    elif serving is None or serving == reference or (met is False and not route.shadow):
        return f"{name} stays as it is", {}
    else:
        part = 0 if met is False else round(route.weight * _WHOLE)
        targets, shadow = [(serving, _WHOLE - part), (reference, part)], reference if route.shadow else None
        text = f"{reference} gets {part / _WHOLE:.4g} of the users of {name}, {serving} the others"
        text += f"; {reference} answers unseen too" if shadow else ""
    made = routes.set_route(
        tenants,
        name,
        targets,
        tenant=job.tenant,
        shadow=shadow,
        who=f"job {job.id}",
        from_move=move,
        check=library.find,
    )
    return text, {"move": made.move, "promoted": bool(met)}


# -- manual actions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobPlace:
    """The current targets of a job's route or alias.

    `leads`: empty if the route or alias was removed, because it did not exist before the job. `shown`: JSON
    values."""

    name: str
    leads: tuple[str, ...]
    shown: Mapping[str, Any]

    def __str__(self) -> str:
        leads = f"leads to {', '.join(self.leads)}" if self.leads else "is gone, as it was before the job"
        return f"{self.name} {leads}"

    @classmethod
    def of_route(cls, name: str, route: Route | None) -> JobPlace:
        leads = () if route is None else tuple(target for target, _ in route.targets)
        return cls(name, leads, {"route": None if route is None else routes.route_shown(route)})

    @classmethod
    def of_alias(cls, name: str, version: str | None) -> JobPlace:
        return cls(name, () if version is None else (version,), {"alias": name, "version": version})


def promote_job(store: JobStore, tenants: Store | None, tenant: str | None, job: str) -> JobPlace:
    """Point the job's route or alias to the job's adapter, for all users.

    Raises UnknownJob, WrongState, ConfigError."""
    found, after = _placing(store, tenant, job)
    if found.result is None:
        raise WrongState(f"job {job} is {found.state}", where="job", fix="only one that has succeeded can be promoted")
    reference = str(found.result["reference"])
    if after.route is not None:
        known, kind, name = _known(tenants), "route", after.route.name
        _, now = _standing(known, found.tenant, name)
        if now is not None and now.targets == ((reference, 1),) and now.shadow is None:
            return JobPlace.of_route(name, now)
        data, who = dict[str, Any](), _hand(found)
        made = routes.set_route(known, name, [(reference, 1)], tenant=found.tenant, who=who, check=store.library.find)
        place = JobPlace.of_route(name, made)
    else:
        kind, name = "alias", f"{found.name}@{after.alias}"
        data, place = {"before": _version(store.library, name)}, JobPlace.of_alias(name, reference)
        if data["before"] == reference:
            return place
        store.library.alias(reference, name.rpartition("@")[2])
    told = JobEvent("info", kind, f"promoted by hand: {place}", {kind: name, "promoted": True, **data})
    store.remark(found.tenant, job, told)
    return place


def rollback_job(store: JobStore, tenants: Store | None, tenant: str | None, job: str) -> JobPlace:
    """Restore the targets of the job's route or alias from before the job.

    A route keeps its users. A route or alias that did not exist before the job is removed. Raises UnknownJob,
    WrongState, and ConfigError if the job did not move the route or alias, or if it was moved again since."""
    found, after = _placing(store, tenant, job)
    if after.route is not None:
        kind, place = "route", _route_back(found, after.route.name, store.library, _known(tenants))
    else:
        kind, place = "alias", _alias_back(store, found, f"{found.name}@{after.alias}")
    store.remark(found.tenant, job, JobEvent("info", kind, f"taken back: {place}", {"promoted": False}))
    return place


def _route_back(job: Job, route: str, library: Library, tenants: Store) -> JobPlace:
    who, moves = f"job {job.id} taken back", _moves(tenants, job.tenant, route)
    mine = set(_of_job(job, moves))
    now = next((move for move in moves if move["current"]), None)
    if now is None or now["move"] not in mine:
        whose = f" --tenant {job.tenant}" if job.tenant else ""
        raise _elsewhere(job, route, f"veneer tenant route history {route}{whose}", moved=bool(mine))
    before = {int(move["move"]): move["before"] for move in moves}
    number = int(now["move"])
    while number in mine and before[number] is not None:
        number = int(before[number])
    if number in mine:
        routes.remove_route(tenants, route, tenant=job.tenant, who=who)
        return JobPlace.of_route(route, None)
    made = routes.rollback_route(tenants, route, tenant=job.tenant, who=who, moves=mine, check=library.find)
    return JobPlace.of_route(route, made)


def _alias_back(store: JobStore, job: Job, name: str) -> JobPlace:
    library = store.library
    moved = [event.data for event in store.events_of(None, job.id, "alias") if event.data.get("promoted")]
    if not moved or _version(library, name) != (job.result or {}).get("reference"):
        raise _elsewhere(job, name, f"veneer library alias, or show {job.name}", moved=bool(moved))
    before = moved[-1]["before"]
    if before is None:
        library.remove(name)
    else:
        library.alias(before, name.rpartition("@")[2])
    return JobPlace.of_alias(name, before)


def _elsewhere(job: Job, name: str, fix: str, *, moved: bool) -> ConfigError:
    what = f"{name} is not where job {job.id} moved it" if moved else f"job {job.id} did not move {name}"
    return ConfigError(what, where="job", fix=fix)


def _placing(store: JobStore, tenant: str | None, job: str) -> tuple[Job, AfterJob]:
    """Return a job and its `after` section, which has a route or an alias.

    Raises UnknownJob, and WrongState if the section has neither."""
    found = store.get(tenant, job)
    after = after_of(found)
    if after is None or (after.route is None and after.alias is None):
        fix = "a section `after` with one in its file; or veneer tenant route set, veneer library alias"
        raise WrongState(f"job {job} has no route and no alias", where="job", fix=fix)
    return found, after
