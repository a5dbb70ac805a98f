"""The section `after` of a job's file: actions after training.

The section is validated before training.

    after:
      evaluate: {data: held-out.jsonl, metrics: [exact_match, loss]}     default for data: the validation rows
      route: {name: acme/support, weight: 0.1, shadow: true}             canary next to the serving version
      promote: {metric: exact_match, against: serving, by: 0.01}         if missing: promote manually

A new version is promoted if its metric is better than the metric of `against` (serving or base) by at least
`by`, in the metric's own unit. `jobs.canary` executes the section.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from veneer.errors import ConfigError, bullets, first_few, nearest, one_of, quoted
from veneer.serve.tenancy.store import ALL, Route, Store, check_route_name
from veneer.train.config.load import RunConfig, config_from, load_config, read_sections
from veneer.train.config.section import SOURCES
from veneer.train.config.text import TrainConfig, preference_formats
from veneer.train.text.rows import Row, read_rows, split_rows

_METRICS = ("exact_match", "valid_json", "likelier", "reward_accuracy", "loss", "perplexity", "reward_margin")
"""The metrics that `train.text.evaluate` computes."""
_LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
_ANSWERED = frozenset({"exact_match", "valid_json"})
"""The metrics for which the model must generate completions."""
_ROUNDING = 1e-9


# -- the section -------------------------------------------------------------------------------------------------------


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class HeldOut(_Section):
    """The section `evaluate`. `data`: held-out files; default: the validation rows."""

    data: str | list[str] | None = None
    metrics: list[str] = pydantic.Field(default=["exact_match", "loss"], min_length=1)
    limit: int | None = pydantic.Field(default=None, ge=1)
    max_new_tokens: int = pydantic.Field(default=256, ge=1, le=1_000_000)

    @property
    def files(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data or []

    @property
    def answered(self) -> bool:
        return bool(_ANSWERED.intersection(self.metrics))


class CanaryRoute(_Section):
    """The section `route`.

    weight: share of users that the new version gets before promotion.
    shadow: whether the new version also answers the other users' requests as a shadow."""

    name: str
    weight: float = pydantic.Field(default=0.1, ge=0, lt=1)
    shadow: bool = False


class PromotionRule(_Section):
    """The section `promote`: when to promote the new version.

    The new version is promoted if its `metric` is better than the `metric` of `against` by at least `by`.

    by: in the metric's own unit."""

    metric: str
    against: Literal["serving", "base"] = "serving"
    by: float = 0.0

    def __str__(self) -> str:
        return f"{self.metric} better than {self.against} by at least {self.by:g}"

    def holds(self, scores: Mapping[str, Mapping[str, float | None]]) -> bool | None:
        """Return whether the scores of the new, serving and base versions meet the rule.

        Returns None if a score is missing or not finite."""
        new, old = scores["new"].get(self.metric), scores[self.against].get(self.metric)
        if new is None or old is None or not (math.isfinite(new) and math.isfinite(old)):
            return None
        improvement = old - new if self.metric in _LOWER_IS_BETTER else new - old
        return improvement >= self.by - _ROUNDING  # tolerates rounding errors: 0.51 - 0.5 is slightly less than 0.01


class AfterJob(_Section):
    """The section `after`."""

    evaluate: HeldOut | None = None
    route: CanaryRoute | None = None
    promote: PromotionRule | None = None

    def on(self, data: list[str]) -> AfterJob:
        """Return a copy of the section with `data` as its held-out files."""
        held_out = (self.evaluate or HeldOut()).model_copy(update={"data": data})
        return self.model_copy(update={"evaluate": held_out})


_SECTIONS: Mapping[str, type[_Section]] = {"evaluate": HeldOut, "route": CanaryRoute, "promote": PromotionRule}


def load_job_config(
    path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, AfterJob | None]:
    """Return a job file's `veneer train` configuration and its section `after`.

    path: the file; None: use only the overrides. Raises ConfigError as `load_config` does."""
    if path is None:
        return load_config(None, overrides)[0], None
    values, lines = read_sections(path)
    after = values.pop("after", None)
    config, _ = config_from(values, overrides, file=Path(path), lines=lines)
    return config, None if after is None else parse_after(after, Path(path).parent, os.fspath(path))


def parse_after(values: Any, folder: Path, where: str = "after") -> AfterJob:
    """Return the section with these values; relative paths are relative to `folder`.

    Raises ConfigError, which lists all errors."""
    if isinstance(values, dict):  # an empty section, such as `evaluate:`, means its defaults
        values = {key: {} if value is None and key in _SECTIONS else value for key, value in values.items()}
    try:
        after = AfterJob.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"it cannot be read:\n{bullets(map(_line, error.errors()), None)}", where=where) from None
    if after.evaluate is None or after.evaluate.data is None:
        return after
    root = folder.resolve()
    files = after.evaluate.files
    return after.on([file if file.startswith(SOURCES) else str(root / Path(file).expanduser()) for file in files])


