"""The loop closed: what was trained is compared, gets its place on a route, is promoted or taken back.

    compared = compare_job(store, lease, tenants, result)      base, what serves now, the new one; on its card
    place_job(store, lease, tenants, reference, compared)      its route moves, as its rule says

    promote_job(store, tenants, "acme", job)                   by hand: all users
    rollback_job(store, tenants, "acme", job)                  what the route led to before the job moved it

| rule          | the new version gets                                                                            |
| none          | its weight of the users, and is the shadow of the rest, if its route says so; a hand decides      |
| it is met     | all users                                                                                         |
| it is not met | no user; where its route has a shadow it answers unseen; what serves stays as it is               |

Where nothing serves yet the base stands for it, and the first version that is let through gets all users.

Each step is an event of the job, written before the next one begins, and the route's own history says which move is the
job's: whoever goes on after a kill finds what was done. What cannot be done here (the route was moved meanwhile, what
serves cannot be read) is a warning among the events and moves nothing; the adapter is in the library all the same.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, Interrupted
from veneer.files.atomic import atomic_write
from veneer.jobs.after import AfterJob, CanaryRoute, HeldOut, held_out_rows, serving_of
from veneer.jobs.store import Job, JobEvent, JobLease, JobStore, LeaseLost, WrongState
from veneer.jobs.validate import job_config, may_pass, told
from veneer.library.database import reading
from veneer.library.library import Library
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import Route, Store, UnknownName
from veneer.train.config.text import TrainConfig

_WHOLE = 10_000
"""Parts of a route's users, as many as it can tell apart."""


def _after_of(job: Job) -> AfterJob | None:
    """The section `after` that a job was submitted with."""
    found = job.about.get("after")
    return None if found is None else AfterJob.model_validate(found)


# -- a job goes on by itself -------------------------------------------------------------------------------------------


def compare_job(
    store: JobStore, lease: JobLease, tenants: Store | None, result: Mapping[str, Any]
) -> dict[str, Any] | None:  # fmt: skip
    """What the event `evaluation` has: `scores` of base, serving and new, and what serves by which move. None where
    nothing is evaluated, or could not be. The card of the adapter has it then. Raises LeaseLost, and what may pass."""
    after = _after_of(lease.job)
    if after is None or after.evaluate is None:
        return None
    adapter = Path(result["adapter"])
    there = _told(store, lease.job, "evaluation")
    if there is None:
        compare = partial(_compared, lease.job, after.evaluate, after.route, store.library, tenants, adapter)
        there = _tried(store, lease, "evaluation", "it could not be compared", compare)
    if "scores" not in there.data:
        return None
    _on_card(adapter, there.data)
    return there.data


def place_job(
    store: JobStore, lease: JobLease, tenants: Store | None, reference: str, compared: Mapping[str, Any] | None
) -> None:  # fmt: skip
    """Moves the job's route to where `reference` belongs, once. Raises LeaseLost, and what may pass."""
    after = _after_of(lease.job)
    if after is None or after.route is None or _told(store, lease.job, "route") is not None:
        return
    place = partial(_placed, lease.job, after, after.route, store.library, tenants, reference, compared)
    _tried(store, lease, "route", "the route stays as it is", place)


def _tried(store: JobStore, lease: JobLease, kind: str, otherwise: str, do: Callable[[], JobEvent]) -> JobEvent:
    """The event that `do` makes, or the one that says why it could not be; noted."""
    store.held(lease.job.id, lease.token)  # a job that was cancelled moves nothing
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
    job: Job, held: HeldOut, route: CanaryRoute | None, library: Library, tenants: Store | None, adapter: Path
) -> JobEvent:  # fmt: skip
    from veneer.models.loading import errors_only
    from veneer.models.text.base import load_text
    from veneer.serve.engine.offline import answering
    from veneer.train.text.evaluate import score_mixes

    config = job_config(job, adapter)
    assert isinstance(config, TrainConfig)  # looked at when it was submitted
    rows = held_out_rows(held, config)
    data: dict[str, Any] = {"rows": len(rows), "serving": None}
    mixes: dict[str, list[tuple[str, float]]] = {"base": [], "new": [(str(adapter), 1.0)]}
    if route is not None:
        move, now = _standing(_known(tenants), job.tenant, route.name)
        serving = serving_of(now, job.name)
        data |= {"route": route.name, "move": move}
        if serving is not None:
            data["serving"] = library.find(serving).reference
            mixes["serving"] = [(str(library.resolve(data["serving"])), 1.0)]
    gc.collect()  # the run's own base
    with errors_only():
        base = load_text(config.base.name, dtype=config.base.dtype, quantise=config.base.quantise)
        found = score_mixes(
            base, rows, mixes, data=config.data.model_copy(update={"long_rows": "cut"}), generate=held.answered,
            max_new_tokens=held.max_new_tokens, answering=answering,
        )  # fmt: skip
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
    return f"on {data['rows']:,} held-out rows: {'; '.join(parts)}"


def _on_card(folder: Path, data: Mapping[str, Any]) -> None:
    """The same whenever it is done again."""
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


# -- routes ------------------------------------------------------------------------------------------------------------


