"""Conversion between OpenAI's fine-tuning API and jobs.

    request = TuningBody.model_validate(body)
    config = tuning_config(request, None, base=…, start=None, files=…, length=…)      for `veneer train`
    job_to_openai(job), event_to_openai(job, event), checkpoint_to_openai(job, point)

`auto` becomes a number, which in some cases depends on the number of training rows; the job shows the number:

    batch_size                 16 rows; fewer if an epoch would have under 25 steps
    n_epochs                   3; up to 10 if the run would otherwise have under 100 steps
    learning_rate_multiplier   1: veneer's default rate; for dpo a tenth of the usual rate
    beta                       0.1
    compute_multiplier         1: 8 completions per prompt
    eval_interval              an epoch

Without a validation file, all rows are used for training, as at OpenAI. Rows longer than the context are
refused.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from veneer.jobs.post_training import AfterJob
from veneer.jobs.store import ENDS, Job, JobCheckpoint, JobEvent, jobs_home
from veneer.library.names import organisation_of
from veneer.serve.http.bodies import Body, Strict, at_most
from veneer.serve.http.text_bodies import JsonSchema
from veneer.train.config.load import config_from
from veneer.train.config.text import TrainConfig, config_keys
from veneer.train.events import TOKEN_ACCURACY
from veneer.train.records import count_lines

_LONG = 100
"""Maximum steps between checkpoints; longer epochs have checkpoints in between."""
_LARGEST = 256
"""Maximum number of rows per step."""
_ROWS_COUNTED = _LONG * _LARGEST + 1
"""Maximum number of rows to count; beyond this number, the exact count makes no difference."""


def _is_auto(value: Any) -> Any:
    if value != "auto":
        raise PydanticCustomError("auto", "must be a number or 'auto'")
    return value


_Auto = Annotated[Literal["auto"], BeforeValidator(_is_auto)]
_Number = TypeVar("_Number")
# "=" occurs in no field name, so these tags cannot be mistaken for fields in errors.
_OrAuto = Annotated[
    Annotated[_Number, Tag("=number")] | Annotated[_Auto, Tag("=auto")],
    Discriminator(lambda value: "=auto" if isinstance(value, str) else "=number"),
]
_Batch = _OrAuto[Annotated[int, Field(ge=1, le=_LARGEST)]]
_Epochs = _OrAuto[Annotated[int, Field(ge=1, le=50)]]
_Multiplier = _OrAuto[Annotated[float, Field(gt=0, le=1000)]]
_Beta = _OrAuto[Annotated[float, Field(gt=0, le=2)]]
_Compute = _OrAuto[Annotated[float, Field(gt=1e-5, le=10)]]
_Count = _OrAuto[Annotated[int, Field(ge=1, le=1_000_000)]]
_GROUP = 8
"""Number of completions per prompt with a `compute_multiplier` of 1."""
_Words = Annotated[str, Field(min_length=1, max_length=200)]


# -- requests ----------------------------------------------------------------------------------------------------------


class Hyperparameters(Strict):
    batch_size: _Batch = "auto"
    learning_rate_multiplier: _Multiplier = "auto"
    n_epochs: _Epochs = "auto"


class DpoHyperparameters(Hyperparameters):
    beta: _Beta = "auto"


class ReinforcementHyperparameters(Hyperparameters):
    compute_multiplier: _Compute = "auto"
    eval_interval: _Count = "auto"


class _ResponseFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class Supervised(Strict):
    hyperparameters: Hyperparameters | None = None


class Dpo(Strict):
    hyperparameters: DpoHyperparameters | None = None


class Reinforced(Strict):
    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters | None = None
    response_format: _ResponseFormat | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the method's fields, except the hyperparameters, as shown in a job."""
        return self.model_dump(mode="json", exclude={"hyperparameters"}, exclude_none=True, by_alias=True)


_Kind = Literal["supervised", "dpo", "reinforcement"]


