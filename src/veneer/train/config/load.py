"""The training configuration: a YAML file plus `section.key=value` overrides, read strictly.

    config, sources = load_config("support.yaml", ["optimizer.learning_rate=5e-4"])
    config.optimizer.learning_rate          0.0005
    sources["optimizer.learning_rate"]      override `optimizer.learning_rate=5e-4`
    sources["adapter.rank"]                 default (enough for thousands of rows; 2 x alpha keeps the scale at 2)

A configuration with `data.pictures` is one for pictures (image_schema.ImageTrainConfig), any other one for text. A
misspelt key, a value of the wrong kind and an impossible combination are one ConfigError that lists them all. Paths in
the file are relative to the file's folder, paths in overrides to the current folder.
Does not know models, data or torch.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from veneer.errors import ConfigError, nearest
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.image_checks import IMAGE_PATHS, image_checks
from veneer.train.config.presets import PRESETS
from veneer.train.config.text import (
    PREFERENCE_KEYS,
    PairsSection,
    ScheduleSection,
    Section,
    TrainConfig,
    keys,
    layer_indices,
    sections,
    why,
)
from veneer.train.config.yaml_lines import parse, parse_value

__all__ = ["Config", "ImageTrainConfig", "Source", "TrainConfig", "config_from", "load_config"]

Config = TrainConfig | ImageTrainConfig


@dataclass(frozen=True)
class Source:
    """Where a value came from. `where`: file:line, the override's text, or the preset. `why`: the reason for it."""

    kind: Literal["file", "override", "preset", "default"]
    where: str = ""
    why: str = ""

    def __str__(self) -> str:
        said = {"file": self.where, "override": f"override `{self.where}`", "preset": f"from preset {self.where}"}
        return said.get(self.kind, "default") + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class _Form:
    """One kind of configuration. `page`: its reference. `paths`: keys that hold paths. `checks`: (wrong, text)."""

    config: type[TrainConfig] | type[ImageTrainConfig]
    page: str
    paths: frozenset[str]
    checks: Callable[[Any, Mapping[str, Source]], list[tuple[bool, str]]]

    @property
    def sections(self) -> Mapping[str, Any]:
        return sections(self.config)


