"""Train a grid of settings together on one base, and write one report.

    run_sweep(file, ["adapter.rank=8,16,64", "optimizer.learning_rate=1e-4,5e-4", "schedule.steps=200"])

Every setting with a comma outside brackets is swept; the other settings are the same for all runs. Each
combination has a folder in the output, such as `rank=8,learning_rate=1e-4`, with the files of an ordinary
run. `sweep.html` and `sweep.json`, next to these folders, compare the results, lowest validation loss first.

Losses are compared only if they measure the same thing. So all runs hold out the same rows, even with
different seeds (`data.split_seed`), and settings that change what the loss measures cannot be swept.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, VeneerError
from veneer.train.checkpoint import write_atomically
from veneer.train.config.load import RunConfig, load_config
from veneer.train.config.text import TrainConfig
from veneer.train.events import Listener
from veneer.train.report.log import read_log
from veneer.train.report.page import write_sweep_page
from veneer.train.text.save import RunResult
from veneer.train.text.together import run_texts

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

_NAME = 120
"""Maximum characters of a combination's folder name."""
_REPORTED = ("validation", "validation_before", "loss", "kept_step", "steps", "tokens_per_second", "adapter")
_MOST = 256
"""Maximum number of combinations; a larger grid is probably a typo."""


@dataclass(frozen=True)
class Combination:
    """One combination of a grid.

    name: name of the run and its folder. swept: setting -> value. overrides: all settings of the run."""

    name: str
    swept: Mapping[str, str]
    overrides: Sequence[str]


def grid(overrides: Sequence[str]) -> list[Combination]:
    """Return every combination of the comma-separated values; the last setting changes fastest.

    Raises ConfigError if no setting is swept, if there are more than 256 combinations, if a setting or value
    is repeated, or if the output folder is swept (one folder contains all combinations)."""
    parsed = [override.partition("=") for override in overrides]
    values = {key: _values(text) for key, _, text in parsed}
    swept = {key: options for key, options in values.items() if len(options) > 1}
    count = math.prod(len(options) for options in swept.values())
    if not swept or count > _MOST:
        message = f"{count} combinations are too many" if swept else "nothing is swept: no setting has several values"
        advice = f"give settings with commas, up to {_MOST} combinations: adapter.rank=8,16 seed=0,1"
        raise ConfigError(message, fix=advice)
    given = Counter(key for key, *_ in parsed)
    given.update(f"{key}={value}" for key, options in swept.items() for value in options)
    if twice := [name for name, times in given.items() if times > 1]:
        raise ConfigError(f"{twice[0]} is given twice", fix="give it once")
    if outputs := swept.keys() & {"output", "output.directory"}:
        fix = "set one folder; each combination gets a subfolder"
        raise ConfigError("the output cannot be swept", where=outputs.pop(), fix=fix)
    leaves = [key.rpartition(".")[2] for key in swept]
    short = {key: last if leaves.count(last) == 1 else key for key, last in zip(swept, leaves, strict=True)}
    fixed = ["".join(parts) for parts in parsed if parts[0] not in swept]
    out = []
    names: set[str] = set()
    for n, combination in enumerate(itertools.product(*swept.values()), 1):
        selected = dict(zip(swept, combination, strict=True))
        name = ",".join(f"{short[key]}={re.sub(r'[^A-Za-z0-9._+-]+', '_', value)}" for key, value in selected.items())
        if len(name) > _NAME or name in names:  # names of two combinations can be equal, and a name can be too long
            name = f"{name[:_NAME]},{n}"
        names.add(name)
        out.append(Combination(name, selected, [*fixed, *(f"{key}={value}" for key, value in selected.items())]))
    return out