class Method(Strict):
    type: _Kind
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforced | None = None

    @model_validator(mode="after")
    def _check_method(self) -> Method:
        if self.type == "reinforcement" and self.reinforcement is None:
            raise _clash("reinforcement.grader is required")
        if unexpected := [each for each in get_args(_Kind) if each != self.type and getattr(self, each) is not None]:
            raise _clash(f"{unexpected[0]} does not belong to type {self.type}")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters | None:
        settings: Any = getattr(self, self.type)
        return settings.hyperparameters if settings is not None else None


def _clash(text: str) -> PydanticCustomError:
    return PydanticCustomError("clash", "{text}", {"text": text})


_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class TuningBody(Body):
    """The body of POST /v1/fine_tuning/jobs."""

    model: str = Field(min_length=1, max_length=512)
    training_file: str = Field(min_length=1, max_length=100)
    validation_file: str | None = Field(default=None, min_length=1, max_length=100)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: str | None = Field(default=None, min_length=1, max_length=64)
    seed: int | None = Field(default=None, ge=0, le=2_147_483_647)
    metadata: Annotated[dict[_Key, _Value], at_most(16)] | None = None
    integrations: Annotated[list[Any], at_most(0)] | None = None
    after: AfterJob | None = Field(
        default=None, description="not part of OpenAI's API (send in extra_body); file ids instead of paths"
    )

    @property
    def kind(self) -> _Kind:
        return "supervised" if self.method is None else self.method.type

    @property
    def reinforced(self) -> Reinforced | None:
        """Return the method's `reinforcement` section; None for other methods."""
        return self.method.reinforcement if self.method is not None and self.kind == "reinforcement" else None

    @property
    def numbers(self) -> Hyperparameters:
        """Return the method's hyperparameters, else the deprecated top-level hyperparameters."""
        chosen_numbers = self.hyperparameters if self.method is None else self.method.hyperparameters
        own = {"dpo": DpoHyperparameters, "reinforcement": ReinforcementHyperparameters}
        return chosen_numbers or self.hyperparameters or own.get(self.kind, Hyperparameters)()

    @model_validator(mode="after")
    def _check_one_source(self) -> TuningBody:
        numbers = self.method and self.method.hyperparameters
        if self.hyperparameters and (self.kind != "supervised" or numbers not in (None, self.hyperparameters)):
            raise _clash(f"set hyperparameters only in method.{self.kind}")
        return self


class FormSettings(Strict):
    """Settings from the Studio's form that OpenAI's request body does not have."""

    format: _Words = "auto"
    columns: Annotated[dict[_Words, _Words], at_most(16)] = Field(default_factory=dict)
    rank: int | None = Field(default=None, ge=1, le=256)
    learning_rate: float | None = Field(default=None, gt=0, le=1)