_SHORT = {"base": "name", "output": "directory"}


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> tuple[Config, dict[str, Source]]:
    """Read a YAML file and apply `section.key=value` overrides (values read as YAML).

    Returns the configuration, for text or for pictures, and the source of each value under its `section.key`.
    Raises ConfigError naming the file and line, the override, and what to write instead."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = nearest(file.name, [p.name for p in file.parent.glob("*.y*ml")]) if file.parent.is_dir() else []
        hint = f"did you mean {file.parent / near[0]}?" if near else "give the path of a YAML file"
        raise ConfigError("the configuration file does not exist", where=str(file), fix=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file cannot be read: {error}", where=str(file)) from None
    data, lines = parse(text, str(file))
    if data is not None and not isinstance(data, dict):
        raise ConfigError(
            f"expected sections such as `base:` and `data:`, found {_found(data)}", where=str(file), fix="see examples/"
        )
    return config_from(data or {}, overrides, file=file, lines=lines)


def config_from(
    values: Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    file: Path | None = None,
    lines: Mapping[tuple[str, ...], int] | None = None,
) -> tuple[Config, dict[str, Source]]:
    """`load_config` for values already in hand: {"base": "smollm2-135m", "data": {"train": …}, "output": …}."""
    overrides = list(overrides)
    form = _form(values, overrides)
    raw: dict[str, Any] = {}
    given: dict[str, Source] = {}
    problems: list[str] = []
    here = Path.cwd()
    for section, value in values.items():
        section = str(section)
        line = (lines or {}).get((section,))
        if section in _SHORT and not isinstance(value, Mapping):
            value = {_SHORT[section]: value}
        raw[section] = {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value
        for key in raw[section] if isinstance(raw[section], dict) else [""]:
            at = (lines or {}).get((section, key), line)
            name = f"{section}.{key}" if key else section
            given[name] = Source("file", f"{file or 'given values'}" + (f":{at}" if at else ""))
            if section in form.sections and isinstance(raw[section], dict):
                raw[section][key] = _absolute(form, name, raw[section][key], file.parent if file else here)
    for override in overrides:
        _override(form, raw, given, override, problems, here)
    _preset(raw, given)
    _gentle(raw, given)
    config = _validate(form, raw, given, problems)
    sources = {name: given.get(name) or Source("default", why=why(f)) for name, f in keys(form.config)}
    if problems := [text for wrong, text in form.checks(config, given) if wrong]:
        _raise(problems, form)
    return config, sources


def _form(values: Mapping[str, Any], overrides: Iterable[str]) -> _Form:
    """Pictures where `data.pictures` is given, text elsewhere."""
    data = values.get("data")
    named = isinstance(data, Mapping) and "pictures" in data
    return _PICTURES if named or any(o.startswith("data.pictures=") for o in overrides) else _TEXT


def _preset(raw: dict[str, Any], given: dict[str, Source]) -> None:
    """Fills in what the preset says and nobody has given."""
    name = raw.get("preset")
    for key, (value, because) in PRESETS[name].settings.items() if isinstance(name, str) and name in PRESETS else ():
        section, _, leaf = key.partition(".")
        held = raw[section] = {} if raw.get(section) is None else raw[section]
        if key not in given and isinstance(held, dict):
            held[leaf] = value
            given[key] = Source("preset", str(name), because)


_GENTLE = 2e-5, "a preference run: about a tenth of what a supervised one takes (TRL's LoRA example for dpo has 5e-6)"


def _gentle(raw: dict[str, Any], given: dict[str, Source]) -> None:
    """The learning rate of a preference run where nobody has given one."""
    preference, key = raw.get("preference"), "optimizer.learning_rate"
    if isinstance(preference, dict) and preference.get("loss") is not None and key not in given:
        held = raw["optimizer"] = {} if raw.get("optimizer") is None else raw["optimizer"]
        if isinstance(held, dict):
            held["learning_rate"], because = _GENTLE
            given[key] = Source("default", why=because)


def _override(
    form: _Form, raw: dict[str, Any], given: dict[str, Source], override: str, problems: list[str], folder: Path
) -> None:
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        problems.append(f"`{override}` is not an override: write section.key=value, as optimizer.learning_rate=5e-4")
        return
    value = parse_value(text, f"override `{override}`")
    if name in _SHORT:
        name = f"{name}.{_SHORT[name]}"
    section, _, rest = name.partition(".")
    key, _, inner = rest.partition(".")
    if section not in form.sections:
        raw[section] = {rest: value} if rest else value
        given[name] = Source("override", override)
        return
    if not rest:
        known = ", ".join(form.sections[section].model_fields)
        problems.append(f"`{override}`: `{section}` is a section; write {section}.KEY={text} with one of {known}")
        return
    held = raw.setdefault(section, {})
    if not isinstance(held, dict):
        return  # the file's section is wrong; that is reported
    if inner:  # adapter.rank_pattern.q_proj=8: one entry of a mapping
        entries = held.get(key)
        held[key] = {**(entries if isinstance(entries, Mapping) else {}), inner: value}
    else:
        held[key] = _absolute(form, f"{section}.{key}", value, folder)
    given[f"{section}.{key}"] = Source("override", override)


def _validate(form: _Form, raw: dict[str, Any], given: Mapping[str, Source], problems: list[str]) -> Config:
    for name in ("base", "data", "output"):
        raw.setdefault(name, {})
    for name, value in list(raw.items()):  # `adapter:` with nothing under it, as when all its keys are commented out
        if value is None and name in form.sections:
            raw[name] = {}
    try:
        # Through JSON: strict for kinds ("16" is no number, true is no 1), while lists may fill tuples.
        config = form.config.model_validate_json(json.dumps(raw, default=str), strict=True)
    except pydantic.ValidationError as error:
        _raise(problems + _explain(form, error, given), form)
    if problems:
        _raise(problems, form)
    return config


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a section (key: value)",
    "model_attributes_type": "a section (key: value)",
    "none_required": "nothing",
}


def _explain(form: _Form, error: pydantic.ValidationError, given: Mapping[str, Source]) -> list[str]:
    """One line per key: what was expected, what was found, and where; a union's alternatives are joined."""
    wanted: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    lines: list[str] = []
    described = dict(keys(form.config))
    for e in error.errors():
        loc = [str(part) for part in e["loc"]]
        name = ".".join(loc[:2]) if loc[0] in form.sections else loc[0]
        at = given.get(name) or given.get(loc[0])
        suffix = f" ({at})" if at else ""
        if e["type"] == "extra_forbidden":
            lines.append(_unknown(form, loc) + suffix)
        elif e["type"] == "missing":
            lines.append(f"`{name}` is required: {described[name].description or ''}")
        elif e["type"] == "value_error":  # a sentence of a validator of ours
            lines.append(f"`{name}`: {str(e['msg']).removeprefix('Value error, ')}{suffix}")
        else:
            context = e.get("ctx") or {}
            want = _EXPECTED.get(e["type"])
            if e["type"] == "literal_error":
                want = "one of " + str(context["expected"]).replace(" or ", ", ")
            wanted.setdefault(name, []).append(want or str(e["msg"]).removeprefix("Input should be "))
            found.setdefault(name, f"{_found(e['input'])}{suffix}")
    for name, kinds in wanted.items():
        lines.append(f"`{name}` should be {' or '.join(dict.fromkeys(kinds))}, found {found[name]}")
    return lines


