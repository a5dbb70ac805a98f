"""Parse `adapter_config.json` by the rules of PEFT 0.21, including files of other tools.

PEFT's matching rules assign values to many modules at once. `parse_config` never raises an error: it returns
what it could read, and all problems. This module works on the configuration, and does not use tensors.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.core.adapter import Card, alpha_of, scale_of
from veneer.errors import AdapterError, UnsafeFileError, nearest, shown
from veneer.files.safetensors import strict_json
from veneer.formats.folder import CONFIG_FILE

MAX_CONFIG_BYTES, MAX_ENTRIES = 16 << 20, 100_000

DUMMY_TARGETS = "dummy-target-modules"
ALL_LINEAR = "all-linear"
PATTERN_SECONDS = 2.0

IGNORED = {  # keys that do not affect what the adapter does to the base
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "base_model_name_or_path",
    "fan_in_fan_out", "velora_config", "astra_config", "merge_weights",
}  # fmt: skip

_STAMP = re.compile(r"(.+_)?(version|commit|date|time|timestamp|created_at|saved_at|license|author|notes?|description)")
"""Keys about a file's origin, which are kept in the card and displayed."""

GROUPED, RANK_MAJOR = "grouped_by_expert", "rank_major"
"""The two layouts of B in expert pairs, named as in Unsloth's `lora_B_layout` (see formats/peft.py)."""

UNSUPPORTED = {  # if one of these keys is neither null nor false, it changes what the adapter does
    "alora_invocation_tokens", "arrow_config", "enable_lora", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "nora_config", "nvfp4_merge_aware", "nvfp4_merge_aware_latent_mix", "paca_config",
    "use_bdlora", "use_nora", "use_paca", "use_qalora",
}  # fmt: skip

_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq", "astra")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task -> modules that PEFT adds to modules_to_save. A model has one of the listed names."""
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", *HEADS)
"""PEFT's tasks for text models."""


@dataclass
class PeftConfig:
    """The settings of adapter_config.json that determine the meaning of the tensors."""

    r: int = 8
    alpha: float = 8.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    heads: tuple[str, ...] = ()
    """Modules in `modules_to_save` that PEFT added for the task."""
    token_indices: list[int] | dict[str, list[int]] | None = None
    layers: list[int] | None = None
    layers_pattern: list[str] = field(default_factory=list)
    bias: str = "none"
    lora_bias: bool = False
    tie: bool = False
    base_name: str = ""
    task_type: str | None = None
    version: tuple[int, ...] | None = None
    b_layout: str = ""
    """Layout of B in expert pairs, if the file states it: RANK_MAJOR or GROUPED."""
    unsloth: str = ""
    """Evidence that Unsloth wrote the configuration, "" if none."""
    stamps: dict[str, Any] = field(default_factory=dict)
    usable: bool = True
    """False if names cannot be matched, for example because a pattern does not compile."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's configuration.

    Raises AdapterError if the file is invalid, UnsafeFileError if it is too large."""
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        similar = nearest(folder.name, siblings, 1)
        raise AdapterError(
            "no such adapter folder", where=str(folder), fix=f"nearest: {similar[0]}" if similar else None
        )
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))[:5]
        fix = f"the folder contains adapters: use one of {', '.join(inside)}" if inside else None
        raise AdapterError(f"the folder has no {CONFIG_FILE}", where=str(folder), fix=fix)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UnsafeFileError(f"{path.stat().st_size:,} bytes are too many for a configuration", where=str(path))
    config = strict_json(path.read_bytes(), where=str(path))
    if not isinstance(config, dict):
        raise AdapterError("the configuration is not a JSON object", where=str(path))
    if (count := max(len(config), *(len(v) for v in config.values() if isinstance(v, dict | list)), 0)) > MAX_ENTRIES:
        raise UnsafeFileError(
            f"{count:,} entries in the configuration; at most {MAX_ENTRIES:,} are read", where=str(path)
        )
    return config