def _values(text: str) -> list[str]:
    """Split a text at its commas, except inside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
            if character == "," and not depth:
                parts.append("")
                continue
        parts[-1] += character
    return [part.strip() for part in parts]


@dataclass
class Sweep:
    """A finished sweep: the result or error of each combination, and the report."""

    combinations: list[Combination]
    results: list[RunResult | VeneerError]
    report: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per combination, lowest loss first, failed runs last.

        The loss is the validation loss, or the training loss if there is no validation."""
        rows = []
        for combination, result in zip(self.combinations, self.results, strict=True):
            row: dict[str, Any] = {"name": combination.name, **combination.swept}
            if isinstance(result, RunResult):
                row |= {key: getattr(result, key) for key in _REPORTED}
            else:
                row["ended"] = result.what
            rows.append(row)
        return sorted(rows, key=_loss_of)

    def to_dict(self) -> dict[str, Any]:
        return {"report": self.report, "runs": self.rows()}


def _loss_of(row: Mapping[str, Any]) -> float:
    loss = row.get("validation", math.inf)
    loss = row.get("loss") if loss is None else loss
    return math.inf if loss is None else float(loss)


def run_sweep(
    file: Path,
    overrides: Sequence[str],
    *,
    resume: bool = False,
    dry_run: bool = False,
    force: bool = False,
    base: TextBase | None = None,
    listener: Callable[[str], Listener] = lambda name: lambda event: None,
) -> Sweep:
    """Train every combination of `grid` on the configuration `file`.

    A failed run becomes a row of the report.

    listener: takes a run's name and returns the listener for its events.

    Raises ConfigError for an invalid grid or for runs whose losses cannot be compared, and the errors of
    `run_texts`."""
    combinations = grid(overrides)
    fixed = [o for o in overrides if o.partition("=")[0] not in combinations[0].swept]
    common = load_config(file, fixed)[0]
    folder = Path(common.output.directory)
    _check_comparable(combinations[0].swept, common)
    same: list[str] = []
    if "seed" in combinations[0].swept and isinstance(common, TrainConfig) and _is_split(common):
        same = [f"data.split_seed={common.split_seed}"]  # hold out the same rows in all runs
    loaded = [
        load_config(file, [*run.overrides, *same, f"output.directory={folder / run.name}"]) for run in combinations
    ]
    results = run_texts(
        [config for config, _ in loaded],
        names=[run.name for run in combinations],
        sources=[sources for _, sources in loaded],
        resume=resume,
        dry_run=dry_run,
        force=force,
        base=base,
        listeners=[listener(run.name) for run in combinations],
    )
    sweep = Sweep(combinations, results)
    if not dry_run:
        report = folder / "sweep.html"
        curves = {}
        for run in combinations:
            scores = [r for r in read_log(folder / run.name / "log.jsonl") if r.get("event") == "evaluated"]
            curves[run.name] = [(float(r["step"]), float(r["loss"])) for r in scores]
        write_sweep_page(report, file.name, sweep.rows(), curves)
        sweep.report = str(report)
        write_atomically(folder / "sweep.json", (json.dumps(sweep.to_dict(), indent=1) + "\n").encode())
    return sweep


def _is_split(config: TrainConfig) -> bool:
    """Return whether the held-out rows depend on the run's seed."""
    return config.data.validation is None and config.data.split != 0 and config.data.split_seed is None


def _check_comparable(swept: Collection[str], config: RunConfig) -> None:
    """Raise ConfigError if a swept setting changes the validation rows, tokens or loss formula."""
    if not isinstance(config, TrainConfig):
        return
    problems = [key for key in swept if key.startswith(("data.", "preference.")) or key == "evaluation.rows"]
    if config.data.validation is not None:
        problems = [key for key in problems if key not in ("data.train", "data.limit")]
    if config.preference.needs_reference and "adapter.start" in swept:
        problems.append("adapter.start")
    if problems:
        text = f"a sweep compares held-out losses, which are not comparable with different {', '.join(problems)}"
        fix = "set data.validation to sweep data.train or data.limit; or train without a sweep (veneer train A.yaml "
        fix += "B.yaml) and compare the adapters with veneer eval"
        raise ConfigError(text, fix=fix)
