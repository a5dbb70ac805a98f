"""Load the training configuration: a YAML file and `section.key=value` overrides.

    config, sources = load_config("support.yaml", ["optimizer.learning_rate=5e-4"])
    config.optimizer.learning_rate          0.0005
    sources["optimizer.learning_rate"]      override `optimizer.learning_rate=5e-4`
    sources["adapter.rank"]                 default (enough for thousands of rows (LoRA Without Regret))

Without a file, all settings are overrides. `common_settings` returns overrides for the command-line options.

A configuration with `data.pictures` or `slider` is an image configuration (ImageTrainConfig); any other
configuration is a text configuration (TrainConfig). Validation is strict: one ConfigError lists all
misspelled keys, values of the wrong type and invalid combinations. Paths in the file are relative to the
file's folder; paths in overrides are relative to the current folder.

The YAML rules differ from PyYAML's (YAML 1.1) where PyYAML's would surprise users: `5e-4` is a number, only
`true` and `false` are booleans (`on`, `off`, `yes`, `no` are text), `1:30` and dates are text, and a
duplicate key is an error. This module does not depend on models, data or torch.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pydantic
import yaml

from veneer.errors import ConfigError, bullets, nearest
from veneer.train.config.checks import image_problems, text_problems
from veneer.train.config.image import PRESETS, ImageTrainConfig
from veneer.train.config.rewards import resolve_reward_paths, reward_problem
from veneer.train.config.section import SOURCES
from veneer.train.config.text import TrainConfig, config_keys, default_source, sections

RunConfig = TrainConfig | ImageTrainConfig


_Kind = type[TrainConfig] | type[ImageTrainConfig]

_PATHS = {
    **dict.fromkeys(("data.train", "data.validation", "output.directory"), ()),
    **dict.fromkeys(("data.pictures", "data.class_folder", "data.cache", "samples.before"), ()),
    "data.chat_template": ("auto", "none"),
    "data.masks": ("auto", "off", "alpha"),
    "data.before": ("auto", "off"),
}
"""Keys whose values are paths -> values of these keys that are not paths."""
_SHORT = {"base": "name", "output": "directory"}


def load_config(path: str | os.PathLike[str] | None, overrides: Iterable[str] = ()) -> tuple[RunConfig, dict[str, str]]:
    """Load a configuration from a YAML file and `section.key=value` overrides.

    Override values are YAML. Without a file (None) and without an override for the output, the output is
    `runs/NAME`, where NAME comes from the name of the data. Returns the configuration (text or image), and a
    dictionary from each `section.key` to a text that names the source of its value. Raises ConfigError, which
    names the file and line or the override, and suggests a correction."""
    if path is None:
        return config_from({}, _with_output(list(overrides)))
    values, lines = read_sections(path)
    return config_from(values, overrides, file=Path(path), lines=lines)


_COMMON = {
    "base": ("base.name", "base"),
    "data": ("data.train", "data.pictures"),
    "output": ("output.directory", "output"),
    "rank": ("adapter.rank",),
    "epochs": ("schedule.epochs",),
    "steps": ("schedule.steps",),
    "learning_rate": ("optimizer.learning_rate",),
}
"""Short name -> key, for settings that have a command-line option and a field on the Train page."""


def common_settings(**values: Any) -> list[str]:
    """Return common settings (`_COMMON`) as `section.key=value`, omitting None, "" and ().

    data: one or several files of rows, or a folder of images. output: a name without a slash is a folder in
    `runs`."""
    out = []
    for name, value in values.items():
        key = _COMMON[name][0]
        if value is None or value in ("", ()):
            continue
        if name == "data":
            files = [value] if isinstance(value, str) else list(value)
            key = _COMMON[name][all(os.path.isdir(os.path.expanduser(file)) for file in files)]
            value = files[0] if len(files) == 1 else files
        if name == "output" and "/" not in value:
            value = f"runs/{value}"
        out.append(_setting(key, value) if name in ("base", "data", "output") else f"{key}={value}")
    return out


def short_names(settings: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Split settings into common settings, by short name, and others.

    This is the inverse of `common_settings`."""
    short = {key: name for name, keys in _COMMON.items() for key in keys}
    common, others = dict[str, str](), list[str]()
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in short and not value.startswith(("[", "{", '"')):
            common[short[key]] = value
        else:
            others.append(setting)
    return common, others