def _unknown(form: _Form, loc: list[str]) -> str:
    name, last = ".".join(loc), loc[-1]
    own = list(form.sections[loc[0]].model_fields) if len(loc) > 1 else list(form.config.model_fields)
    prefix = f"{loc[0]}." if len(loc) > 1 else ""
    candidates = {f"{prefix}{key}": _likeness(last, key) + 0.1 for key in own}
    for other, _ in keys(form.config):  # the right key in the wrong place
        candidates.setdefault(other, _likeness(last, other.rpartition(".")[2]))
    best = max(candidates, key=lambda c: candidates[c])
    hint = f"did you mean `{best}`?" if candidates[best] >= 0.6 else f"known here: {', '.join(own)}"
    return f"unknown key `{name}`; {hint}"


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _text_checks(config: TrainConfig, given: Mapping[str, Source]) -> list[tuple[bool, str]]:
    """Combinations that cannot be meant, all of them."""
    return [
        *_data_checks(config), *_batching_checks(config, given), *_preference_checks(config),
        *_start_checks(config), *_run_checks(config),
    ]  # fmt: skip


def _picture_checks(config: ImageTrainConfig, given: Mapping[str, Source]) -> list[tuple[bool, str]]:
    return [*image_checks(config, given), *_run_checks(config)]


def _data_checks(config: TrainConfig) -> list[tuple[bool, str]]:
    data, patience = config.data, config.evaluation.patience
    return [
        (not data.files("train"), "`data.train` is an empty list: name at least one file"),
        (
            data.validation is not None and bool(data.split),
            "`data.validation` and `data.split` both hold rows out: keep one",
        ),
        (
            isinstance(data.split, float) and data.split >= 1,
            f"`data.split: {data.split}` is a share and must be below 1; a whole number counts rows",
        ),
        (
            patience is not None and data.validation is None and data.split == 0,
            "`evaluation.patience` needs held-out rows: give `data.validation` or `data.split`",
        ),
    ]


def _batching_checks(config: TrainConfig, given: Mapping[str, Source]) -> list[tuple[bool, str]]:
    batching, length = config.batching, config.data.max_length
    pack = batching.mode == "pack"
    return [
        (
            not pack and batching.tokens is not None,
            "`batching.tokens` is only used with `mode: pack`; with `mode: bucket` a step is `batching.rows` rows",
        ),
        (
            pack and batching.tokens is None,
            "`batching.mode: pack` needs `batching.tokens`, the tokens of one step (as 8192)",
        ),
        (
            pack and "batching.rows" in given,
            "`batching.rows` is only used with `mode: bucket`; with `mode: pack` a step is `batching.tokens` tokens",
        ),
        (
            pack and batching.tokens is not None and batching.tokens < length,
            f"`batching.tokens: {batching.tokens}` is less than `data.max_length: {length}`: a row may not fit",
        ),
    ]


def _preference_checks(config: TrainConfig) -> list[tuple[bool, str]]:
    loss, data = config.preference.loss, config.data
    keys = _changed(config.preference)
    if loss is None:
        named = ", ".join(f"`preference.{key}`" for key in keys)
        return [
            (bool(keys), f"without `preference.loss` (dpo, ipo, orpo, kto or simpo) nothing uses {named}"),
            (
                data.format in ("preference", "unpaired-preference"),
                f"`data.format: {data.format}` needs `preference.loss`, as dpo",
            ),
        ]
    return [
        *(
            (True, f"`preference.{key}` is not used by {loss}; it belongs to {', '.join(PREFERENCE_KEYS[key])}")
            for key in keys
            if key != "loss" and loss not in PREFERENCE_KEYS[key]
        ),
        (
            data.format not in ("auto", "preference") and (loss != "kto" or data.format != "unpaired-preference"),
            f"`data.format: {data.format}` has nothing that {loss} can compare: it takes `preference`"
            + (" or `unpaired-preference`" if loss == "kto" else ""),
        ),
        (data.train_on == "all", "`data.train_on: all` would compare the prompts as well; leave it at `assistant`"),
        (
            loss == "kto" and config.batching.mode == "bucket" and config.batching.rows < 2,
            "`batching.rows: 1` leaves kto no other prompt to estimate its reference point with; give 2 or more",
        ),
    ]