def parse_config(raw: Mapping[str, Any]) -> tuple[PeftConfig, list[str]]:
    """Return the configuration and a list of problems, one line each."""
    problems: list[str] = []
    kind = raw.get("peft_type")
    if kind != "LORA":
        return PeftConfig(usable=False), [
            f"peft_type is {shown(repr(kind)[:40])}, but only LORA, LOHA and LOKR are supported. Convert it with PEFT "
            "(`peft.convert_to_lora`), or merge it (`merge_and_unload`)"
        ]
    supported = set(FIELDS) | IGNORED | UNSUPPORTED | {"peft_type", "init_lora_weights"}
    stamps = {key: raw[key] for key in sorted(set(raw) - supported) if _STAMP.fullmatch(key)}
    for i, key in enumerate(sorted(set(raw) - supported - set(stamps))):
        similar = nearest(key, supported, 1) if i < 20 else []
        hint = f", did you mean {similar[0]!r}?" if similar else ""
        problems.append(
            f"unknown key {key!r} = {shown(str(raw[key])[:60])}{hint} (the key can change the adapter's effect)"
        )
    for key in sorted(UNSUPPORTED):
        if raw.get(key):
            problems.append(
                f"{key} = {shown(str(raw[key])[:60])}: not supported, and it changes the adapter's effect. Merge the "
                "adapter with the tool that trained it, or train it as plain LoRA"
            )
    problems += _init_problems(raw.get("init_lora_weights", True))
    config = PeftConfig(stamps=stamps, unsloth=unsloth_marks(raw))
    for key, (attribute, check) in FIELDS.items():
        if key not in raw or (raw[key] is None and key not in ("r", "lora_alpha")):
            continue
        try:
            setattr(config, attribute, check(raw[key]))
        except (ValueError, TypeError) as error:
            problems.append(f"{key} = {str(raw[key])[:60]!r}: {error}")
    config.base_name = str(raw.get("base_model_name_or_path") or "")
    config.task_type = str(raw["task_type"]) if raw.get("task_type") else None
    config.heads = HEADS.get(config.task_type or "", ())
    config.modules_to_save = sorted({*config.modules_to_save, *config.heads})
    config.version = _version(raw.get("peft_version"))
    broken = _pattern_problems(config)
    config.usable = not broken
    return config, problems + broken + _combination_problems(config)


def card_from_config(config: PeftConfig) -> Card:
    """Return a card from the configuration, for an adapter without a card."""
    targets = config.target_modules if isinstance(config.target_modules, list) else [config.target_modules or ""]
    kind = "text" if config.task_type in _TASKS else ""
    targets = sorted({t for t in [*targets, *config.target_parameters] if t})
    return Card(base=config.base_name, kind=kind, rank=config.r, alpha=config.alpha, targets=targets)


def with_task(card: Card, config: PeftConfig) -> Card:
    """Return `card` with the configuration's task in `extra`.

    If an adapter has a task, PEFT loads the adapter only into the model class for that task."""
    if config.task_type in (None, "CAUSAL_LM"):
        return card
    return replace(card, extra={**card.extra, "task_type": config.task_type})


def unsloth_marks(raw: Mapping[str, Any]) -> str:
    """Return the evidence that Unsloth wrote a configuration, or ""."""
    mapping, base, targets = (raw.get(k) for k in ("auto_mapping", "base_model_name_or_path", "target_modules"))
    if isinstance(mapping, dict) and "unsloth_fixed" in mapping:
        return "unsloth_fixed in auto_mapping"
    if isinstance(base, str) and base.lower().startswith("unsloth/"):
        return f"the base is {base[:60]}"
    return "Unsloth's expression as target_modules" if isinstance(targets, str) and targets[:9] == "(?:.*?(?:" else ""


def _init_problems(value: Any) -> list[str]:
    if isinstance(value, bool) or value is None or value in _PLAIN_INITS:
        return []
    name = str(value).lower()
    if name.startswith(_MUTATING_INITS):
        return [
            f"init_lora_weights = {value!r}: PEFT took A and B out of the base's own weights and changed the base, so "
            "these pairs are correct only on that base. Save the adapter again with PEFT's `save_pretrained(…, "
            "path_initial_model_for_weight_conversion=INITIAL)`, which writes the difference from the untouched base"
        ]
    return [f"init_lora_weights = {value!r} is not understood"]


def _expect(ok: bool, requirement: str) -> None:
    if not ok:
        raise ValueError(f"{requirement} is expected")


def _int(value: Any) -> int:
    _expect(type(value) is int and value >= 1, "an integer of at least 1")
    return int(value)


def _number(value: Any) -> float:
    _expect(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30, "a number")
    return float(value)


def _probability(value: Any) -> float:
    number = _number(value)
    _expect(0 <= number < 1, "a number of at least 0 and below 1")
    return number


def _bool(value: Any) -> bool:
    _expect(isinstance(value, bool), "true or false")
    return bool(value)


def _strings(value: Any) -> list[str]:
    _expect(isinstance(value, list) and all(isinstance(v, str) and v for v in value), "a list of names")
    return sorted(value)