def settings_of(config: Mapping[str, Any]) -> list[str]:
    """Return a configuration's values as `section.key=value`.

    If these values are passed as overrides, `load_config` returns the same configuration."""
    out = []
    for section, value in config.items():
        values = value.items() if isinstance(value, Mapping) else [("", value)]
        out += [_setting(f"{section}.{key}" if key else section, each) for key, each in values if each is not None]
    return out


def _setting(key: str, value: Any) -> str:
    plain = isinstance(value, str) and parse_yaml(value, key)[0] == value
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


def _with_output(overrides: list[str]) -> list[str]:
    """Return the overrides, plus a default output if no override sets the output.

    The default is named after the data: data.train=desk.jsonl is written to runs/desk."""
    overridden = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    if overridden.keys() & {"output", "output.directory"}:
        return overrides
    named_after = ("data.train", "data.pictures", "slider.positive")
    source = next((overridden[key] for key in named_after if key in overridden), "")
    first = str(source.strip("[] \"'").split(",")[0]).rstrip("/")
    name = re.sub(r"[^a-z0-9]+", "-", Path(first.rpartition(":")[2]).stem.lower()).strip("-")
    return [*overrides, f"output.directory=runs/{name or 'adapter'}"]


def read_sections(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Mapping[tuple[str, ...], int]]:
    """Return the sections of a YAML file, and the line of each key.

    Raises ConfigError if the file is invalid."""
    file, fix = Path(path), "give the path of a YAML file; in it, `base:` names the base's folder or file"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        suggestions = nearest(file.name, [p.name for p in file.parent.glob("*.y*ml")])
        hint = f"did you mean {file.parent / suggestions[0]}?" if suggestions else fix
        raise ConfigError("the configuration file does not exist", where=str(file), fix=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"the configuration file cannot be read: {why}", where=str(file), fix=fix) from None
    data, lines = parse_yaml(text, str(file))
    if data is not None and not isinstance(data, dict):
        problem = f"expected sections such as `base:` and `data:`, found {_described(data)}"
        raise ConfigError(problem, where=str(file), fix="see examples/")
    return data or {}, lines


def config_from(
    values: Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    file: Path | None = None,
    lines: Mapping[tuple[str, ...], int] | None = None,
) -> tuple[RunConfig, dict[str, str]]:
    """Return the configuration for parsed values, like `load_config`.

    Example of `values`: {"base": "smollm2-135m", "data": {"train": …}, "output": …}"""
    overrides = list(overrides)
    kind = _kind_of(values, overrides)
    raw: dict[str, Any] = {}
    key_sources: dict[str, str] = {}
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
            key_sources[name] = f"{file or 'given values'}" + (f":{at}" if at else "")
            if section in sections(kind) and isinstance(raw[section], dict):
                raw[section][key] = _absolute(kind, name, raw[section][key], file.parent if file else here)
    for override in overrides:
        _override(kind, raw, key_sources, override, problems, here)
    written = set(key_sources)
    _fill(raw, key_sources)
    config = _validate(kind, raw, key_sources, problems)
    sources = {name: key_sources.get(name) or default_source(f) for name, f in config_keys(kind)}
    found = image_problems(config, written) if isinstance(config, ImageTrainConfig) else text_problems(config, written)
    if problems := list(found):
        _raise(problems, kind)
    return config, sources


def _kind_of(values: Mapping[str, Any], overrides: Iterable[str]) -> _Kind:
    """Return the image configuration if `data.pictures` or `slider` is set, else the text configuration."""
    data = values.get("data")
    named = (isinstance(data, Mapping) and "pictures" in data) or "slider" in values
    named = named or any(o.startswith(("data.pictures=", "slider.")) for o in overrides)
    return ImageTrainConfig if named else TrainConfig