def _start_checks(config: TrainConfig) -> list[tuple[bool, str]]:
    named = [f"`adapter.{key}`" for key in _changed(config.adapter) if key not in ("start", "dropout")]
    return [
        (
            config.adapter.start is not None and bool(named),
            f"{', '.join(named)} cannot be set beside `adapter.start`, which brings its own",
        )
    ]


def _changed(section: Section) -> list[str]:
    """The keys that are not at their default."""
    return [key for key, f in type(section).model_fields.items() if getattr(section, key) != f.default]


def _run_checks(config: Config) -> list[tuple[bool, str]]:
    schedule: ScheduleSection = config.schedule
    adapter: PairsSection = config.adapter
    opt, warm = config.optimizer, schedule.warmup
    every = [("evaluation", config.evaluation.every), ("checkpoint", config.checkpoint.every)]
    return [
        (
            schedule.epochs is not None and schedule.steps is not None,
            "`schedule.epochs` and `schedule.steps` both say when to end: keep one",
        ),
        (
            isinstance(warm, float) and warm >= 1,
            f"`schedule.warmup: {warm}` is a share of all steps and must be below 1; a whole number counts steps",
        ),
        (
            isinstance(warm, int) and schedule.steps is not None and warm >= schedule.steps,
            f"`schedule.warmup: {warm}` never ends within `schedule.steps: {schedule.steps}`",
        ),
        *(
            (isinstance(steps, int) and steps < 1, f"`{name}.every: {steps}` should be at least 1 step, or `epoch`")
            for name, steps in every
        ),
        (
            opt.momentum > 0 and opt.name not in ("sgd", "rmsprop"),
            f"`optimizer.momentum` is not used by {opt.name}; it takes `optimizer.betas`",
        ),
        (
            any(not 0 <= b < 1 for b in opt.betas),
            f"`optimizer.betas: {list(opt.betas)}` must each be at least 0 and below 1",
        ),
        (
            _bad_layers(adapter.layers),
            f"`adapter.layers: {adapter.layers}` is not a list of block numbers or ranges such as 0-3,28-29",
        ),
        (any(r <= 0 for r in adapter.rank_pattern.values()), "`adapter.rank_pattern` has a rank below 1"),
    ]


def _bad_layers(layers: str | tuple[int, ...] | None) -> bool:
    try:
        indices = layer_indices(layers)
    except ValueError:
        return True
    return indices is not None and (not indices or min(indices) < 0)


_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w\[\]:%+-]+)?")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")


def _absolute(form: _Form, name: str, value: Any, folder: Path) -> Any:
    """`value` with relative paths resolved against `folder`, for the keys that hold paths; hub ids stay as they are."""
    if isinstance(value, list | tuple) and name in form.paths:
        return [_absolute(form, name, v, folder) for v in value]
    if not isinstance(value, str) or value.startswith("hub:"):
        return value
    if os.name != "nt" and _WINDOWS.match(value):
        drive, rest = value[0].lower(), value[3:].replace("\\", "/")
        raise ConfigError(
            f"`{name}` is a path as Windows has it, {value!r}, and this is another system",
            fix=f"a path of this machine (in WSL: /mnt/{drive}/{rest})",
        )
    path = os.path.expanduser(value)
    resolved = os.path.normpath(folder.resolve() / path)
    if form is _TEXT and name in form.paths:
        hub = _HUB.fullmatch(value) and not value.endswith(_SUFFIXES) and not glob.glob(resolved)
        return f"hub:{value}" if hub else resolved
    words = {"data.chat_template": ("auto", "none"), "data.masks": ("auto", "off", "alpha")}
    if name == "output.directory" or ((name in form.paths or name in words) and value not in words.get(name, ())):
        return resolved
    if name in ("base.name", "adapter.start") and (value.startswith((".", "~")) or os.path.exists(resolved)):
        return resolved
    return value


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    if value is None:
        return "nothing"
    return (
        f"the text {value!r}"
        if isinstance(value, str)
        else f"{value!r}".replace("True", "true").replace("False", "false")
    )


def _raise(problems: list[str], form: _Form) -> Any:
    fix = f"docs/reference/{form.page} lists every key"
    if len(problems) == 1:
        raise ConfigError(problems[0], fix=fix)
    listed = "\n".join(f"  - {p}" for p in problems)
    raise ConfigError(f"{len(problems)} things are wrong:\n{listed}", fix=fix)


_TEXT = _Form(TrainConfig, "config.md", frozenset({"data.train", "data.validation"}), _text_checks)
_PICTURES = _Form(ImageTrainConfig, "image-config.md", IMAGE_PATHS, _picture_checks)