def suffix_of(text: str | None) -> str:
    """Convert a text to a name suffix: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", (text or "").lower()).strip("-")


def tuning_config(
    request: TuningBody, form: FormSettings | None, *, base: str, start: str | None, files: dict[str, Path], length: int
) -> dict[str, Any]:
    """Return a request's training configuration, with numbers in place of `auto`.

    form: additional settings from the Studio's form
    base, start: the base, and the adapter to continue from
    files: `train` and, if there is one, `validation` -> file
    length: maximum tokens of a row

    Raises ConfigError."""
    numbers = request.numbers
    rows = count_lines(files["train"], _ROWS_COUNTED)
    batch = numbers.batch_size if numbers.batch_size != "auto" else min(16, max(1, rows // 25))
    steps = math.ceil(rows / batch)
    epochs = numbers.n_epochs if numbers.n_epochs != "auto" else min(10, max(3, math.ceil(100 / max(1, steps))))
    config: dict[str, Any] = {
        "base": {"name": base},
        "data": {"max_length": length} | {part: str(path) for part, path in files.items()},
        "batching": {"rows": batch},
        "schedule": {"epochs": epochs},
        "checkpoint": {"every": "epoch" if steps <= _LONG else _LONG, "keep": 3},
        "seed": secrets.randbelow(1 << 31) if request.seed is None else request.seed,
    }
    if start is not None:
        config["adapter"] = {"start": start}
    if "validation" in files:
        config["evaluation"] = {"keep": "last"}  # as at OpenAI, where the client chooses among the checkpoints
    else:
        config["data"]["split"] = 0
    if isinstance(numbers, DpoHyperparameters):
        config["data"]["format"] = "openai-preference"
        config["preference"] = {"loss": "dpo", "beta": 0.1 if numbers.beta == "auto" else numbers.beta}
    if request.reinforced is not None:
        _reinforce(config, request.reinforced)
    if form is not None:
        config["data"] |= {"format": form.format, "columns": form.columns}
        if form.rank is not None:
            config["adapter"] = {"rank": form.rank}
    times = 1.0 if numbers.learning_rate_multiplier == "auto" else numbers.learning_rate_multiplier
    plain, _ = config_from({**config, "output": {"directory": str(files["train"].parent)}})
    assert isinstance(plain, TrainConfig)
    config["base"]["name"] = plain.base.name  # config_from replaces a relative folder with an absolute path
    rate = None if form is None else form.learning_rate
    config["optimizer"] = {"learning_rate": rate or plain.optimizer.learning_rate * times}
    return config


def _reinforce(config: dict[str, Any], request: Reinforced) -> None:
    """Add a request's reinforcement settings to a configuration."""
    numbers = request.hyperparameters or ReinforcementHyperparameters()
    times = 1.0 if numbers.compute_multiplier == "auto" else numbers.compute_multiplier
    rewards = [{"kind": "grader", "grader": request.grader, "sandbox": True}]
    config["reinforcement"] = {"loss": "grpo", "rewards": rewards, "group": max(2, round(_GROUP * times))}
    if request.response_format is not None:
        config["reinforcement"]["grammar"] = {"json_schema": request.response_format.json_schema.json_schema}
    if numbers.eval_interval != "auto" and "validation" in config["data"]:
        config["evaluation"]["every"] = numbers.eval_interval


# -- responses ---------------------------------------------------------------------------------------------------------