def _fill(raw: dict[str, Any], key_sources: dict[str, str]) -> None:
    """Fill in unset keys: the values of the preset, and the learning rate of a preference run."""
    name, preference = raw.get("preset"), raw.get("preference")
    values: dict[str, tuple[Any, str]] = {}
    if isinstance(name, str) and name in PRESETS:
        settings = PRESETS[name].settings.items()
        values = {key: (value, f"from preset {name} ({because})") for key, (value, because) in settings}
    if isinstance(preference, dict) and preference.get("loss") is not None:
        because = "a preference run: about a tenth of a supervised run's rate (TRL's LoRA example for dpo has 5e-6)"
        values["optimizer.learning_rate"] = 2e-5, f"default ({because})"
    for key, (value, source) in values.items():
        section, _, key_name = key.partition(".")
        given = raw[section] = {} if raw.get(section) is None else raw[section]
        if key not in key_sources and isinstance(given, dict):
            given[key_name], key_sources[key] = value, source


def _override(
    kind: _Kind, raw: dict[str, Any], key_sources: dict[str, str], override: str, problems: list[str], folder: Path
) -> None:
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        example = "section.key=value, such as optimizer.learning_rate=5e-4"
        problems.append(f"`{override}` is not an override: write {example}")
        return
    value = parse_yaml(text, f"override `{override}`")[0]
    if name in _SHORT:
        name = f"{name}.{_SHORT[name]}"
    section, _, rest = name.partition(".")
    key, _, inner = rest.partition(".")
    if section not in sections(kind):
        raw[section] = {rest: value} if rest else value
        key_sources[name] = f"override `{override}`"
        return
    if not rest:
        valid_keys = ", ".join(sections(kind)[section].model_fields)
        problems.append(f"`{override}`: `{section}` is a section; write {section}.KEY={text} with one of {valid_keys}")
        return
    values = raw.setdefault(section, {})
    if not isinstance(values, dict):
        return  # the section in the file is invalid and will be reported
    if inner:  # adapter.rank_pattern.q_proj=8: one entry of a mapping
        entries = values.get(key)
        values[key] = {**(entries if isinstance(entries, Mapping) else {}), inner: value}
    else:
        values[key] = _absolute(kind, f"{section}.{key}", value, folder)
    key_sources[f"{section}.{key}"] = f"override `{override}`"


def _validate(kind: _Kind, raw: dict[str, Any], key_sources: Mapping[str, str], problems: list[str]) -> RunConfig:
    for name in ("base", "data", "output"):
        raw.setdefault(name, {})
    for name, value in list(raw.items()):  # for example an `adapter:` with all keys commented out
        if value is None and name in sections(kind):
            raw[name] = {}
    try:
        # Validation of JSON is strict about types ("16" is not a number, true is not 1), but tuples accept
        # lists.
        config = kind.model_validate_json(json.dumps(raw, default=str), strict=True)
    except pydantic.ValidationError as error:
        _raise(problems + _explain(kind, error, key_sources), kind)
    if problems:
        _raise(problems, kind)
    return config


_EXPECTED = {"model_type": "a section", "model_attributes_type": "a section", "tuple_type": "a list"}


def _explain(kind: _Kind, error: pydantic.ValidationError, key_sources: Mapping[str, str]) -> list[str]:
    """Return one line per key, with the expected and the actual value, and the location.

    The errors for the alternatives of a union are joined into one line."""
    expected: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    lines: list[str] = []
    described = dict(config_keys(kind))
    for e in error.errors():
        loc = [str(part) for part in e["loc"]]
        name = ".".join(loc[:2]) if loc[0] in sections(kind) else loc[0]
        at = key_sources.get(name) or key_sources.get(loc[0])
        suffix = f" ({at})" if at else ""
        if name == "reinforcement.rewards" and len(loc) > 2:
            lines.append(f"`{name}` {reward_problem(loc[2:], e)}{suffix}")
        elif e["type"] == "extra_forbidden":
            lines.append(_unknown(kind, loc) + suffix)
        elif e["type"] == "missing":
            lines.append(f"`{name}` is required: {described[name].description or ''}")
        elif e["type"] == "value_error":  # message of a validator in train/config
            lines.append(f"`{name}`: {str(e['msg']).removeprefix('Value error, ')}{suffix}")
        else:
            want = _EXPECTED.get(e["type"]) or str(e["msg"]).removeprefix("Input should be ")
            expected.setdefault(name, []).append(want)
            values.setdefault(name, f"{_described(e['input'])}{suffix}")
    for name, kinds in expected.items():
        lines.append(f"`{name}` should be {' or '.join(dict.fromkeys(kinds))}, found {values[name]}")
    return lines


