"""Listeners of a run: the JSONL log and the terminal view.

    JsonLog      one JSON object per line in `log.jsonl`; a resumed run appends without repeating a step
    ConsoleView  settings with their sources, preflight, a progress bar with loss, speed, memory and time left

Trackers are in report.trackers, and the HTML page is in report.page.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from veneer.errors import counted, shown
from veneer.train.checkpoint import Progress, disk_errors, write_atomically
from veneer.train.events import (
    Checked,
    Evaluated,
    Event,
    Note,
    Probed,
    Resolved,
    Sampled,
    Stepped,
    Stopped,
    mean_rewards,
    measure_text,
    parts_text,
    to_record,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

_MEASURED = ("reward_accuracy", "reward_margin", "logp_chosen", "cut_share")
"""Metrics of an evaluation that the terminal shows; the log has all metrics."""
_CHECK_STYLES = {"(?m)^STOP": "bold red", "(?m)^warn": "yellow", "(?m)^  ok": "green", "(?s)⟦.*?⟧": "bold green"}


class JsonLog:
    """Writes each event as one line and flushes it, so a killed run has a complete log.

    resumed: the progress at which a run is resumed, or None for a new log. Records of later steps are
    removed, because these steps run again."""

    def __init__(self, path: Path, resumed: Progress | None = None) -> None:
        self.path = path
        records = [r for r in read_log(path) if _is_before(r, resumed)] if resumed is not None else []
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(path, lines.encode())
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115  open for the length of the run

    def __call__(self, event: Event) -> None:
        with disk_errors(self.path):
            self._file.write(json.dumps(to_record(event)) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the log's records, or [] if there is no log.

    Incomplete lines are omitted."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def _is_before(record: dict[str, Any], progress: Progress) -> bool:
    if record.get("event") == "stopped" and record.get("reason") != "interrupted":
        return False
    last = min(progress.step, progress.evaluated) if record.get("event") == "evaluated" else progress.step
    return int(record.get("step", 0)) <= last


def _sampling_summary(event: Stepped) -> str:
    """Return a summary of the step's completions, or "" if the step sampled none.

    The summary has the groups without a training signal, the share of truncated completions, the staleness of
    the adapter, and the sampler-trainer mismatch."""
    metrics, parts = event.extra, []
    if "answer_tokens" not in metrics:
        return ""
    if metrics.get("constant_groups"):
        parts.append(f"{metrics['constant_groups']:.0f} of {metrics['groups']:.0f} groups constant")
    if metrics["cut_share"]:
        parts.append(f"{metrics['cut_share']:.0%} cut")
    if metrics.get("policy_lag"):
        drift = f" (drift {metrics['drift']:.2g})" if "drift" in metrics else ""
        parts.append(f"{counted(int(metrics['policy_lag']), 'step')} off-policy{drift}")
    if metrics.get("dropped_answers"):
        parts.append(f"{counted(int(metrics['dropped_answers']), 'answer')} dropped")
    if "gap_mean" in metrics:
        text = f"gap {metrics['gap_mean']:.2g} (maximum {metrics['gap_max']:.2g}, {metrics['gap_share']:.1%} above 1%)"
        parts.append(f"{text}, KL {metrics['gap_kl']:.2g}")
    return "  ".join(parts)


class ConsoleView:
    """Shows a run in a terminal, with a progress bar.

    In a pipe or a CI log, about 20 lines per run are printed instead of the progress bar.

    unit: the unit of the speed, tokens or pictures. For runs that sample, the speed is the number of sampled
        tokens divided by the time of the whole step: sampling, scoring and training.
    verbose: also show settings with default values.
    name: the run's name, printed at the start of each line if there are several runs."""

    def __init__(
        self, console: Console | None = None, *, unit: str = "tokens", verbose: bool = False, name: str = ""
    ) -> None:
        from rich.console import Console

        self.unit, self.verbose, self.name = unit, verbose, name
        self.console = console if console is not None else Console(stderr=True, highlight=False)
        self._bar: Bar | None = None
        self._task: Any = None
        self._began = time.monotonic()
        self._printed = 0
        self._recent: list[tuple[float, float]] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Resolved():
                self._settings(event)
            case Checked():
                from rich.text import Text

                text = Text(shown(event.text, lines=True))
                for pattern, style in _CHECK_STYLES.items():
                    text.highlight_regex(pattern, style)
                self.console.print()
                self._line("Checks before step one", style="bold")
                self.console.print(text, soft_wrap=True)
                self.console.print()
            case Note():
                self._line(shown(event.text, lines=True))
            case Probed():
                message = f"longest batch, {event.tokens:,} {self.unit}, run first: {event.seconds:.1f} s, "
                message += f"peak memory {size(event.peak_memory_bytes)}"
                self._line(message)
            case Stepped():
                self._step(event)
            case Evaluated():
                suffix = "  (before training)" if event.step == 0 else "  (best so far)" if event.best else ""
                suffix = "  (worse than before training)" if event.worse else suffix
                perplexity = "" if event.perplexity is None else f", perplexity {event.perplexity:.3f}"
                rows = "pictures" if self.unit == "pictures" else "rows"
                names = [name for name in _MEASURED if name in event.extra]
                measured = "".join(f", {name.replace('_', ' ')} {event.extra[name]:.3f}" for name in names)
                message = f"step {event.step}: validation {measure_text(event.loss, event.extra)}{perplexity}"
                message += f"{measured} on {event.rows} {rows}{suffix}"
                self._line(message)
            case Sampled():
                self._line(f"step {event.step}: samples in {shown(event.path)}")
            case Stopped():
                self.close()
                if event.reason != "finished":
                    self._line(f"stopped after step {event.step}: {shown(event.reason)}")

    def close(self) -> None:
        """Remove the progress bar. Must be called at the end of every run."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _settings(self, event: Resolved) -> None:
        from rich.text import Text

        values = {
            key: shown(short(value))
            for key, value in event.settings.items()
            if self.verbose or not event.sources.get(key, "").startswith("default")
        }
        more = len(event.settings) - len(values)
        note = f" ({more} more with default values: see --verbose or the report)" if more else ""
        self._line(f"Settings and their sources{note}", style="bold")
        left = max(map(len, values), default=0)
        middle = min(28, max(map(len, values.values()), default=0))
        for key, value in values.items():
            source = shown(event.sources.get(key, ""))
            style = "" if source.startswith("default") else "cyan"
            self._line(Text.assemble(f"  {shown(key):<{left}}  ", (f"{value:<{middle}}  ", style), (source, "dim")))

    def _line(self, content: Any, **style: str) -> None:
        """Print one line of any length. A terminal wraps the line; a pipe does not."""
        name = [f"{shown(self.name)}:"] if self.name else []
        self.console.print(*name, content, markup=False, soft_wrap=True, **style)  # type: ignore[arg-type]

    def _step(self, event: Stepped) -> None:
        counts, sampling = event.extra.get("drawn_tokens"), _sampling_summary(event)
        self._recent = [*self._recent, (event.tokens if counts is None else counts, event.seconds)][-20:]
        seconds = sum(s for _, s in self._recent)
        per_second = sum(t for t, _ in self._recent) / seconds if seconds else 0.0
        unit = self.unit if counts is None else f"sampled {self.unit}"
        speed = f"{per_second:,.{0 if per_second >= 10 else 2}f} {unit}/s"
        left = (event.steps - event.step) * seconds / len(self._recent)
        if self.name or not self.console.is_terminal:
            every = max(1, event.steps // 20)
            if event.step in (1, event.steps) or event.step - self._printed >= every:
                self._printed = event.step
                text = f"step {event.step}/{event.steps}  {measure_text(event.loss, event.extra)}  {speed}  "
                text += f"memory {size(event.memory_bytes)}  {duration(left)} left"
                self._line(text + (f"  {sampling}" if sampling else ""))
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn())
            self._bar = Bar(*columns, TextColumn("{task.description}", markup=False), console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", total=event.steps)
        parts = parts_text(mean_rewards(event.extra) or {})
        below = "  ".join(filter(None, (parts, sampling)))
        headline = measure_text(event.loss, {k: v for k, v in event.extra.items() if k in ("reward", "reward_failed")})
        text = f"{headline} {speed} {size(event.memory_bytes)} {duration(left)} left"
        self._bar.update(self._task, completed=event.step, description=text + (f"\n{below}" if below else ""))


def size(n: float) -> str:
    """Format a number of bytes: 3.4 GB (10⁹), 19.6 MB, 812 kB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:.{1 if n < 100 * factor else 0}f} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """Format a number of seconds: 42 s, 3 min 05 s, 2 h 10 min."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def short(value: Any) -> str:
    """Format a setting's value: booleans as yes and no, lists without brackets, the home folder as `~`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items()) or "none"
    text = str(value)
    home = os.path.expanduser("~")
    return text.replace(home, "~", 1) if len(home) > 1 and text.startswith(home + os.sep) else text