def _standing(tenants: Store, tenant: str, route: str) -> tuple[int, Route | None]:
    """The number of the move that holds, 0 where there is none, and where it leads, None where nowhere."""
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
    """The moves that were made for a job, by itself or by hand."""
    return [int(move["move"]) for move in moves if move["who"] in (f"job {job.id}", _hand(job))]


def _placed(
    job: Job, after: AfterJob, route: CanaryRoute, library: Library, tenants: Store | None, reference: str,
    compared: Mapping[str, Any] | None,
) -> JobEvent:  # fmt: skip
    name, known = route.name, _known(tenants)

    def event(text: str, promoted: bool = False, **data: Any) -> JobEvent:
        about = {"route": name, "reference": reference, "promoted": promoted, **data}
        return JobEvent("info", "route", text, about)

    move, now = _standing(known, job.tenant, name)
    if after.evaluate is not None and compared is None:
        return event(f"it was not compared: {name} stays as it is")
    met, said = None, ""
    if (rule := after.rule) is not None:
        met = rule.holds(compared["scores"]) if compared is not None else None
        if met is None:
            return event(f"`{rule.text}` could not be decided: {name} stays as it is")
        said = f"`{rule.text}` is {'met' if met else 'not met'}: "
    if mine := _of_job(job, _moves(known, job.tenant, name)):  # before a kill
        return event(f"{said}{name} was moved", bool(met), move=max(mine))
    if compared is not None and compared.get("move", move) != move:
        raise routes.RouteMoved(f"{name} was moved since {reference} was compared", where="route")
    serving = serving_of(now, job.name)
    if met or (serving is None and met is None):
        targets, shadow = [(reference, 1)], None
        text = f"{name} leads to {reference}" + ("" if serving is None else f", and not to {serving}")
    elif serving is None or serving == reference or (met is False and not route.shadow):
        return event(f"{said}{name} stays as it is")
    else:
        part = 0 if met is False else round(route.weight * _WHOLE)
        targets, shadow = [(serving, _WHOLE - part), (reference, part)], reference if route.shadow else None
        text = f"{reference} gets {part / _WHOLE:.4g} of the users of {name}, {serving} the others"
        text += f"; {reference} answers unseen too" if shadow else ""
    made = routes.set_route(
        known, name, targets, tenant=job.tenant, shadow=shadow, who=f"job {job.id}", from_move=move, check=library.find
    )  # fmt: skip
    return event(said + text, bool(met), move=made.move)


# -- by hand -----------------------------------------------------------------------------------------------------------


def promote_job(store: JobStore, tenants: Store | None, tenant: str | None, job: str) -> Route:
    """All users of its route get what the job made. Raises UnknownJob, WrongState, ConfigError."""
    found, route = _routed(store, tenant, job)
    if found.result is None:
        raise WrongState(f"job {job} is {found.state}", where="job", fix="only one that has succeeded can be promoted")
    reference, known = str(found.result["reference"]), _known(tenants)
    _, now = _standing(known, found.tenant, route)
    if now is not None and now.targets == ((reference, 1),) and now.shadow is None:
        return now
    made = routes.set_route(
        known, route, [(reference, 1)], tenant=found.tenant, who=_hand(found), check=store.library.find
    )  # fmt: skip
    told = JobEvent("info", "route", f"promoted by hand: {route} leads to {reference}", {"promoted": True})
    store.remark(found.tenant, job, told)
    return made


def rollback_job(store: JobStore, tenants: Store | None, tenant: str | None, job: str) -> Route | None:
    """The route leads again to what it led to before the job moved it, for the same users; None where there was no
    such route. Raises UnknownJob, WrongState, ConfigError where the job did not move it, or somebody else has since."""
    found, route = _routed(store, tenant, job)
    known, who = _known(tenants), f"job {job} taken back"
    moves = _moves(known, found.tenant, route)
    mine = set(_of_job(found, moves))
    now = next((move for move in moves if move["current"]), None)
    if now is None or now["move"] not in mine:
        what = f"{route} is not where job {job} moved it" if mine else f"job {job} did not move {route}"
        raise ConfigError(what, where="job", fix=f"veneer tenant route history {route}, and rollback")
    before = {int(move["move"]): move["before"] for move in moves}
    number = int(now["move"])
    while number in mine and before[number] is not None:
        number = int(before[number])
    back = None
    if number in mine:
        routes.remove_route(known, route, tenant=found.tenant, who=who)
    else:
        back = routes.rollback_route(
            known, route, tenant=found.tenant, who=who, moves=mine, check=store.library.find
        )  # fmt: skip
    leads = "is gone, as before" if back is None else f"leads to {', '.join(name for name, _ in back.targets)} again"
    store.remark(found.tenant, job, JobEvent("info", "route", f"taken back: {route} {leads}", {"promoted": False}))
    return back


def _routed(store: JobStore, tenant: str | None, job: str) -> tuple[Job, str]:
    """A job, and the route it is for."""
    found = store.get(tenant, job)
    after = _after_of(found)
    if after is None or after.route is None:
        fix = "a section `after` with a route in its file; or veneer tenant route set"
        raise WrongState(f"job {job} has no route", where="job", fix=fix)
    return found, after.route.name