def _string_or_strings(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else _strings(value)


def _names_or_regex(value: Any) -> list[str] | str:
    return value if isinstance(value, str) else _strings(value)


def _indices(value: Any) -> list[int]:
    indices = [value] if isinstance(value, int) else value
    is_valid = isinstance(indices, list) and all(type(v) is int and v >= 0 for v in indices)
    _expect(is_valid, "a list of integers of at least 0")
    if len(set(indices)) != len(indices):
        raise ValueError("an index appears twice")
    return list(indices)


def _tokens(value: Any) -> list[int] | dict[str, list[int]]:
    if isinstance(value, dict):
        return {str(k): _indices(v) for k, v in sorted(value.items())}
    return _indices(value)


def _pattern(check: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def parse(value: Any) -> dict[str, Any]:
        _expect(isinstance(value, dict), "a mapping from module names to numbers")
        return {key: check(v) for key, v in value.items()}  # keep the order: the first matching pattern wins

    return parse


def _one_of(words: str, *allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        _expect(value in allowed, words)
        return str(value)

    return parse


FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("r", _int),
    "lora_alpha": ("alpha", _number),
    "use_rslora": ("rslora", _bool),
    "use_dora": ("dora", _bool),
    "lora_dropout": ("dropout", _probability),
    "rank_pattern": ("rank_pattern", _pattern(_int)),
    "alpha_pattern": ("alpha_pattern", _pattern(_number)),
    "target_modules": ("target_modules", _names_or_regex),
    "exclude_modules": ("exclude_modules", _names_or_regex),
    "target_parameters": ("target_parameters", _strings),
    "modules_to_save": ("modules_to_save", _string_or_strings),
    "trainable_token_indices": ("token_indices", _tokens),
    "layers_to_transform": ("layers", _indices),
    "layers_pattern": ("layers_pattern", _string_or_strings),
    "bias": ("bias", _one_of("none, all or lora_only", "none", "all", "lora_only")),
    "lora_bias": ("lora_bias", _bool),
    "ensure_weight_tying": ("tie", _bool),
    "lora_B_layout": ("b_layout", _one_of(f"{GROUPED} or {RANK_MAJOR}", GROUPED, RANK_MAJOR)),
}


def _version(value: Any) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", value) if isinstance(value, str) else None
    return tuple(int(part or 0) for part in match.groups()) if match else None


def _pattern_problems(config: PeftConfig) -> list[str]:
    """Return a message for each regular expression that does not compile."""
    keys = ("rank_pattern", "alpha_pattern", "layers_pattern")
    expressions = [(key, pattern) for key in keys for pattern in getattr(config, key)]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, key), str):
            expressions.append((key, value))
    problems = []
    for key, expression in expressions:
        try:
            re.compile(f"({expression})")
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"{key}: {expression[:80]!r} is not a regular expression: {error}")
    return problems


def _combination_problems(config: PeftConfig) -> list[str]:
    problems = []
    if isinstance(config.target_modules, str) and (config.layers is not None or config.layers_pattern):
        problems.append("layers_to_transform and layers_pattern require target_modules to be a list, not a string")
    if config.layers_pattern and config.layers is None:
        problems.append("layers_pattern needs layers_to_transform")
    if config.dora and config.target_parameters:
        problems.append("use_dora cannot be combined with target_parameters")
    if config.lora_bias and (config.dora or config.target_parameters):
        problems.append("lora_bias cannot be combined with use_dora or target_parameters")
    return problems


class PatternError(Exception):
    """A regular expression that is invalid, or that backtracks for too long."""


def _regex_match(expression: str, name: str, *, full: bool = False) -> bool:
    """Return whether `re.match` or `re.fullmatch` matches, with a time limit.

    The limit protects against hostile expressions."""
    if not re.search(r"[*+{]", expression):  # an expression without repetition cannot backtrack for long
        return bool((re.fullmatch if full else re.match)(expression, name))
    import regex  # type: ignore[import-untyped]

    try:
        pattern = _compiled(expression)
        return bool((pattern.fullmatch if full else pattern.match)(name, timeout=PATTERN_SECONDS))
    except TimeoutError:
        raise PatternError(
            f"the pattern {expression[:80]!r} takes longer than {PATTERN_SECONDS:g} s to match"
        ) from None
    except regex.error as error:
        raise PatternError(f"the pattern {expression[:80]!r} cannot be run: {error}") from None


@lru_cache(maxsize=1 << 12)
def _compiled(expression: str) -> Any:
    import regex

    return regex.compile(expression)