def _line(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    name = ".".join(["after", *loc])
    if error["type"] == "extra_forbidden":
        keys = list((_SECTIONS[loc[0]] if len(loc) > 1 else AfterJob).model_fields)
        suggestion = nearest(loc[-1], keys, 1)
        help = f"did you mean {suggestion[0]}?" if suggestion else f"known keys: {first_few(keys, 9)}"
        return f"unknown key `{name}`: {help}"
    return f"`{name}`: {str(error['msg']).removeprefix('Value error, ')}"


# -- checks before training --------------------------------------------------------------------------------------------


def check_after(after: AfterJob, config: RunConfig, name: str, tenant: str, tenants: Store | None) -> None:
    """Check the section against the run's configuration and the tenant's routes.

    name: the name of the job's adapter.

    Raises ConfigError if an action is certain to fail after training."""
    rule = after.promote
    if after.route is None and (after.evaluate is None or rule is not None):
        message = "`promote` needs a route" if rule else "there is nothing to do after the job"
        raise ConfigError(message, where="after", fix="route: {name: support, weight: 0.1}")
    if after.evaluate is not None:
        if not isinstance(config, TrainConfig):
            fix = "remove it, and promote manually: veneer jobs promote"
            raise ConfigError("image jobs cannot be evaluated", where="after.evaluate", fix=fix)
        for metric in after.evaluate.metrics:
            one_of(metric, _METRICS, "a metric", "after.evaluate.metrics")
    if rule is not None:
        one_of(rule.metric, _METRICS, "a metric", "after.promote.metric")
        metrics = [] if after.evaluate is None else after.evaluate.metrics
        if rule.metric not in metrics:
            message = f"{rule.metric} is used in `promote` but not listed in evaluate.metrics"
            fix = f"evaluate: {{metrics: [{', '.join([*metrics, rule.metric])}]}}"
            raise ConfigError(message, where="after.promote", fix=fix)
    if after.route is not None:
        check_route_name(after.route.name)
        _check_owner(after.route.name, tenant, tenants)
        assert tenants is not None
        serving_version(tenants.refresh().routes.get((tenant, after.route.name)), name)


def _check_owner(route: str, tenant: str, tenants: Store | None) -> None:
    where, namespace = "after.route.name", route.rpartition("/")[0]
    if tenants is None:
        fix = "use veneer tenant add, or --tenants with a database"
        raise ConfigError("routes need a tenants' database, and this machine has none", where=where, fix=fix)
    if tenant and namespace and namespace != tenant:
        fix = f"{tenant}/{route.rpartition('/')[2]}"
        raise ConfigError(f"{quoted(route)} is not in the namespace of tenant {tenant}", where=where, fix=fix)
    known = tenants.refresh().routes
    if tenant and (tenant, route) not in known and (ALL, route) in known:
        message = f"{quoted(route)} belongs to all tenants, and a job of {tenant} can change only {tenant}'s routes"
        fix = f"use another name, such as {tenant}/{route}, or a job without a tenant"
        raise ConfigError(message, where=where, fix=fix)


def serving_version(route: Route | None, name: str) -> str | None:
    """Return the version that a route serves; None if there is no route.

    name: the name of the job's adapter.

    Raises ConfigError if the route has several targets, or if its target is the newest version of `name`: the
    route would then move to the job's adapter before the comparison."""
    if route is None or not route.targets:
        return None
    if len(route.targets) > 1:
        parts = " ".join(f"{target}={weight}" for target, weight in route.targets)
        fix = "first choose one target: veneer jobs promote, veneer jobs rollback or veneer tenant route set"
        raise ConfigError(f"{route.name} already has several targets: {parts}", where="after.route.name", fix=fix)
    target = route.targets[0][0]
    if target in (name, f"{name}@latest"):
        newest = f"{route.name} points to the newest version of {name}"
        message = f"{newest}, so it would move to the job's adapter before the comparison"
        fix = f"set a fixed version: veneer tenant route set {route.name} {name}@1"
        raise ConfigError(message, where="after.route.name", fix=fix)
    return target


def held_out_rows(held_out: HeldOut, config: TrainConfig) -> list[Row]:
    """Return the held-out rows of a job.

    Raises DataError, and ConfigError if there are no held-out rows."""
    if held_out.data is not None:
        rows, _ = read_rows(held_out.data, limit=held_out.limit)
        return rows
    loss = config.preference.loss
    formats = None if loss is None else preference_formats(loss)
    options: dict[str, Any] = {"format": config.data.format, "columns": config.data.columns, "formats": formats}
    if config.data.validation is not None:
        rows, _ = read_rows(config.data.files("validation"), **options)
    else:
        trained, _ = read_rows(config.data.files("train"), limit=config.data.limit, **options)
        rows = split_rows(trained, config.data.split, seed=config.split_seed)[1]
    if not rows:
        fix = "evaluate: {data: held-out.jsonl}, or data.validation, or data.split"
        raise ConfigError("no rows are held out", where="after.evaluate", fix=fix)
    return rows[: held_out.limit]