def _unknown(kind: _Kind, loc: list[str]) -> str:
    name, last = ".".join(loc), loc[-1]
    valid = list(sections(kind)[loc[0]].model_fields) if len(loc) > 1 else list(kind.model_fields)
    prefix = f"{loc[0]}." if len(loc) > 1 else ""
    named = {key: f"{prefix}{key}" for key in valid}
    for full_key, _ in config_keys(kind):  # the right key in the wrong section
        named.setdefault(full_key.rpartition(".")[2], full_key)
    suggestions = nearest(last, named, 1)
    hint = f"did you mean `{named[suggestions[0]]}`?" if suggestions else f"valid keys: {', '.join(valid)}"
    return f"unknown key `{name}`; {hint}"


_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w\[\]:%+-]+)?")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
_MODELS = ("base.name", "adapter.start", "distillation.teacher", "distillation.base")
"""Keys whose value is a name or a path. A value is a path if it exists, or begins with a dot or `~`."""


def _absolute(kind: _Kind, name: str, value: Any, folder: Path) -> Any:
    """Return `value` with relative paths resolved against `folder`.

    Only keys that have paths as values are resolved. Hub ids are unchanged."""
    if isinstance(value, list | tuple) and name in _PATHS:
        return [_absolute(kind, name, v, folder) for v in value]
    if name == "reinforcement.rewards" and isinstance(value, list | tuple):
        return resolve_reward_paths(value, folder)
    if not isinstance(value, str) or value.startswith(SOURCES) or value in _PATHS.get(name, ()):
        return value
    resolved = os.path.normpath(folder.resolve() / os.path.expanduser(value))
    if name in _MODELS:
        return resolved if value.startswith((".", "~")) or os.path.exists(resolved) else value
    if name not in _PATHS:
        return value
    if not value.strip():
        raise ConfigError(f"`{name}` is empty, which would mean the folder {folder.resolve()}", fix="name a path")
    is_rows = kind is TrainConfig and name in ("data.train", "data.validation")
    if is_rows and _HUB.fullmatch(value) and not value.endswith(_SUFFIXES) and not glob.glob(resolved):
        return f"hub:{value}"
    return resolved


def _described(value: Any) -> str:
    return "a section" if isinstance(value, dict) else json.dumps(value, default=str, ensure_ascii=False)


def _raise(problems: list[str], kind: _Kind) -> NoReturn:
    page = "config.md" if kind is TrainConfig else "image-config.md"
    fix = f"docs/reference/{page} lists every key"
    if len(problems) == 1:
        raise ConfigError(problems[0], fix=fix)
    raise ConfigError(f"{len(problems)} things are wrong:\n{bullets(problems, None)}", fix=fix)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core rules of YAML 1.2 for plain scalars, and underscores in numbers (10_000)."""


_RULES = {
    "tag:yaml.org,2002:null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "tag:yaml.org,2002:int": (r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
        list("-+0123456789."),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _RULES.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def parse_yaml(text: str, where: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Return the value of a YAML text, and the 1-based line of each key by path.

    Raises ConfigError with `where:line` for invalid YAML and for duplicate keys."""
    loader = _Loader(text)
    lines: dict[tuple[str, ...], int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, (), lines, where)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        position = error.problem_mark or error.context_mark
        at = f"{where}:{position.line + 1}" if position else where
        fix = "check the indentation and quotes"
        raise ConfigError(f"not valid YAML: {error.problem}", where=at, fix=fix) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {error}", where=where) from None
    finally:
        loader.dispose()


def _walk(node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int], where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            here = (*path, str(key_node.value))
            line = key_node.start_mark.line + 1
            if here in lines:
                text = f"`{'.'.join(here)}` occurs twice, on lines {lines[here]} and {line}"
                raise ConfigError(text, where=f"{where}:{line}", fix="keep one of the two")
            lines[here] = line
            _walk(value_node, here, lines, where)