def is_or_ends(name: str, entries: Iterable[str]) -> bool:
    """Return whether `name` is one of the entries, or ends in a dot and one of the entries."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def excluded(config: PeftConfig, name: str) -> bool:
    """Return whether exclude_modules or modules_to_save excludes `name` from pairs."""
    if isinstance(config.exclude_modules, str) and config.exclude_modules:
        if _regex_match(config.exclude_modules, name, full=True):
            return True
    elif config.exclude_modules and is_or_ends(name, config.exclude_modules):
        return True
    return any(_regex_match(rf"(^|.*\.){entry}($|\..*)", name) for entry in config.modules_to_save)


def selects(config: PeftConfig, name: str, entries: Iterable[str] | None = None) -> bool:
    """Return whether PEFT puts a pair on the module `name`.

    entries: used instead of target_modules.

    The meaning of "all-linear" depends on the model and is left to the caller: this function accepts every
    name. It also accepts every name if the configuration has neither target_modules nor target_parameters; in
    this case, PEFT uses a default for the model's architecture."""
    targets = config.target_modules if entries is None else list(entries)
    if targets is None and not config.target_parameters:
        return not excluded(config, name)
    if targets is None or targets == DUMMY_TARGETS or excluded(config, name):
        return False
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or _regex_match(targets, name, full=True)
    if name in targets:
        return True
    if not is_or_ends(name, targets):
        return False
    if not config.layers:
        return True
    match: re.Match[str] | None = None
    if not config.layers_pattern:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    for pattern in config.layers_pattern:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
        if match:
            break
    return match is not None and int(match["idx"]) in config.layers


def unmatched_targets(config: PeftConfig, names: Iterable[str]) -> tuple[list[str], bool]:
    """Return (the target_modules entries that select none of `names`, whether this is all entries).

    A regular expression counts as one entry."""
    targets, names = config.target_modules, list(names)
    entries = targets if isinstance(targets, list) else [targets] if targets and targets != DUMMY_TARGETS else []
    ending: dict[str, list[str]] = {}  # suffix -> names, because an entry selects by suffix
    for name in names:
        parts = name.split(".")
        for at in range(len(parts)):
            ending.setdefault(".".join(parts[at:]), []).append(name)
    idle = []
    for entry in entries:
        single = [entry] if isinstance(targets, list) else None
        if not any(selects(config, n, single) for n in (ending.get(entry, []) if single else names)):
            idle.append(entry)
    return idle, len(idle) == len(entries)


def unmatched_patterns(config: PeftConfig, names: Collection[str]) -> list[tuple[str, str]]:
    """Return (key, pattern) for each pattern that matches none of `names`.

    key: "rank_pattern" or "alpha_pattern"."""
    both = [("rank_pattern", p) for p in config.rank_pattern] + [("alpha_pattern", p) for p in config.alpha_pattern]
    return [(key, p) for key, p in both if not any(_regex_match(rf"(.*\.)?({p})$", name) for name in names)]


def names_parameter(config: PeftConfig, name: str) -> bool:
    """Return whether target_parameters selects the parameter with the full name `name`."""
    return is_or_ends(name, config.target_parameters)


def _first(patterns: Mapping[str, Any], name: str) -> str | None:
    return next((key for key in patterns if _regex_match(rf"(.*\.)?({key})$", name)), None)


def rank_of_module(config: PeftConfig, name: str) -> tuple[int, str]:
    """Return the rank of a module or parameter, and the configuration key that sets the rank."""
    key = _first(config.rank_pattern, name)
    return (config.r, "r") if key is None else (config.rank_pattern[key], f"rank_pattern[{key!r}]")


def alpha_of_module(config: PeftConfig, name: str) -> float:
    """Return the alpha of a module or parameter."""
    key = _first(config.alpha_pattern, name)
    return config.alpha if key is None else config.alpha_pattern[key]


def exact_alpha(scale: float, rank: int, rslora: bool = False) -> float | int:
    """Return an alpha that gives `scale`, exactly if possible.

    Prefers integers and numbers with few digits."""
    alpha = alpha_of(scale, rank, rslora)
    candidates = [float(round(alpha)), round(alpha, 6), alpha]
    for step in (math.inf, -math.inf):
        neighbor = math.nextafter(alpha, step)
        candidates += [neighbor, math.nextafter(neighbor, step)]
    exact = next((a for a in candidates if scale_of(a, rank, rslora) == scale), alpha)
    return int(exact) if exact == int(exact) and abs(exact) < 1 << 53 else exact


def commonest(values: Iterable[Any], default: Any) -> Any:
    """Return the most frequent value, or `default` if there are no values.

    If several values are equally frequent, the smallest is returned."""
    counts = Counter(values)
    return min(counts, key=lambda v: (-counts[v], v)) if counts else default


def patterns_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return {pattern: value} for all names whose value is not the default.

    No name matches two patterns. A pattern is a name's last part if all names with this last part have the
    same value, otherwise the whole name, anchored at its start."""
    out: dict[str, Any] = {}
    by_leaf: dict[str, set[Any]] = defaultdict(set)
    for name, value in values.items():
        by_leaf[name.rpartition(".")[2]].add(value)
    for name, value in sorted(values.items()):
        last_name = name.rpartition(".")[2]
        if value != default:
            out[re.escape(last_name) if len(by_leaf[last_name]) == 1 else f"^{re.escape(name)}"] = value
    return out