def job_to_openai(job: Job, results: Sequence[str] = ()) -> dict[str, Any]:
    """Return a job in OpenAI's format. `results`: ids of the job's result files."""
    request, config = job.about["openai"], job.config
    numbers = dict(request["hyperparameters"])
    if job.plan is not None:  # replaces `auto` with the numbers
        resolved = {"batch_size": config["batching"]["rows"], "n_epochs": config["schedule"]["epochs"], "beta": 0.1}
        resolved |= {"learning_rate_multiplier": 1.0, "compute_multiplier": 1.0}
        resolved |= {"eval_interval": max(1, job.steps // config["schedule"]["epochs"])}
        numbers = {key: resolved[key] if value == "auto" else value for key, value in numbers.items()}
    kind = request["kind"]
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "created_at": int(job.created),
        "model": request["model"],
        "fine_tuned_model": request["tuned"] if job.state == "succeeded" else None,
        "finished_at": None if job.ended is None else int(job.ended),
        "status": "validating_files" if job.state == "validating" else job.state,
        "error": error_to_openai(job),
        "organization_id": organisation_of(job.tenant),
        "training_file": request["training_file"],
        "validation_file": request["validation_file"],
        "result_files": list(results),
        "hyperparameters": {key: value for key, value in numbers.items() if key in Hyperparameters.model_fields},
        "method": {"type": kind, kind: {"hyperparameters": numbers, **request.get("reinforcement", {})}},
        "seed": config["seed"],
        "trained_tokens": job.tokens if job.state in ENDS else None,
        "estimated_finish": _estimated_finish(job),
        "integrations": [],
        "metadata": request["metadata"],
        "user_provided_suffix": request["suffix"],
    } | ({"after": request["after"]} if request.get("after") else {})


def _estimated_finish(job: Job) -> int | None:
    if job.state != "running" or not job.step:
        return None
    return int(time.time() + (job.steps - job.step) * job.seconds / job.step)


def error_to_openai(job: Job) -> dict[str, Any] | None:
    """Return a failed job's error in OpenAI's format; None for other jobs.

    The message names files by their uploaded names, with line numbers."""
    if job.error is None:
        return None
    error = {key: str(value) for key, value in job.error.items() if value}
    kind = error.get("kind", "failed")
    if kind in _OPERATOR_ERRORS:
        return {"code": _CODES[kind], "message": _OPERATOR_ERRORS[kind], "param": None}
    text = ": ".join(error[key] for key in ("where", "message") if key in error)
    param = next((param for path, param in _paths(job).items() if path in text), None)
    param = param or ("training_file" if kind in ("data", "preflight") else None)
    code = _CODES.get(kind, kind) if param is None else f"invalid_{param.rpartition('.')[2]}"
    parts = [error[key] for key in ("where", "message") if key in error and not _SETTING.fullmatch(error[key])]
    message = _in_one_line(": ".join(parts))
    if "fix" in error and not _SETTING.search(error["fix"]):
        message += f" ({_in_one_line(error['fix'])})"
    return {"code": code, "message": _plain_text(job, message), "param": param}


_CODES = {"overbudget": "budget_exceeded", "internal": "server_error", "died": "server_error", "lost": "server_error"}
_OPERATOR_ERRORS = {
    "internal": "internal error; the server's operator can find the cause in the log",
    "died": "the job's process died repeatedly; the server's operator can find the cause in the log",
    "lost": "the job's worker was lost repeatedly; the server's operator can find the cause in the log",
}
"""Texts that replace certain errors, whose own messages can name hosts and paths.

Only the operator may see the original messages."""


_KEYS = "|".join(re.escape(key) for key, _ in config_keys() if "." in key)
_SETTING = re.compile(rf"\b(?:{_KEYS})\b(?!\.\w)(?:=\S+)?|\bveneer [a-z]+")
"""Matches a configuration setting or a command, neither of which an API client can use."""
_SETTINGS = {"data.max_length": "the base's context", "data.format": "the format"}
_LISTED = 3
"""Maximum number of listed problems in a client's message.

The text before the list has the total."""


def _in_one_line(text: str) -> str:
    """Return a command-line message as one line.

    Replaces the names of settings with words, and omits hints (`fix:`)."""
    head, *lines = text.splitlines() or [""]
    problems = [line.strip().removeprefix("- ") for line in lines if not line.strip().startswith(("fix:", "…"))]
    more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    summary = " ".join([head, "; ".join(problems[:_LISTED]) + more]).strip()
    return _SETTING.sub(lambda match: _SETTINGS.get(match[0], match[0].partition(".")[2].replace("_", " ")), summary)


def _event_text(job: Job, event: JobEvent) -> str:
    """Return an event's message as one line.

    For a preflight event, includes only the findings about the rows."""
    kind = (job.error or {}).get("kind")
    if kind in _OPERATOR_ERRORS and event.data.get("state") == "failed":
        return f"failed: {_OPERATOR_ERRORS[kind]}"
    if event.kind != "preflight":
        return _in_one_line(str(event.data.get("public", event.message)).removeprefix("warning: "))
    findings = event.data.get("findings") or ()
    shown = [each["text"] for each in findings if each.get("level", "warn") == "warn" or each.get("check") in _CHECKS]
    return _in_one_line("the rows were checked" + (f": {'; '.join(shown)}" if shown else ""))


_CHECKS = ("format", "learned", "long rows")


def _paths(job: Job) -> dict[str, str]:
    """Return path -> request parameter for each file that a job reads."""
    data = job.config["data"]
    evaluation = (job.about.get("after") or {}).get("evaluate") or {}
    params = dict.fromkeys(evaluation.get("data") or [], "after.evaluate.data")
    keys = {"validation": "validation_file", "train": "training_file", "pictures": "training_file"}
    for key, param in keys.items():
        files = data.get(key) or ()
        params |= dict.fromkeys([files] if isinstance(files, str) else files, param)
    return params


def _plain_text(job: Job, text: str) -> str:
    """Return a text in which uploaded file names replace the server's paths."""
    for path in (*_paths(job), str(job.config["base"]["name"])):
        text = text.replace(path, Path(path).name)
    return text.replace(f"{job.folder}/", "").replace(f"{jobs_home().parent}/", "")


def _event_id(job: Job, number: int) -> str:
    return f"ftevent-{job.id.removeprefix('ftjob-')}-{number}"


def event_number(job: Job, id: str) -> int | None:
    """Return the number in an event id, or None if the event id is not this job's."""
    head, _, number = id.rpartition("-")
    mine = head == _event_id(job, 0)[:-2] and number.isascii() and number.isdigit() and len(number) < 16
    return int(number) if mine else None


_METRICS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "metrics": {"loss": ["train_loss"], TOKEN_ACCURACY: ["train_mean_token_accuracy"], "steps": ["total_steps"]},
    "validation": {
        "validation_loss": ["valid_loss", "full_valid_loss"],
        TOKEN_ACCURACY: ["valid_mean_token_accuracy", "full_valid_mean_token_accuracy"],
    },
}
"""Kind of event -> metric -> OpenAI's names for the metric.

Every validation uses all held-out rows, so its metrics also have OpenAI's `full_valid` names."""
METRIC_KINDS = tuple(_METRICS)
"""The kinds of events that have metrics."""


