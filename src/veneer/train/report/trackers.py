"""Trackers for `report.trackers`: TensorBoard and W&B.

A tracker receives a run's scalars and sample sheets.

    | name        | package, an extra of the same name | destination |
    | tensorboard | tensorboard | OUTPUT/tensorboard |
    | wandb       | wandb       | set by `wandb login` and WANDB_MODE; files in OUTPUT/wandb |

A resumed run continues its run in the tracker; for W&B, the run's id is in OUTPUT/trackers.json. The steps
since the checkpoint run again and give the same values, so sending them again changes nothing in a tracker.
If a tracker cannot start, the run stops before step one. If a tracker fails later, the failure is reported
once and the run continues without the tracker.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, MissingExtraError, install_command
from veneer.train.checkpoint import write_atomically
from veneer.train.config.text import ReportSection
from veneer.train.events import Evaluated, Event, Listener, Note, Resolved, Sampled, Stepped


@dataclass(frozen=True)
class Tracker:
    """A run in one tracker.

    The fields are functions: log(step, values), picture(step, path) and finish(failed)."""

    log: Callable[[int, dict[str, float]], Any]
    picture: Callable[[int, str], Any]
    finish: Callable[[bool], Any]


def check_trackers(report: ReportSection) -> None:
    """Raise MissingExtraError, with the names of all trackers that are not installed."""
    missing = [name for name in report.trackers if find_spec(name) is None]
    if missing:
        text = f"report.trackers names {', '.join(missing)}, but the required package is not installed"
        fix = f"{install_command(','.join(missing))}, or remove it from report.trackers"
        raise MissingExtraError(text, fix=fix)


@contextmanager
def tracked(
    report: ReportSection, folder: Path, settings: Resolved, resumed: bool, emit: Listener
) -> Iterator[Listener]:
    """Yield a listener that sends events to the trackers.

    folder: the run's output folder. emit: receives a note if a tracker fails.

    Raises ConfigError, with the tracker's message, if a tracker cannot start."""
    running: dict[str, Tracker] = {}

    def for_each_tracker(action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(running.items()):
            try:
                with redirect_stdout(sys.stderr):
                    action(tracker)
            except Exception as error:
                del running[name]
                emit(Note(f"warning: {name} failed and will not receive further events: {error}"))

    def listener(event: Event) -> None:
        if isinstance(event, Sampled):
            for_each_tracker(lambda tracker: tracker.picture(event.step, str(folder / event.path)))
        elif isinstance(event, Stepped | Evaluated):
            values = scalars(event)
            for_each_tracker(lambda tracker: tracker.log(event.step, values))

    failed = True
    try:
        for name in report.trackers:
            start = _tensorboard if name == "tensorboard" else _wandb
            try:
                # Trackers print greetings, but stdout is reserved for output that programs read.
                with redirect_stdout(sys.stderr):
                    running[name] = start(report, folder, settings.settings, resumed)
            except Exception as error:
                fix = f"correct this, or remove {name} from report.trackers"
                raise ConfigError(f"{name} could not start: {error}", where="report.trackers", fix=fix) from error
        yield listener
        failed = False
    finally:
        for_each_tracker(lambda tracker: tracker.finish(failed))


def scalars(event: Stepped | Evaluated) -> dict[str, float]:
    """Return the scalars of a step or an evaluation, by the names that all trackers use."""
    if isinstance(event, Stepped):
        return {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/gradient_norm": event.gradient_norm,
            "speed/tokens_per_second": event.tokens_per_second,
            "memory/peak_bytes": event.memory_bytes,
            **{f"train/{name}": value for name, value in event.extra.items()},
        }
    values = {"validation/loss": event.loss}
    if event.perplexity is not None:
        values["validation/perplexity"] = event.perplexity
    return values | {f"validation/{name}": value for name, value in event.extra.items()}


def _tensorboard(report: ReportSection, folder: Path, settings: Mapping[str, Any], resumed: bool) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    opened: list[Any] = []

    def at(step: int) -> Any:
        if not opened:  # purge_step hides values that were written after the resumed step
            opened.append(SummaryWriter(str(folder / "tensorboard"), purge_step=step))
        return opened[0]

    def log(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            at(step).add_scalar(key, value, step)

    def picture(step: int, path: str) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            at(step).add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(failed: bool) -> None:
        for each in opened:
            each.close()

    return Tracker(log, picture, finish)


def _wandb(report: ReportSection, folder: Path, settings: Mapping[str, Any], resumed: bool) -> Tracker:
    import wandb

    ids = folder / "trackers.json"
    id = json.loads(ids.read_text())["wandb"] if resumed and ids.is_file() else uuid.uuid4().hex[:8]
    entity, _, project = report.project.rpartition("/")
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        entity=entity or None,
        project=project,
        name=report.name or folder.resolve().name,
        id=id,
        resume="allow",
        reinit="create_new",
        dir=str(folder),
        config=dict(settings),
        tags=list(report.tags) or None,
        settings=wandb.Settings(silent=True, console="off"),
    )
    write_atomically(ids, json.dumps({"wandb": id}).encode())
    # A resumed run repeats steps with the same values, and W&B ignores values for steps that it already has.
    return Tracker(
        lambda step, values: run.log(values, step=step),
        lambda step, path: run.log({"samples": wandb.Image(path)}, step=step),
        lambda failed: run.finish(exit_code=int(failed)),
    )