def event_to_openai(job: Job, event: JobEvent) -> dict[str, Any]:
    """Return an event in OpenAI's format."""
    data = {} if event.kind == "preflight" else _data_of(event)
    return {
        "object": "fine_tuning.job.event",
        "id": _event_id(job, event.number),
        "created_at": int(event.at),
        "level": event.level,
        "message": _plain_text(job, _event_text(job, event)),
        "data": json.loads(_plain_text(job, json.dumps(data))),
        "type": "metrics" if event.kind in METRIC_KINDS else "message",
    }


def _data_of(event: JobEvent) -> dict[str, Any]:
    names = _METRICS.get(event.kind, {})
    data = {key: value for key, value in event.data.items() if key != "public"}
    return {name: value for key, value in data.items() for name in names.get(key, [key])}


_COLUMNS = {
    name: name.replace("train_accuracy", "train_mean_token_accuracy")
    for name in ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
}
"""Column of OpenAI's result file -> the metric's name in OpenAI's events."""


def result_file(events: Iterable[JobEvent]) -> bytes:
    """Return a job's result file: CSV with OpenAI's columns and one line per step.

    Only steps that have a validation have validation metrics."""
    lines: dict[int, dict[str, Any]] = {}
    for event in events:
        lines.setdefault(int(event.data["step"]), {}).update(_data_of(event))
    rows = [[str(lines[step].get(name, "")) for name in _COLUMNS.values()] for step in sorted(lines)]
    return "".join(",".join(row) + "\n" for row in [[*_COLUMNS], *rows]).encode()


def checkpoint_id(job: Job, step: int) -> str:
    return f"ftckpt_{job.id.removeprefix('ftjob-')}{step}"


def checkpoint_to_openai(job: Job, point: JobCheckpoint) -> dict[str, Any]:
    """Return a published checkpoint in OpenAI's format."""
    values: dict[str, Any] = {"step": point.step}
    for split, prefix in (("train", ""), ("valid", "validation_"), ("full_valid", "validation_")):
        values[f"{split}_loss"] = point.metrics.get(f"{prefix}loss")
        values[f"{split}_mean_token_accuracy"] = point.metrics.get(f"{prefix}{TOKEN_ACCURACY}")
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint_id(job, point.step),
        "created_at": int(point.at),
        "fine_tuned_model_checkpoint": f"{job.about['openai']['tuned']}:ckpt-step-{point.step}",
        "fine_tuning_job_id": job.id,
        "step_number": point.step,
        "metrics": {key: value for key, value in values.items() if value is not None},
    }
